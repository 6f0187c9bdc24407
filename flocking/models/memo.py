"""Finding something out once per model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

from flocking.models.attributes import Same, changing, config_marks, mark, settings, unlike
from flocking.models.copies import forward_of
from flocking.models.locks import exclusive
from flocking.models.trees import modules_of, named_modules_of

_Found = TypeVar("_Found")

_STATES = 4  # of one model that are remembered: a flag is often put back, or an adapter


class PerModel(Generic[_Found]):
    """A function of a model that runs once for each state of it.

    The state is all that can be compared without looking at weights: modules, kinds of weights,
    what modules and configs keep, and functions that stand in the place of methods. What a module
    was seen to change by itself as it ran does not count.
    """

    def __init__(self, find: Callable[[PreTrainedModel], _Found]) -> None:
        functools.update_wrapper(self, find)
        self._find = find
        self._known: weakref.WeakKeyDictionary[nn.Module, list[tuple[_State, _Found]]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, model: PreTrainedModel) -> _Found:
        """What is known of the model as it is, or else what the function finds now."""
        with exclusive(model):
            state = _settled.get(model) or _state_of(model)
            for then, found in self._known.get(model, ()):
                if _is_same(model, then, state):
                    return found
            found = self._find(model)
            self._remember(model, state, found)
            return found

    def forget(self, model: PreTrainedModel) -> None:
        """Run the function again at the next call."""
        self._known.pop(model, None)

    def remember(self, model: PreTrainedModel, found: _Found) -> None:
        """Take `found` as known of a model, for example because it holds for its original."""
        self._known.pop(model, None)
        self._remember(model, _state_of(model), found)

    def _remember(self, model: PreTrainedModel, state: _State, found: _Found) -> None:
        # What was found of other modules would keep them, and their weights, in memory.
        before = [each for each in self._known.get(model, ()) if each[0].modules == state.modules]
        self._known[model] = [(state, found), *before[: _STATES - 1]]


_settled: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Take the model for what it is now inside of the ``with``, whatever its hooks note in it."""
    if model in _settled:
        yield
        return
    _settled[model] = _state_of(model)
    try:
        yield
    finally:
        del _settled[model]


class _State(NamedTuple):
    modules: list[tuple[object, ...]]
    others: tuple[object, ...]
    kept: list[dict[str, Any]]


def _state_of(model: nn.Module) -> _State:
    kinds: set[object] = set()
    modules: list[tuple[object, ...]] = []
    values: list[Any] = []
    classes: set[type] = set()
    for path, module in named_modules_of(model):
        kind = type(module)
        modules.append((path, id(module), kind, tuple(module._parameters)))
        if (mine := forward_of(module)) is not None:
            values.append((path, mark(mine, by_kind=True)))
        if kind not in classes:
            classes.add(kind)
            values.append(Same(kind.forward))
        for p in module._parameters.values():
            kinds.add(p if p is None else (type(p), p.device.type, p.dtype))
    return _State(
        modules,
        (kinds, getattr(model, "name_or_path", None), values, config_marks(model)),
        settings(model, by_kind=True),
    )


def _is_same(model: nn.Module, then: _State, now: _State) -> bool:
    return (
        then.modules == now.modules
        and then.others == now.others
        and (
            then.kept == now.kept  # nearly always
            or not any(map(unlike, then.kept, now.kept, map(changing, modules_of(model))))
        )
    )
