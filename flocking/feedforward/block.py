"""One feed-forward (FF) block, and the error for models that have none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flocking.feedforward.moe import is_experts
from flocking.models import device_of


class UnsupportedModelError(ValueError):
    """The model has no FF block that can be located and proved."""


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One FF block: ``down(z)`` with ``z = act(gate(x)) * up(x)`` or ``z = act(up(x))``.

    Attributes
    ----------
    layer : int
        Index of the decoder (or encoder) layer that holds the block.
    path : str
        Path of the smallest module that holds all of the block's projections; of the
        down-projection, where that is the whole model.
    d_ff : int
        Number of neurons, the width of ``z``; of a mixture of experts, all of theirs together.
    up, down : torch.nn.Module
        The projections. The input of ``down`` is the tensor ``z`` that is recorded. Of a mixture
        of experts, the one module that holds all of them.
    gate : torch.nn.Module or None
        The projection inside the activation function; None in a plain block, and the
        same module as ``up`` where the two are fused into one matrix of ``2 * d_ff`` rows.
    interleaved : bool
        Whether a fused matrix alternates gate and up row by row (else it stacks them).
    error : float
        Largest relative error seen in the proof; NaN if unproved (meta device).
    experts : int
        Of a mixture, which share the neurons evenly; 1 in a dense block.
    prunable : bool
        Whether its neurons are independent of each other. Where they are not (a norm between
        the activation function and the down-projection, say), they can be recorded only.
    token_first : bool
        Whether the model computes z as (token, sequence, neuron), as XLNet does.
    offset : int or None
        Where the text's tokens begin in a z that has rows for more than those: behind a prefix of
        the model's own, or before what fills them up. None if there are no such rows.
    call, calls : int
        Which of its runs in one forward pass this is, of how many, from 0. (Where layers share
        weights, or one is run repeatedly, each run counts as a layer.)
    """

    layer: int
    path: str
    d_ff: int
    up: nn.Module = field(repr=False)
    gate: nn.Module | None = field(repr=False)
    down: nn.Module = field(repr=False)
    interleaved: bool = field(default=False, repr=False)
    error: float = math.nan
    experts: int = 1
    prunable: bool = True
    token_first: bool = field(default=False, repr=False)
    offset: int | None = field(default=None, repr=False)
    call: int = field(default=0, repr=False)
    calls: int = field(default=1, repr=False)

    @property
    def weight(self) -> Tensor:
        """Of the down-projection(s); without values while they are offloaded."""
        return self.down.down_proj if self.kind == "experts" else self.down.weight

    @property
    def device(self) -> torch.device:
        """Where the block computes, which need not be where its weights are kept."""
        return device_of(self.down, "down_proj" if self.kind == "experts" else "weight")

    @property
    def kind(self) -> str:
        """``"plain"``, ``"gated"``, ``"fused"`` (gate and up in one matrix) or ``"experts"``."""
        if is_experts(self.down):
            return "experts"
        if self.gate is None:
            return "plain"
        return "fused" if self.gate is self.up else "gated"
