"""Figures of the experiments: data in, ``Figure`` out; nothing is computed here.

Each function in ``FIGURES`` lays out what the experiment of the same name returns, a column
(3.5 inches) wide, with its caption.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from flocking.drawing import (
    BLUE,
    BY_ALLOCATION,
    BY_REFERENCE,
    BY_SELECTION,
    BY_WEIGHTS,
    CONTROL,
    HINDSIGHT,
    MAGNITUDE,
    MODEL,
    OTHERS,
    band,
    by_layer,
    guide,
    heatmap,
    in_style,
    known,
    legend,
    page,
    powers_of_two,
)

_ENLARGED = 5  # ratio of perplexities up to which the useful densities are shown again
_RELATIVE = "perplexity (times the full model's)"


@in_style
def heatmaps(data: xr.Dataset, figure: Figure) -> None:
    """Heat maps of two texts, trained above and control below."""
    upper, axes = page(
        figure, data, 2, data.sizes["sequence"], height=3.4, sharex=True, sharey=True
    )
    trained = data.relative.sel(weights="trained")
    vmax = float(np.percentile(trained, 99))  # one scale for all, so that they compare
    for row, weights in enumerate(data.weights.values):
        for column, text in enumerate(data.sequence.values):
            ax = axes[row, column]
            here = data.sel(weights=weights, sequence=text)
            heatmap(here.relative, ax, vmax=vmax, colorbar=False)
            ax.set_title(f"{text}, score {here.score.item():.2f}")
            ax.label_outer()
            name = {"trained": "trained", "control": "random weights"}[weights]
            ax.set_ylabel(f"{name}\ntoken" if column == 0 else "")
    upper.colorbar(
        axes[0, 0].images[0],
        ax=axes,
        extend="max",
        label="relative activation $|z|/\\|z\\|_2$",
        location="bottom",
        aspect=40,
        shrink=0.8,
    )


@in_style
def scores(data: xr.Dataset, figure: Figure) -> None:
    """Flocking score, rank consistency and effective neurons by layer."""
    upper, axes = page(figure, data, 3, 1, height=4.4, sharex=True)
    labels = ("flocking score", "rank consistency", "effective neurons")
    for ax, name, label in zip(axes[:, 0], data, labels, strict=False):
        for weights, style in BY_WEIGHTS.items():
            band(data[name].sel(weights=weights), ax, **style)
        ax.set_ylabel(label)
    guide(0, axes[0, 0])
    guide(0, axes[1, 0])
    axes[2, 0].plot(data.layer, data.d_ff, color="0.35", ls=":", lw=1, label="all equal ($d_{ff}$)")
    axes[2, 0].set_yscale("log")
    by_layer(axes[-1])
    legend(upper, axes[[0, 2]])


@in_style
def token_order(data: xr.Dataset, figure: Figure) -> None:
    """Scores by layer of texts in order, permuted and drawn; their differences; overlaps."""
    upper, axes = page(figure, data, 4, 2, height=5.6, sharex=True)
    styles = dict(zip(data.order.values, (MODEL, OTHERS, CONTROL), strict=True))
    readings = {
        "in order": {**styles["in order"], "label": "text in order"},
        "permuted": {**styles["permuted"], "label": "its tokens permuted"},
        "drawn": {**styles["drawn"], "label": "tokens drawn at random"},
    }
    steps = {
        "order": {**MAGNITUDE, "label": "order (in order $-$ permuted)"},
        "words": {**HINDSIGHT, "label": "words (permuted $-$ drawn)"},
    }
    compared = {
        "permuted": readings["permuted"],
        "drawn": readings["drawn"],
        "another text": {"color": "0.35", "ls": (0, (4, 1)), "label": "another text in order"},
    }
    rows = (
        ("flocking_score", "order", readings),
        ("flocking_score_change", "step", steps),
        ("rank_consistency", "order", readings),
        ("overlap", "compared", compared),
    )
    titles = {"trained": "trained", "control": "random weights (control)"}
    for panels, (name, dim, looks) in zip(axes, rows, strict=True):
        for ax, weights in zip(panels, data.weights.values, strict=True):
            here = data[name].sel(weights=weights)
            for label, style in looks.items():
                band(here.sel({dim: label}), ax, **style)
            guide(data.attrs["chance"] if name == "overlap" else 0, ax)
    for ax, weights in zip(axes[0], data.weights.values, strict=True):
        ax.set_title(titles[weights])
    labels = (
        "flocking score",
        "its paired\ndifferences",
        "rank consistency",
        "overlap with\nthe text's",
    )
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)
    by_layer(axes[-1])
    legend(upper, axes[:, :1], ncols=2)


@in_style
def sequence_overlap(data: xr.Dataset, figure: Figure) -> None:
    """Overlap of kept neurons within and between sequences, and specificity, by layer."""
    upper, axes = page(figure, data, 2, 1, height=3.9, sharex=True)
    upper, lower = axes[:, 0]
    for weights, style in BY_WEIGHTS.items():
        name = style["label"].partition(" (")[0]
        band(data.within.sel(weights=weights), upper, **style | {"label": f"{name}, one text"})
        between = {**style, "label": f"{name}, two texts", "marker": "o", "ms": 2}
        band(data.between.sel(weights=weights), upper, **between)
        band(
            data.specificity.sel(weights=weights), lower, **style | {"label": f"{name}, all pairs"}
        )
        different = {**style, "label": f"{name}, no repeats", "marker": "s", "ms": 2}
        band(data.different_tokens.sel(weights=weights), lower, **different)
    guide(data.attrs["chance"], upper)
    guide(0, lower, "as similar as two texts")
    upper.set(ylabel="Jaccard overlap", ylim=(0, 1))
    lower.set_ylabel("specificity")
    by_layer(axes[-1])
    for ax in (upper, lower):
        ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


@in_style
def generation(data: xr.Dataset, figure: Figure) -> None:
    """Prompt-generation overlap and captured energy, by layer and by density."""
    upper, axes = page(figure, data, 2, 2, height=3.4, sharey="row")
    here = data.sel(density=0.5)
    prompts = {
        "GRIFFIN": MODEL | {"label": "prompt's selection (GRIFFIN)"},
        "GRIFFIN, control": CONTROL | {"label": "the same, random weights"},
    }
    for weights, style in zip(BY_WEIGHTS, prompts.values(), strict=True):
        band(here.jaccard.sel(weights=weights), axes[0, 0], **style)
        band(data.jaccard_mean.sel(weights=weights), axes[0, 1], **style)
    guide(here.chance.item(), axes[0, 0])
    axes[0, 1].plot(data.density, data.chance, color="0.35", ls=":", lw=1, label="chance")
    methods = {
        **prompts,
        "hindsight": HINDSIGHT,
        "other texts": OTHERS,
        "magnitude": MAGNITUDE,
    }
    for method, style in methods.items():
        band(here.captured.sel(selection=method), axes[1, 0], **style)
        band(data.captured_mean.sel(selection=method), axes[1, 1], **style)
    guide(0.5, axes[1, 0])
    axes[1, 1].plot(data.density, data.density, color="0.35", ls=":", lw=1, label="chance")
    axes[0, 0].set(ylabel="Jaccard overlap", title="density 0.5")
    axes[0, 1].set(title="mean over layers")
    axes[1, 0].set(ylabel="captured energy")
    for ax in axes[:, 0]:
        by_layer([ax])
    for ax in axes[:, 1]:
        ax.set_xlabel("density (fraction kept)")
    for ax in axes.flat:
        ax.set_ylim(0, 1)
    legend(upper, axes[1:, :1], ncols=2)


@in_style
def drift(data: xr.Dataset, figure: Figure) -> None:
    """Captured energy and overlap, by prompt length and by distance."""
    upper, axes = page(figure, data, 2, 2, height=3.6, sharey="row", sharex="col")
    energy, overlaps = axes
    for weights, style in BY_WEIGHTS.items():
        band(data.captured.sel(weights=weights), energy[0], **style)
        band(data.jaccard.sel(weights=weights), overlaps[0], **style)
    band(data.hindsight.sel(weights="trained"), energy[0], **HINDSIGHT)
    band(data.other_texts.sel(weights="trained"), energy[0], **OTHERS)
    # Prompts of growing length in growing darkness; the control at the longest alone.
    shades = sns.light_palette(BLUE, data.sizes["cut"] + 1)[1:]
    for shade, marker, cut in zip(shades, "os^D", data.cut.values, strict=False):
        style = {"color": shade, "marker": marker, "ms": 2.5, "label": f"trained, prompt of {cut}"}
        for ax, name in ((energy[1], "captured_far"), (overlaps[1], "jaccard_far")):
            band(known(data[name].sel(weights="trained", cut=cut)), ax, **style)
    longest = data.cut.values[-1]
    for ax, name in ((energy[1], "captured_far"), (overlaps[1], "jaccard_far")):
        band(known(data[name].sel(weights="control", cut=longest)), ax, **CONTROL)
    others = data.other_texts_far.sel(weights="trained").isel(cut=0)
    band(known(others), energy[1], **OTHERS)
    for ax in energy:
        guide(data.attrs["density"], ax)
    for ax in overlaps:
        guide(data.attrs["chance"], ax)
    energy[0].set_ylabel("captured energy")
    overlaps[0].set_ylabel("Jaccard overlap")
    for ax in axes.flat:
        ax.set_ylim(0, 1)
    powers_of_two(overlaps[0], data.prompt_length.values)
    overlaps[0].tick_params(axis="x", rotation=60)
    overlaps[0].set_xlabel("prompt length (tokens)")
    overlaps[1].set_xlabel("tokens after the prompt")
    legend(upper, axes[:1], ncols=2)


@in_style
def text_kinds(data: xr.Dataset, figure: Figure) -> None:
    """Effective neurons by layer and text."""
    over = data.over_layers.sel(weights="trained")
    order = data.text.values[np.argsort(over.sel(interval="estimate").values)]
    upper, axes = page(figure, data, 1, 2, height=3.2, sharey=True, width_ratios=[2.4, 1])
    colours, means = axes[0]
    values = data.effective_neurons.sel(weights="trained", text=order)
    image = colours.pcolormesh(
        values.layer,
        np.arange(len(order)),
        values.transpose("text", "layer").values,
        norm="log",
        cmap="viridis",
        shading="nearest",
        rasterized=True,
    )
    colours.set_yticks(np.arange(len(order)), order)
    by_layer([colours])
    for weights, style, marker in (("trained", MODEL, "o"), ("control", CONTROL, "s")):
        here = data.over_layers.sel(weights=weights, text=order)
        estimate, low, high = (here.sel(interval=name).values for name in here.interval.values)
        means.errorbar(
            estimate,
            np.arange(len(order)),
            xerr=(estimate - low, high - estimate),
            fmt=marker,
            ms=3,
            lw=1,
            color=style["color"],
            label=style["label"],
        )
    means.set(xlabel=f"mean (of {data.attrs['d_ff']})", xlim=(0, None))
    means.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    upper.colorbar(
        image, ax=colours, location="top", label="effective neurons (trained)", aspect=30
    )
    legend(upper, axes[:, 1:], ncols=3)


@in_style
def loss_by_prompt(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by prompt length and by distance."""
    upper, axes = page(figure, data, 1, 2, height=3.2, width_ratios=[1.1, 1], sharey=True)
    lengths, distances = axes[0]
    _relative(lengths, data.relative)
    lengths.set_xlabel("prompt length (tokens)")
    powers_of_two(lengths, data.prompt_length.values)
    shades = sns.light_palette(BLUE, data.sizes["prompt_length"] + 1)[1:]
    for shade, marker, length in zip(shades, "os^D", data.prompt_length.values, strict=False):
        here = data.relative_far.sel(selection="GRIFFIN", prompt_length=length)
        style = {"color": shade, "marker": marker, "ms": 2.5, "label": f"GRIFFIN, after {length}"}
        band(here, distances, **style)
    static = data.relative_far.sel(selection="static").isel(prompt_length=-1)
    band(static, distances, **BY_SELECTION["static"])
    guide(1, distances, "full model")
    distances.set(xlabel="tokens after the prompt", xlim=(0, None))
    legend(upper, axes, ncols=2)


@in_style
def loss_by_density(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by density, with the useful part enlarged."""
    upper, axes = page(figure, data, 1, 2, height=2.4)
    everything, close = axes[0]
    _relative(everything, data.relative)
    _relative(close, data.relative.sel(density=slice(0.5, None)))
    close.set(yscale="linear", ylabel="", ylim=(0.9, _ENLARGED))
    for ax in axes[0]:
        ax.set_xlabel("density (fraction kept)")
    legend(upper, axes, ncols=2)


@in_style
def loss_by_allocation(data: xr.Dataset, figure: Figure) -> None:
    """Loss by density with one for all layers and with allocated ones; the allocated ones."""
    upper, axes = page(figure, data, 2, 1, height=4, height_ratios=[1.2, 1])
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


@in_style
def loss_by_method(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by method; loss against captured energy."""
    _, axes = page(figure, data, 2, 1, height=4, height_ratios=[1, 1.2])
    upper, lower = axes[:, 0]
    pruned = data.isel(selection=slice(1, None))  # the first is the full model
    names = pruned.sortby(pruned.relative.sel(interval="estimate")).selection.values
    for row, name in enumerate(names):
        style = BY_SELECTION[name]
        look = {"ls": "none", "color": style["color"], "marker": style["marker"]}
        estimate, low, high = data.relative.sel(selection=name).values
        spread = [[estimate - low], [high - estimate]]
        upper.errorbar(estimate, row, xerr=spread, ms=3, lw=1, **look)
        here = data.sel(selection=name)
        x, y = np.ravel(here.captured.values), np.ravel(here.excess.values)
        lower.plot(x, y, ms=2.5, mew=0.6, alpha=0.7, label=style["label"], **look)
    upper.set_yticks(np.arange(len(names)), [BY_SELECTION[name]["label"] for name in names])
    upper.invert_yaxis()
    upper.axvline(1, color="0.35", ls=":", lw=1)
    upper.set(xlabel=_RELATIVE, xscale="log")
    lower.set(xlabel="captured energy (colours as above)", xlim=(None, 1))
    lower.set_ylabel("loss above the full model's\n(nats; linear up to 1)")
    guide(0, lower)
    chance = data.attrs["density"]
    lower.axvline(chance, color="0.35", ls=":", lw=1)
    lower.annotate("chance", (chance, 0.98), xycoords=("data", "axes fraction"), va="top")
    lower.set_yscale("symlog", linthresh=1)  # most differ by less than a nat, chance by many
    lower.set_yticks([0, 0.5, 1, 2, 4, 8, 16])
    lower.yaxis.set_major_formatter(ScalarFormatter())
    lower.set_ylim(-0.1, None)


@in_style
def loss_by_reference(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity by what a selection is made from, after short and long prompts."""
    columns = data.sizes["prompt_length"]
    _, axes = page(figure, data, 2, columns, height=2.9, sharey="row", height_ratios=[8, 1])
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
        ax.axvline(1, color="0.35", ls=":", lw=1)
        ax.set(title=f"after {length} tokens", xlim=(0, None))
    for ax in axes[1]:
        ax.set(xlabel="$\\times$ full model's", xlim=(0, None))


@in_style
def loss_by_batch(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity of shared selections by batch size."""
    upper, axes = page(figure, data, 1, 1, height=2.6)
    _relative(axes[0, 0], data.relative)
    axes[0, 0].set(xlabel="batch size (texts that share one selection)", yscale="linear")
    axes[0, 0].set_ylim(0, None)
    powers_of_two(axes[0, 0], data.batch_size.values)
    legend(upper, axes, ncols=3)


@in_style
def loss_by_distance(data: xr.Dataset, figure: Figure) -> None:
    """Perplexity and agreement by distance, for neurons chosen once and anew."""
    upper, axes = page(figure, data, 2, data.sizes["prompt_length"], height=4, sharey="row")
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
    for row, label in enumerate([_RELATIVE, "predictions that are\nthe full model's"]):
        axes[row, 0].set_ylabel(label)
        for ax in axes[row, 1:]:
            ax.set_ylabel("")
    legend(upper, axes, ncols=2)


FIGURES: dict[str, Callable[[xr.Dataset], Figure]] = {
    draw.__name__: draw
    for draw in (
        heatmaps,
        scores,
        token_order,
        sequence_overlap,
        generation,
        drift,
        text_kinds,
        loss_by_prompt,
        loss_by_density,
        loss_by_allocation,
        loss_by_method,
        loss_by_reference,
        loss_by_batch,
        loss_by_distance,
    )
}


def _relative(ax: Axes, values: xr.DataArray) -> None:
    """One line for each selection, and the full model as a guide."""
    for name in values.selection.values:
        if name != "full":
            band(values.sel(selection=name), ax, **BY_SELECTION[name])
    guide(1, ax, "full model")
    ax.set(ylabel=_RELATIVE, yscale="log")
