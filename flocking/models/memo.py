"""Finding something out once per model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

_Found = TypeVar("_Found")


class PerModel(Generic[_Found]):
    """Remember what `find` says of a model, until the model's modules or weights change kind."""

    def __init__(self, find: Callable[[nn.Module], _Found]) -> None:
        functools.update_wrapper(self, find)
        self._find = find
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[object, _Found]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, model: nn.Module) -> _Found:
        """What is known of the model, or else what is found out now."""
        state = _state_of(model)
        if model not in self._known or self._known[model][0] != state:
            self._known[model] = (state, self._find(model))
        return self._known[model][1]

    def forget(self, model: nn.Module) -> None:
        """Find it out again, the next time."""
        self._known.pop(model, None)

    def remember(self, model: nn.Module, found: _Found) -> None:
        """What is known of a model already, such as of its shadow."""
        self._known[model] = (_state_of(model), found)


def _state_of(model: nn.Module) -> tuple[object, ...]:
    config = getattr(model, "config", None)
    modules, kinds = {}, set()
    for path, module in model.named_modules():
        own = vars(module)  # PEFT's layers know which of their adapters is in force
        modules[path] = id(module), str(own.get("_active_adapter")), own.get("_disable_adapters")
        for p in module._parameters.values():
            kinds.add(p if p is None else (type(p), p.device.type, p.dtype))
    return (
        modules,
        kinds,
        getattr(model, "name_or_path", None),
        getattr(config, "is_decoder", None),
        getattr(config, "_attn_implementation", None),
    )
