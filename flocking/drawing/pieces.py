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
    MaxNLocator,
    NullLocator,
    ScalarFormatter,
)


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
    x = values[dim].values
    estimate, low, high = (values.sel(interval=name).values for name in ("estimate", "low", "high"))
    (drawn,) = ax.plot(x, estimate, **line)
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
    return ax


def guide(y: float, ax: Axes, label: str = "chance") -> Axes:
    """Draw a horizontal line for a level that needs no estimate, such as chance."""
    ax.axhline(y, color="0.35", ls=":", lw=1, label=label)
    return ax


def by_layer(axes: np.ndarray | list[Axes]) -> None:
    """Label the x axes as layers, with whole numbers."""
    for ax in axes:
        ax.set_xlabel("layer")
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
    axis.set_major_formatter(ScalarFormatter())
