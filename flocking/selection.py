"""From a statistic to the experts: how many neurons are kept, and which.

The analysis and the inference of this package select with these same functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flocking.feedforward import FeedForward
from flocking.shadow import fused_rows, width


def expert_count(density: float, d_ff: int) -> int:
    """Neurons kept at a density: ``floor(density * d_ff + 1e-9)``.

    Raises
    ------
    ValueError
        If `density` is not in (0, 1], or keeps no neuron at all.
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"density={density}: give the fraction of neurons to keep, above 0 and at most 1."
        )
    count = math.floor(density * d_ff + 1e-9)
    if count == 0:
        raise ValueError(f"density={density} keeps none of {d_ff} neurons: give {1 / d_ff:.2g} up.")
    return count


def top_k(statistic: Tensor, k: int) -> Tensor:
    """Mask of the `k` neurons with the largest statistic; ties go to the lowest index.

    Parameters
    ----------
    statistic : Tensor, shape (..., neuron)
        In any floating dtype, without NaN.
    k : int

    Returns
    -------
    Tensor of bool, shape (..., neuron)
        With `k` true values along the last axis.
    """
    lowest = statistic.kthvalue(statistic.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above, tied = statistic > lowest, statistic == lowest
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


@torch.no_grad()
def magnitude(block: FeedForward) -> Tensor:
    """Static statistic of a block's neurons: the product of their up and gate row norms.

    The baseline of Dong, Chen and Chi (2024, arXiv 2404.01365, section 5.1), which needs no
    text; for a plain block it is the up row norm alone.

    Returns
    -------
    Tensor of float32, shape (d_ff,)
        On the block's own device, in the weights' units (squared for gated blocks).
    """

    def row_norms(projection: torch.nn.Module) -> Tensor:
        weight = projection.weight.float()
        if weight.shape[0] != width(projection)[1]:  # GPT-2's Conv1D is stored transposed
            weight = weight.T
        return torch.linalg.vector_norm(weight, dim=1)

    norms = row_norms(block.up)
    if block.kind == "plain":
        return norms
    if block.kind == "gated":
        return norms * row_norms(block.gate)
    neurons = torch.arange(block.d_ff, device=norms.device)
    both = norms[fused_rows(neurons, block.d_ff, block.interleaved)]
    return both.unflatten(0, (-1, 2) if block.interleaved else (2, -1)).prod(
        1 if block.interleaved else 0
    )
