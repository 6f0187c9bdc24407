"""The only hooks of the package: they read ``z``, the input of every FF down-projection.

Recording and GRIFFIN's prefill are callbacks of :func:`observe`; no other module registers a hook.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, SupportsIndex, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flocking.feedforward.block import FeedForward
from flocking.feedforward.discovery import feedforwards
from flocking.feedforward.moe import Routed, is_experts
from flocking.feedforward.moe_hooks import watched, watching
from flocking.models import exclusive, modules_of, require_model


def select_layers(
    blocks: list[FeedForward], layers: Iterable[int] | None, argument: str = "layers"
) -> list[FeedForward]:
    """The blocks of the given layers, in model order; all of them for None.

    Raises
    ------
    TypeError
        If `layers` is not a list of layer numbers.
    ValueError
        If a layer has no FF block, or if none is asked for.
    """
    if layers is None:
        return blocks
    try:
        wanted = {_number(layer) for layer in layers}
    except TypeError:
        raise TypeError(f"{argument}={layers!r}: give a list of layer numbers.") from None
    known = {block.layer for block in blocks}
    if unknown := sorted(wanted - known):
        raise ValueError(
            f"{argument}={unknown}: there are FF blocks in layers {min(known)} to {max(known)} "
            f"({len(known)} of them) only."
        )
    if not wanted:
        raise ValueError(f"{argument} is empty: name at least one layer, or leave it out for all.")
    return [block for block in blocks if block.layer in wanted]


def _number(layer: object) -> int:
    """A layer's number; a TypeError for anything else, of a mask's True and False too."""
    if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
        raise TypeError
    return operator.index(layer)


_eager_lock = threading.Lock()
_eager_stack, _eager_users = ExitStack(), 0


@contextmanager
def _eager() -> Iterator[None]:
    """Run nothing compiled, until the last thread that asks for this leaves its ``with``.

    torch's stance belongs to the process: if two threads each restored what they had found, the
    stance of one could stay.
    """
    global _eager_users
    with _eager_lock:
        if _eager_users == 0:
            _eager_stack.enter_context(torch.compiler.set_stance("force_eager"))
        _eager_users += 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_users -= 1
            if _eager_users == 0:
                _eager_stack.close()


def is_observed(model: nn.Module) -> bool:
    """Whether some block of the model is inside of an :func:`observe`."""
    return any(
        module in watched
        or any(
            isinstance(getattr(hook, "__self__", None), _Watch)
            for hook in module._forward_pre_hooks.values()
        )
        for module in model.modules()
    )


def anything_is_watched() -> bool:
    """Whether any thread is inside of :func:`observe`, where compiled code runs eagerly."""
    return _eager_users > 0


@overload
def observe(
    model: nn.Module,
    callback: Callable[[FeedForward, Tensor], Tensor | None],
    *,
    layers: Iterable[int] | None = None,
    routed: Literal[False] = False,
) -> AbstractContextManager[list[FeedForward]]: ...


@overload
def observe(
    model: nn.Module,
    callback: Callable[[FeedForward, Tensor | Routed], Tensor | None],
    *,
    layers: Iterable[int] | None = None,
    routed: Literal[True],
) -> AbstractContextManager[list[FeedForward]]: ...


@contextmanager
def observe(
    model: nn.Module,
    callback: Callable[[FeedForward, Any], Tensor | None],  # the overloads say what it is given
    *,
    layers: Iterable[int] | None = None,
    routed: bool = False,
) -> Iterator[list[FeedForward]]:
    """Call ``callback(block, z)`` at every FF block of every forward pass in the ``with``.

    Only passes of the thread that entered the ``with`` count, and no other thread can observe,
    record or score the same model until the end. The hooks are removed at the end, whatever
    happens in between, and hooks of others are not touched. Compiled models
    (``model.compile()``, ``torch.compile(model)`` or a compiled ``forward``) would silently skip
    hooks: inside the ``with``, everything compiled runs eagerly instead.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    callback : callable
        Gets the :class:`FeedForward` and its ``z``, a tensor of shape (sequence, token,
        d_ff), or (sequence * token, d_ff) where a block flattens its input as OPT's does, in
        the model's dtype and on its layer's device. The model itself goes on with this tensor, so
        copy what you keep and change nothing in place. Return None to leave the model alone, or a
        tensor to use in place of ``z``. A mixture of experts has the neurons of all its experts
        next to each other, shape (sequence * token, d_ff), zero for experts that a token is not
        routed to.
    layers : iterable of int, optional
        Layers to watch; all by default.
    routed : bool
        Give the callback a mixture's activations as ``flocking.feedforward.Routed``, which
        holds those of the experts that each token is routed to; the callback may return others
        in the shape of ``Routed.z``.

    Yields
    ------
    list of FeedForward
        The watched blocks.

    Raises
    ------
    UnsupportedModelError
        If the model has no FF block that can be proved.
    ValueError
        If `layers` names a layer that has no FF block.
    TypeError
        If `model` is not a transformers model.
    RuntimeError
        At the end, if a watched block never ran: no forward pass was made inside the ``with``, or
        something bypassed the block. Before, if gradients are wanted of a model that is trained
        with gradient checkpointing, whose blocks run again for them.

    Examples
    --------
    >>> shapes = {}
    >>> with flocking.observe(model, lambda ff, z: shapes.update({ff.layer: tuple(z.shape)})):
    ...     output = model(**tokenizer("Birds of a feather", return_tensors="pt"))
    >>> shapes  # (sequence, token, d_ff)
    {0: (1, ..., 64), 1: (1, ..., 64)}
    """
    model = require_model(model)
    _refuse_checkpointing(model)
    with ExitStack() as everything:
        everything.enter_context(exclusive(model))
        blocks = select_layers(feedforwards(model), layers)
        watch = _Watch(blocks, callback, routed)
        everything.enter_context(_eager())
        if any(block.calls > 1 for block in blocks):  # a pass that failed must not shift the next
            start: nn.Module = model.base_model
            handle = start.register_forward_pre_hook(watch.begin)
            everything.callback(handle.remove)
        for module in watch.by_module:
            if is_experts(module):
                everything.enter_context(watching(module, watch.tap_of(module)))
            else:
                handle = module.register_forward_pre_hook(watch.hook)
                everything.callback(handle.remove)
        yield blocks
    watch.refuse_silent()


def _refuse_checkpointing(model: PreTrainedModel) -> None:
    """Refuse to watch passes whose blocks run again for the gradients, outside of the ``with``."""
    again = any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in modules_of(model)
    )
    if again and torch.is_grad_enabled():
        raise RuntimeError(
            "the model has gradient checkpointing, which runs its blocks again for the gradients, "
            "watched twice or not at all: disable it first, or enter torch.no_grad()."
        )


class _Watch:
    """Hands the callback of one :func:`observe` the z of each run of each block.

    Attributes
    ----------
    by_module : dict
        The watched blocks, by down-projection and number of the run.
    ran : Counter
        How often each down-projection ran in this forward pass.
    silent : set of FeedForward
        Those that have not run yet.
    elsewhere : bool
        Whether another thread has run one of them: its passes do not count.
    """

    def __init__(
        self,
        blocks: list[FeedForward],
        callback: Callable[[FeedForward, Any], Tensor | None],
        routed: bool,
    ) -> None:
        self.blocks, self.callback, self.routed = blocks, callback, routed
        self.by_module: dict[nn.Module, dict[int, FeedForward]] = {}
        for block in blocks:
            self.by_module.setdefault(block.down, {})[block.call] = block
        self.ran: Counter[nn.Module] = Counter()
        self.silent = set(blocks)
        self.elsewhere = False
        self._thread = threading.get_ident()

    def begin(self, *_: object) -> None:
        """A forward pre-hook of the whole model, where blocks run several times in a pass."""
        if threading.get_ident() == self._thread:
            self.ran.clear()

    def running(self, module: nn.Module) -> FeedForward | None:
        """The block that this run of a module belongs to; None if it is not watched."""
        runs = self.by_module.get(module)
        if runs is None:  # the module of a copy that was made of the model since
            return None
        if threading.get_ident() != self._thread:
            self.elsewhere = True
            return None
        block = runs.get(self.ran[module] % next(iter(runs.values())).calls)
        self.ran[module] += 1
        if block is not None:
            self.silent.discard(block)
        return block

    def hook(self, module: nn.Module, args: tuple) -> tuple | None:
        """A forward pre-hook of a dense block's down-projection."""
        block = self.running(module)
        if block is None:
            return None
        z = args[0]
        replacement = self.callback(block, z.transpose(0, 1) if block.token_first else z)
        if replacement is None:
            return None
        if block.token_first:
            replacement = replacement.transpose(0, 1)
        return (replacement, *args[1:])

    def tap_of(self, module: nn.Module) -> Callable[[Routed], Tensor | None]:
        """What a mixture of experts hands its activations to."""

        def tap(z: Routed) -> Tensor | None:
            block = self.running(module)
            if block is None:
                return None
            if self.routed:
                return self.callback(block, z)
            replacement = self.callback(block, z.dense())
            return None if replacement is None else z.of(replacement)

        return tap

    def refuse_silent(self) -> None:
        """Raise a RuntimeError if a block never ran."""
        names = [block.path for block in self.blocks if block in self.silent]
        if not names:
            return
        which = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        remedy = (
            "only another thread ran them, whose passes do not count: run the model in the thread "
            "that entered the `with`"
            if self.elsewhere
            else "run this very model inside the `with` (not a copy, an export or a captured graph "
            "of it)"
        )
        raise RuntimeError(
            f"{len(names)} of {len(self.blocks)} observed FF blocks never ran ({which}): {remedy}."
        )
