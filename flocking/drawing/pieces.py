"""Pieces that several figures share: heat maps, bands, guides, axes and legends."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.ticker import (
    AutoLocator,
    FixedLocator,
    FuncFormatter,
    LogFormatter,
    MaxNLocator,
    NullLocator,
    ScalarFormatter,
)

from flocking.drawing.style import CHANCE, LEVEL
from flocking.drawing.words import literal, printed

_CELLS = 2048  # along each side of an image, which has at least half of them
_SMALLEST = 5.0  # points: the height of a row in which a token's text can be read
# How the cells along the x and y axes of pictures are named.
_Cells = tuple[tuple[str, ...] | None, tuple[float, float]]  # names, and from where to where
_NAMES: WeakKeyDictionary[Axes, dict[str, _Cells]] = WeakKeyDictionary()
# What was drawn there: the picture, and what belongs to it.
_PICTURES: WeakKeyDictionary[Axes, list[AxesImage | Colorbar | Legend]] = WeakKeyDictionary()


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
        Value of the brightest colour, above 0; by default the 99th percentile, so that a few
        outliers do not darken the rest.
    colorbar : bool
        Draw a colour bar beside the axes.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError
        If `vmax` is no number.
    ValueError
        If `relative` has other dimensions than token and neuron, or no token with values; if `vmax`
        is not above 0; if an axis is shared with a picture that has other names.
    """
    if set(relative.dims) != {"token", "neuron"}:
        raise ValueError(
            f"relative has dimensions {relative.dims}: select one sequence and one layer, so that "
            "token and neuron are left."
        )
    check_brightest(vmax)
    values = relative.transpose("token", "neuron").dropna("token", how="all")
    shown = values.values.astype(np.float32)
    if not shown.size:
        raise ValueError("relative has no token with values: select one that is not padding.")
    if vmax is None:
        vmax = brightest(shown)
    ax = plt.gca() if ax is None else ax
    across, down = (_extent(axis.values) for axis in (values.neuron, values.token))
    rows, columns = _places(values.token.values), _places(values.neuron.values)
    texts = _texts(ax, values)
    named(ax, "x", columns, across)
    named(ax, "y", texts or rows, down)
    image = cells(
        ax,
        shown,
        (*across, *down[::-1]),
        cmap=sns.color_palette("rocket", as_cmap=True),
        vmin=0,
        vmax=vmax,
    )
    ax.set(xlabel="neuron", ylabel="token (position in the text)")
    for axis, labels in ((ax.xaxis, columns), (ax.yaxis, rows)):
        if labels is None:
            whole_numbers(axis)
        else:
            _name_places(axis, labels)
    if texts:
        _name_tokens(ax, texts, down[0] + 0.5)
    if colorbar:
        told = "relative activation $|z|/\\|z\\|_2$"
        belongs(ax, ax.figure.colorbar(image, ax=ax, extend="max", label=told))
    return ax


def check_brightest(vmax: object) -> None:
    """Refuse what is not the value of a colour: anything but a number above 0, or None."""
    if vmax is None:
        return
    if isinstance(vmax, bool | np.bool_) or not isinstance(vmax, Real):
        raise TypeError(f"vmax is a {type(vmax).__name__}: give a number above 0, such as 0.1.")
    if not 0 < float(vmax) < np.inf:
        raise ValueError(f"vmax={vmax!r}: give a number above 0, such as 0.1.")


def cells(
    ax: Axes, values: np.ndarray, extent: tuple[float, float, float, float], **look: Any
) -> AxesImage:
    """Draw numbers or colours as cells, in the place of an earlier picture.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    values : numpy.ndarray, shape (row, column) or (row, column, 3)
    extent : tuple of float
        Left, right, lower and upper edge of the axes.
    **look
        Passed to ``ax.imshow``.
    """
    _take_off(ax)
    ax.grid(False)  # lines over the cells would be streaks that nothing measured
    options = {"aspect": "auto", "origin": "upper", "interpolation": "antialiased", **look}
    image = ax.imshow(_fine(values), extent=extent, **options)
    _PICTURES[ax] = [image]
    return image


def belongs(ax: Axes, more: Colorbar | Legend) -> None:
    """Note what is drawn for the picture on axes, and goes when another one takes its place."""
    _PICTURES[ax].append(more)


def _take_off(ax: Axes) -> None:
    """Remove an earlier picture from axes, with its ticks, unless a user has cleared them."""
    image, *more = _PICTURES.pop(ax, [None])
    if not isinstance(image, AxesImage) or image not in ax.get_images():
        return
    for drawn in more:
        if isinstance(drawn, Colorbar):
            if drawn.ax in drawn.ax.figure.axes:
                drawn.remove()
        elif isinstance(drawn, Legend) and drawn is ax.get_legend():
            drawn.remove()
    image.remove()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(AutoLocator())
        axis.set_major_formatter(ScalarFormatter())
        axis.reset_ticks()


def _fine(values: np.ndarray) -> np.ndarray:
    """An image with more pixels than the axes, whose cells are repeated, so that they keep edges.

    Matplotlib averages neighbours, along both axes if columns are narrower than a pixel of the
    screen, or between one and three pixels wide.
    """
    rows, columns = (max(1, _CELLS // size) for size in values.shape[:2])
    return values.repeat(rows, axis=0).repeat(columns, axis=1)


def _in_a_row(labels: np.ndarray) -> bool:
    """Whether labels are whole numbers, each one more than the one before."""
    return bool(labels.dtype.kind in "iu" and (np.diff(labels) == 1).all())


def brightest(values: np.ndarray) -> float:
    """Value of the brightest colour: the 99th percentile of what is not 0.

    (Of sparse layers, nearly all is. Neurons beyond a narrower layer's width have no values.)
    """
    there = values[~np.isnan(values) & (values != 0)]
    return float(np.percentile(there, 99)) if there.size else 1.0


def _extent(labels: np.ndarray) -> tuple[float, float]:
    """Edges of an axis on which each label is in the middle of its cell."""
    first = labels[0] if _in_a_row(labels) else 0
    return first - 0.5, first + len(labels) - 0.5


def _places(labels: np.ndarray) -> tuple[str, ...] | None:
    """Names of cells whose labels are not in a row."""
    return None if _in_a_row(labels) else tuple(str(label) for label in labels.tolist())


def named(
    ax: Axes,
    which: Literal["x", "y"],
    names: tuple[str, ...] | None,
    extent: tuple[float, float],
) -> None:
    """Note where the cells along an axis are, and their names; others that share it must agree.

    Matplotlib has one set of names, and one pair of limits, for all axes that share one.

    Raises
    ------
    ValueError
        If something is drawn there that is named otherwise.
    """
    shared = ax.get_shared_x_axes() if which == "x" else ax.get_shared_y_axes()
    for other in shared.get_siblings(ax):
        if other is ax or not other.has_data():
            continue
        # (Of what else is drawn there, such as a line, limits may be any.)
        if _NAMES.get(other, {}).get(which, (None, extent)) != (names, extent):
            raise ValueError(
                f"ax shares its {which} axis with axes on which something else is drawn, and both "
                "would have the same names and limits: give axes that are not shared, as "
                f"plt.subplots makes without share{which}."
            )
    _NAMES.setdefault(ax, {})[which] = names, extent


def whole_numbers(axis: Axis) -> None:
    """Put ticks at whole numbers, as many as there is room for."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _name_places(axis: Axis, labels: tuple[str, ...]) -> None:
    """Show labels that are not in a row at the places where they are drawn."""

    def label(place: float, _: int | None = None) -> str:
        number = round(place)
        here = number in range(len(labels)) and place == number
        return literal(labels[number]) if here else ""

    axis.set_major_formatter(FuncFormatter(label))


def _room(ax: Axes, rows: int) -> float:
    """Height of a row, in points."""
    return float(72 * ax.get_window_extent().height / ax.figure.get_dpi() / rows)


def _texts(ax: Axes, values: xr.DataArray) -> tuple[str, ...] | None:
    """Each token's text as it is drawn, if texts are known and there is room for them."""
    if "token_text" not in values.coords:
        return None
    texts = values.token_text.values.tolist()
    if not any(texts) or _room(ax, len(texts)) < _SMALLEST:
        return None
    return tuple(printed(texts, _font(ax)))


def _font(ax: Axes) -> FontProperties:
    # (The labels of a shared axis may be hidden, and are not among get_yticklabels().)
    return ax.yaxis.get_major_ticks(1)[0].label1.get_fontproperties()


def _name_tokens(ax: Axes, texts: tuple[str, ...], first: float) -> None:
    """Each token's text beside its row."""
    ax.set_yticks(first + np.arange(len(texts)))
    size = min(_font(ax).get_size_in_points(), 0.95 * _room(ax, len(texts)))
    # (A dollar sign in a text is one, and begins no formula.)
    ax.set_yticklabels(texts, fontsize=size, parse_math=False)
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
    order = in_order(x)
    x = x[order]
    estimate, low, high = (
        values.sel(interval=name).values[order] for name in ("estimate", "low", "high")
    )
    if len(x) == 1:  # neither a line nor a band has a width
        line = {"marker": "o", **line}
        (drawn,) = ax.plot(x, estimate, **line)
        ax.vlines(x, low, high, color=drawn.get_color(), lw=1)
        return ax
    (drawn,) = ax.plot(x, estimate, **line)
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
    return ax


def in_order(labels: np.ndarray) -> np.ndarray:
    """Places of labels by size, so that lines lead from left to right; names stay as they are."""
    numbers = np.issubdtype(labels.dtype, np.number)
    return np.argsort(labels, kind="stable") if numbers else np.arange(len(labels))


def guide(y: float, ax: Axes, label: str = "chance") -> Axes:
    """Draw a horizontal line for chance, which needs no estimate."""
    ax.axhline(y, **against(ax, CHANCE), label=label)
    return ax


def level(y: float, ax: Axes, label: str) -> Axes:
    """Draw a horizontal line for a level that is not chance: the full model, all equal."""
    ax.axhline(y, **against(ax, LEVEL), label=label)
    return ax


def is_dark(ax: Axes) -> bool:
    """Whether axes have a dark background, as in matplotlib's style ``dark_background``."""
    seen = [each for each in (ax.get_facecolor(), ax.figure.get_facecolor()) if to_rgba(each)[3]]
    return bool(seen) and _lightness(seen[0]) < 0.5  # (What is transparent shows what is behind.)


def against(ax: Axes, look: dict[str, Any]) -> dict[str, Any]:
    """A look in grey, as it is seen as well on the background of the axes."""
    return look | {"color": str(1 - float(look["color"]))} if is_dark(ax) else look


def _lightness(colour: Any) -> float:
    """From 0, black, to 1, white, as the eye weighs red, green and blue (ITU-R BT.709)."""
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def mark(bar: Colorbar, value: float) -> None:
    """Draw a line at a value of a colour bar, dark on light colours and light on dark ones."""
    colour = bar.cmap(bar.norm(value))
    bar.ax.axhline(value, color="black" if _lightness(colour[:3]) > 0.5 else "white", lw=1)


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
    axis.set_major_formatter(FuncFormatter(_plainly))


def _plainly(value: float, _: int | None = None) -> str:
    """A tick's number; as a power of ten if it has many digits."""
    if 1e-3 <= value < 1e6:
        return f"{value:.7g}"
    exponent = math.log10(value)
    return f"$10^{{{exponent:.0f}}}$" if exponent.is_integer() else f"{value:g}"
