"""One feed-forward (FF) block, and the error for models that have none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flocking.feedforward.moe import is_experts
from flocking.models import device_of, tensor_of


class UnsupportedModelError(ValueError):
    """A transformers model in which FF blocks cannot be located and proved.

    Examples
    --------
    >>> import torch
    >>> broken = flocking.control(model)
    >>> for layer in broken.model.layers:
    ...     layer.mlp = torch.nn.Identity()
    >>> try:
    ...     flocking.feedforwards(broken)
    ... except flocking.UnsupportedModelError as error:
    ...     print(error)
    LlamaForCausalLM has no feed-forward block that flocking can prove: ...
    """


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One FF block: ``down(z)`` with ``z = act(gate(x)) * up(x)`` or ``z = act(up(x))``.

    Attributes
    ----------
    layer : int
        Index of the decoder (or encoder) layer that holds the block.
    path : str
        Path of the smallest module that holds all of the block's projections; that of the
        down-projection, if the smallest module is the whole model.
    d_ff : int
        Number of neurons, the width of ``z``; in a mixture, those of all experts together.
    up, down : torch.nn.Module
        The projections. The input of ``down`` is the tensor ``z`` that is recorded. In a mixture
        of experts, both are the one module that holds all experts.
    gate : torch.nn.Module or None
        The projection inside the activation function; None in a plain block. Where gate and up
        are fused into one matrix of ``2 * d_ff`` rows, the same module as ``up``.
    interleaved : bool
        Whether a fused matrix alternates gate and up row by row (else it stacks them).
    error : float
        Largest relative error seen in the proof; NaN if unproved (meta device).
    experts : int
        Number of experts in a mixture, which share the neurons evenly; 1 in a dense block.
    prunable : bool
        Whether its neurons are independent of each other. If not (because of a norm between the
        activation function and the down-projection, for example), they can only be recorded.
    token_first : bool
        Whether the model computes z as (token, sequence, neuron), as XLNet does.
    offset : int or None
        Where the text's tokens begin in a z that has more rows than those: after a prefix that
        the model adds, or before rows that fill it up. None if there are no such rows.
    call, calls : int
        Which run of the block in one forward pass this is, counted from 0, and how many there
        are. Where layers share weights, or a layer runs repeatedly, each run counts as a layer.

    Examples
    --------
    >>> block = flocking.feedforwards(model)[0]
    >>> block
    FeedForward(layer=0, path='model.layers.0.mlp', d_ff=64, error=..., experts=1, prunable=True)
    >>> block.kind, block.down
    ('gated', Linear(in_features=64, out_features=32, bias=False))
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
        """Weight of the down-projection(s); without values while it is offloaded."""
        return tensor_of(self.down, self._weight_name)

    @property
    def device(self) -> torch.device:
        """Where the block computes, which need not be where its weights are kept."""
        return device_of(self.down, self._weight_name)

    @property
    def _weight_name(self) -> str:
        return "down_proj" if self.kind == "experts" else "weight"

    @property
    def kind(self) -> str:
        """``"plain"``, ``"gated"``, ``"fused"`` (gate and up in one matrix) or ``"experts"``."""
        if is_experts(self.down):
            return "experts"
        if self.gate is None:
            return "plain"
        return "fused" if self.gate is self.up else "gated"
