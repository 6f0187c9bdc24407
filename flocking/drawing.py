"""What figures are drawn with: colours, a style, heat maps, bands, and a page with its caption."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, _, _, _, SKY = sns.color_palette("colorblind")
# Colour and dashes together, so that neither is needed to tell the lines apart.
TRAINED = {"color": BLUE, "ls": "-", "label": "trained"}
CONTROL = {"color": ORANGE, "ls": "--", "label": "random weights (control)"}
BY_WEIGHTS = {"trained": TRAINED, "control": CONTROL}
HINDSIGHT = {"color": GREEN, "ls": (0, (5, 1, 1, 1)), "label": "best in hindsight"}
OTHERS = {"color": PURPLE, "ls": "-.", "label": "static: other texts"}
MAGNITUDE = {"color": RED, "ls": (0, (1, 1)), "label": "static: weight magnitude"}
_DOT = {"ms": 2.5}
BY_SELECTION = {
    "hindsight": {**HINDSIGHT, **_DOT, "marker": "v", "label": "hindsight: scored tokens"},
    "global-local": {
        **_DOT,
        "color": ORANGE,
        "ls": (0, (3, 1)),
        "marker": "D",
        "label": "global-local",
    },
    "static": {**OTHERS, **_DOT, "marker": "s"},
    "GRIFFIN": {**_DOT, "color": BLUE, "ls": "-", "marker": "o", "label": "GRIFFIN"},
    "half-sampled": {**_DOT, "color": BROWN, "ls": "--", "marker": "<", "label": "half-sampled"},
    "sampled": {**_DOT, "color": SKY, "ls": "--", "marker": ">", "label": "sampled"},
    "random": {**_DOT, "color": "0.5", "ls": ":", "marker": "x", "label": "random (chance)"},
    "magnitude": {**MAGNITUDE, **_DOT, "marker": "P"},
}

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


def in_style(draw: Callable[[xr.Dataset, Figure], None]) -> Callable[[xr.Dataset], Figure]:
    """A figure of the project: in its style, whatever the user's own."""

    def styled(data: xr.Dataset) -> Figure:
        # Made outside of the context, at whose end a notebook's interactive mode would be lost.
        figure = plt.figure()
        with mpl.rc_context(STYLE):
            draw(data, figure)
        return figure

    styled.__name__, styled.__doc__ = draw.__name__, draw.__doc__
    return styled


def page(
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
    ratios = {key: options.pop(key) for key in ("width_ratios", "height_ratios") if key in options}
    return {**options, "gridspec_kw": ratios}


def save(figure: Figure, folder: Path, name: str, model: str, caption: str) -> None:
    """Write a figure as PNG and SVG, which say what they show, and close it."""
    about = {"Title": f"{name}, {model}", "Description": caption}
    with mpl.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", metadata=about)
        figure.savefig(folder / f"{name}.svg", metadata={**about, "Date": None})
    plt.close(figure)


def by_layer(axes: np.ndarray | list[Axes]) -> None:
    """Label the x axes as layers, with whole numbers."""
    for ax in axes:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def known(values: xr.DataArray) -> xr.DataArray:
    """Without the points that do not exist, so that bands have no holes."""
    return values.dropna("distance", how="all")


def legend(figure: SubFigure, axes: np.ndarray, ncols: int = 3) -> None:
    """One legend above the figure, for all of the axes."""
    entries = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=ncols, frameon=False
    )
