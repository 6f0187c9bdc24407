"""A model's shadow: a copy of its modules that shares its weights, to change at will.

Whatever flocking tries on a model, or turns it into, happens on a shadow: other modules
are put in place, projections are cut down, and the model itself is never touched.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, where `model` is what ``torch.compile`` or PEFT made of it."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"model adds {model.active_peft_config.peft_type.value.lower()} tokens of its own, "
                "which belong to no text: give its get_base_model(), without them."
            )
        model = model.get_base_model()  # its adapters are inside, in the place of projections
    return model


# Methods that accelerate wraps, each for one very model: a copy's would act on the original.
_WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


def shadow(model: nn.Module) -> nn.Module:
    """A deep copy of `model`'s modules that shares every parameter.

    Buffers are its own (some models update theirs as they run). Hooks stay behind, since
    they are the user's and would fire, and so do compiled calls, which would run the
    original model instead of the copy. The copy is in eval mode.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        memo.update({id(hooks): type(hooks)() for hooks in _hooks_of(module).values()})
        if hasattr(module, "_hf_hook"):  # accelerate's, which holds the values of what it offloads
            memo[id(module._hf_hook)] = module._hf_hook
        for name in _overridden.get(module, {}):  # what somebody put there is not the model's
            memo[id(vars(module)[name])] = object()
    twin = copy.deepcopy(model, memo)
    for module, copied in zip(model.modules(), twin.modules(), strict=True):
        _without_overrides(module, copied, memo)
    for name in _WRAPPED:
        vars(twin).pop(name, None)
    for module in twin.modules():
        # A compiled forward, or what generate keeps once it has compiled for a static cache.
        for name, value in list(vars(module).items()):
            if hasattr(value, "_torchdynamo_orig_callable"):
                delattr(module, name)
    return twin.eval()


def _hooks_of(module: nn.Module) -> dict[str, dict]:
    """Hooks of every kind, by the attribute that holds them."""
    return {k: v for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}


def separate(module: nn.Module) -> nn.Module:
    """A shallow copy of a module, whose hooks are its own (none)."""
    copied = copy.copy(module)
    vars(copied).update({name: type(hooks)() for name, hooks in _hooks_of(module).items()})
    _without_overrides(module, copied)
    return copied


_ABSENT = object()
_overridden: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


@contextmanager
def overriding(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another attribute of a module for the time of the block; no copy of it gets that."""
    before = vars(module).get(name, _ABSENT)
    _overridden.setdefault(module, {})[name] = before
    vars(module)[name] = value
    try:
        yield
    finally:
        _restore(module, name, before)
        del _overridden[module][name]


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = before


def _without_overrides(module: nn.Module, copied: nn.Module, memo: dict | None = None) -> None:
    for name, before in _overridden.get(module, {}).items():
        if memo is not None and before is not _ABSENT:
            before = copy.deepcopy(before, memo)
        _restore(copied, name, before)


@contextmanager
def replaced(root: nn.Module, replacements: dict[str, nn.Module]) -> Iterator[None]:
    """Other modules at the given paths below `root`, for the time of the block."""
    originals = {path: root.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            put(root, path, module)
        yield
    finally:
        for path, module in originals.items():
            put(root, path, module)


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """`module` in the place of what is at `path` below `root`."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """`module` with another forward; attributes such as ``weight`` stay readable."""
    changed = separate(module)
    changed.forward = forward
    return changed
