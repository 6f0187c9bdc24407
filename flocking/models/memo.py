"""Finding something out once per model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn
from transformers import PreTrainedModel

from flocking.models.locks import exclusive

_Found = TypeVar("_Found")


class PerModel(Generic[_Found]):
    """A function of a model that runs once, until the modules or kinds of weights change."""

    def __init__(self, find: Callable[[PreTrainedModel], _Found]) -> None:
        functools.update_wrapper(self, find)
        self._find = find
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[object, _Found]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, model: PreTrainedModel) -> _Found:
        """What is known of the model, or else what the function finds now."""
        with exclusive(model):
            state = _state_of(model)
            if model not in self._known or self._known[model][0] != state:
                self._known[model] = (state, self._find(model))
            return self._known[model][1]

    def forget(self, model: PreTrainedModel) -> None:
        """Run the function again at the next call."""
        self._known.pop(model, None)

    def remember(self, model: PreTrainedModel, found: _Found) -> None:
        """Take `found` as known of a model, for example because it holds for its original."""
        self._known[model] = (_state_of(model), found)


def _state_of(model: nn.Module) -> tuple[object, ...]:
    config = getattr(model, "config", None)
    modules, kinds = {}, set()
    for path, module in model.named_modules():
        values = vars(module)  # PEFT's layers keep here which of their adapters is active
        adapter = str(values.get("_active_adapter")), values.get("_disable_adapters")
        modules[path] = id(module), type(module), tuple(module._parameters), *adapter
        for p in module._parameters.values():
            kinds.add(p if p is None else (type(p), p.device.type, p.dtype))
    return (
        modules,
        kinds,
        getattr(model, "name_or_path", None),
        getattr(config, "is_decoder", None),
        getattr(config, "_attn_implementation", None),
    )
