"""Compact projections: one FF block's experts, in memory that never moves."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from flocking.feedforward import FeedForward, copy_cut, cut, fused_rows, stored_transposed, width
from flocking.feedforward import moe as mixtures
from flocking.models import byte_count, loaded, put


class _Projection:
    """One projection of a dense block, and how its compact copies are made and filled."""

    def __init__(self, block: FeedForward, original: nn.Module) -> None:
        self.block, self.original = block, original

    def _indices(self, experts: Tensor) -> dict[str, Tensor]:
        """Which outputs, or inputs, belong to these experts."""
        if self.original is self.block.down:
            return {"inputs": experts}
        if self.block.kind == "fused":
            experts = fused_rows(experts, self.block.d_ff, self.block.interleaved)
        return {"outputs": experts}

    def cut(self, experts: Tensor) -> nn.Module:
        return cut(self.original, **self._indices(experts))

    def by_sequence(self, compact: nn.Module, sequences: int) -> nn.Module:
        return _BySequence(self.original, compact, sequences)

    def fill(self, compact: nn.Module, experts: Tensor, row: int | None = None) -> None:
        """Copy the experts' weights; `row` says which sequence's they are, if not everyone's."""
        weight, bias = (p if p is None else p.detach() for p in (compact.weight, compact.bias))
        if row is not None:
            weight, bias = weight[row], bias if bias is None else bias[row]
        copy_cut(self.original, weight, bias, **self._indices(experts))


class _Mixture:
    """The same for all experts of a mixture, of each of which some neurons are kept."""

    def __init__(self, block: FeedForward) -> None:
        self.block, self.original = block, block.down

    def _neurons(self, experts: Tensor) -> Tensor:
        """Numbers within each of the mixture's experts, (expert, k), of those among all."""
        count, d = mixtures.shape(self.original)
        return experts.view(count, -1) - torch.arange(count, device=experts.device)[:, None] * d

    def cut(self, experts: Tensor) -> nn.Module:
        return mixtures.take(self.original, self._neurons(experts))

    def by_sequence(self, compact: nn.Module, sequences: int) -> nn.Module:
        return mixtures.BySequence(self.original, compact, sequences)

    def fill(self, compact: nn.Module, experts: Tensor, row: int | None = None) -> None:
        if row is None:
            mixtures.take(self.original, self._neurons(experts), out=compact)
        else:
            compact.fill(row, self.original, self._neurons(experts))


class Compact:
    """The compact projections of one FF block of a twin.

    They are put in the place of the block's own when it is made, with room for `k` neurons, and
    refuse to run until :meth:`fill` has been called.

    Attributes
    ----------
    block : FeedForward
        Of the original model.
    k : int
        Number of experts; in a mixture, of each of its experts' neurons.
    experts : Tensor of int64, shape (experts,) or (sequence, experts)
        Their indices, ascending; none before the first fill.
    layers : list of int
        The block's own, and those that are further runs of it.
    """

    def __init__(self, twin: nn.Module, block: FeedForward, paths: dict[int, str], k: int) -> None:
        self.block, self.k, self.layers = block, k, [block.layer]
        self.experts = torch.empty(0, dtype=torch.int64)
        if block.kind == "experts":
            self.parts = [_Mixture(block)]
        else:
            ups = [block.up] if block.kind != "gated" else [block.up, block.gate]
            self.parts = [_Projection(block, module) for module in (*ups, block.down)]
        # Where they stand in the twin, as the module that holds each (no cycle through the twin
        # itself, whose memory would then wait for the garbage collector) and its name there.
        self.places = []
        for part in self.parts:
            parent, _, name = paths[id(part.original)].rpartition(".")
            self.places.append((twin.get_submodule(parent), name))
        neurons = torch.arange(block.d_ff, device=block.device).view(block.experts, -1)
        any_k = neurons[:, :k].flatten()
        self.shared = [part.cut(any_k) for part in self.parts]
        self.several: list[nn.Module] = []
        for module, (parent, name) in zip(self.shared, self.places, strict=True):
            if hasattr(module, "config"):  # a mixture's, which says how it is computed
                module.config = parent.get_submodule(name).config
            put(parent, name, module)
        self.empty()

    def empty(self) -> None:
        """Refuse to run until the next :meth:`fill`."""
        for module in (*self.shared, *self.several):
            module.forward = refuse

    def fill(self, experts: Tensor) -> None:
        """Copy the experts' weights; memory is only taken where the number of sequences changes.

        Parameters
        ----------
        experts : Tensor of int64, shape (experts,) or (sequence, experts)
            Ascending. One selection for all, or one for each sequence.

        Raises
        ------
        RuntimeError
            If the original was converted since the compact projections were made.
        """
        for part, compact in zip(self.parts, self.shared, strict=True):
            now, then = (next(m.parameters()).dtype for m in (part.original, compact))
            if now != then:
                raise RuntimeError(
                    f"the original is in {now} by now, and this twin in {then}: make the twin "
                    "again."
                )
        self.experts = experts
        if experts.ndim == 1:
            for part, compact in zip(self.parts, self.shared, strict=True):
                part.fill(compact, experts)
                vars(compact).pop("forward", None)
            return
        if len(self.several) == 0 or self.several[0].sequences != len(experts):
            self.several = [
                part.by_sequence(compact, len(experts))
                for part, compact in zip(self.parts, self.shared, strict=True)
            ]
            for compact in self.shared:  # only their shapes are of use from now on
                for name, value in compact.named_parameters(recurse=False):
                    value = nn.Parameter(value.to("meta"), requires_grad=False)
                    compact.register_parameter(name, value)
            for module, place in zip(self.several, self.places, strict=True):
                put(*place, module)
        for part, compact in zip(self.parts, self.several, strict=True):
            for row, mine in enumerate(experts):
                part.fill(compact, mine, row)
            vars(compact).pop("forward", None)

    @property
    def parameters(self) -> int:
        """Weights and biases that one token is computed with."""
        return sum(p.numel() for module in self.shared for p in module.parameters())

    @property
    def bytes(self) -> int:
        """Of the weights and biases that are held."""
        weights = [p for m in (*self.shared, *self.several) for p in m.parameters()]
        return sum(byte_count(p) for p in weights if not p.is_meta)


def refuse(*args: object, **kwargs: object) -> NoReturn:
    """In the place of a forward pass without experts."""
    raise RuntimeError(
        "this twin has no experts yet: call its generate, which chooses them from the prompt, or "
        "flocking.score; or run the original model."
    )


class _BySequence(nn.Module):
    """A projection with other weights for each sequence of the batch.

    Weights are of shape (sequence, outputs, inputs) or, where the original is stored transposed,
    (sequence, inputs, outputs).
    """

    def __init__(self, original: nn.Module, compact: nn.Module, sequences: int) -> None:
        super().__init__()
        self.sequences = sequences
        self.transposed = stored_transposed(compact)
        self.outputs = width(compact)[1]
        with loaded(original):
            for name in ("weight", "bias"):
                value, whole = getattr(compact, name, None), getattr(original, name, None)
                if value is not None:
                    room = whole.new_empty(sequences, *value.shape)
                    if value.shape == whole.shape:  # a down-projection's bias, whatever is kept
                        room.copy_(whole.detach())
                    value = nn.Parameter(room, requires_grad=False)
                self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        # (Some blocks flatten the tokens of all sequences: the twin has looked at their number.)
        by_sequence = x.reshape(self.sequences, -1, x.shape[-1])
        weight = self.weight if self.transposed else self.weight.transpose(1, 2)
        y = torch.bmm(by_sequence, weight)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.reshape(*x.shape[:-1], self.outputs)
