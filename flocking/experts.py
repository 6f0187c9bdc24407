"""Mixtures of experts, by transformers' experts interface: watched, cut down, told apart.

There, all experts of a layer are one module with three-dimensional weights, whose forward is
looked up by name for every call. A module that is watched is given a config of its own with the
name of an implementation registered here: it runs the one that the model was to use, by way of a
stand-in that hands out what the activation function gives, the input of the down-projections.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flocking.moments import Routed
from flocking.projections import fused_rows, loaded, without_accelerate
from flocking.shadow import separate

_NAME = "flocking"
# What hands out activations in rows that we can tell apart. Others (eager loops, kernels that
# fuse all) run as the first of these while they are watched, up to rounding.
_TRANSPARENT = ("grouped_mm", "batched_mm")

_watched: weakref.WeakKeyDictionary[nn.Module, tuple[Callable, str]] = weakref.WeakKeyDictionary()


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts, and follows the interface."""
    down = module._parameters.get("down_proj")
    return hasattr(module, "has_gate") and down is not None and down.ndim == 3


def foreign_experts(layer: nn.Module) -> str | None:
    """Path of experts in `layer` that do not follow the interface, which nobody can watch."""
    for path, module in layer.named_modules():
        named = re.search("experts?$", path, re.I) or re.search("experts?$", type(module).__name__)
        several = isinstance(module, nn.ModuleList | nn.ModuleDict) or any(
            p is not None and p.ndim == 3 for p in module._parameters.values()
        )
        if named and several and not is_experts(module):
            return path
    return None


def shape(experts: nn.Module) -> tuple[int, int]:
    """Number of experts, and of neurons in each."""
    count, *matrix = experts.down_proj.shape
    return count, matrix[0 if experts.is_transposed else 1]


def _axes(experts: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Each parameter that has neurons along an axis; whether gate and up are fused in it."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    yield up, 2 if experts.is_transposed else 1, experts.has_gate
    if experts.has_bias:
        yield f"{up}_bias", 1, experts.has_gate
    yield "down_proj", 1 if experts.is_transposed else 2, False


def take(experts: nn.Module, neurons: Tensor, out: nn.Module | None = None) -> nn.Module:
    """Experts with some of their neurons, as a copy or in the memory of an earlier one.

    Grouped matrix products take rows of whole multiples of 16 bytes only. Where `k` neurons do not
    fill them, the copy has a few more, which add nothing to its output.

    Parameters
    ----------
    experts : torch.nn.Module
        Left as it is.
    neurons : Tensor of int64, shape (expert, k)
        Which of each expert's neurons to keep.
    out : torch.nn.Module, optional
        What :func:`take` returned for as many.
    """
    with loaded(experts):
        return _take(experts, neurons, out)


def _take(experts: nn.Module, neurons: Tensor, out: nn.Module | None) -> nn.Module:
    compact = out
    if compact is None:
        compact = without_accelerate(separate(experts))
        compact._parameters = dict(experts._parameters)
    d_ff, k = shape(experts)[1], neurons.shape[1]
    more = -k % (16 // experts.down_proj.element_size())
    neurons = torch.cat((neurons, neurons[:, :1].expand(-1, more)), dim=1)
    for name, axis, fused in _axes(experts):
        index = neurons
        if fused:
            rows = [fused_rows(row, d_ff, not experts.is_concatenated) for row in neurons]
            index = torch.stack(rows)
        whole = experts._parameters[name].detach()
        for dim in range(1, whole.ndim):
            if dim != axis:
                index = index.unsqueeze(dim)
        sizes = list(whole.shape)
        sizes[axis] = -1
        index = index.to(whole.device).expand(sizes)
        if out is None:
            kept = nn.Parameter(whole.gather(axis, index), requires_grad=False)
            compact._parameters[name] = kept
        else:
            torch.gather(whole, axis, index, out=compact._parameters[name].data)
    down = compact.down_proj.detach()
    down.narrow(1 if experts.is_transposed else 2, k, more).zero_()
    return compact


def row_norms(experts: nn.Module) -> Tensor:
    """Product of each neuron's gate and up row norms, or up row norm, (expert, neuron)."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    with loaded(experts):
        weight = experts._parameters[name].detach().float()
    norms = torch.linalg.vector_norm(weight, dim=1 if experts.is_transposed else 2)
    if not experts.has_gate:
        return norms
    pair = (2, -1) if experts.is_concatenated else (-1, 2)
    return norms.unflatten(1, pair).prod(dim=1 if experts.is_concatenated else 2)


class BySequence(nn.Module):
    """Experts cut down to other neurons for each sequence of the batch.

    The sequences' experts stand side by side, and each token is routed to those of its own.

    Parameters
    ----------
    original : torch.nn.Module
        All experts whole.
    compact : torch.nn.Module
        What :func:`take` returned of them.
    sequences : int
    """

    def __init__(self, original: nn.Module, compact: nn.Module, sequences: int) -> None:
        super().__init__()
        self.sequences, self.count = sequences, shape(compact)[0]
        self.all = separate(compact)
        vars(self.all).pop("forward", None)
        self.all._parameters = dict(compact._parameters)
        self.all.num_experts = sequences * self.count
        with loaded(original):
            for name, value in compact._parameters.items():
                if value is not None:
                    whole = original._parameters[name].detach()
                    room = whole.new_empty(sequences * self.count, *value.shape[1:])
                    if value.shape == whole.shape:  # the down-projections' biases, whole
                        room.copy_(whole.repeat(sequences, *[1] * (whole.ndim - 1)))
                    self.all._parameters[name] = nn.Parameter(room, requires_grad=False)

    def fill(self, row: int, original: nn.Module, neurons: Tensor) -> None:
        """Copy the weights of one sequence's neurons, int64 (expert, k)."""
        mine = separate(self.all)
        here = slice(row * self.count, (row + 1) * self.count)
        mine._parameters = {
            name: value if value is None else value.detach()[here]
            for name, value in self.all._parameters.items()
        }
        take(original, neurons, out=mine)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Of (token, hidden), all sequences' tokens one after another."""
        tokens = torch.arange(len(top_k_index), device=top_k_index.device)
        sequence = tokens // (len(tokens) // self.sequences)
        return self.all(hidden_states, top_k_index + sequence[:, None] * self.count, top_k_weights)


class _StandIn:
    """An experts module to its implementation, but for the activations that it hands to `tap`."""

    def __init__(self, experts: nn.Module, tap: Callable[[Tensor], Tensor]) -> None:
        self._experts, self._tap = experts, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self._tap(self._experts._apply_gate(x))

    def act_fn(self, x: Tensor) -> Tensor:
        return self._tap(self._experts.act_fn(x))


def _run_watched(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The implementation registered here: another's, with its activations handed out."""
    callback, name = _watched[experts]
    count, d_ff = shape(experts)
    tokens, slots = top_k_index.shape
    flat = top_k_index.reshape(-1)
    # The grouped implementation sorts its rows by expert, as the same call does here.
    order = torch.sort(flat)[1] if name == "grouped_mm" else None

    def tap(rows: Tensor) -> Tensor:
        z = rows
        if order is not None:
            z = torch.empty_like(rows)
            z[order] = rows
        routed = Routed(z.reshape(tokens, slots, d_ff), top_k_index, count)
        replacement = callback(routed)
        if replacement is None:
            return rows
        z = replacement.reshape(-1, d_ff)
        return z if order is None else z[order]

    run = ALL_EXPERTS_FUNCTIONS.get_interface(name, None)
    return run(_StandIn(experts, tap), hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _run_watched)


@contextmanager
def watching(experts: nn.Module, callback: Callable[[Routed], Tensor | None]) -> Iterator[None]:
    """Call ``callback(routed)`` in every forward pass of `experts` inside of the ``with``.

    Parameters
    ----------
    experts : torch.nn.Module
        Its config is another, like its own, inside of the ``with``, and nothing else changes.
    callback : callable
        Gets the :class:`Routed` activations; may return others in the place of ``routed.z``.

    Raises
    ------
    RuntimeError
        If somebody watches these experts already, or they are spread over devices.
    """
    if experts in _watched:
        raise RuntimeError("these experts are watched already: leave the other `with` first.")
    if getattr(experts, "_is_expert_parallel", False):
        raise RuntimeError("experts that are spread over devices cannot be watched.")
    own = experts.config
    name = own._experts_implementation
    _watched[experts] = callback, name if name in _TRANSPARENT else _TRANSPARENT[0]
    experts.config = copy.copy(own)
    experts.config._experts_implementation_internal = _NAME
    try:
        yield
    finally:
        experts.config = own
        del _watched[experts]
