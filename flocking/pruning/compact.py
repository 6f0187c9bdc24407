"""Compact projections: the kept neurons of one FF block, in memory that never moves."""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from flocking.feedforward import FeedForward, copy_cut, cut, fused_rows, stored_transposed, width
from flocking.feedforward import moe as mixtures
from flocking.models import byte_count, loaded, put


class _Part(Protocol):
    """What is pruned as one module, and how its compact copies are made and filled."""

    original: nn.Module

    def cut(self, kept: Tensor) -> nn.Module:
        """A compact copy of the weights of the kept neurons."""

    def by_sequence(self, compact: nn.Module, sequences: int) -> nn.Module:
        """An unfilled module with other weights for each sequence."""

    def fill(self, compact: nn.Module, kept: Tensor, row: int | None = None) -> None:
        """Copy the kept neurons' weights; `row` names the sequence, if each has its own."""


class _Projection:
    """One projection of a dense block."""

    def __init__(self, block: FeedForward, original: nn.Module) -> None:
        self.block, self.original = block, original

    def _indices(self, kept: Tensor) -> dict[str, Tensor]:
        """Which outputs, or inputs, belong to the kept neurons."""
        if self.original is self.block.down:
            return {"inputs": kept}
        if self.block.kind == "fused":
            kept = fused_rows(kept, self.block.d_ff, self.block.interleaved)
        return {"outputs": kept}

    def cut(self, kept: Tensor) -> nn.Module:
        return cut(self.original, **self._indices(kept))

    def by_sequence(self, compact: nn.Module, sequences: int) -> nn.Module:
        return _BySequence(self.original, compact, sequences)

    def fill(self, compact: nn.Module, kept: Tensor, row: int | None = None) -> None:
        indices = self._indices(kept)
        values = (compact._parameters[name] for name in ("weight", "bias"))
        weight, bias = (None if each is None else each.detach() for each in values)
        if row is not None:
            weight, bias = (None if each is None else each[row] for each in (weight, bias))
        elif "inputs" in indices:  # a down-projection's bias stays whole, and the original's own
            whole = self.original._parameters["bias"]
            if whole is not None and not whole.is_meta:
                compact._parameters["bias"] = whole
            bias = None
        assert weight is not None
        copy_cut(self.original, weight, bias, **indices)


class _Mixture:
    """All experts of a mixture, in each of which the same number of neurons is kept."""

    def __init__(self, block: FeedForward) -> None:
        self.original = block.down

    def _neurons(self, kept: Tensor) -> Tensor:
        """Indices within each expert, (expert, k), from indices through all experts."""
        count, d = mixtures.shape(self.original)
        return kept.view(count, -1) - torch.arange(count, device=kept.device)[:, None] * d

    def cut(self, kept: Tensor) -> nn.Module:
        return mixtures.take(self.original, self._neurons(kept))

    def by_sequence(self, compact: nn.Module, sequences: int) -> nn.Module:
        return mixtures.BySequence(self.original, compact, sequences)

    def fill(self, compact: nn.Module, kept: Tensor, row: int | None = None) -> None:
        if isinstance(compact, mixtures.BySequence) and row is not None:
            compact.fill(row, self.original, self._neurons(kept))
        else:
            mixtures.take(self.original, self._neurons(kept), out=compact)


class Compact:
    """The compact projections of one FF block of a twin.

    They replace the block's projections in the twin when this is made, with room for `k` neurons,
    and refuse to run until :meth:`fill` has been called.

    Attributes
    ----------
    block : FeedForward
        Of the original model.
    k : int
        Number of kept neurons; in a mixture, of each expert.
    kept : Tensor of int64, shape (neuron,) or (sequence, neuron)
        Indices of the kept neurons, ascending; empty before the first fill.
    layers : list of int
        The block's own, and those that are further runs of it.
    """

    def __init__(self, twin: nn.Module, block: FeedForward, paths: dict[int, str], k: int) -> None:
        self.block, self.k, self.layers = block, k, [block.layer]
        self.kept = torch.empty(0, dtype=torch.int64, device="cpu")
        self.parts = _parts(block)
        # Where they stand in the twin, as the module that holds each and its name there. (A
        # reference to the twin would be a cycle, and memory would wait for the garbage collector.)
        self._places: list[tuple[nn.Module, str]] = []
        for part in self.parts:
            path, _, name = paths[id(part.original)].rpartition(".")
            self._places.append((twin.get_submodule(path), name))
        neurons = torch.arange(block.d_ff, device=block.device).view(block.experts, -1)
        any_k = neurons[:, :k].flatten()
        self._shared = [part.cut(any_k) for part in self.parts]
        self._apart: list[nn.Module] = []  # with weights for each sequence
        self._sequences = 0
        for module, (parent, name) in zip(self._shared, self._places, strict=True):
            if hasattr(module, "config"):  # a mixture's, which says how it is computed
                module.config = parent.get_submodule(name).config
            put(parent, name, module)
        self.empty()

    def empty(self) -> None:
        """Refuse to run until the next :meth:`fill`."""
        for module in self.modules:
            vars(module)["forward"] = refuse

    def fill(self, kept: Tensor) -> None:
        """Copy the kept neurons' weights; memory is only taken if the number of sequences changes.

        Parameters
        ----------
        kept : Tensor of int64, shape (neuron,) or (sequence, neuron)
            Ascending. One selection for all sequences, or one for each.
        """
        self.kept = kept
        if kept.ndim == 1:
            for part, compact in zip(self.parts, self._shared, strict=True):
                part.fill(compact, kept)
                vars(compact).pop("forward", None)
            return
        if self._sequences != len(kept):
            self._make_room(len(kept))
        for part, compact in zip(self.parts, self._apart, strict=True):
            with loaded(part.original):  # once for all rows, where weights are offloaded
                for row, mine in enumerate(kept):
                    part.fill(compact, mine, row)
            vars(compact).pop("forward", None)

    def _make_room(self, sequences: int) -> None:
        """Take memory for weights of each sequence, and give up what was there before."""
        self._apart = [
            part.by_sequence(compact, sequences)
            for part, compact in zip(self.parts, self._shared, strict=True)
        ]
        self._sequences = sequences
        for compact in self._shared:  # only their shapes are needed from now on
            for name, value in compact.named_parameters(recurse=False):
                away = nn.Parameter(value.to("meta"), requires_grad=False)
                compact.register_parameter(name, away)
        for module, place in zip(self._apart, self._places, strict=True):
            put(*place, module)

    @property
    def modules(self) -> list[nn.Module]:
        """All that may stand in the twin in the place of a projection."""
        return [*self._shared, *self._apart]

    @property
    def parameters(self) -> int:
        """Weights and biases that one token is computed with."""
        return sum(p.numel() for module in self._shared for p in module.parameters())

    @property
    def bytes(self) -> int:
        """Of the weights and biases that are held."""
        weights = [p for m in self.modules for p in m.parameters()]
        return sum(byte_count(p) for p in weights if not p.is_meta)


def _parts(block: FeedForward) -> list[_Part]:
    if block.kind == "experts":
        return [_Mixture(block)]
    ups = [block.up, block.gate] if block.kind == "gated" else [block.up]
    return [_Projection(block, m) for m in (*ups, block.down) if m is not None]


def refuse(*args: object, **kwargs: object) -> NoReturn:
    """Stand for a forward pass without a selection."""
    raise RuntimeError(
        "this twin has no selection yet: call its generate, which selects neurons from the prompt, "
        "or flocking.score; or run the original model."
    )


class _BySequence(nn.Module):
    """A projection with other weights for each sequence of the batch.

    Weights are of shape (sequence, outputs, inputs) or, where the original is stored transposed,
    (sequence, inputs, outputs).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, original: nn.Module, compact: nn.Module, sequences: int) -> None:
        super().__init__()
        self.sequences = sequences
        self.transposed = stored_transposed(compact)
        widths = width(compact)
        assert widths is not None
        self.outputs = widths[1]
        with loaded(original):
            for name in ("weight", "bias"):
                value = getattr(compact, name, None)
                if value is not None:
                    room = getattr(original, name).new_empty(sequences, *value.shape)
                    value = nn.Parameter(room, requires_grad=False)
                self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        # (Some blocks flatten the tokens of all sequences: the twin has checked their number.)
        by_sequence = x.reshape(self.sequences, -1, x.shape[-1])
        weight = self.weight if self.transposed else self.weight.transpose(1, 2)
        y = torch.bmm(by_sequence, weight)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.reshape(*x.shape[:-1], self.outputs)
