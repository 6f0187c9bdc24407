"""Figures of the experiments on GRIFFIN: perplexities, and their ratios on the same texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from flocking.drawing import (
    BLUE,
    BY_ALLOCATION,
    BY_REFERENCE,
    BY_SELECTION,
    CHANCE,
    LEVEL,
    band,
    by_layer,
    in_style,
    legend,
    level,
    logarithmic,
    page,
    powers_of_two,
)

FROM_EXPERIMENTS = (
    "the numbers of an experiment: what the function of this name in "
    "flocking.experiments.reproduce.EXPERIMENTS returns"
)
_RELATIVE = "perplexity (times the full model's)"


def subject(data: xr.Dataset) -> str:
    """Of which model and how many texts a figure is, and what its bands are."""
    texts, tokens = len(data.attrs["texts"]), data.attrs["tokens"]
    return f"{data.attrs['model']}, {texts} texts of {tokens} tokens, 95% bootstrap bands"


def _at_density(data: xr.Dataset) -> str:
    """The same, of pruned models."""
    return f"{subject(data)}; density {data.attrs['density']}"


@in_style(FROM_EXPERIMENTS, "relative", "relative_far")
def loss_by_prompt(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by prompt length and by distance; chance is apart, on another scale."""
    told = f"{_at_density(data)}. The same tokens after longer and longer prompts."
    ratios = {"height_ratios": [1, 5], "width_ratios": [1.1, 1]}
    upper, axes = page(figure, told, 2, 2, height=3.3, sharex="col", **ratios)
    (far_above, empty), (lengths, distances) = axes
    empty.set_axis_off()
    distances.sharey(lengths)
    useful = [name for name in data.selection.values if name != "random"]
    _relative(lengths, data.relative.sel(selection=useful))
    band(data.relative.sel(selection="random"), far_above, **BY_SELECTION["random"])
    for ax in (lengths, far_above):
        powers_of_two(ax, data.prompt_length.values)
    chance = data.relative.sel(selection="random")
    low, high = (int(np.floor(np.log10(value))) for value in (chance.min(), chance.max()))
    ticks = 10.0 ** np.arange(low, high + 2)
    logarithmic(far_above, far_above.yaxis, ticks.tolist())
    far_above.set(ylim=(ticks[0], ticks[-1]), ylabel="chance")
    logarithmic(lengths, lengths.yaxis, [1, 1.5, 2, 3, 5, 10])
    lengths.set_xlabel("prompt length (tokens)")
    shades = sns.light_palette(BLUE, data.sizes["prompt_length"] + 1)[1:]
    for shade, marker, length in zip(shades, "os^D", data.prompt_length.values, strict=False):
        here = data.relative_far.sel(selection="GRIFFIN", prompt_length=length)
        style = {"color": shade, "marker": marker, "ms": 2.5, "label": f"GRIFFIN, after {length}"}
        band(here, distances, **style)
    static = data.relative_far.sel(selection="static").isel(prompt_length=-1)
    band(static, distances, **BY_SELECTION["static"])
    level(1, distances, "full model")
    distances.set(xlabel="tokens after the prompt", xlim=(0, None))
    distances.tick_params(labelleft=False)
    legend(upper, axes, ncols=2)


@in_style(FROM_EXPERIMENTS, "relative", "over_static")
def loss_by_density(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by density; GRIFFIN's ratio to static on the same texts."""
    told = (
        f"{subject(data)}. Left: bands are of the mean over texts. Right: the ratio on the same "
        "texts."
    )
    upper, axes = page(figure, told, 1, 2, height=2.4)
    everything, ratio = axes[0]
    _relative(everything, data.relative)
    logarithmic(everything, everything.yaxis)
    band(data.over_static, ratio, **BY_SELECTION["GRIFFIN"])
    logarithmic(ratio, ratio.yaxis, [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64])
    level(1, ratio, "no difference")
    ratio.set_ylabel("GRIFFIN's perplexity\n(times static's)")
    for ax in axes[0]:
        ax.set(xlabel="density (fraction kept)", xlim=(0, 1.05))
    legend(upper, axes, ncols=2)


@in_style(FROM_EXPERIMENTS, "over_one", "share")
def loss_by_allocation(data: xr.Dataset, figure: Figure) -> None:
    """Loss by density with one for all layers and with allocated ones; the allocated ones."""
    told = f"{subject(data)}. Below: the densities of the layers, allocated on other texts."
    upper, axes = page(figure, told, 2, 1, height=4, height_ratios=[1.2, 1])
    by_density, by_depth = axes[:, 0]
    for name in data.allocation.values:
        band(data.over_one.sel(allocation=name), by_density, **BY_ALLOCATION[name])
    by_density.set(xlabel="density (fraction kept)")
    by_density.set_ylabel("loss above that with\none density for all (nats)")
    shades = sns.light_palette(BLUE, data.sizes["density"] + 1)[1:]
    for shade, marker, density in zip(shades, "os^", data.density.values, strict=True):
        style = {"color": shade, "marker": marker, "ms": 2.5, "label": f"allocated, {density}"}
        band(data.share.sel(allocation="allocated", density=density), by_depth, **style)
    by_depth.set(ylabel="density of the layer", ylim=(0, 1.05))
    by_layer([by_depth])
    legend(upper, axes, ncols=2)


@in_style(FROM_EXPERIMENTS, "relative", "captured", "excess")
def loss_by_method(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by method; loss against captured energy."""
    told = (
        f"{data.attrs['model']}, density {data.attrs['density']}, {data.sizes['excerpt']} excerpts "
        f"of each of {data.sizes['text']} texts; 95% bootstrap intervals over texts. Below: each "
        "point is an excerpt."
    )
    _, axes = page(figure, told, 2, 1, height=4, height_ratios=[1, 1.2])
    upper, lower = axes[:, 0]
    pruned = data.isel(selection=slice(1, None))  # the first is the full model
    names = pruned.sortby(pruned.relative.sel(interval="estimate")).selection.values
    for row, name in enumerate(names):
        style = BY_SELECTION[name]
        look: dict[str, Any] = {"ls": "none", "color": style["color"], "marker": style["marker"]}
        estimate, low, high = data.relative.sel(selection=name).values
        spread = [[estimate - low], [high - estimate]]
        upper.errorbar(estimate, row, xerr=spread, ms=3, lw=1, **look)
        here = data.sel(selection=name)
        x, y = np.ravel(here.captured.values), np.ravel(here.excess.values)
        lower.plot(x, y, ms=2.5, mew=0.6, alpha=0.7, label=style["label"], **look)
    upper.set_yticks(np.arange(len(names)), [BY_SELECTION[name]["label"] for name in names])
    upper.invert_yaxis()
    upper.axvline(1, **LEVEL)
    upper.set(xlabel=_RELATIVE)
    logarithmic(upper, upper.xaxis)
    lower.set(xlabel="captured energy (colours as above)", xlim=(None, 1))
    lower.set_ylabel("loss above the full model's\n(nats; linear up to 1)")
    level(0, lower, "full model")
    chance = data.attrs["density"]
    lower.axvline(chance, **CHANCE)
    lower.annotate("chance", (chance, 0.98), xycoords=("data", "axes fraction"), va="top")
    lower.set_yscale("symlog", linthresh=1)  # most differ by less than a nat, chance by many
    lower.set_yticks([0, 0.5, 1, 2, 4, 8, 16])
    lower.yaxis.set_major_formatter(ScalarFormatter())
    lower.set_ylim(min(-0.1, 1.1 * lower.dataLim.y0), None)


@in_style(FROM_EXPERIMENTS, "relative", "over")
def loss_by_reference(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by what a selection is made from, after short and long prompts."""
    texts = len(data.attrs["texts"])
    told = (
        f"{data.attrs['model']}, density {data.attrs['density']}, {texts} texts, by "
        "what static and global-local are made from; 95% bootstrap intervals."
    )
    columns = data.sizes["prompt_length"]
    _, axes = page(figure, told, 2, columns, height=2.9, sharey="row", height_ratios=[8, 1])
    useful = [name for name in BY_REFERENCE if name != "random"]
    # Chance is hundreds of times higher: on another scale.
    for panels, names in zip(axes, (useful, ["random"]), strict=True):
        for ax, length in zip(panels, data.prompt_length.values, strict=True):
            for row, name in enumerate(names):
                estimate, low, high = data.relative.sel(selection=name, prompt_length=length).values
                style = {"ls": "none", "ms": 3, "lw": 1, **BY_REFERENCE[name]}
                ax.errorbar(estimate, row, xerr=[[estimate - low], [high - estimate]], **style)
        panels[0].set_yticks(np.arange(len(names)), [BY_REFERENCE[name]["label"] for name in names])
    axes[0, 0].invert_yaxis()
    for ax, length in zip(axes[0], data.prompt_length.values, strict=True):
        ax.axvline(1, **LEVEL)
        ax.set(title=f"after {length} tokens", xlim=(0, None))
    for ax in axes[1]:
        ax.set(xlabel="perplexity,\n$\\times$ full model's", xlim=(0, None))


@in_style(FROM_EXPERIMENTS, "relative", "over_alone", "over_static")
def loss_by_batch(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity of shared selections by batch size, and its ratios on the same texts."""
    told = (
        f"{_at_density(data)}. Left: bands are of the mean over texts. Right: ratios on the same "
        "texts."
    )
    upper, axes = page(figure, told, 1, 2, height=2.5)
    absolute, ratios = axes[0]
    _relative(absolute, data.relative)
    absolute.set(yscale="linear", ylim=(0, None))
    own = {**BY_SELECTION["GRIFFIN"], "label": "GRIFFIN over its own at size 1"}
    static = {**BY_SELECTION["static"], "label": "GRIFFIN over static"}
    band(data.over_alone, ratios, **own)
    band(data.over_static, ratios, **static)
    level(1, ratios, "no difference")
    ratios.set_ylabel("ratio of perplexities")
    for ax in axes[0]:
        ax.set_xlabel("texts that share a selection")
        powers_of_two(ax, data.batch_size.values)
    legend(upper, axes, ncols=2)


@in_style(FROM_EXPERIMENTS, "relative", "agreement")
def loss_by_distance(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity and agreement by distance, for neurons chosen once and anew."""
    told = f"{_at_density(data)}. Neurons chosen once, from the prompt, and anew every N tokens."
    upper, axes = page(figure, told, 2, data.sizes["prompt_length"], height=4, sharey="row")
    names = [name for name in data.selection.values if name != "full"]
    for column, length in zip(axes.T, data.prompt_length.values, strict=True):
        loss, agreement = column
        here = data.sel(prompt_length=length)
        _relative(loss, here.relative)
        loss.set_title(f"after {length} tokens")
        for name in names:
            band(here.agreement.sel(selection=name), agreement, **BY_SELECTION[name])
        agreement.set(xlabel="tokens after the prompt", ylim=(0, 1), xlim=(0, None))
        loss.set(xlim=(0, None), xlabel="")
    logarithmic(axes[0, 0], axes[0, 0].yaxis)
    for row, label in enumerate([_RELATIVE, "predictions that are\nthe full model's"]):
        axes[row, 0].set_ylabel(label)
        for ax in axes[row, 1:]:
            ax.set_ylabel("")
    legend(upper, axes, ncols=2)


@in_style(FROM_EXPERIMENTS, "relative", "over_static", "agreement")
def loss_by_lengths(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity and agreement by lengths of the prompt and of what follows, number by number."""
    told = (
        f"{data.attrs['model']}, {len(data.attrs['texts'])} texts, density "
        f"{data.attrs['density']}: perplexity, times the full model's. Below, GRIFFIN over static "
        "(bold: the 95% interval is without 1)."
    )
    _, axes = page(figure, told, 3, 2, height=5, sharex=True, sharey=True)
    estimate = data.sel(interval="estimate")
    pruned = estimate.relative.sel(selection=["GRIFFIN", "static", "global-local"])
    colours = (
        sns.color_palette("rocket_r", as_cmap=True),
        LogNorm(1, max(float(pruned.max()), 1.01)),
    )
    for ax, name in zip(axes.flat, [*pruned.selection.values, "random"], strict=False):
        random = name == "random"  # hundreds of times higher: of no colour
        look = (None, "{:,.0f}") if random else (colours, "{:.2f}")
        _numbers(ax, estimate.relative.sel(selection=name), *look)
        ax.set_title(BY_SELECTION[name]["label"])
    over, same = axes[2]
    sides = sns.color_palette("vlag", as_cmap=True), LogNorm(1 / 3, 3)
    _numbers(over, data.over_static, sides, "{:.2f}")
    over.set_title("GRIFFIN over static")
    shares = sns.light_palette(BLUE, as_cmap=True), Normalize(0, 1)
    _numbers(same, estimate.agreement.sel(selection="GRIFFIN"), shares, "{:.0%}")
    same.set_title("GRIFFIN's predictions that\nare the full model's")
    for ax in axes[:, 0]:
        ax.set_ylabel("prompt (tokens)")
    for ax in axes[-1]:
        ax.set_xlabel("tokens after it")


def _numbers(
    ax: Axes, values: xr.DataArray, colours: tuple[Colormap, Normalize] | None, form: str
) -> None:
    """A number in each cell, (prompt_length, horizon); bold where an interval is without 1."""
    bold = np.zeros((values.sizes["prompt_length"], values.sizes["horizon"]), bool)
    if "interval" in values.dims:
        low, high = (values.sel(interval=name) for name in ("low", "high"))
        bold = ((low > 1) | (high < 1)).transpose("prompt_length", "horizon").values
        values = values.sel(interval="estimate")
    shown = values.transpose("prompt_length", "horizon").values
    cmap, norm = colours or (ListedColormap(["0.93"]), Normalize(0, 1))
    ax.imshow(shown, cmap=cmap, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        red, green, blue, _ = cmap(norm(value))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        ax.text(
            column,
            row,
            form.format(value),
            ha="center",
            va="center",
            color="white" if dark else "black",
            weight="bold" if bold[row, column] else "normal",
        )
    ax.set_yticks(np.arange(len(shown)), values.prompt_length.values)
    ax.set_xticks(np.arange(shown.shape[1]), values.horizon.values)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _relative(ax: Axes, values: xr.DataArray) -> None:
    """One line for each selection, and the full model as a level."""
    for name in values.selection.values:
        if name != "full":
            band(values.sel(selection=name), ax, **BY_SELECTION[name])
    level(1, ax, "full model")
    ax.set(ylabel=_RELATIVE, yscale="log")
