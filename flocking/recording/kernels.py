"""Windowed sums on CUDA devices, in Triton: activations are read twice and not copied.

With torch's own operations, the sums of :class:`flocking.recording.Moments` move 34 bytes for each
activation in bfloat16, since squares and magnitudes are written out in float32; the kernels move
four. Sums are made in the same order every time, without atomic additions, so that a recording
does not change from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 128  # most tokens that one program sums
_ROWS, _COLUMNS = 16, 128  # tokens and neurons that a program reads at a time
_BLOCK = 1024  # neurons that a token's norm is taken over at a time


class Pieces(NamedTuple):
    """A chunk's real tokens, cut so that each piece lies in one window.

    Attributes
    ----------
    spans : Tensor of int32, shape (piece, 3)
        Sequence, first token, and the token after the last; ordered by sequence and window.
    targets : Tensor of int32, shape (sum, 2)
        Sequence and window that each sum is added to.
    offsets : Tensor of int32, shape (sum + 1,)
        First piece of each sum.
    real : Tensor of int32, shape (sequence, token)
        1 for real tokens, 0 for padding.
    """

    spans: Tensor
    targets: Tensor
    offsets: Tensor
    real: Tensor

    @classmethod
    def of(cls, window: Tensor, device: torch.device) -> Pieces:
        """From each token's window, on the CPU, int64 (sequence, token), -1 for padding."""
        sequences, tokens = window.shape
        place = torch.arange(sequences * tokens, device="cpu")
        token = place % tokens
        flat = window.flatten()
        new = (token == 0) | (flat != flat.roll(1))
        begun = torch.where(new, place, 0).cummax(dim=0).values
        first = torch.nonzero(new | ((place - begun) % _TOKENS == 0))[:, 0]
        last = torch.cat((first[1:], first.new_tensor([len(flat)])))
        kept = flat[first] >= 0
        first, last = first[kept], last[kept]
        target = torch.stack((first // tokens, flat[first]), dim=1)
        order = (target[:, 0] * (int(flat.max()) + 1) + target[:, 1]).argsort(stable=True)
        first, last, target = first[order], last[order], target[order]
        spans = torch.stack((target[:, 0], token[first], token[first] + last - first), dim=1)
        targets, counts = torch.unique_consecutive(target, dim=0, return_counts=True)
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(dim=0)))
        parts = (spans, targets, offsets, window >= 0)
        return cls(*(part.to(device, torch.int32) for part in parts))


def add(z: Tensor, pieces: Pieces, energy: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Add a chunk's energy and mass to their sums.

    Parameters
    ----------
    z : Tensor, shape (sequence, token, neuron)
        In any floating dtype, on a CUDA device.
    pieces : Pieces
        On the same device.
    energy, mass : Tensor of float32, shape (sequence, window, neuron)
        Contiguous, on the same device; added to in place.

    Returns
    -------
    norm, l1 : Tensor of float32, shape (sequence, token)
        As :meth:`flocking.recording.Moments.update` gives them.
    """
    if z.stride(-1) != 1:
        z = z.contiguous()
    sequences, tokens, width = z.shape
    strides = z.stride()[:2]
    norm, l1 = (z.new_empty(sequences, tokens, dtype=torch.float32) for _ in range(2))
    count, sums = len(pieces.spans), len(pieces.targets)
    parts = z.new_empty(2, count, width, dtype=torch.float32)  # energy and mass of each piece
    columns = triton.cdiv(width, _COLUMNS)
    with torch.cuda.device_of(z):
        _norms[(sequences * tokens,)](
            z, pieces.real, norm, l1, tokens, width, *strides, block=_BLOCK
        )
        if count:
            _sum_pieces[(count, columns)](
                z, norm, pieces.spans, *parts, tokens, width, *strides,
                rows=_ROWS, columns=_COLUMNS,
            )  # fmt: skip
            _add_up[(sums, columns)](
                *parts, pieces.targets, pieces.offsets, energy, mass, energy.shape[1], width,
                columns=_COLUMNS,
            )  # fmt: skip
    return norm, l1


@triton.jit
def _norms(
    z, real, norm, l1, tokens, width, sequence_stride, token_stride, block: tl.constexpr
):  # one token
    row = tl.program_id(0)
    sequence, token = row // tokens, row % tokens
    start = z + sequence.to(tl.int64) * sequence_stride + token.to(tl.int64) * token_stride
    inside = tl.where(tl.load(real + row) != 0, width, 0)  # nothing is read at padding
    squares = tl.zeros((block,), tl.float32)
    sizes = tl.zeros((block,), tl.float32)
    for first in range(0, width, block):
        column = first + tl.arange(0, block)
        x = tl.load(start + column, mask=column < inside, other=0.0).to(tl.float32)
        squares += x * x
        sizes += tl.abs(x)
    length = tl.sqrt(tl.sum(squares, axis=0))
    divisor = tl.where(length < 1e-18, 1e-18, length)
    tl.store(norm + row, length)
    tl.store(l1 + row, tl.sum(sizes, axis=0) / divisor)


@triton.jit
def _sum_pieces(
    z, norm, spans, energies, masses, tokens, width, sequence_stride, token_stride,
    rows: tl.constexpr, columns: tl.constexpr,
):  # one piece, some neurons  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    sequence = tl.load(spans + 3 * piece).to(tl.int64)
    start = tl.load(spans + 3 * piece + 1)
    stop = tl.load(spans + 3 * piece + 2)
    there = column < width
    # (Each row of a tile is summed separately until the end: adding rows up takes a barrier.)
    energy = tl.zeros((rows, columns), tl.float32)
    mass = tl.zeros((rows, columns), tl.float32)
    for first in range(start, stop, rows):
        row = first + tl.arange(0, rows)
        length = tl.load(norm + sequence * tokens + row, mask=row < stop, other=1.0)
        scale = 1.0 / tl.where(length < 1e-18, 1e-18, length)
        place = sequence * sequence_stride + row.to(tl.int64)[:, None] * token_stride
        inside = (row < stop)[:, None] & there[None, :]
        x = tl.load(z + place + column[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.abs(x) * scale[:, None]
        energy += r * r
        mass += r
    tl.store(energies + piece * width + column, tl.sum(energy, axis=0), mask=there)
    tl.store(masses + piece * width + column, tl.sum(mass, axis=0), mask=there)


@triton.jit
def _add_up(
    energies, masses, targets, offsets, energy, mass, windows, width, columns: tl.constexpr
):  # one window of one sequence, some neurons
    number = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    there = column < width
    sequence, window = tl.load(targets + 2 * number), tl.load(targets + 2 * number + 1)
    place = (sequence.to(tl.int64) * windows + window) * width + column
    first, last = tl.load(offsets + number), tl.load(offsets + number + 1)
    row = first.to(tl.int64) * width + column
    e, m = tl.load(energy + place, mask=there), tl.load(mass + place, mask=there)
    for _ in range(first, last):
        e += tl.load(energies + row, mask=there)
        m += tl.load(masses + row, mask=there)
        row += width
    tl.store(energy + place, e, mask=there)
    tl.store(mass + place, m, mask=there)
