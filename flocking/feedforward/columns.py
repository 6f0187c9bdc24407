"""Copies of some columns of a matrix on CUDA devices, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 8, 256  # of the copy, made by one program


def take_columns(whole: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Copy some columns of a matrix.

    Parameters
    ----------
    whole : Tensor, shape (row, column)
        On a CUDA device.
    index : Tensor of int64, shape (k,)
        Columns; read once for several rows, where ``torch.gather`` reads it for each.
    out : Tensor, shape (row, k)
        Of the same dtype and device, contiguous.

    Returns
    -------
    Tensor
        `out`.
    """
    if whole.stride(1) != 1:
        return torch.index_select(whole, 1, index, out=out)
    grid = (triton.cdiv(whole.shape[0], _ROWS), triton.cdiv(len(index), _COLUMNS))
    with torch.cuda.device_of(whole):
        _take_columns[grid](
            whole, index, out, len(whole), len(index), whole.stride(0),
            rows=_ROWS, columns=_COLUMNS,
        )  # fmt: skip
    return out


@triton.jit
def _take_columns(
    whole, index, out, height, kept, stride, rows: tl.constexpr, columns: tl.constexpr
):
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    there = column < kept
    source = tl.load(index + column, mask=there, other=0)
    inside = (row < height)[:, None] & there[None, :]
    value = tl.load(whole + row[:, None] * stride + source[None, :], mask=inside)
    tl.store(out + row[:, None] * kept + column[None, :], value, mask=inside)
