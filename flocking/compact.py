"""Compact projections: one FF block's experts, in memory that never moves."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from flocking.feedforward import FeedForward
from flocking.shadow import cut, fused_rows, put, stored_transposed, width


class Compact:
    """The compact projections of one FF block of a twin.

    They are put in the place of the block's own when it is made, with room for `k` neurons, and
    refuse to run until :meth:`fill` has been called.

    Attributes
    ----------
    block : FeedForward
        Of the original model.
    k : int
        Number of experts.
    experts : Tensor of int64, shape (k,) or (sequence, k)
        Their indices, ascending; none before the first fill.
    """

    def __init__(self, twin: nn.Module, block: FeedForward, paths: dict[int, str], k: int) -> None:
        self.block, self.k = block, k
        self.experts = torch.empty(0, dtype=torch.int64)
        ups = [block.up] if block.kind != "gated" else [block.up, block.gate]
        self.originals = [*ups, block.down]
        # Where they stand in the twin, as the module that holds each (no cycle through the twin
        # itself, whose memory would then wait for the garbage collector) and its name there.
        self.places = []
        for module in self.originals:
            parent, _, name = paths[id(module)].rpartition(".")
            self.places.append((twin.get_submodule(parent), name))
        any_k = torch.arange(k, device=block.weight.device)
        self.shared = [cut(module, **self._indices(module, any_k)) for module in self.originals]
        self.several: list[_BySequence] = []
        for module, place in zip(self.shared, self.places, strict=True):
            put(*place, module)
        self.empty()

    def empty(self) -> None:
        """Refuse to run until the next :meth:`fill`."""
        for module in (*self.shared, *self.several):
            module.forward = refuse

    def _indices(self, module: nn.Module, experts: Tensor) -> dict[str, Tensor]:
        """Which outputs, or inputs, of a projection belong to these experts."""
        if module is self.block.down:
            return {"inputs": experts}
        if self.block.kind == "fused":
            experts = fused_rows(experts, self.block.d_ff, self.block.interleaved)
        return {"outputs": experts}

    def fill(self, experts: Tensor) -> None:
        """Copy the experts' weights; memory is only taken where the number of sequences changes.

        Parameters
        ----------
        experts : Tensor of int64, shape (k,) or (sequence, k)
            Ascending. One selection for all, or one for each sequence.

        Raises
        ------
        RuntimeError
            If the original was converted since the compact projections were made.
        """
        for original, compact in zip(self.originals, self.shared, strict=True):
            if original.weight.dtype != compact.weight.dtype:
                raise RuntimeError(
                    f"the original is in {original.weight.dtype} by now, and this twin in "
                    f"{compact.weight.dtype}: make the twin again."
                )
        self.experts = experts
        if experts.ndim == 1:
            for original, compact in zip(self.originals, self.shared, strict=True):
                _copy(original, compact.weight, compact.bias, **self._indices(original, experts))
                vars(compact).pop("forward", None)
            return
        if len(self.several) == 0 or self.several[0].weight.shape[0] != len(experts):
            self.several = [
                _BySequence(original, compact, len(experts))
                for original, compact in zip(self.originals, self.shared, strict=True)
            ]
            for compact in self.shared:  # only their shapes are of use from now on
                compact.weight = nn.Parameter(compact.weight.to("meta"), requires_grad=False)
            for module, place in zip(self.several, self.places, strict=True):
                put(*place, module)
        for compact in self.several:
            vars(compact).pop("forward", None)
        for row, mine in enumerate(experts):
            for original, compact in zip(self.originals, self.several, strict=True):
                bias = None if compact.bias is None else compact.bias[row]
                _copy(original, compact.weight[row], bias, **self._indices(original, mine))

    @property
    def parameters(self) -> int:
        """Weights and biases that one token is computed with."""
        return sum(p.numel() for module in self.shared for p in module.parameters())

    @property
    def bytes(self) -> int:
        """Of the weights and biases that are held."""
        weights = [p for m in (*self.shared, *self.several) for p in m.parameters()]
        return sum(p.numel() * p.element_size() for p in weights if not p.is_meta)


def refuse(*args: object, **kwargs: object) -> NoReturn:
    """In the place of a forward pass without experts."""
    raise RuntimeError(
        "this twin has no experts yet: call its generate, which chooses them from the prompt, or "
        "flocking.score; or run the original model."
    )


@torch.no_grad()
def _copy(
    original: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    *,
    outputs: Tensor | None = None,
    inputs: Tensor | None = None,
) -> None:
    """The given outputs or inputs of a projection into memory that is there already."""
    out_axis = 1 if stored_transposed(original) else 0
    axis = out_axis if outputs is not None else 1 - out_axis
    kept = (outputs if outputs is not None else inputs).to(weight.device)
    torch.index_select(original.weight.detach(), axis, kept, out=weight.data)
    if outputs is not None and bias is not None:
        torch.index_select(original.bias.detach(), 0, kept, out=bias.data)


class _BySequence(nn.Module):
    """A projection with other weights for each sequence of the batch.

    Weights are of shape (sequence, outputs, inputs) or, where the original is stored transposed,
    (sequence, inputs, outputs).
    """

    def __init__(self, original: nn.Module, compact: nn.Module, sequences: int) -> None:
        super().__init__()
        self.transposed = stored_transposed(compact)
        self.outputs = width(compact)[1]
        for name in ("weight", "bias"):
            value, whole = getattr(compact, name, None), getattr(original, name, None)
            if value is not None:
                room = whole.new_empty(sequences, *value.shape)
                if value.shape == whole.shape:  # a down-projection's bias, whatever the experts
                    room.copy_(whole.detach())
                value = nn.Parameter(room, requires_grad=False)
            self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        # (Some blocks flatten the tokens of all sequences: the twin has looked at their number.)
        by_sequence = x.reshape(len(self.weight), -1, x.shape[-1])
        weight = self.weight if self.transposed else self.weight.transpose(1, 2)
        y = torch.bmm(by_sequence, weight)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.reshape(*x.shape[:-1], self.outputs)
