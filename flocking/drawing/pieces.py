"""Pieces that several figures share: heat maps, bands, guides, axes and legends."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import SubFigure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatter,
    MaxNLocator,
    NullLocator,
    ScalarFormatter,
)

from flocking.drawing.style import CHANCE, LEVEL
from flocking.drawing.words import printed

_ROWS = 256  # that an image has at least half of
_SMALLEST = 5.0  # points: the height of a row in which a token's text can be read


def heatmap(
    relative: xr.DataArray,
    ax: Axes | None = None,
    *,
    vmax: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw relative activations of one layer over one text, tokens against neurons.

    The first figure of the GRIFFIN paper (Dong, Chen and Chi 2024, arXiv 2404.01365):
    flocking shows as vertical streaks, neurons that stay high from token to token.

    Parameters
    ----------
    relative : xarray.DataArray, (token, neuron)
        From ``record(..., relative=[layer])``, one sequence and layer of it, restricted to
        the neurons and tokens to be shown. Tokens without values (padding) are left out. With
        coordinate ``token_text``, each row is named by its text where there is room for it.
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
        If `relative` has other dimensions than token and neuron, or no token with values.
    """
    if set(relative.dims) != {"token", "neuron"}:
        raise ValueError(
            f"relative has dimensions {relative.dims}: select one sequence and one layer, so that "
            "token and neuron are left."
        )
    ax = plt.gca() if ax is None else ax
    values = relative.transpose("token", "neuron").dropna("token", how="all")
    shown = values.values.astype(np.float32)
    if not shown.size:
        raise ValueError("relative has no token with values: select one that is not padding.")
    if vmax is None:
        vmax = float(np.percentile(shown, 99))
    across, down = (_extent(axis.values) for axis in (values.neuron, values.token))
    image = ax.imshow(
        tall(shown),
        aspect="auto",
        interpolation="antialiased",
        cmap=sns.color_palette("rocket", as_cmap=True),
        vmin=0,
        vmax=vmax or 1,
        extent=(*across, *down[::-1]),
    )
    ax.set(xlabel="neuron", ylabel="token (position in the text)")
    for axis, labels in ((ax.xaxis, values.neuron.values), (ax.yaxis, values.token.values)):
        if not _in_a_row(labels):
            _name_places(axis, labels)
    if "token_text" in values.coords:
        _name_tokens(ax, values.token_text.values.tolist(), down[0] + 0.5)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, extend="max", label="relative activation $|z|/\\|z\\|_2$")
    return ax


def tall(rows: np.ndarray) -> np.ndarray:
    """An image whose few rows are repeated, so that they keep their edges.

    Matplotlib averages neighbours along both axes where columns are narrower than a pixel.
    """
    return np.repeat(rows, max(1, _ROWS // len(rows)), axis=0)


def _in_a_row(labels: np.ndarray) -> bool:
    """Whether labels are whole numbers, each one more than the one before."""
    return bool(labels.dtype.kind in "iu" and (np.diff(labels) == 1).all())


def _extent(labels: np.ndarray) -> tuple[float, float]:
    """Edges of an axis on which each label is in the middle of its cell."""
    first = labels[0] if _in_a_row(labels) else 0
    return first - 0.5, first + len(labels) - 0.5


def _name_places(axis: Axis, labels: np.ndarray) -> None:
    """Show labels that are not in a row at the places where they are drawn."""

    def label(place: float, _: int | None = None) -> str:
        number = round(place)
        return str(labels[number]) if number in range(len(labels)) and place == number else ""

    axis.set_major_formatter(FuncFormatter(label))


def _name_tokens(ax: Axes, texts: list[str], first: float) -> None:
    """Each token's text beside its row, if texts are known and there is room for them."""
    box = ax.get_window_extent()
    points = 72 * box.height / ax.figure.get_dpi() / len(texts)
    if not any(texts) or points < _SMALLEST:
        return
    ax.set_yticks(first + np.arange(len(texts)))
    font = ax.get_yticklabels()[0].get_fontproperties()
    size = min(font.get_size_in_points(), 0.95 * points)
    # (A dollar sign in a text is one, and begins no formula.)
    ax.set_yticklabels(printed(texts, font), fontsize=size, parse_math=False)
    ax.set_ylabel("token")


def band(values: xr.DataArray, ax: Axes | None = None, **line: Any) -> Axes:
    """Draw one line with its confidence band.

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
    x = values[dim].values if dim in values.coords else np.arange(values.sizes[dim])
    estimate, low, high = (values.sel(interval=name).values for name in ("estimate", "low", "high"))
    if len(x) == 1:  # neither a line nor a band has a width
        line = {"marker": "o", **line}
        (drawn,) = ax.plot(x, estimate, **line)
        ax.vlines(x, low, high, color=drawn.get_color(), lw=1)
        return ax
    (drawn,) = ax.plot(x, estimate, **line)
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
    return ax


def guide(y: float, ax: Axes, label: str = "chance") -> Axes:
    """Draw a horizontal line for chance, which needs no estimate."""
    ax.axhline(y, **CHANCE, label=label)
    return ax


def level(y: float, ax: Axes, label: str) -> Axes:
    """Draw a horizontal line for a level that is not chance: the full model, all equal."""
    ax.axhline(y, **LEVEL, label=label)
    return ax


def by_layer(axes: np.ndarray | list[Axes]) -> None:
    """Label the x axes as layers, with whole numbers."""
    for ax in axes:
        ax.set_xlabel("layer")
        if not ax.xaxis.have_units():  # (labels that are words have their own places)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def known(values: xr.DataArray) -> xr.DataArray:
    """The values without distances at which all are missing, so that bands have no holes."""
    return values.dropna("distance", how="all")


def legend(figure: SubFigure, axes: np.ndarray, ncols: int = 3) -> None:
    """Put one legend above the figure, for all of the axes."""
    entries = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=ncols, frameon=False
    )


def powers_of_two(ax: Axes, values: np.ndarray) -> None:
    """Make the x axis logarithmic, with these values as ticks, in full."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.minorticks_off()


def below(axes: np.ndarray, label: str) -> None:
    """Label the lowest axes in use of each column."""
    for column in axes.T:
        for ax in [ax for ax in column if ax.axison][-1:]:
            ax.set_xlabel(label)


def logarithmic(ax: Axes, axis: Axis, ticks: list[float] | None = None) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
    if ticks is not None:
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_minor_formatter(LogFormatter())  # (of a short axis, some of them)
    axis.set_major_formatter(ScalarFormatter())
