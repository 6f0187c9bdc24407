"""One text as a picture: its tokens against the neurons of a layer."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from flocking import drawing
from flocking.plotting.given import check_ax, free, leaving_no_figure, listed, one_of
from flocking.recording import canonical


@leaving_no_figure
def heatmap(
    data: xr.Dataset | xr.DataArray,
    *,
    layer: int | str | None = None,
    sequence: int | str | None = None,
    ax: Axes | None = None,
    vmax: float | None = None,
    colorbar: bool = True,
) -> Axes:
    r"""Draw a text's relative activations at one layer, tokens against neurons.

    The first figure of the GRIFFIN paper (Dong, Chen and Chi 2024, arXiv 2404.01365): flocking
    shows as vertical streaks, neurons that stay high from token to token. Networks with random
    weights show them too, so draw :func:`flocking.control` beside it.

    Parameters
    ----------
    data : xarray.Dataset or xarray.DataArray
        A recording made with ``record(..., relative=[layer])``, or windows selected from one; or a
        part of its ``relative``, (token, neuron), such as the first 256 neurons of one sequence and
        layer.
    layer, sequence : int or str, optional
        Labels of what is drawn. Needed if the recording has ``relative`` of several layers, or
        several sequences.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes if they are empty, or those of a new figure.
    vmax : float, optional
        Value of the brightest colour, above 0, to compare several pictures; by default the 99th
        percentile of all values but zeros. (Where columns are narrower than a pixel, matplotlib
        draws the mean of neighbours: give some of the neurons, as below, to see single ones.)
    colorbar : bool
        Draw a colour bar beside the axes.

    Returns
    -------
    matplotlib.axes.Axes
        Rows are tokens, from the first one down, without padding. They are named by their texts
        where each row has 5 points of height or more (about 50 tokens on axes of matplotlib's
        default size) and texts are known, as of a recording made with a tokenizer: a space is
        drawn as a dot, the end of a line as an arrow, and what the font lacks as in Python
        (``\u4e2d``).

    Raises
    ------
    TypeError
        If `data` is neither a recording nor a DataArray, `ax` no axes, or `vmax` no number.
    ValueError
        If the recording has no ``relative``, or none of that layer or sequence; if neither is
        named and there are several; if a DataArray has other dimensions than token and neuron;
        if `vmax` is not above 0; if `ax` shares an axis with a picture of other tokens.

    Examples
    --------
    >>> text = "Birds of a feather flock together, and so do neurons."
    >>> recording = flocking.record(model, text, relative=True, progress=False)
    >>> ax = flocking.plot.heatmap(recording, layer=1)
    >>> [label.get_text() for label in ax.get_yticklabels()[:4]]
    ['Birds', '·of', '·a', '·feather']

    A part of the neurons:

    >>> part = recording.relative.sel(sequence=0, layer=1).isel(neuron=slice(32))
    >>> ax = flocking.plot.heatmap(part, colorbar=False)
    """
    check_ax(ax)
    drawing.check_brightest(vmax)
    if isinstance(data, xr.DataArray):
        dim = "relative_layer" if {"relative_layer"} & {*data.coords, *data.dims} else "layer"
        relative = one_of(one_of(data, "sequence", sequence, "sequence"), dim, layer, "layer")
        return drawing.heatmap(relative, free(ax), vmax=vmax, colorbar=colorbar)
    whole = canonical(data, "relative", some_layers=True).recording
    one = one_of(whole, "sequence", sequence, "sequence")
    dim = "relative_layer" if "relative_layer" in one["relative"].dims else "layer"
    there = one[dim].values.tolist()
    left_out = [label for label in one.layer.values.tolist() if label not in there]
    if not isinstance(layer, np.ndarray) and layer in left_out:
        raise ValueError(
            f"layer {layer!r} was recorded without its relative activations: choose from "
            f"{listed(there)}, or record it with relative=[{layer!r}]."
        )
    relative = one_of(one[["relative"]], dim, layer, "layer")["relative"]
    # (Of windows that were selected, in the order of the text.)
    inside = np.isin(one.token_window.values, one.window.values)
    if not inside.any():
        raise ValueError("the text has no token in these windows: select others.")
    relative = relative.isel(token=np.flatnonzero(inside))
    ax = drawing.heatmap(relative, free(ax), vmax=vmax, colorbar=colorbar)
    ax.set_xlabel(f"neuron of layer {relative[dim].item()}", parse_math=False)
    return ax
