"""Figures: one function each, data in, ``Axes`` out; nothing is computed from models here."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes


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
