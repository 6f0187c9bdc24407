"""Which neurons are kept, and which experts tokens are routed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flocking import analysis
from flocking.drawing import BLUE, GREEN, ORANGE, belongs, cells, mark, named, whole_numbers
from flocking.plotting.given import check_ax, free, leaving_no_figure, one_of, refuse_empty
from flocking.recording import canonical, whole_neurons

_PALE, _NOTHING = "0.9", "1.0"
_LINE = 60  # characters in a line of the legend


@leaving_no_figure
def selection(
    data: xr.DataArray,
    other: xr.DataArray | None = None,
    *,
    labels: tuple[str, str] = ("first", "second"),
    ax: Axes | None = None,
) -> Axes:
    """Draw which neurons are kept, by layer; or two selections against each other.

    Parameters
    ----------
    data : xarray.DataArray, bool, (layer, neuron)
        A selection, as :func:`flocking.select` returns it, of one sequence; or the last of a
        twin's ``history``. Any other dimension may stand in the place of ``layer``:
        ``selection.sel(layer=3)`` of several texts shows which neurons they share.
    other : xarray.DataArray, bool, (layer, neuron), optional
        Another selection from the same layers.
    labels : tuple of str
        Names of the two in the legend.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes if they are empty, or those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        A row for each layer, the lowest on top. Of one selection, neurons are in the model's order.
        Of two, each row is sorted: those that both keep, the first alone, the second alone,
        neither, so that lengths can be compared. (:func:`flocking.jaccard` gives the overlap as a
        number.) Layers with fewer neurons end earlier.

    Raises
    ------
    TypeError
        If `data` or `other` is not a DataArray, `labels` is no tuple, or `ax` no axes.
    ValueError
        If it is not a selection over neurons, has more dimensions, none of a dimension, or the
        layers of the two differ; if there are not two labels; if `ax` shares its y axis with a
        picture of other rows.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> kept = flocking.select(flocking.statistic(recording), density=0.5)
    >>> ax = flocking.plot.selection(kept.isel(sequence=0))
    >>> ax = flocking.plot.selection(
    ...     kept.isel(sequence=0), kept.isel(sequence=1), labels=("code", "dialogue"), ax=ax
    ... )
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['both', 'code alone', 'dialogue alone', 'neither']
    """
    check_ax(ax)
    names = _two(labels)
    kept = _rows("data", data)
    rows = str(kept.dims[0])
    if other is None:
        kinds: list[tuple[str, Any]] = [("kept", BLUE), ("not kept", _PALE)]
        number = np.where(kept.values, 0, 1)
    else:
        second = _rows("other", other)
        analysis.jaccard(kept, second)  # what it refuses, such as other layers
        if second.dims != kept.dims:
            raise ValueError(
                f"data is by {rows} and other by {second.dims[0]}: give two of the same dimensions."
            )
        second = second if rows not in second.indexes else second.sel({rows: kept[rows]})
        first, alone = (f"{label} alone" for label in names)
        kinds = [("both", BLUE), (first, ORANGE), (alone, GREEN), ("neither", _PALE)]
        number = 3 - 2 * kept.values - second.values
    number = np.where(_there(kept), number, len(kinds))
    if other is not None:
        number = np.sort(number, axis=1)
    own, ax = ax is None, free(ax)
    named(ax, "x", None, (-0.5, number.shape[1] - 0.5))
    named(ax, "y", _labels(kept, rows), (-0.5, len(number) - 0.5))
    colours = np.array([to_rgb(colour) for _, colour in [*kinds, ("", _NOTHING)]])
    extent = (-0.5, number.shape[1] - 0.5, len(number) - 0.5, -0.5)
    shown = np.round(255 * colours).astype(np.uint8)[number]
    cells(ax, shown, extent, interpolation_stage="rgba")
    _name_rows(ax, kept, rows)
    ax.set_xlabel("neuron" if other is None else "neurons, sorted")
    if own and isinstance(ax.figure, Figure) and ax.figure.get_layout_engine() is None:
        ax.figure.set_layout_engine("constrained")  # makes room for the legend above
    legend = ax.legend(
        handles=[Patch(color=colour, label=fill(label, _LINE)) for label, colour in kinds],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=1 if any(len(label) > _LINE // 2 for label, _ in kinds) else 2,
        frameon=False,
    )
    belongs(ax, legend)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return ax


def _two(labels: object) -> tuple[str, str]:
    """Names of two selections."""
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"labels is a {type(labels).__name__}: give two names, as in ('a', 'b').")
    if len(labels) != 2:
        raise ValueError(f"labels has {len(labels)} names: give two, as in ('a', 'b').")
    return str(labels[0]), str(labels[1])


def _rows(name: str, values: object) -> xr.DataArray:
    """A selection with one dimension beside neurons, which comes first."""
    if isinstance(values, Mapping) and not isinstance(values, xr.Dataset):
        raise TypeError(
            f"{name} is a {type(values).__name__}: give a bool DataArray, such as the last of a "
            "twin's history, twin.history.isel(position=-1)."
        )
    if not isinstance(values, xr.DataArray):
        raise TypeError(
            f"{name} is a {type(values).__name__}: give the DataArray that flocking.select "
            "returns, as from flocking.select(flocking.statistic(recording))."
        )
    if values.dtype != bool or "neuron" not in values.dims:
        raise ValueError(
            f"{name} is not a selection over neurons: give what flocking.select returns."
        )
    values = whole_neurons(values)
    single = [
        dim for dim in values.dims if values.sizes[dim] == 1 and dim not in ("layer", "neuron")
    ]
    values = values.squeeze(single)
    values = values.expand_dims("layer") if values.dims == ("neuron",) else values
    more = [str(dim) for dim in values.dims if dim != "neuron"]
    if len(more) > 1:
        drop = next((dim for dim in more if dim != "layer"), more[0])
        raise ValueError(
            f"{name} has dimensions {', '.join(more)} beside neuron: select one, as in "
            f"selection.isel({drop}=0)."
        )
    for dim in (*more, "neuron"):
        if not values.sizes[dim]:
            raise ValueError(f"there is no {dim} to draw: {name} has none left.")
    return values.transpose(*more, "neuron")


def _there(kept: xr.DataArray) -> np.ndarray:
    """Which neurons there are: layers may be narrower than the widest."""
    width = kept.sizes["neuron"] if "d_ff" not in kept.coords else np.atleast_1d(kept.d_ff.values)
    return np.broadcast_to(np.arange(kept.sizes["neuron"]) < np.reshape(width, (-1, 1)), kept.shape)


def _labels(values: xr.DataArray, dim: str) -> tuple[str, ...]:
    labels = values[dim].values if dim in values.coords else np.arange(values.sizes[dim])
    return tuple(str(label) for label in labels)


def _name_rows(ax: Axes, values: xr.DataArray, dim: str) -> None:
    ax.set_ylabel(dim, parse_math=False)
    labels = _labels(values, dim)
    most = 16
    step = -(-len(labels) // most)
    ax.set_yticks(np.arange(len(labels))[::step], labels[::step], parse_math=False)


@leaving_no_figure
def experts(
    data: xr.Dataset,
    *,
    sequence: int | str | None = None,
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw how often a mixture's experts are used: the share of tokens routed to each, by layer.

    Parameters
    ----------
    data : xarray.Dataset
        A recording of a mixture of experts, or windows selected from one.
    sequence : int or str, optional
        Label of the text that is drawn; by default all of them together.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes if they are empty, or those of a new figure.
    colorbar : bool
        Draw a colour bar beside the axes.

    Returns
    -------
    matplotlib.axes.Axes
        A row for each layer with experts, the lowest on top; experts in the model's order. A row
        adds up to the number of experts that each token is routed to: 2 for Mixtral, 1 for Llama 4.
        The line in the colour bar is where all experts would be used equally.

    Raises
    ------
    TypeError
        If `data` is not a recording, or `ax` no axes.
    ValueError
        If it is of a model without experts, has no token, or a part of the experts only; if `ax`
        shares its y axis with a picture of other layers.

    Examples
    --------
    Of a model with a mixture of experts in every layer::

        recording = flocking.record(mixture, flocking.passages())
        flocking.plot.experts(recording)

    Any other has none to draw:

    >>> recording = flocking.record(model, "The starlings turned as one.", progress=False)
    >>> flocking.plot.experts(recording)
    Traceback (most recent call last):
        ...
    ValueError: the recording is of a model without mixtures of experts: there is no routing ...
    """
    check_ax(ax)
    canonical(data, "tokens")  # refuses what is no recording
    if "routed" not in data.variables:
        raise ValueError(
            "the recording is of a model without mixtures of experts: there is no routing to draw."
        )
    refuse_empty(data)
    whole = _all_experts(canonical(data, "routed", "tokens", "experts").recording)
    whole = whole.isel(layer=np.flatnonzero(whole.experts.values > 1))
    if sequence is not None:
        whole = one_of(whole, "sequence", sequence, "sequence").expand_dims("sequence")
    shares, equal = _shares(whole)
    ax = free(ax)
    named(ax, "x", None, (-0.5, shares.sizes["routed_expert"] - 0.5))
    named(ax, "y", _labels(shares, "layer"), (-0.5, len(shares) - 0.5))
    image = cells(
        ax,
        np.ma.masked_invalid(shares.values),
        (-0.5, shares.sizes["routed_expert"] - 0.5, len(shares) - 0.5, -0.5),
        cmap=sns.color_palette("rocket", as_cmap=True),
        vmin=0,
    )
    _name_rows(ax, shares, "layer")
    ax.set_xlabel("expert")
    whole_numbers(ax.xaxis)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, label="share of tokens routed to the expert")
        belongs(ax, bar)
        for share in {*equal.tolist()}:
            mark(bar, share)
    return ax


def _all_experts(recording: xr.Dataset) -> xr.Dataset:
    """A recording with all experts in the model's order, by their labels if they have any."""
    number = recording.sizes["routed_expert"]
    if "routed_expert" in recording.coords:
        labels = recording["routed_expert"].values
        order = np.argsort(labels, kind="stable")
        whole = labels.dtype.kind in "iuf" and np.array_equal(labels[order], np.arange(number))
        recording = recording.isel(routed_expert=order)
    else:
        whole = True
    if not whole or number < recording.experts.values.max(initial=0):
        raise ValueError(
            f"the recording has {number} experts of "
            f"{recording.experts.values.max(initial=0):.0f}, or others twice: give all of them, "
            "without a selection along routed_expert."
        )
    return recording


def _shares(recording: xr.Dataset) -> tuple[xr.DataArray, np.ndarray]:
    """Shares of all tokens, (layer, routed_expert), and by layer what each would be if equal."""
    tokens = int(recording["tokens"].sum())
    if not tokens or not recording.sizes["layer"]:
        raise ValueError("the recording has no token in a layer with experts: there is no routing.")
    counts = recording["routed"].sum(["sequence", "window"]).transpose("layer", "routed_expert")
    number = recording.experts.values
    there = np.arange(counts.sizes["routed_expert"]) < number[:, None]
    shares = counts.copy(data=np.where(there, counts.values / tokens, np.nan))
    return shares, counts.sum("routed_expert").values / tokens / number
