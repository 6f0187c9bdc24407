"""Methods: from a statistic to a score for each neuron, of which the ``k`` largest are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from flocking.analysis import magnitude, top_k
from flocking.feedforward import FeedForward

# --------------------------------------------------------------------------------------
# Methods

# A method gets a statistic (float64, shape (..., neuron)), the number k to keep, the block and a
# random generator, and returns a score for each neuron, of which the k largest are kept. GRIFFIN
# passes one statistic at a time, of shape (d_ff,), or (expert, neuron) for a mixture of experts,
# in each of which k neurons are kept. Users' functions have the same signature.
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
    """Every neuron with the same probability: the control of every other method."""
    # Drawn on the CPU, so that a seed gives the same selection on every device.
    uniform = torch.rand(statistic.shape, generator=generator, dtype=torch.float64, device="cpu")
    return uniform.clamp_min(torch.finfo(torch.float64).tiny).to(
        statistic.device, non_blocking=True
    )


def by_magnitude(
    statistic: Tensor, k: int, block: FeedForward, generator: torch.Generator
) -> Tensor:
    """Static: the norms of the weights, see :func:`magnitude`; the text does not matter."""
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
    """Weighted mean of ranks within the prompt and ranks over other texts.

    Global-local aggregation of ranks (GLASS, arXiv 2508.14302):
    ``(1 - weight) * rank(s) + weight * rank(reference)``, ranks ascending. GLASS takes global ranks
    from the model itself; here they come from a calibration set of texts.

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
    check_weight(weight)

    def method(statistic: Tensor, k: int, block: FeedForward, generator: object) -> Tensor:
        static = _ranks(reference(block).to(statistic).reshape(statistic.shape))
        return (1 - weight) * _ranks(statistic) + weight * static

    return method


def over_runs(values: np.ndarray, blocks: Sequence[FeedForward]) -> np.ndarray:
    """Statistics of blocks that run several times in a pass, each over all of its runs.

    Parameters
    ----------
    values : ndarray of float64, shape (layer, neuron)
        A statistic of each run, a norm over tokens.
    blocks : sequence of FeedForward
        Of the same layers; runs of one block have the same down-projection.

    Returns
    -------
    ndarray of float64, shape (layer, neuron)
        The norm over the tokens of all runs, the same in each of them.
    """
    joined = values.copy()
    for row, block in enumerate(blocks):
        runs = [number for number, other in enumerate(blocks) if other.down is block.down]
        if len(runs) > 1:
            joined[row] = np.sqrt(np.square(values[runs]).sum(axis=0))
    return joined


def check_weight(weight: object) -> None:
    """Raise a ValueError for a weight that is no number from 0 to 1."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) <= 1:
        raise ValueError(f"weight={weight!r}: give the weight of the global ranks, from 0 to 1.")


def _ranks(values: Tensor) -> Tensor:
    """Ascending ranks along the last axis; among equal values, the first has the highest."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(values.shape[-1], 0, -1, dtype=values.dtype, device=values.device)
    return torch.empty_like(values).scatter_(-1, order, ranks.expand_as(values))


# Methods that need a statistic of other texts, that draw, and for which the text does not matter.
WITH_REFERENCE = ("static", "global-local")
DRAWN = ("sampled", "half-sampled", "random")
WITHOUT_TEXT = ("static", "magnitude")

METHODS: dict[str, Method] = {
    "topk": by_statistic,
    "sampled": sampled,
    "half-sampled": half_sampled,
    "random": uniformly,
    "magnitude": by_magnitude,
}
