"""Selections in the forms that users have them, as one mask for each layer of a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from flocking.analysis import is_changed, mark_of, marked
from flocking.feedforward import FeedForward
from flocking.recording import whole_neurons


class Wide(NamedTuple):
    """A layer whose neurons are selected from.

    Attributes
    ----------
    layer : int
        Its label.
    d_ff : int
        Number of its neurons; in a mixture, those of all experts together.
    experts : int
        Number of experts, which share the neurons evenly; 1 in a dense block.
    first : int or None
        The layer whose block this runs once more; None if it has a block to itself.
    """

    layer: int
    d_ff: int
    experts: int = 1
    first: int | None = None


def layers_of(blocks: Iterable[FeedForward]) -> list[Wide]:
    """The layers of a model's blocks, each run of a block being one."""
    firsts: dict[int, int] = {}
    found = []
    for block in blocks:
        first = firsts.setdefault(id(block.down), block.layer)
        again = None if first == block.layer else first
        found.append(Wide(block.layer, block.d_ff, block.experts, again))
    return found


def masks_of(selection: Any, layers: Sequence[Wide]) -> dict[int, np.ndarray]:
    """One selection as masks.

    Parameters
    ----------
    selection : dict or xarray.DataArray
        The ``selection`` of a twin: indices of the kept neurons by layer, int64 (k,) or (1, k).
        Or what :func:`flocking.select` returns, bool (layer, neuron), with other dimensions of
        size 1.
    layers : list of Wide
        All layers of the model that it is for.

    Returns
    -------
    dict of ndarray of bool, shape (d_ff,)
        True for kept neurons, by layer, in the order of `layers`; at least one in each layer (in
        a mixture, as many in each expert).

    Raises
    ------
    TypeError
        If it is no selection, but a statistic or a twin, for example.
    ValueError
        If it is of several sequences, of other layers or widths than the model's, keeps nothing
        somewhere, or different neurons in runs of one block.
    """
    if isinstance(selection, xr.DataArray):
        masks = _of_array(selection, layers)
    elif isinstance(selection, Mapping) and not isinstance(selection, xr.Dataset):
        masks = _of_indices(selection, layers)
    else:
        raise TypeError(_no_selection(selection))
    for wide in layers:
        _check_counts(masks[wide.layer], wide)
        if wide.first is not None and (masks[wide.layer] != masks[wide.first]).any():
            raise ValueError(
                f"layers {wide.first} and {wide.layer} are runs of one block, whose weights can be "
                "cut in one way only, and the selection keeps different neurons in them: give "
                "both the same, as the selection of a twin does "
                "(flocking.griffin(model, method='static', reference=statistic))."
            )
    return masks


class Kept(dict[int, Tensor]):
    """A twin's selection: indices of the kept neurons by layer.

    Attributes
    ----------
    attrs : dict of str
        ``made_from`` says in words how neurons were selected.
    """

    def __init__(self, indices: Mapping[int, Tensor], made_from: str) -> None:
        super().__init__(indices)
        several = any(kept.ndim > 1 and len(kept) != 1 for kept in indices.values())
        # (Of several sequences, none can be taken out with its attributes.)
        marks = [] if several else [_mark({n: _in_mask(kept) for n, kept in indices.items()})]
        self.attrs = marked(made_from, *marks)


def _in_mask(indices: Tensor) -> np.ndarray:
    """A mask that ends with the last neuron that is kept."""
    kept = indices.cpu().numpy().ravel()
    mask = np.zeros(kept.max(initial=0) + 1, bool)
    mask[kept] = True
    return mask


def _mark(masks: Mapping[int, np.ndarray]) -> str:
    """The mark of masks by layer, as that of the array that :func:`flocking.select` returns."""
    rows = np.zeros((len(masks), max(map(len, masks.values()))), bool)
    for row, layer in zip(rows, sorted(masks), strict=True):
        row[: len(masks[layer])] = masks[layer]
    return mark_of(rows)


def made_from(selection: Any, masks: Mapping[int, np.ndarray]) -> str:
    """What a selection says of how it was made, ``selection.attrs["made_from"]``; else empty.

    Parameters
    ----------
    selection : dict or xarray.DataArray
    masks : dict of ndarray of bool, shape (d_ff,)
        What it is now, as of :func:`masks_of`: where that is not what was made, this is said.
    """
    attributes = getattr(selection, "attrs", None)
    if not isinstance(attributes, Mapping) or not (told := str(attributes.get("made_from") or "")):
        return ""
    if is_changed(attributes, _mark(masks)):
        return f"not known: the selection was changed after it was made. It was made from: {told}"
    if isinstance(selection, xr.DataArray) and "sequence" in selection.coords:
        told += f"; of sequence {np.ravel(selection['sequence'].values)[0]} of the recording"
    return told


def _no_selection(given: Any) -> str:
    named = {xr.Dataset: "a recording", PreTrainedModel: "a model"}
    kinds = (name for kind, name in named.items() if isinstance(given, kind))
    what = next(kinds, f"a {type(given).__name__}")
    return (
        f"selection is {what}: give the selection of a twin (twin.selection), or what "
        "flocking.select(statistic, density) returns."
    )


# --------------------------------------------------------------------------------------
# Arrays


def _of_array(selection: xr.DataArray, layers: Sequence[Wide]) -> dict[int, np.ndarray]:
    _check_dtype(selection.dtype, "")
    if not {"layer", "neuron"} <= {*selection.dims, *selection.coords}:
        raise ValueError(_other_dims(selection))
    _refuse_several(selection)
    for dim in ("layer", "neuron"):
        if dim not in selection.dims and dim in selection.coords:
            selection = selection.expand_dims(dim)
    # Dimensions of size 1: they say which one was taken.
    more = [dim for dim in selection.dims if dim not in ("layer", "neuron")]
    selection = selection.squeeze(more, drop=True)
    if {*selection.dims} != {"layer", "neuron"}:
        raise ValueError(_other_dims(selection))
    try:
        selection = whole_neurons(selection).transpose("layer", "neuron")
    except ValueError as problem:
        raise ValueError(f"selection: {problem}") from problem
    labels = [wide.layer for wide in layers]
    found = selection["layer"].values.tolist() if "layer" in selection.coords else None
    if found is None and len(selection) != len(labels):
        raise ValueError(
            f"selection has {len(selection)} layers, the model {len(labels)}: make it from this "
            "model."
        )
    rows = _rows(labels if found is None else found, labels)
    _check_widths(selection.isel(layer=rows), layers)
    values = selection.values
    return {wide.layer: values[row, : wide.d_ff] for wide, row in zip(layers, rows, strict=True)}


def _other_dims(selection: xr.DataArray) -> str:
    return (
        f"selection has dimensions {_listed(selection.dims)}: give one over layer and neuron, as "
        "flocking.select(statistic, density) returns."
    )


def _refuse_several(selection: xr.DataArray) -> None:
    """One selection is a model; several are as many models."""
    several = {dim: n for dim, n in selection.sizes.items() if dim not in ("layer", "neuron")}
    several = {dim: n for dim, n in several.items() if n != 1}
    if "sequence" in several:
        raise ValueError(_of_sequences(several["sequence"], "selection.isel(sequence=0)"))
    for dim, size in several.items():
        if size == 0:
            raise ValueError(f"selection is empty along {dim!r}: give one selection.")
        raise ValueError(
            f"selection has {size} selections along {dim!r}, and a model has one: take one of "
            f"them, as with selection.isel({dim}=0)."
        )


def _of_sequences(count: int, one: str) -> str:
    return (
        f"selection is of {count} sequences, and a model has one for all: average their "
        "statistics first (flocking.select(flocking.global_statistic(model, texts), density)), or "
        f"take that of one sequence ({one})."
    )


def _rows(found: list[Any], labels: list[int]) -> list[int]:
    """Where the layers stand in what was found."""
    if len({*found}) < len(found):
        raise ValueError("selection has a layer twice: give each layer once.")
    _check_layers(found, labels)
    return [found.index(label) for label in labels]


def _check_layers(found: Iterable[Hashable], labels: list[int]) -> None:
    there = list(found)
    if unknown := [each for each in there if each not in labels]:
        raise ValueError(
            f"selection has layers that the model has not ({_listed(unknown)}; its layers are "
            f"{_listed(labels)}): make it from this model."
        )
    if lacking := [label for label in labels if label not in there]:
        raise ValueError(
            f"selection lacks layers of the model ({_listed(lacking)}): give all of them, with "
            "all of a layer's neurons where it is to stay whole."
        )


def _check_widths(selection: xr.DataArray, layers: Sequence[Wide]) -> None:
    """As many neurons as the layers have, and none kept beyond a narrower layer's."""
    widest = max(wide.d_ff for wide in layers)
    if selection.sizes["neuron"] != widest:
        raise ValueError(
            f"selection is over {selection.sizes['neuron']} neurons, and the model's layers have "
            f"{_widths(layers)}: make it from this model."
        )
    for name in ("d_ff", "experts"):
        said = (
            np.broadcast_to(selection[name].values, len(layers)) if name in selection.coords else ()
        )
        for wide, value in zip(layers, said, strict=False):
            if value != getattr(wide, name):
                raise ValueError(
                    f"selection says {name}={value} of layer {wide.layer}, and the model has "
                    f"{getattr(wide, name)}: make it from this model."
                )
    for wide, mask in zip(layers, selection.values, strict=True):
        if mask[wide.d_ff :].any():
            raise ValueError(
                f"selection keeps neurons of layer {wide.layer} beyond its {wide.d_ff}: make it "
                "from this model."
            )


def _widths(layers: Sequence[Wide]) -> str:
    different = sorted({wide.d_ff for wide in layers})
    return str(different[0]) if len(different) == 1 else f"up to {different[-1]}"


# --------------------------------------------------------------------------------------
# Indices


def _of_indices(selection: Mapping[Any, Any], layers: Sequence[Wide]) -> dict[int, np.ndarray]:
    if texts := [key for key in selection if isinstance(key, str)]:
        raise TypeError(
            f"selection names layers by strings ({_listed(map(repr, texts))}): give their whole "
            "numbers, as {int(layer): kept for layer, kept in selection.items()}."
        )
    _check_layers(selection, [wide.layer for wide in layers])
    return {wide.layer: _mask(selection[wide.layer], wide) for wide in layers}


def _mask(indices: Any, wide: Wide) -> np.ndarray:
    """Mask of the kept neurons of one layer; a mask itself is one already."""
    where = f" of layer {wide.layer}"
    values = _array(indices, where)
    _check_dtype(values.dtype, where, "biu")
    if values.ndim == 2:
        if len(values) != 1:
            one = "{layer: kept[0] for layer, kept in twin.selection.items()}"
            raise ValueError(_of_sequences(len(values), one))
        values = values[0]
    if values.ndim != 1:
        raise ValueError(
            f"selection{where} has {values.ndim} dimensions: give the indices of the neurons that "
            "are kept, (k,)."
        )
    if values.dtype.kind == "b":
        if len(values) != wide.d_ff:
            raise ValueError(
                f"selection{where} is a mask of {len(values)} neurons, and the layer has "
                f"{wide.d_ff}: make it from this model."
            )
        return values.copy()
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < wide.d_ff:
        raise ValueError(
            f"selection{where} has neurons from {values.min()} to {values.max()}, and the layer "
            f"has those from 0 to {wide.d_ff - 1}: make it from this model."
        )
    if len(np.unique(values)) < len(values):
        if {*np.unique(values).tolist()} <= {0, 1}:
            raise TypeError(
                f"selection{where} is a mask of the numbers 0 and 1, where whole numbers are "
                "indices of neurons: make it bool."
            )
        raise ValueError(f"selection{where} has a neuron twice: give each kept neuron once.")
    mask = np.zeros(wide.d_ff, bool)
    mask[values] = True
    return mask


def _array(indices: Any, where: str) -> np.ndarray:
    if isinstance(indices, Tensor):
        indices = indices.detach().cpu()
        return (indices.float() if indices.is_floating_point() else indices).numpy()
    try:
        values = np.asarray(indices)
    except (TypeError, ValueError):  # rows of different lengths
        values = np.array(None)
    if values.size == 0 and values.dtype.kind == "f":  # an empty list
        values = values.astype(np.int64)
    if values.dtype.kind == "O":
        raise TypeError(
            f"selection{where} is a {type(indices).__name__}: give the indices of the neurons that "
            "are kept."
        )
    return values


# --------------------------------------------------------------------------------------
# Both


def _check_dtype(dtype: np.dtype, where: str, kinds: str = "b") -> None:
    """A mask, or indices; but no statistic, nor what had no value in some place."""
    if dtype.kind in kinds:
        return
    if dtype.kind == "f":
        raise TypeError(
            f"selection{where} is of numbers, a statistic: give flocking.select(statistic, "
            "density)."
        )
    why = " (as after where, reindex or concat, which leave places without a value)"
    raise TypeError(
        f"selection{where} is of dtype {dtype}{why if dtype.kind == 'O' else ''}: give a bool "
        "array, True for kept neurons, as flocking.select returns."
    )


def _check_counts(mask: np.ndarray, wide: Wide) -> None:
    if not mask.any():
        raise ValueError(
            f"selection keeps no neuron of layer {wide.layer}: keep one or more. (Where a "
            "statistic is NaN, flocking.select keeps none.)"
        )
    counts = mask.reshape(wide.experts, -1).sum(axis=1)
    if len({*counts.tolist()}) > 1:
        raise ValueError(
            f"selection keeps {counts.min()} to {counts.max()} neurons of the experts of layer "
            f"{wide.layer}, which have one width in a model: keep as many in each, as "
            "flocking.select does."
        )


def _listed(values: Iterable[Hashable]) -> str:
    """A few of several labels, in words."""
    words = [str(value) for value in values]
    return ", ".join(words) if len(words) <= 8 else f"{', '.join(words[:6])}, ..., {words[-1]}"
