"""Figures: data in, ``Axes`` or ``Figure`` out; nothing is computed here.

:func:`heatmap`, :func:`band` and :func:`guide` draw on one ``ax``. The functions in ``FIGURES`` lay
out what the experiment of the same name returns, a column (3.5 inches) wide, with its caption.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, *_ = sns.color_palette("colorblind")
# Colour and dashes together, so that neither is needed to tell the lines apart.
_TRAINED = {"color": _BLUE, "ls": "-", "label": "trained"}
_CONTROL = {"color": _ORANGE, "ls": "--", "label": "random weights (control)"}
_BY_WEIGHTS = {"trained": _TRAINED, "control": _CONTROL}
_HINDSIGHT = {"color": _GREEN, "ls": (0, (5, 1, 1, 1)), "label": "best in hindsight"}
_OTHERS = {"color": _PURPLE, "ls": "-.", "label": "static: other texts"}
_MAGNITUDE = {"color": _RED, "ls": (0, (1, 1)), "label": "static: weight magnitude"}

_WIDTH = 3.5  # inches: a column of a two-column page
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "savefig.dpi": 300,
    "svg.fonttype": "none",
    "svg.hashsalt": "flocking",
}


def heatmap(
    relative: xr.DataArray,
    ax: Axes | None = None,
    *,
    vmax: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Relative activations of one layer over one text, tokens against neurons.

    The first figure of the GRIFFIN paper (Dong, Chen and Chi 2024, arXiv 2404.01365):
    flocking shows as vertical streaks, neurons that stay high from token to token.

    Parameters
    ----------
    relative : xarray.DataArray, (token, neuron)
        From ``record(..., relative=[layer])``, one sequence and layer of it, restricted to
        the neurons and tokens to be shown. Tokens without values (padding) are left out.
    ax : matplotlib.axes.Axes, optional
        Where to draw; the current axes by default.
    vmax : float, optional
        Value of the brightest colour; by default the 99th percentile, so that a few
        outliers do not darken the rest.
    colorbar : bool
        Draw a colour bar beside the axes.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If `relative` has other dimensions than token and neuron.
    """
    if set(relative.dims) != {"token", "neuron"}:
        raise ValueError(
            f"relative has dimensions {relative.dims}: select one sequence and one layer, so that "
            "token and neuron are left."
        )
    ax = plt.gca() if ax is None else ax
    values = relative.transpose("token", "neuron").dropna("token", how="all")
    shown = values.values.astype(np.float32)
    if vmax is None:
        vmax = float(np.percentile(shown, 99))
    edges = [axis.values[[0, -1]] + np.array([-0.5, 0.5]) for axis in (values.neuron, values.token)]
    image = ax.imshow(
        shown,
        aspect="auto",
        interpolation="antialiased",
        cmap=sns.color_palette("rocket", as_cmap=True),
        vmin=0,
        vmax=vmax,
        extent=(*edges[0], *edges[1][::-1]),
    )
    ax.set(xlabel="neuron", ylabel="token (position in the text)")
    if colorbar:
        ax.figure.colorbar(image, ax=ax, extend="max", label="relative activation $|z|/\\|z\\|_2$")
    return ax


def band(values: xr.DataArray, ax: Axes | None = None, **line: object) -> Axes:
    """One line with its confidence band.

    Parameters
    ----------
    values : xarray.DataArray, (interval, x)
        As :func:`flocking.bootstrap` returns it: "estimate", "low" and "high" along ``interval``;
        the other dimension is x.
    ax : matplotlib.axes.Axes, optional
        Where to draw; the current axes by default.
    **line
        Passed to ``ax.plot``: ``color``, ``ls``, ``label``, ...

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If `values` has other dimensions than ``interval`` and one more.
    """
    if "interval" not in values.dims or values.ndim != 2:
        raise ValueError(
            f"values has dimensions {values.dims}: give interval and one more, as bootstrap does."
        )
    ax = plt.gca() if ax is None else ax
    (dim,) = set(values.dims) - {"interval"}
    x = values[dim].values
    estimate, low, high = (values.sel(interval=name).values for name in ("estimate", "low", "high"))
    (drawn,) = ax.plot(x, estimate, **line)
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
    return ax


def guide(y: float, ax: Axes, label: str = "chance") -> Axes:
    """A horizontal line for a level that needs no estimate, such as chance."""
    ax.axhline(y, color="0.35", ls=":", lw=1, label=label)
    return ax


# --------------------------------------------------------------------------------------
# The figures of the experiments


def _figure(draw: Callable[[xr.Dataset, Figure], None]) -> Callable[[xr.Dataset], Figure]:
    """A figure of the project: in its style, whatever the user's own."""

    def styled(data: xr.Dataset) -> Figure:
        # Made outside of the context, at whose end a notebook's interactive mode would be lost.
        figure = plt.figure()
        with mpl.rc_context(STYLE):
            draw(data, figure)
        return figure

    styled.__name__, styled.__doc__ = draw.__name__, draw.__doc__
    return styled


@_figure
def heatmaps(data: xr.Dataset, figure: Figure) -> None:
    """Heat maps of two texts, trained above and control below."""
    upper, axes = _page(
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


@_figure
def scores(data: xr.Dataset, figure: Figure) -> None:
    """Flocking score, rank consistency and effective neurons by layer."""
    upper, axes = _page(figure, data, 3, 1, height=4.4, sharex=True)
    labels = ("flocking score", "rank consistency", "effective neurons")
    for ax, name, label in zip(axes[:, 0], data, labels, strict=False):
        for weights, style in _BY_WEIGHTS.items():
            band(data[name].sel(weights=weights), ax, **style)
        ax.set_ylabel(label)
    guide(0, axes[0, 0])
    guide(0, axes[1, 0])
    axes[2, 0].plot(data.layer, data.d_ff, color="0.35", ls=":", lw=1, label="all alike ($d_{ff}$)")
    axes[2, 0].set_yscale("log")
    _layers(axes[-1])
    _legend(upper, axes[[0, 2]])


@_figure
def sequence_overlap(data: xr.Dataset, figure: Figure) -> None:
    """Overlap of experts within and between sequences, and specificity, by layer."""
    upper, axes = _page(figure, data, 2, 1, height=3.9, sharex=True)
    upper, lower = axes[:, 0]
    for weights, style in _BY_WEIGHTS.items():
        name = style["label"].partition(" (")[0]
        band(data.within.sel(weights=weights), upper, **style | {"label": f"{name}, one text"})
        between = {**style, "label": f"{name}, two texts", "marker": "o", "ms": 2}
        band(data.between.sel(weights=weights), upper, **between)
        band(
            data.specificity.sel(weights=weights), lower, **style | {"label": f"{name}, all pairs"}
        )
        different = {**style, "label": f"{name}, different tokens", "marker": "s", "ms": 2}
        band(data.different_tokens.sel(weights=weights), lower, **different)
    guide(data.attrs["chance"], upper)
    guide(0, lower, "as alike as two texts")
    upper.set(ylabel="Jaccard overlap of experts", ylim=(0, 1))
    lower.set_ylabel("specificity")
    _layers(axes[-1])
    for ax in (upper, lower):
        ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


@_figure
def generation(data: xr.Dataset, figure: Figure) -> None:
    """Prompt-generation overlap and captured energy, by layer and by density."""
    upper, axes = _page(figure, data, 2, 2, height=3.4, sharey="row")
    here = data.sel(density=0.5)
    prompts = {
        "GRIFFIN": _TRAINED | {"label": "prompt's experts (GRIFFIN)"},
        "GRIFFIN, control": _CONTROL | {"label": "the same, random weights"},
    }
    for weights, style in zip(_BY_WEIGHTS, prompts.values(), strict=True):
        band(here.jaccard.sel(weights=weights), axes[0, 0], **style)
        band(data.jaccard_mean.sel(weights=weights), axes[0, 1], **style)
    guide(here.chance.item(), axes[0, 0])
    axes[0, 1].plot(data.density, data.chance, color="0.35", ls=":", lw=1, label="chance")
    methods = {
        **prompts,
        "hindsight": _HINDSIGHT,
        "other texts": _OTHERS,
        "magnitude": _MAGNITUDE,
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
        _layers([ax])
    for ax in axes[:, 1]:
        ax.set_xlabel("density (fraction kept)")
    for ax in axes.flat:
        ax.set_ylim(0, 1)
    _legend(upper, axes[1:, :1], ncols=2)


@_figure
def drift(data: xr.Dataset, figure: Figure) -> None:
    """Captured energy and overlap, by prompt length and by distance."""
    upper, axes = _page(figure, data, 2, 2, height=3.6, sharey="row", sharex="col")
    energy, overlaps = axes
    for weights, style in _BY_WEIGHTS.items():
        band(data.captured.sel(weights=weights), energy[0], **style)
        band(data.jaccard.sel(weights=weights), overlaps[0], **style)
    band(data.hindsight.sel(weights="trained"), energy[0], **_HINDSIGHT)
    band(data.other_texts.sel(weights="trained"), energy[0], **_OTHERS)
    # Prompts of growing length in growing darkness; the control at the longest alone.
    shades = sns.light_palette(_BLUE, data.sizes["cut"] + 1)[1:]
    for shade, marker, cut in zip(shades, "os^D", data.cut.values, strict=False):
        style = {"color": shade, "marker": marker, "ms": 2.5, "label": f"trained, prompt of {cut}"}
        for ax, name in ((energy[1], "captured_far"), (overlaps[1], "jaccard_far")):
            band(_known(data[name].sel(weights="trained", cut=cut)), ax, **style)
    longest = data.cut.values[-1]
    for ax, name in ((energy[1], "captured_far"), (overlaps[1], "jaccard_far")):
        band(_known(data[name].sel(weights="control", cut=longest)), ax, **_CONTROL)
    others = data.other_texts_far.sel(weights="trained").isel(cut=0)
    band(_known(others), energy[1], **_OTHERS)
    for ax in energy:
        guide(data.attrs["density"], ax)
    for ax in overlaps:
        guide(data.attrs["chance"], ax)
    energy[0].set_ylabel("captured energy")
    overlaps[0].set_ylabel("Jaccard overlap")
    for ax in axes.flat:
        ax.set_ylim(0, 1)
    overlaps[0].set_xscale("log", base=2)
    overlaps[0].set_xticks(data.prompt_length.values)
    overlaps[0].xaxis.set_major_formatter(ScalarFormatter())
    overlaps[0].minorticks_off()
    overlaps[0].tick_params(axis="x", rotation=60)
    overlaps[0].set_xlabel("prompt length (tokens)")
    overlaps[1].set_xlabel("tokens after the prompt")
    _legend(upper, axes[:1], ncols=2)


@_figure
def text_kinds(data: xr.Dataset, figure: Figure) -> None:
    """Effective neurons by layer and text."""
    over = data.over_layers.sel(weights="trained")
    order = data.text.values[np.argsort(over.sel(interval="estimate").values)]
    upper, axes = _page(figure, data, 1, 2, height=3.2, sharey=True, width_ratios=[2.4, 1])
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
    _layers([colours])
    for weights, style, marker in (("trained", _TRAINED, "o"), ("control", _CONTROL, "s")):
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
    _legend(upper, axes[:, 1:], ncols=3)


FIGURES: dict[str, Callable[[xr.Dataset], Figure]] = {
    draw.__name__: draw
    for draw in (heatmaps, scores, sequence_overlap, generation, drift, text_kinds)
}


def _page(
    figure: Figure, data: xr.Dataset, rows: int, columns: int, *, height: float, **options: object
) -> tuple[SubFigure, np.ndarray]:
    """Axes a column wide, with the data's caption below them."""
    lines = textwrap.wrap(data.attrs["caption"], 82)
    below = 0.105 * len(lines) + 0.05
    figure.set_size_inches(_WIDTH, height + below)
    figure.set_layout_engine("constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, below])
    lower.text(0.01, 0.97, "\n".join(lines), va="top", fontsize=5.6, linespacing=1.15)
    return upper, upper.subplots(rows, columns, squeeze=False, **_gridspec(options))


def _gridspec(options: dict[str, object]) -> dict[str, object]:
    ratios = {key: options.pop(key) for key in ("width_ratios",) if key in options}
    return {**options, "gridspec_kw": ratios}


def _layers(axes: np.ndarray | list[Axes]) -> None:
    for ax in axes:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _known(values: xr.DataArray) -> xr.DataArray:
    """Without the points that do not exist, so that bands have no holes."""
    return values.dropna("distance", how="all")


def _legend(figure: SubFigure, axes: np.ndarray, ncols: int = 3) -> None:
    entries = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=ncols, frameon=False
    )
