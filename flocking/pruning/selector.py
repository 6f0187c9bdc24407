"""From the moments of a prompt to the neurons that are kept, for all layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flocking.analysis import magnitude, top_k
from flocking.feedforward import FeedForward
from flocking.pruning.methods import Method
from flocking.pruning.prompt import Read

Scope = Literal["shared", "sequence"]


@dataclass
class Selected:
    """A selection, and what tells whether it can be used. Lists have one tensor a block.

    Attributes
    ----------
    kept : list of Tensor of int64, shape (k,) or (sequence, k)
        Indices of the kept neurons, ascending.
    finite, numbers : list of Tensor of bool, shape ()
        Whether the statistic is finite, and whether the method returned no NaN.
    unreached : list of Tensor of int64, shape ()
        Experts of mixtures that no token was routed to, for each sequence and mixture.
    """

    kept: list[Tensor]
    finite: list[Tensor]
    numbers: list[Tensor]
    unreached: list[Tensor]


class Selector:
    """Selects neurons from what was read: a method, and how it is applied to a batch.

    Parameters
    ----------
    blocks : list of (FeedForward, int)
        The blocks, and how many neurons to keep in each (of a mixture, in each expert).
    method, scope, seed
        As of :func:`flocking.griffin`.
    """

    def __init__(
        self, blocks: list[tuple[FeedForward, int]], method: Method, scope: Scope, seed: int
    ) -> None:
        self._blocks = blocks
        self.method, self.scope, self.seed = method, scope, seed

    def select(self, read: Read) -> Selected:
        """Select neurons of every block.

        Layers of one shape are computed together, and the device is not waited for, but with
        mixtures: whoever uses the result checks its flags when that costs nothing.
        """
        apart = self.scope == "sequence"
        # Each sequence draws the same numbers, so that its selection is the same in a batch and
        # alone, and a beam goes on with the selection of the beam that it comes from.
        count = len(read.tokens) if apart else 1
        generators = [torch.Generator().manual_seed(self.seed) for _ in range(count)]
        statistics = self._statistics(read)
        finite = _together(lambda each: each.isfinite().flatten(1).all(dim=1), statistics)
        statistics, unreached = self._with_weights(statistics)
        scores = [
            torch.stack(
                [
                    self._scores(block, k, statistic, generator)
                    for statistic, generator in zip(rows, generators, strict=True)
                ]
            )
            for (block, k), rows in zip(self._blocks, statistics, strict=True)
        ]
        numbers = _together(lambda each: ~each.isnan().flatten(1).any(dim=1), scores)
        kept = _together(_largest, scores, [k for _, k in self._blocks])
        return Selected(kept if apart else [k[0] for k in kept], finite, numbers, unreached)

    def _statistics(self, read: Read) -> list[Tensor]:
        """Of each block, float64 (sequence, neuron), with one row if all sequences share it."""

        def of(energy: Tensor) -> Tensor:
            # Computed as by flocking.statistic: float32 windows, added in float64.
            each = energy.double().sum(dim=2).sqrt()
            if self.scope == "sequence":
                return each
            # (In float64, whatever torch's default dtype is.)
            counts = read.tokens.to(each.device, non_blocking=True).clamp_min(1)
            share = counts.double().rsqrt()
            return (each * share[:, None]).sum(dim=1, keepdim=True)

        return _together(of, [read.moments[block.layer].energy for block, _ in self._blocks])

    def _with_weights(self, statistics: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of mixtures, (sequence, expert, neuron), with experts that no token was routed to filled.

        The text says nothing about these: their weights do. Gives also how many these are.
        """
        absent = {}
        for place, (block, _) in enumerate(self._blocks):
            if block.kind == "experts":
                statistic = statistics[place].unflatten(1, (block.experts, -1))
                absent[place] = (statistic == 0).all(dim=2, keepdim=True)
                statistics[place] = statistic
        # (All weights of a mixture take longer to read than the device takes to say whether they
        # are needed.)
        needed = {place: where.any() for place, where in absent.items()}
        for place, where in absent.items():
            if needed[place]:
                statistic = statistics[place]
                by_weights = magnitude(self._blocks[place][0]).to(statistic)
                by_weights = by_weights.view_as(statistic[0])
                statistics[place] = torch.where(where, by_weights, statistic)
        return statistics, [row.sum() for where in absent.values() for row in where]

    def _scores(
        self, block: FeedForward, k: int, statistic: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The method's score of each neuron, (expert, neuron); a dense block is one expert."""
        scores = self.method(statistic, k, block, generator)
        if not isinstance(scores, Tensor) or scores.shape != statistic.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            size = " x ".join(map(str, statistic.shape))
            raise ValueError(
                f"expected one score for each of {size} neurons, method returned {got}."
            )
        scores = scores if scores.is_floating_point() else scores.double()
        return scores.view(block.experts, -1)


def _together(
    function: Callable[..., Tensor], tensors: list[Tensor], numbers: list[int] | None = None
) -> list[Tensor]:
    """The function's result for each tensor (and number), with equal shapes in one call."""
    numbers = numbers or [0] * len(tensors)
    groups: dict[tuple, list[int]] = {}
    for place, (tensor, number) in enumerate(zip(tensors, numbers, strict=True)):
        groups.setdefault((tensor.shape, tensor.device, tensor.dtype, number), []).append(place)
    results = list(tensors)
    for (*_, number), places in groups.items():
        stacked = torch.stack([tensors[place] for place in places])
        found = function(stacked, number) if number else function(stacked)
        for place, result in zip(places, found, strict=True):
            results[place] = result
    return results


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` best neurons of each expert, ascending, numbered through all experts.

    From (..., expert, neuron) to (..., expert * k), without asking the device how many there are.
    """
    kept = top_k(scores, k).to(torch.uint8)
    within = kept.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    first = torch.arange(scores.shape[-2], device=scores.device) * scores.shape[-1]
    return (within + first[:, None]).flatten(-2)
