"""The one hook of the package: it reads ``z``, the input of every FF down-projection.

Recording, and GRIFFIN's prefill, are callbacks of :func:`observe`; no other module
registers a hook.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from flocking.feedforward.block import FeedForward
from flocking.feedforward.discovery import feedforwards
from flocking.feedforward.moe import Routed, is_experts
from flocking.feedforward.moe_hooks import watching
from flocking.models import unwrap


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
        wanted = {operator.index(layer) for layer in layers}
    except TypeError:
        raise TypeError(f"{argument}={layers!r}: give a list of layer numbers.") from None
    known = {block.layer for block in blocks}
    if unknown := sorted(wanted - known):
        raise ValueError(
            f"{argument}={unknown}: there are FF blocks in layers {min(known)} to {max(known)} "
            f"here ({len(known)} of them), and in no others."
        )
    if not wanted:
        raise ValueError(f"{argument} is empty: name at least one layer, or leave it out for all.")
    return [block for block in blocks if block.layer in wanted]


_eager_lock = threading.Lock()
_eager_stack, _eager_users = ExitStack(), 0


@contextmanager
def _eager() -> Iterator[None]:
    """Nothing runs compiled, until the last of all threads that ask for it is through.

    (The stance belongs to the process: two threads that each restored what they had found would
    leave one's for good.)
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


def anything_is_watched() -> bool:
    """Whether this process is inside of :func:`observe`, so that what is compiled runs eagerly."""
    return _eager_users > 0


@contextmanager
def observe(
    model: nn.Module,
    callback: Callable[[FeedForward, Tensor], Tensor | None],
    *,
    layers: Iterable[int] | None = None,
    routed: bool = False,
) -> Iterator[list[FeedForward]]:
    """Call ``callback(block, z)`` at every FF block of every forward pass in the ``with``.

    The hooks are removed at the end, whatever happens in between, and nobody else's are
    touched. Compiled models (``model.compile()``, ``torch.compile(model)`` or a compiled
    ``forward``) would skip hooks without a word: inside the ``with``, everything compiled
    runs eagerly instead.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    callback : callable
        Gets the :class:`FeedForward` and its ``z``, a tensor of shape (sequence, token,
        d_ff), or (sequence * token, d_ff) where a block flattens its input as OPT's does, in
        the model's dtype and on its layer's device: the very tensor that the model
        goes on with, so copy what you keep and change nothing in place. Return None to
        leave the model alone, or a tensor to use in place of ``z``. A mixture of experts has
        the neurons of all its experts side by side, shape (sequence * token, d_ff), zero at
        those that a token is not routed to.
    layers : iterable of int, optional
        Layers to watch; all by default.
    routed : bool
        Give the callback a mixture's activations as :class:`flocking.feedforward.Routed`, at the
        experts that each token is routed to alone, and take them back as ``Routed.z`` is.

    Yields
    ------
    list of FeedForward
        The blocks that are watched.

    Raises
    ------
    UnsupportedModelError
        If the model has no FF block that can be proved.
    ValueError
        If `layers` names a layer that does not exist.
    RuntimeError
        At the end, if a watched block never ran: either no forward pass was made inside
        the ``with``, or something bypassed the block.

    Examples
    --------
    >>> norms = {}
    >>> with flocking.observe(model, lambda ff, z: norms.update({ff.layer: z.norm()})):
    ...     model(**tokenizer("Birds of a feather", return_tensors="pt"))
    """
    model = unwrap(model)
    blocks = select_layers(feedforwards(model), layers)
    silent = set(blocks)
    by_module: dict[nn.Module, dict[int, FeedForward]] = {}
    for block in blocks:
        by_module.setdefault(block.down, {})[block.call] = block
    ran: Counter[nn.Module] = Counter()  # how often, in this forward pass

    def running(module: nn.Module) -> FeedForward | None:
        """Which of a module's runs this is; None if it is not watched."""
        mine = by_module.get(module)
        if mine is None:  # of a copy that a user made of the model in the meantime
            return None
        block = mine.get(ran[module] % next(iter(mine.values())).calls)
        ran[module] += 1
        silent.discard(block)
        return block

    def hook(module: nn.Module, args: tuple) -> tuple | None:
        block = running(module)
        if block is None:
            return None
        z = args[0]
        replacement = callback(block, z.transpose(0, 1) if block.token_first else z)
        if replacement is None:
            return None
        if block.token_first:
            replacement = replacement.transpose(0, 1)
        return (replacement, *args[1:])

    def tap_of(module: nn.Module) -> Callable[[Routed], Tensor | None]:
        def tap(z: Routed) -> Tensor | None:
            block = running(module)
            if block is None:
                return None
            if routed:
                return callback(block, z)
            replacement = callback(block, z.dense())
            return None if replacement is None else z.of(replacement)

        return tap

    with ExitStack() as everything:
        everything.enter_context(_eager())
        if any(block.calls > 1 for block in blocks):  # a pass that failed must not shift the next
            handle = model.base_model.register_forward_pre_hook(lambda *_: ran.clear())
            everything.callback(handle.remove)
        for module in by_module:
            if is_experts(module):
                everything.enter_context(watching(module, tap_of(module)))
            else:
                handle = module.register_forward_pre_hook(hook)
                everything.callback(handle.remove)
        yield blocks
    if silent:
        names = [block.path for block in blocks if block in silent]
        which = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise RuntimeError(
            f"{len(names)} of {len(blocks)} observed FF blocks never ran ({which}): run this very "
            "model inside the `with` (not a copy, an export or a captured graph of it)."
        )
