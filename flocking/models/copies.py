"""A model's shadow: a copy of its modules that shares its weights, and may be changed freely.

Whatever flocking tries on a model, or makes of it, happens on a shadow: modules are replaced,
projections are cut down, and the model itself is never touched.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)

# Methods that accelerate wraps and binds to one model: a copy's would act on the original.
_WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


def shadow(model: _Module) -> _Module:
    """A deep copy of `model`'s modules that shares every parameter.

    Buffers are copied, since some models update theirs as they run. Hooks are left out, since
    they are the user's and would fire; so are compiled calls, which would run the original
    model instead of the copy. The copy is in eval mode.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        memo.update({id(hooks): type(hooks)() for hooks in _hooks_of(module).values()})
        if hasattr(module, "_hf_hook"):  # accelerate's, which holds the values of what it offloads
            memo[id(module._hf_hook)] = module._hf_hook
        for name in _overridden.get(module, {}):  # a temporary replacement is not the model's
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


def separate(module: _Module) -> _Module:
    """A shallow copy of a module, without its hooks."""
    copied = copy.copy(module)
    vars(copied).update({name: type(hooks)() for name, hooks in _hooks_of(module).items()})
    _without_overrides(module, copied)
    return copied


_ABSENT = object()
_overridden: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


@contextmanager
def overriding(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's attribute inside of the ``with``; copies do not get it."""
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
    """Other modules at the given paths below `root`, inside of the ``with``."""
    originals = {path: root.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            put(root, path, module)
        yield
    finally:
        for path, module in originals.items():
            put(root, path, module)


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set `module` at `path` below `root`, in the place of the one that is there."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A copy of `module` with another forward; attributes such as ``weight`` stay readable."""
    changed = separate(module)
    changed.forward = forward
    return changed
