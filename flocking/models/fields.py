"""Configs of a model, generation configs among them, whose fields copies of the model follow."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from flocking.models.attributes import configs, mark

GENERATION = ("generation_config",)


def configs_of(
    module: nn.Module,
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig | GenerationConfig]]:
    """A module's configs, the generation config among them, each with its names."""
    yield from configs(module)
    generation = vars(module).get("generation_config")
    if isinstance(generation, GenerationConfig):
        yield GENERATION, generation


class Fields:
    """A config of a module as it was at the last look, and those of its copies.

    A field of a generation config that was set to something else in a copy stays as it was set
    there, and so does a generation config that took the place of the copy's own.
    """

    def __init__(self, names: tuple[str, ...], module: nn.Module, copies: list[nn.Module]) -> None:
        self.names = names
        self._module = weakref.ref(module)
        self._copies = [weakref.ref(each) for each in copies]
        self._marks = self._look(module)
        self._theirs = [(self._place(each), self._look(each)) for each in copies]

    def follow(self) -> bool:
        """Bring the fields that have changed to the copies; whether they may matter to a check."""
        module = self._module()
        if module is None or (now := self._look(module)) == self._marks:
            return False
        then, self._marks = self._marks, now
        fields = [
            name
            for name in {**then, **now}
            if name not in then or name not in now or then[name] != now[name]
        ]
        place = self._place(module)
        for number, ref in enumerate(self._copies):
            if (mine := ref()) is None:
                continue
            target, (own, before) = self._place(mine), self._theirs[number]
            here = self._look(mine)
            if self.names == GENERATION and target is not own:
                continue
            taken = [
                name
                for name in fields
                if self.names != GENERATION or before.get(name) == here.get(name)
            ]
            for name in taken:
                if name not in place:
                    target.pop(name, None)
                else:
                    target[name] = copy.deepcopy(place[name])
            looked = self._look(mine)
            before.update((name, looked.get(name)) for name in taken)
        return self.names != GENERATION

    def _look(self, module: nn.Module) -> dict[str, Any]:
        return {
            name: mark(value)
            for name, value in self._place(module).items()
            if not isinstance(value, PreTrainedConfig)
        }

    def _place(self, module: nn.Module) -> dict[str, Any]:
        """The fields, in the dict that holds them; empty if there is no such config any longer."""
        value: Any = module
        for name in self.names:
            value = vars(value).get(name)
            if not isinstance(value, PreTrainedConfig | GenerationConfig):
                return {}
        return vars(value)
