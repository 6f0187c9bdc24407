"""Watching mixtures of experts: handing out the inputs of their down-projections.

Experts that follow transformers' experts interface look up their forward by name for every call.
A watched module is given a separate config with the name of an implementation that is registered
here. It runs the implementation that the model was to use, on a stand-in for the module that hands
out what the activation function returns. Other experts are all computed at once: for these, a
stand-in replaces the weights.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flocking.feedforward.moe import Routed, by_interface, shape
from flocking.models import overriding, parameter_of

_NAME = "flocking"
# Implementations in which each row's token and expert are known. Others (eager loops, kernels that
# fuse everything) are replaced by the first of these while watched, with the same output up to
# rounding.
_TRANSPARENT = ("grouped_mm", "batched_mm")

watched: weakref.WeakKeyDictionary[nn.Module, tuple[Callable, str]] = weakref.WeakKeyDictionary()


class _StandIn:
    """Stands for an experts module in its implementation, and hands its activations to `tap`."""

    def __init__(self, experts: nn.Module, tap: Callable[[Tensor], Tensor]) -> None:
        self._experts: Any = experts
        self._tap = tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self._tap(self._experts._apply_gate(x))

    def act_fn(self, x: Tensor) -> Tensor:
        return self._tap(self._experts.act_fn(x))


class _Tapped:
    """Stands for the down-projections' parameter where all experts are computed at once.

    What is multiplied with it, (expert, token, d), passes through `tap`.
    """

    def __init__(self, read: Callable[[], Tensor], tap: Callable[[Tensor], Tensor]) -> None:
        self._read, self._tap = read, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read(), name)

    def transpose(self, *axes: int) -> _Tapped:
        return _Tapped(lambda: self._read().transpose(*axes), self._tap)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (torch.bmm, torch.matmul) and isinstance(args[1], cls):
            args = (args[1]._tap(args[0]), *args[1:])
        args = tuple(a._read() if isinstance(a, cls) else a for a in args)
        return func(*args, **(kwargs or {}))


def _all_at_once(callback: Callable[[Routed], Tensor | None]) -> Callable[[Tensor], Tensor]:
    """A tap for `_Tapped` that hands `callback` the experts with activations other than zero.

    Experts that a token is not routed to have zeros there. (So may others, which then do not count
    as routed to.)
    """

    def tap(z: Tensor) -> Tensor:
        by_token = z.transpose(0, 1)
        active = by_token.any(dim=-1)
        slots = max(1, int(active.sum(dim=1).max()))
        expert = active.byte().topk(slots, dim=1).indices.sort(dim=1).values
        rows = by_token.gather(1, expert[..., None].expand(-1, -1, z.shape[-1]))
        # A token with fewer experts than others has slots left over, marked as not filled.
        routed = Routed(rows, expert, len(z), active.gather(1, expert))
        replacement = callback(routed)
        if replacement is None:
            return z
        dense = routed._replace(z=replacement).dense()
        return dense.unflatten(-1, (len(z), -1)).transpose(0, 1)

    return tap


def _run_watched(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The implementation registered here: runs another one and hands out its activations."""
    # A copy that a user made of watched experts is not watched.
    callback, name = watched.get(experts, (lambda routed: None, _TRANSPARENT[0]))
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
        # What an expert computes for a token counts for nothing with a weight of zero, by which
        # some routers leave all of them out.
        filled = top_k_weights.reshape(tokens, slots) != 0
        z = z.reshape(tokens, slots, d_ff).masked_fill(~filled[..., None], 0)
        routed = Routed(z, top_k_index, count, filled)
        replacement = callback(routed)
        if replacement is None:
            return rows
        z = replacement.reshape(-1, d_ff)
        return z if order is None else z[order]

    return ALL_EXPERTS_FUNCTIONS[name](
        _StandIn(experts, tap), hidden_states, top_k_index, top_k_weights
    )


ALL_EXPERTS_FUNCTIONS.register(_NAME, _run_watched)


@contextmanager
def watching(experts: nn.Module, callback: Callable[[Routed], Tensor | None]) -> Iterator[None]:
    """Call ``callback(routed)`` in every forward pass of `experts` inside of the ``with``.

    Parameters
    ----------
    experts : torch.nn.Module
        Inside of the ``with`` it has a copy of its config; nothing else changes.
    callback : callable
        Gets the :class:`Routed` activations; may return a tensor to use in place of ``routed.z``.

    Raises
    ------
    RuntimeError
        If these experts are watched already, or are spread over devices.
    """
    if experts in watched:
        raise RuntimeError("these experts are watched already: leave the other `with` first.")
    if getattr(experts, "_is_expert_parallel", False):
        raise RuntimeError("experts that are spread over devices cannot be watched.")
    if not by_interface(experts):
        name = ""
        tapped = _Tapped(lambda: parameter_of(experts, "down_proj"), _all_at_once(callback))
        instead = overriding(experts, "down_proj", tapped)
    else:
        config: Any = copy.copy(experts.config)
        name = config._experts_implementation
        config._experts_implementation_internal = _NAME
        instead = overriding(experts, "config", config)
    watched[experts] = callback, name if name in _TRANSPARENT else _TRANSPARENT[0]
    try:
        with instead:
            yield
    finally:
        del watched[experts]
