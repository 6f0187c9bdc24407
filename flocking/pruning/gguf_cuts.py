"""Cutting the tensors of a GGUF file in their bytes, and proving what was cut.

Rows are whole quantisation blocks: their bytes are copied, and lose nothing. Columns cross the
blocks: they are dequantised, cut and quantised again, unless each value has its own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from flocking.pruning.gguf_blocks import Cut

if TYPE_CHECKING:
    from flocking.models.gguf import Tensor

Kind = GGMLQuantizationType

# Types that columns can be quantised to, with the largest difference that this makes: in parts of
# the largest value of a block (a block's scale is a float16 itself), and beyond that. Only types
# that keep an exact zero, as Q4_1 and Q5_1 do not.
STEPS = {
    Kind.F32: (0.0, 0.0),
    Kind.F16: (2.0**-11, 2.0**-25),
    Kind.BF16: (2.0**-8, 0.0),
    Kind.Q8_0: (1 / 127 + 2.0**-10, 128 * 2.0**-25),
    Kind.Q5_0: (1 / 16 + 2.0**-10, 16 * 2.0**-25),
    Kind.Q4_0: (1 / 8 + 2.0**-10, 8 * 2.0**-25),
}
AGAIN = "check the disk, and try again"
_AT_ONCE = 2**22  # values that are dequantised at a time


@dataclass(frozen=True)
class Narrower:
    """What a tensor is cut to.

    Attributes
    ----------
    before, after : Tensor
        What the tables of both files say of it; their places are not used.
    how : Cut
        Where its neurons are.
    kept : ndarray of bool, shape (experts, d_ff)
        True for kept neurons.
    width : int
        Neurons of each expert that are stored, some of which may add nothing.
    again : bool
        Whether it is quantised again.
    """

    before: Tensor
    after: Tensor
    how: Cut
    kept: np.ndarray
    width: int
    again: bool


def narrower(
    tensor: Tensor, how: Cut, kept: np.ndarray, width: int, down: GGMLQuantizationType
) -> Narrower:
    """The plan of a cut; `down` is the type that columns get where blocks are cut through."""
    shape, again = list(tensor.shape), False
    if how is Cut.COLUMNS:
        shape[0] = width
        again = not (_in_bytes(tensor.kind) or _is_whole(kept, width))
    else:
        axis = 1 if tensor.name.endswith(".weight") else 0
        shape[axis] = width * (2 if how is Cut.HALVES else 1)
    kind, sizes = (down if again else tensor.kind), tuple(shape)
    after = tensor._replace(shape=sizes, kind=kind, size=byte_count(sizes, kind))
    return Narrower(tensor, after, how, kept, width, again)


def byte_count(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes that a tensor takes; `shape` as in the file."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def pieces(cut: Narrower, data: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of a cut tensor, a part at a time, from the bytes of the whole one, uint8 (n,)."""
    if cut.how is Cut.COLUMNS:
        yield from _columns(cut, data)
    else:
        yield from _rows(cut, data)


def difference(cut: Narrower, before: np.ndarray, after: np.ndarray) -> str:
    """Why a tensor that was written is not what it was cut from, and a remedy; empty if it is.

    Parameters
    ----------
    cut : Narrower
        What was cut.
    before, after : ndarray of uint8, shape (n,)
        The bytes of the tensor in both files.
    """
    if cut.how is not Cut.COLUMNS:
        return _row_difference(cut, before, after)
    return (_step_difference if cut.again else _exact_difference)(cut, before, after)


def _in_bytes(kind: GGMLQuantizationType) -> bool:
    """Whether each value has its own bytes, so that columns can be cut without loss."""
    return bool(GGML_QUANT_SIZES[kind][0] == 1)


def _is_whole(kept: np.ndarray, width: int) -> bool:
    return bool(kept.all()) and width == kept.shape[1]


def _order(kept: np.ndarray, width: int) -> np.ndarray:
    """Which neuron each stored one is: the kept ones, and the last of them to fill the width up.

    So a filling row lies in the same quantisation block of activations as the neuron that it
    repeats, and changes no other's rounding.
    """
    indices = np.flatnonzero(kept)
    return np.concatenate([indices, np.full(width - len(indices), indices[-1])])


# --------------------------------------------------------------------------------------
# Rows


def _by_expert(cut: Narrower, tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """Bytes of rows, by expert and half: (expert, half, row, byte)."""
    halves = 2 if cut.how is Cut.HALVES else 1
    rows = cut.kept.shape[1] if tensor is cut.before else cut.width
    return data.reshape(len(cut.kept), halves, rows, -1)


def _rows(cut: Narrower, data: np.ndarray) -> Iterator[np.ndarray]:
    for expert, kept in zip(_by_expert(cut, cut.before, data), cut.kept, strict=True):
        order = _order(kept, cut.width)
        for half in expert:
            yield half[order]


def _row_difference(cut: Narrower, before: np.ndarray, after: np.ndarray) -> str:
    old, new = _by_expert(cut, cut.before, before), _by_expert(cut, cut.after, after)
    for expert, kept in enumerate(cut.kept):
        count = int(kept.sum())
        for half in range(old.shape[1]):
            if not np.array_equal(new[expert, half, :count], old[expert, half, kept]):
                return f"has rows that differ from those that were kept: {AGAIN}"
    return ""


# --------------------------------------------------------------------------------------
# Columns


def _groups(cut: Narrower, *data: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """An expert's kept neurons and some of its rows, as bytes (row, byte), in each of `data`."""
    rows = cut.before.shape[1]
    at_once = max(1, _AT_ONCE // cut.before.shape[0])
    whole = [one.reshape(len(cut.kept), rows, -1) for one in data]
    for expert, kept in enumerate(cut.kept):
        for start in range(0, rows, at_once):
            yield kept, *(one[expert, start : start + at_once] for one in whole)


def _columns(cut: Narrower, data: np.ndarray) -> Iterator[np.ndarray]:
    whole = _is_whole(cut.kept, cut.width)
    for kept, rows in _groups(cut, data):
        if cut.again:
            values = np.zeros((len(rows), cut.width), np.float32)
            values[:, : kept.sum()] = _values(rows, cut.before.kind)[:, kept]
            yield _quantized(values, cut.after.kind)
        elif whole:
            yield rows
        else:
            size = GGML_QUANT_SIZES[cut.before.kind][1]
            values = np.zeros((len(rows), cut.width, size), np.uint8)
            values[:, : kept.sum()] = rows.reshape(len(rows), -1, size)[:, kept]
            yield values.reshape(len(rows), -1)


def _values(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Float32 values of rows of bytes."""
    with np.errstate(all="ignore"):
        return np.asarray(dequantize(np.ascontiguousarray(rows), kind), np.float32)


def _quantized(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes of rows of values."""
    with np.errstate(all="ignore"):
        return quantize(values, kind).view(np.uint8)


def _exact_difference(cut: Narrower, before: np.ndarray, after: np.ndarray) -> str:
    whole, size = _is_whole(cut.kept, cut.width), GGML_QUANT_SIZES[cut.before.kind][1]
    for kept, old, new in _groups(cut, before, after):
        if whole:
            if not np.array_equal(old, new):
                return f"differs, though all of it was kept: {AGAIN}"
            continue
        old, new = (one.reshape(len(one), -1, size) for one in (old, new))
        if not np.array_equal(new[:, : kept.sum()], old[:, kept]) or new[:, kept.sum() :].any():
            return f"has columns that differ from those that were kept: {AGAIN}"
    return ""


def _step_difference(cut: Narrower, before: np.ndarray, after: np.ndarray) -> str:
    """Whether each value is within one step of the quantiser, and what fills up exactly zero."""
    block = GGML_QUANT_SIZES[cut.after.kind][0]
    for kept, old, new in _groups(cut, before, after):
        count = int(kept.sum())
        wanted = np.zeros((len(old), cut.width), np.float32)
        wanted[:, :count] = _values(old, cut.before.kind)[:, kept]
        if not np.isfinite(wanted).all():
            return "has values that are not finite: get the whole file again"
        found = _values(new, cut.after.kind)
        largest = np.abs(wanted).reshape(len(wanted), -1, block).max(axis=2).repeat(block, axis=1)
        share, beyond = STEPS[cut.after.kind]
        near = np.abs(found - wanted) <= largest * share + beyond
        if not near[:, :count].all():
            return (
                f"has values that {cut.after.kind.name} cannot hold: give another type for down, "
                "as 'F32'"
            )
        if found[:, count:].any():
            return f"has neurons that fill it up and are not zero: {AGAIN}"
    return ""
