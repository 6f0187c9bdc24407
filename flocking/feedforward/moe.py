"""Mixtures of experts with three-dimensional weights: recognising them and cutting them down.

All experts of a layer are one module, as in transformers' experts interface and in Llama 4.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flocking.feedforward.projections import fused_rows
from flocking.models import loaded, parameter_of, separate, tensor_of, without_accelerate


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts side by side, as in the interface or in Llama 4."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    up, down = held.get("gate_up_proj", held.get("up_proj")), held.get("down_proj")
    return up is not None and down is not None and up.ndim == down.ndim == 3


def by_interface(experts: nn.Module) -> bool:
    """Whether experts follow the interface; other experts are all computed for all tokens."""
    return hasattr(experts, "has_gate")


class _Layout(NamedTuple):
    """How the weights lie in memory, in the interface's terms."""

    has_gate: bool  # fused with up in one parameter
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool


def _layout(experts: nn.Module) -> _Layout:
    if by_interface(experts):
        return _Layout(*(getattr(experts, name) for name in _Layout._fields))
    fused = "gate_up_proj" in experts._parameters
    up = parameter_of(experts, "gate_up_proj" if fused else "up_proj").shape
    down = tensor_of(experts, "down_proj").shape
    # By sizes, if they differ; the proof refuses blocks where this is wrong.
    straight = up[2] == down[1] and up[1] == (2 if fused else 1) * down[2]
    return _Layout(fused, has_bias=False, is_transposed=not straight, is_concatenated=True)


def foreign_experts(layer: nn.Module) -> str | None:
    """Path of experts in `layer` of another kind, which cannot be watched; None without any."""
    for path, module in layer.named_modules():
        # Experts of one neuron each, whose weights are looked up by their numbers (Doge).
        tables = [each for each in module.children() if isinstance(each, nn.Embedding)]
        if path and len({table.weight.shape for table in tables}) < len(tables):
            return path
        named = re.search("experts?$", path, re.I) or re.search("experts?$", type(module).__name__)
        several = isinstance(module, nn.ModuleList | nn.ModuleDict) or any(
            p is not None and p.ndim == 3 for p in module._parameters.values()
        )
        if named and several and not is_experts(module):
            return path
    return None


def shape(experts: nn.Module) -> tuple[int, int]:
    """Number of experts, and number of neurons in each."""
    count, *matrix = tensor_of(experts, "down_proj").shape
    return count, matrix[0 if _layout(experts).is_transposed else 1]


def axes(experts: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """The parameters that have neurons along an axis, and whether gate and up are fused in it."""
    layout = _layout(experts)
    up = "gate_up_proj" if layout.has_gate else "up_proj"
    yield up, 2 if layout.is_transposed else 1, layout.has_gate
    if not layout.has_gate and experts._parameters.get("gate_proj") is not None:
        yield "gate_proj", 2 if layout.is_transposed else 1, False
    if layout.has_bias:
        yield f"{up}_bias", 1, layout.has_gate
    yield "down_proj", 1 if layout.is_transposed else 2, False


def _whole(experts: nn.Module) -> list[str]:
    """The other parameters, which are the same whatever neurons are kept."""
    cut = {name for name, *_ in axes(experts)}
    present = (name for name, value in experts._parameters.items() if value is not None)
    return [name for name in present if name not in cut]


def take(
    experts: nn.Module, neurons: Tensor, out: nn.Module | None = None, *, zeros: int | None = None
) -> nn.Module:
    """A copy of experts with some of their neurons; or `out`, filled again.

    Grouped matrix products need rows of a multiple of 16 bytes. Where `k` neurons do not fill
    them, the copy has a few more, which add nothing to its output.

    Parameters
    ----------
    experts : torch.nn.Module
        Left as it is.
    neurons : Tensor of int64, shape (expert, k)
        Which of each expert's neurons to keep.
    out : torch.nn.Module, optional
        What :func:`take` returned for the same number of neurons.
    zeros : int, optional
        The copy has this many neurons more in each expert, of zero weights, and no others.
    """
    with loaded(experts):
        compact = _take(experts, neurons, out, zeros)
    if out is not None:
        for name in _whole(experts):
            value = parameter_of(experts, name)
            if not value.is_meta:  # as of experts that are loaded for each run
                compact._parameters[name] = value
    return compact


def _take(
    experts: nn.Module, neurons: Tensor, out: nn.Module | None, zeros: int | None = None
) -> nn.Module:
    compact = out
    if compact is None:
        compact = without_accelerate(separate(experts))
        compact._parameters = dict(experts._parameters)
    d_ff, k = shape(experts)[1], neurons.shape[1]
    more = -k % (16 // tensor_of(experts, "down_proj").element_size()) if zeros is None else zeros
    neurons = torch.cat((neurons, neurons[:, :1].expand(-1, more)), dim=1)
    for name, axis, fused in axes(experts):
        index = neurons
        if fused:
            rows = [fused_rows(row, d_ff, not _layout(experts).is_concatenated) for row in neurons]
            index = torch.stack(rows)
        whole = parameter_of(experts, name).detach()
        for dim in range(1, whole.ndim):
            if dim != axis:
                index = index.unsqueeze(dim)
        sizes = list(whole.shape)
        sizes[axis] = -1
        index = index.to(whole.device).expand(sizes)
        if out is None:
            kept = whole.gather(axis, index)
            if zeros:
                added = torch.arange(k, k + zeros, device=whole.device)
                if fused:
                    added = fused_rows(added, k + zeros, not _layout(experts).is_concatenated)
                kept.index_fill_(axis, added, 0)
            compact._parameters[name] = nn.Parameter(kept, requires_grad=False)
        else:
            torch.gather(whole, axis, index, out=parameter_of(compact, name).data)
    down = parameter_of(compact, "down_proj").detach()
    down.narrow(1 if _layout(experts).is_transposed else 2, k, more).zero_()
    return compact


def row_norms(experts: nn.Module) -> Tensor:
    """Product of each neuron's gate and up row norms, or its up row norm, (expert, neuron)."""
    layout = _layout(experts)
    factors: list[Tensor] = []
    with loaded(experts):
        for name, axis, fused in axes(experts):
            weight = parameter_of(experts, name).detach()
            if name == "down_proj" or weight.ndim != 3:
                continue
            # (In float32, without a copy in float32; torch has no norms of 8 bits.)
            weight = weight if weight.dtype.itemsize > 1 else weight.float()
            wide = torch.promote_types(weight.dtype, torch.float32)
            norms = torch.linalg.vector_norm(weight, dim=3 - axis, dtype=wide).float()
            if fused:
                pair = (2, -1) if layout.is_concatenated else (-1, 2)
                norms = norms.unflatten(1, pair).prod(dim=1 if layout.is_concatenated else 2)
            factors.append(norms)
    return functools.reduce(torch.mul, factors)


class BySequence(nn.Module):
    """Experts cut down to other neurons for each sequence of the batch.

    The experts of all sequences stand side by side, and each token is routed to those of its
    sequence.

    Parameters
    ----------
    original : torch.nn.Module
        All experts whole.
    compact : torch.nn.Module
        What :func:`take` returned for them.
    sequences : int
        Number of sequences.
    """

    def __init__(self, original: nn.Module, compact: nn.Module, sequences: int) -> None:
        super().__init__()
        self.sequences, self.count = sequences, shape(compact)[0]
        self.all = separate(compact)
        vars(self.all).pop("forward", None)
        self.all._parameters = dict(compact._parameters)
        vars(self.all)["num_experts"] = sequences * self.count
        with loaded(original):
            for name, value in compact._parameters.items():
                if value is not None:
                    whole = parameter_of(original, name).detach()
                    room = whole.new_empty(sequences * self.count, *value.shape[1:])
                    self.all._parameters[name] = nn.Parameter(room, requires_grad=False)

    def fill(self, row: int, original: nn.Module, neurons: Tensor) -> None:
        """Copy the weights of the neurons, int64 (expert, k), of sequence number `row`."""
        mine = separate(self.all)
        here = slice(row * self.count, (row + 1) * self.count)
        mine._parameters = {
            name: value if value is None else nn.Parameter(value.detach()[here], False)
            for name, value in self.all._parameters.items()
        }
        take(original, neurons, out=mine)
        with loaded(original):
            for name in _whole(original):  # the down-projections' biases
                room = parameter_of(self.all, name).detach()
                room[here].copy_(parameter_of(original, name).detach())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output, (token, hidden), for the sequences' tokens one after another."""
        tokens = torch.arange(len(top_k_index), device=top_k_index.device)
        sequence = tokens // (len(tokens) // self.sequences)
        return self.all(hidden_states, top_k_index + sequence[:, None] * self.count, top_k_weights)


class Routed(NamedTuple):
    """Activations of a mixture: for each token, those of the experts that it is routed to.

    Attributes
    ----------
    z : Tensor, shape (..., slot, d)
        Input of the down-projection of the expert in each of a token's slots; `d` is its neurons.
    expert : Tensor of int64, shape (..., slot)
        Number of that expert.
    experts : int
        Number of experts.
    filled : Tensor of bool, shape (..., slot), or None
        Which slots are in use; all if None. In the others, z is zero.
    """

    z: Tensor
    expert: Tensor
    experts: int
    filled: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of :meth:`dense`."""
        return (*self.expert.shape[:-1], self.experts * self.z.shape[-1])

    def reshape(self, *tokens: int) -> Routed:
        """The same with other dimensions before the slots."""
        z, expert = (x.reshape(*tokens, *x.shape[-n:]) for x, n in ((self.z, 2), (self.expert, 1)))
        filled = self.filled
        if filled is not None:
            filled = filled.reshape(*tokens, filled.shape[-1])
        return Routed(z, expert, self.experts, filled)

    def dense(self) -> Tensor:
        """All experts' neurons side by side, shape (..., experts * d), zero where not routed."""
        full = self.z.new_zeros(*self.expert.shape[:-1], self.experts, self.z.shape[-1])
        return full.scatter(-2, self.expert[..., None].expand_as(self.z), self.z).flatten(-2)

    def of(self, dense: Tensor) -> Tensor:
        """The values in `dense` at the experts that each token is routed to, shaped as `z`."""
        full = dense.unflatten(-1, (self.experts, -1))
        return full.gather(-2, self.expert[..., None].expand_as(self.z))
