"""Figures of the experiments: data in, ``Figure`` out; nothing is computed here.

Each function in ``FIGURES`` lays out what the experiment of the same name returns, a column
(3.5 inches) wide, with a line or two on what is seen. Its caption, with the numbers, is the
attribute ``caption`` of the data, and stands beside the file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flocking import plotting
from flocking.drawing import (
    BLUE,
    BY_WEIGHTS,
    CHANCE,
    CONTROL,
    HINDSIGHT,
    MAGNITUDE,
    MODEL,
    OTHERS,
    SKY,
    band,
    brightest,
    by_layer,
    guide,
    in_style,
    known,
    legend,
    level,
    page,
    powers_of_two,
)
from flocking.experiments.loss_figures import (
    FROM_EXPERIMENTS,
    loss_by_allocation,
    loss_by_batch,
    loss_by_density,
    loss_by_distance,
    loss_by_lengths,
    loss_by_method,
    loss_by_prompt,
    loss_by_reference,
    subject,
)

_NAMES = {"trained": "model", "control": "random weights"}
_TEXTS = {"within": "one text", "between": "two texts"}


@in_style(FROM_EXPERIMENTS, "relative", "score")
def heatmaps(data: xr.Dataset, figure: Figure) -> None:
    """Heat maps of two texts, the model's above and the control's below."""
    told = (
        f"{data.attrs['model']}, layer {data.attrs['layer']}, {data.sizes['neuron']} of "
        f"{data.d_ff.item()} neurons. Vertical streaks are neurons that flock; random weights "
        "have them, too."
    )
    columns = data.sizes["sequence"]
    upper, axes = page(figure, told, 2, columns, height=3.4, sharex=True, sharey=True)
    trained = data.relative.sel(weights="trained")
    vmax = brightest(trained.values)  # one scale for all, so that they compare
    for row, weights in enumerate(data.weights.values):
        for column, text in enumerate(data.sequence.values):
            ax = axes[row, column]
            here = data.sel(weights=weights, sequence=text)
            plotting.heatmap(here.relative, ax=ax, vmax=vmax, colorbar=False)
            ax.images[0].set_interpolation("none")  # there is more than a pixel for each
            ax.set_title(f"{text}, score {here.score.item():.2f}", parse_math=False)
            ax.label_outer()
            ax.set_ylabel(f"{_NAMES[weights]}\ntoken" if column == 0 else "")
    upper.colorbar(
        axes[0, 0].images[0],
        ax=axes,
        extend="max",
        label="relative activation $|z|/\\|z\\|_2$",
        location="bottom",
        aspect=40,
        shrink=0.8,
    )


@in_style(FROM_EXPERIMENTS, "flocking_score", "rank_consistency", "effective_neurons")
def scores(data: xr.Dataset, figure: Figure) -> None:
    """Flocking score, rank consistency and effective neurons by layer."""
    upper, axes = page(figure, f"{subject(data)}.", 3, 1, height=4.4, sharex=True)
    model, control = (data.sel(weights=weights) for weights in BY_WEIGHTS)
    plotting.scores(model, control=control, axes=axes[:, 0])
    legend(upper, axes[[0, 2]])


@in_style(FROM_EXPERIMENTS, "flocking_score", "flocking_score_change", "overlap")
def token_order(data: xr.Dataset, figure: Figure) -> None:
    """Scores by layer of texts in order, permuted and drawn; their differences; overlaps."""
    upper, axes = page(figure, f"{subject(data)}.", 4, 2, height=5.6, sharex=True)
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
        "another text": {"color": SKY, "ls": (0, (4, 1)), "label": "another text in order"},
    }
    rows = (
        ("flocking_score", "order", readings),
        ("flocking_score_change", "step", steps),
        ("rank_consistency", "order", readings),
        ("overlap", "compared", compared),
    )
    for panels, (name, dim, looks) in zip(axes, rows, strict=True):
        for ax, weights in zip(panels, data.weights.values, strict=True):
            here = data[name].sel(weights=weights)
            for label, style in looks.items():
                band(here.sel({dim: label}), ax, **style)
            if name == "flocking_score_change":
                level(0, ax, "no difference")
            else:
                guide(data.attrs["chance"] if name == "overlap" else 0, ax)
    for ax, weights in zip(axes[0], data.weights.values, strict=True):
        ax.set_title(BY_WEIGHTS[weights]["label"])
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


@in_style(FROM_EXPERIMENTS, "within", "between", "specificity", "different_tokens")
def sequence_overlap(data: xr.Dataset, figure: Figure) -> None:
    """Overlap of kept neurons within and between sequences, and specificity, by layer."""
    told = f"{subject(data)}. Above: kept neurons at density {data.attrs['density']}."
    upper, axes = page(figure, told, 2, 1, height=3.9, sharex=True)
    upper, lower = axes[:, 0]
    overlaps = data[["within", "between"]].assign_coords(density=data.attrs["density"])
    model, control = (overlaps.sel(weights=weights) for weights in BY_WEIGHTS)
    plotting.overlap(model, control=control, ax=upper)
    for weights, style in BY_WEIGHTS.items():
        name = _NAMES[weights]
        band(
            data.specificity.sel(weights=weights), lower, **style | {"label": f"{name}, all pairs"}
        )
        different = {**style, "label": f"{name}, no repeats", "marker": "s", "ms": 2}
        band(data.different_tokens.sel(weights=weights), lower, **different)
    level(0, lower, "as similar as two texts")
    upper.set_xlabel("")
    lower.set_ylabel("specificity")
    by_layer(axes[-1])
    for ax in (upper, lower):
        where = {"loc": "lower center", "bbox_to_anchor": (0.45, 1)}
        ax.legend(frameon=False, ncols=2, handlelength=1.4, columnspacing=0.6, **where)


@in_style(FROM_EXPERIMENTS, "within", "between", "within_mean", "between_above_chance_mean")
def overlap_by_density(data: xr.Dataset, figure: Figure) -> None:
    """Overlap of kept neurons at several densities, by layer, and over layers beside chance."""
    told = (
        f"{subject(data)}. Neurons kept for the first half of a text, and for the second half of "
        "the same or of another."
    )
    upper, axes = page(figure, told, 3, 2, height=5)
    shades = sns.light_palette(BLUE, data.sizes["density"] + 2)[2:]
    for panels, weights in zip(axes, data.weights.values, strict=False):
        for ax, name in zip(panels, _TEXTS, strict=True):
            for shade, marker, density in zip(shades, "os^D", data.density.values, strict=True):
                look = {"color": shade, "marker": marker, "ms": 1.5, "lw": 0.8}
                here = data[name].sel(weights=weights, density=density)
                band(here, ax, **look, label=f"density {density}")
            for chance in data.chance.values:
                guide(chance, ax)
            ax.set(ylim=(0, 1), title=_TEXTS[name] if ax in axes[0] else "")
            by_layer([ax])
        panels[0].set_ylabel(f"{_NAMES[weights]}\noverlap (Jaccard)")
    plain, scaled = axes[2]
    for weights, style in BY_WEIGHTS.items():
        for name, more in (("within", {"marker": "s"}), ("between", {"marker": "o"})):
            here = data.sel(weights=weights)
            look = style | more | {"ms": 3, "label": f"{_NAMES[weights]}, {_TEXTS[name]}"}
            band(here[f"{name}_mean"], plain, **look)
            band(here[f"{name}_above_chance_mean"], scaled, **look)
    plain.plot(data.density, data.chance, **CHANCE, label="chance")
    guide(0, scaled)
    for ax, label in ((plain, "overlap (Jaccard)"), (scaled, "above chance")):
        ax.set(ylim=(-0.02, 1), xlabel="density (fraction kept)", ylabel=label)
        ax.set_xticks(data.density.values)
    legend(upper, axes, ncols=2)


@in_style(FROM_EXPERIMENTS, "jaccard", "captured", "jaccard_mean", "captured_mean")
def generation(data: xr.Dataset, figure: Figure) -> None:
    """Prompt-generation overlap and captured energy, by layer and by density."""
    told = (
        f"{data.attrs['model']}: neurons selected from prompts of {data.attrs['tokens']} tokens, "
        f"on what it then generates; {len(data.attrs['texts'])} texts, 95% bootstrap bands."
    )
    upper, axes = page(figure, told, 2, 2, height=3.4, sharey="row")
    here = data.sel(density=0.5)
    prompts = {
        "GRIFFIN": MODEL | {"label": "prompt's selection (GRIFFIN)"},
        "GRIFFIN, control": CONTROL | {"label": "the same, random weights"},
    }
    for weights, style in zip(BY_WEIGHTS, prompts.values(), strict=True):
        band(here.jaccard.sel(weights=weights), axes[0, 0], **style)
        band(data.jaccard_mean.sel(weights=weights), axes[0, 1], **style)
    guide(here.chance.item(), axes[0, 0])
    axes[0, 1].plot(data.density, data.chance, **CHANCE, label="chance")
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
    axes[1, 1].plot(data.density, data.density, **CHANCE, label="chance")
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


@in_style(FROM_EXPERIMENTS, "captured", "jaccard", "captured_far", "jaccard_far", "other_texts")
def drift(data: xr.Dataset, figure: Figure) -> None:
    """Captured energy and overlap, by prompt length and by distance."""
    density = data.attrs["density"]
    told = (
        f"{subject(data)}. Neurons kept at density {density}, selected from a text's start, on "
        "what follows."
    )
    upper, axes = page(figure, told, 2, 2, height=3.6, sharey="row", sharex="col")
    energy, overlaps = axes
    for weights, style in BY_WEIGHTS.items():
        band(data.captured.sel(weights=weights), energy[0], **style)
        band(data.jaccard.sel(weights=weights), overlaps[0], **style)
    band(data.hindsight.sel(weights="trained"), energy[0], **HINDSIGHT)
    band(data.other_texts.sel(weights="trained"), energy[0], **OTHERS)
    far = data[["captured_far", "jaccard_far"]].rename(
        captured_far="captured_energy", jaccard_far="jaccard", cut="prompt_length"
    )
    far = far.assign_coords(density=density)
    model, control = (far.sel(weights=weights) for weights in BY_WEIGHTS)
    plotting.drift(model, control=control, axes=axes[:, 1])
    others = data.other_texts_far.sel(weights="trained").isel(cut=0)
    band(known(others), energy[1], **OTHERS)
    guide(density, energy[0])
    guide(data.attrs["chance"], overlaps[0])
    energy[0].set_ylabel("captured energy")
    overlaps[0].set_ylabel("Jaccard overlap")
    for ax in axes[:, 1]:
        ax.set_ylabel("")
    energy[0].set_ylim(None, 1)
    powers_of_two(overlaps[0], data.prompt_length.values)
    overlaps[0].tick_params(axis="x", rotation=60)
    overlaps[0].set_xlabel("prompt length (tokens)")
    legend(upper, axes[:1], ncols=2)


@in_style(FROM_EXPERIMENTS, "effective_neurons", "over_layers")
def text_kinds(data: xr.Dataset, figure: Figure) -> None:
    """Effective neurons by layer and text."""
    told = (
        f"{data.attrs['model']}, of {data.attrs['d_ff']} neurons; excerpts of "
        f"{data.attrs['tokens']} tokens. Right: mean over layers, with the lowest and the highest "
        "excerpt."
    )
    over = data.over_layers.sel(weights="trained")
    order = data.text.values[np.argsort(over.sel(interval="estimate").values)]
    upper, axes = page(figure, told, 1, 2, height=3.2, sharey=True, width_ratios=[2.4, 1])
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
    colours.set_yticks(np.arange(len(order)), order, parse_math=False)
    by_layer([colours])
    for weights, marker in (("trained", "o"), ("control", "s")):
        style = BY_WEIGHTS[weights]
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
    means.set(xlabel="mean (neurons)", xlim=(0, None))
    means.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    upper.colorbar(image, ax=colours, location="top", label="effective neurons (model)", aspect=30)
    legend(upper, axes[:, 1:], ncols=3)


@in_style(FROM_EXPERIMENTS, "overlap", "share", "settled", "chance")
def atlas(data: xr.Dataset, figure: Figure) -> None:
    """Overlap of kinds, how static selections settle, and by how many kinds neurons are kept."""
    told = (
        f"{data.attrs['model']}, density {data.attrs['density']}: {data.sizes['kind']} kinds of "
        f"text, {data.attrs['pieces']} pieces of {data.attrs['piece']} tokens of each."
    )
    upper, axes = page(figure, told, 2, 2, height=4.2, height_ratios=[1.4, 1])
    matrices = data.overlap.values
    for ax, weights in zip(axes[0], data.weights.values, strict=True):
        image = ax.pcolormesh(
            data.overlap.sel(weights=weights).values,
            vmin=matrices.min(),
            vmax=matrices.max(),
            cmap="viridis",
            rasterized=True,
        )
        places = np.arange(data.sizes["kind"]) + 0.5
        ax.set_yticks(places, data.kind.values if ax is axes[0, 0] else [], parse_math=False)
        ax.set_xticks(places, [])
        ax.invert_yaxis()
        ax.set(title=_NAMES[weights], xlabel="piece of (same order)")
    axes[0, 0].set_ylabel("overlap with piece of")
    upper.colorbar(image, ax=axes[0], label="Jaccard", aspect=20)
    counts, settling = axes[1]
    styles = {"by kind": {"marker": "o"}, "at random": {"ls": ":", "marker": "s"}}
    for weights, style in BY_WEIGHTS.items():
        for dealt, more in styles.items():
            label = _NAMES[weights] + (", pieces dealt" if dealt == "at random" else "")
            here = data.share.sel(weights=weights, dealt=dealt)
            counts.plot(data.kinds, here, **{**style, **more, "ms": 2, "label": label})
        band(data.settled.sel(weights=weights), settling, **style)
    counts.plot(data.kinds, data.chance, **CHANCE, label="chance")
    counts.set(xlabel="kinds that keep it", ylabel="share of neurons", ylim=(0, None))
    guide(data.attrs["chance_jaccard"], settling)
    powers_of_two(settling, data.pieces.values)
    settling.set(xlabel="pieces selected from", ylabel="overlap (Jaccard)")
    legend(upper, axes[1:, :1], ncols=2)


FIGURES: dict[str, Callable[[xr.Dataset], Figure]] = {
    draw.__name__: draw
    for draw in (
        heatmaps,
        scores,
        token_order,
        atlas,
        sequence_overlap,
        overlap_by_density,
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
        loss_by_lengths,
    )
}
