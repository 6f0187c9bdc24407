"""From a statistic to the experts: how many neurons are kept, and which.

The analysis and the inference of this package select with these same functions. A method gives
every neuron a score, and the ``k`` neurons with the largest scores are the experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flocking.experts import row_norms
from flocking.feedforward import FeedForward
from flocking.projections import dense, fused_rows


def expert_count(density: float, d_ff: int) -> int:
    """Neurons kept at a density: ``floor(density * d_ff + 1e-9)``.

    Parameters
    ----------
    density : float
        Fraction to keep, in (0, 1].
    d_ff : int
        Neurons there are.

    Returns
    -------
    int

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
    if block.kind == "experts":
        return row_norms(block.down).flatten()

    def norms_of(projection: torch.nn.Module) -> Tensor:
        return torch.linalg.vector_norm(dense(projection), dim=1)

    norms = norms_of(block.up)
    if block.kind == "plain":
        return norms
    if block.kind == "gated":
        return norms * norms_of(block.gate)
    neurons = torch.arange(block.d_ff, device=norms.device)
    both = norms[fused_rows(neurons, block.d_ff, block.interleaved)]
    return both.unflatten(0, (-1, 2) if block.interleaved else (2, -1)).prod(
        1 if block.interleaved else 0
    )


# --------------------------------------------------------------------------------------
# Methods

# From a statistic (float64, shape (..., neuron)), the number k to keep, the block and a source of
# random numbers, a score for each neuron, of which the k largest are kept. GRIFFIN gives one
# statistic at a time, shape (d_ff,), or (expert, neuron) of a mixture of experts, in each of which
# k neurons are kept. A user's own function fits the same place.
Method = Callable[[Tensor, int, FeedForward, torch.Generator], Tensor]


def by_statistic(
    statistic: Tensor, k: int, block: FeedForward, generator: torch.Generator
) -> Tensor:
    """The largest statistic: GRIFFIN (Dong, Chen and Chi 2024, arXiv 2404.01365, section 4.1)."""
    return statistic


def sampled(statistic: Tensor, k: int, block: FeedForward, generator: torch.Generator) -> Tensor:
    """Drawn without replacement, each time in proportion to the statistic (ibid., section 5.3).

    The k largest of ``log s + g``, with standard Gumbel ``g``, are such a sample (Vieira 2014;
    Kool, van Hoof and Welling 2019, arXiv 1903.06059, section 2.3).
    """
    uniform = uniformly(statistic, k, block, generator)
    return statistic.log() - (-uniform.log()).log()


def half_sampled(
    statistic: Tensor, k: int, block: FeedForward, generator: torch.Generator
) -> Tensor:
    """The largest ``k // 2``, and the others drawn as by :func:`sampled` (ibid., section 5.3)."""
    drawn = sampled(statistic, k, block, generator)
    return drawn if k < 2 else drawn.masked_fill(top_k(statistic, k // 2), math.inf)


def uniformly(statistic: Tensor, k: int, block: FeedForward, generator: torch.Generator) -> Tensor:
    """All neurons alike: the control of every other method."""
    # Drawn on the CPU, so that a seed gives the same experts on every device.
    uniform = torch.rand(statistic.shape, generator=generator, dtype=torch.float64)
    return uniform.clamp_min(torch.finfo(torch.float64).tiny).to(
        statistic.device, non_blocking=True
    )


def by_magnitude(
    statistic: Tensor, k: int, block: FeedForward, generator: torch.Generator
) -> Tensor:
    """Static: the weights' own norms, see :func:`magnitude`; the text does not matter."""
    return magnitude(block).reshape(statistic.shape)


def by_reference(reference: Callable[[FeedForward], Tensor]) -> Method:
    """Static: the largest statistic over other texts; this text does not matter.

    Parameters
    ----------
    reference : callable
        Gives a block's static statistic, shape (d_ff,).
    """

    def method(statistic: Tensor, k: int, block: FeedForward, generator: object) -> Tensor:
        return reference(block).to(statistic).reshape(statistic.shape)

    return method


def global_local(reference: Callable[[FeedForward], Tensor], weight: float) -> Method:
    """Ranks within the prompt and ranks over other texts, averaged.

    Global-local aggregation of ranks (GLASS, arXiv 2508.14302):
    ``(1 - weight) * rank(s) + weight * rank(reference)``, ranks ascending. GLASS's global ranks
    are the model's own; here they are those of a calibration set of texts.

    Parameters
    ----------
    reference : callable
        Gives a block's static statistic, shape (d_ff,).
    weight : float
        Of the global ranks, in [0, 1]: at 0 GRIFFIN, at 1 :func:`by_reference`.

    Raises
    ------
    ValueError
        If `weight` is not in [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: give the weight of the global ranks, from 0 to 1.")

    def method(statistic: Tensor, k: int, block: FeedForward, generator: object) -> Tensor:
        static = _ranks(reference(block).to(statistic).reshape(statistic.shape))
        return (1 - weight) * _ranks(statistic) + weight * static

    return method


def _ranks(values: Tensor) -> Tensor:
    """Ascending ranks along the last axis; of equal values the first ranks highest."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(values.shape[-1], 0, -1, dtype=values.dtype, device=values.device)
    return torch.empty_like(values).scatter_(-1, order, ranks.expand_as(values))


WITH_REFERENCE = ("static", "global-local")  # they need a statistic of other texts

METHODS: dict[str, Method] = {
    "topk": by_statistic,
    "sampled": sampled,
    "half-sampled": half_sampled,
    "random": uniformly,
    "magnitude": by_magnitude,
}
