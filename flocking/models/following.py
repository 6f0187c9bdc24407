"""Changes of a model since working copies of it were made: followed, or noticed and refused.

Copies share the model's parameters and most of its buffers, so that their values are those of the
model at any time. What else a user changes is compared here by identity, and no weight by value.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedConfig

from flocking.models.copies import forward_of, has_own_state, hook_keys
from flocking.models.weights import parts

_TENSORS = ("_parameters", "_buffers")
_OF_TORCH = frozenset(vars(nn.Module())) | {"forward", "config", "generation_config"}
_SINGLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_GONE = object()


class Original:
    """A model of which working copies were made, and which they follow.

    Neither the model nor the copies are kept alive.

    Parameters
    ----------
    model : torch.nn.Module
    *copies : torch.nn.Module
        Working copies of it, or copies of such copies, with the same modules. A module that takes
        the place of one of theirs later does not follow.
    """

    def __init__(self, model: nn.Module, *copies: nn.Module) -> None:
        rows = zip(model.named_modules(), *(each.modules() for each in copies), strict=True)
        self._parts = []
        seen: set[int] = set()  # configs
        for (path, module), *mine in rows:
            config = vars(module).get("config")
            is_first = isinstance(config, PreTrainedConfig) and id(config) not in seen
            seen.add(id(config))
            self._parts.append(_Part(path, module, mine, is_first))

    def put_aside(self, paths: set[str]) -> None:
        """Say of modules that others stand in their place in a copy, with values of their own."""
        for part in self._parts:
            part.is_replaced = part.path in paths

    def follow(self) -> None:
        """Let the copies have what was changed in the model since the last time.

        These are parameters and buffers that were replaced by others of the same shape, and
        numbers, strings and flags, which say for example which adapter is active.

        Raises
        ------
        RuntimeError
            If anything else was changed: modules or hooks, for example. The copies are then left
            as they are.
        """
        news = []
        for part in self._parts:
            if (module := part.module()) is None:
                continue
            tensors, values = part.changed_tensors(module), part.changed_values(module)
            if problem := part.problem(module, tensors, values):
                raise RuntimeError(
                    f"the model was changed since this twin was made ({problem}): make the twin "
                    "again."
                )
            if tensors or values:
                news.append((part, module, tensors, values))
        for part, module, tensors, values in news:
            part.follow(module, tensors, values)


def settings(model: nn.Module) -> list[dict[str, Any]]:
    """Numbers, strings and flags of all modules of a model, to be compared with later ones."""
    return [each for module in model.modules() for each, _ in _plain(module, False)]


class _Part:
    """One module of a model, as it was at the last look, and its counterparts in the copies."""

    def __init__(
        self, path: str, module: nn.Module, copies: list[nn.Module], with_config: bool
    ) -> None:
        self.path, self.with_config = path, with_config
        self.module = weakref.ref(module)
        self.copies = [weakref.ref(each) for each in copies]
        self.kind, self.forward = type(module), id(forward_of(module))
        self.children = {name: _reference(child) for name, child in module._modules.items()}
        self.hooks = hook_keys(module)
        self.is_replaced = False
        self.values = [values for values, _ in _plain(module, with_config)]
        self.tensors = {
            (kind, name): _Seen(tensor, [vars(each)[kind].get(name) for each in copies], kind)
            for kind in _TENSORS
            for name, tensor in vars(module)[kind].items()
        }

    def changed_tensors(self, module: nn.Module) -> list[tuple[str, str]]:
        """Parameters and buffers that are not as they were: the dict that holds each, and names."""
        if _is_offloaded(module):  # they come and go as the model runs
            return []
        holders, found = vars(module), []
        for (kind, name), seen in self.tensors.items():
            tensor = holders[kind].get(name)
            if seen.is_same(tensor):
                continue
            if kind == "_buffers" and not seen.shared and not seen.is_it(tensor):
                seen.look(tensor)  # the module made it anew as it ran
            else:
                found.append((kind, name))
        return found

    def changed_values(self, module: nn.Module) -> list[tuple[int, dict[str, Any]]]:
        """Plain values that are not as they were, all of one dict, with the number of the dict."""
        found = zip(_plain(module, self.with_config), self.values, strict=False)
        return [(number, now) for number, ((now, _), then) in enumerate(found) if now != then]

    def problem(
        self,
        module: nn.Module,
        tensors: list[tuple[str, str]],
        values: list[tuple[int, dict[str, Any]]],
    ) -> str:
        """What was changed that the copies cannot follow; empty if there is nothing."""
        named = self.path or "the model itself"
        if type(module) is not self.kind:
            return f"{named} is a {type(module).__name__} now"
        if id(forward_of(module)) != self.forward:
            return f"{named} has another forward"
        children = module._modules
        for name in {**self.children, **children}:
            was_there, is_there = name in self.children, name in children
            if not (was_there and is_there) or children[name] is not _referent(self.children[name]):
                return self._what(name, was_there, is_there)
        if hook_keys(module) - self.hooks:
            return f"a hook was registered on {named}"
        if values and self.is_replaced:
            return f"an attribute of {named} was changed"
        return self._problem_of(module, tensors)

    def _problem_of(self, module: nn.Module, tensors: list[tuple[str, str]]) -> str:
        for name in module._parameters:
            if ("_parameters", name) not in self.tensors:
                return self._what(name, False, True)
        for kind, name in tensors:
            seen, tensor = self.tensors[kind, name], vars(module)[kind].get(name)
            if name not in vars(module)[kind]:
                return self._what(name, True, False)
            if not seen.can_become(tensor, kind):
                return f"{self.path}.{name} {seen.difference(tensor)}".lstrip(".")
        return ""

    def _what(self, name: str, was_there: bool, is_there: bool) -> str:
        done = "replaced" if was_there and is_there else "added" if is_there else "removed"
        return f"{self.path}.{name} was {done}".lstrip(".")

    def follow(
        self,
        module: nn.Module,
        tensors: list[tuple[str, str]],
        values: list[tuple[int, dict[str, Any]]],
    ) -> None:
        """Bring what has changed to the copies."""
        copies = [each for ref in self.copies if (each := ref()) is not None]
        for kind, name in tensors:
            seen, tensor = self.tensors[kind, name], vars(module)[kind][name]
            for mine in copies:
                vars(mine)[kind][name] = seen.of_copy(tensor)
            seen.look(tensor)
        places = [place for _, place in _plain(module, self.with_config)]
        for number, now in values:
            then = self.values[number]
            changed = [name for name in now if name not in then or now[name] != then[name]]
            for mine in copies:
                _, target = list(_plain(mine, self.with_config))[number]
                for name in changed:
                    value = places[number][name]
                    target[name] = value if isinstance(value, Tensor) else copy.deepcopy(value)
            self.values[number] = now


class _Seen:
    """A tensor of a module, as it was at the last look.

    Attributes
    ----------
    shared : bool
        Whether the copies have this very tensor; else each has its own.
    """

    def __init__(self, tensor: Tensor | None, of_copies: list[Tensor | None], kind: str) -> None:
        self.shared = all(each is tensor for each in of_copies)
        self._weak = kind == "_buffers" and not self.shared
        self.look(tensor)

    def look(self, tensor: Tensor | None) -> None:
        # A shared one lives as long as the copies, so that its id is its own. (torch does not swap
        # parameters to which there are weak references.)
        self._reference = _reference(tensor) if self._weak else None
        self._id, self._written = id(tensor), self._state(tensor)
        self._form = _form(tensor)

    def is_same(self, tensor: Tensor | None) -> bool:
        """Whether this is the tensor; where the copies have their own, it must be unchanged."""
        return (
            self.is_it(tensor)
            and _form(tensor) == self._form
            and self._state(tensor) == self._written
        )

    def is_it(self, tensor: Tensor | None) -> bool:
        """Whether this is the very tensor, changed or not."""
        return tensor is _referent(self._reference) if self._weak else id(tensor) == self._id

    def can_become(self, tensor: Tensor | None, kind: str) -> bool:
        """Whether another tensor can take its place in the copies, too."""
        if tensor is None or self._form is None or (kind == "_parameters" and not self.shared):
            return False
        return _form(tensor) == self._form

    def difference(self, tensor: Tensor | None) -> str:
        """In which way this is another tensor, as the rest of a sentence."""
        if tensor is not None and self._form is not None:
            _, _, dtype, device = self._form
            if tensor.dtype != dtype:
                return f"is in {tensor.dtype} now"
            if tensor.device != device:
                return f"is on {tensor.device} now"
        return "was changed" if self.is_it(tensor) else "was replaced"

    def of_copy(self, tensor: Tensor | None) -> Tensor | None:
        """What a copy gets where the model has this tensor."""
        return tensor if self.shared or tensor is None else tensor.detach().clone()

    def _state(self, tensor: Tensor | None) -> list[tuple[int, int]]:
        """Where an unshared tensor is, and how often it was written to, as far as torch counts."""
        if self.shared or tensor is None:
            return []
        return [
            (part.data_ptr(), 0 if part.is_inference() else part._version)
            for part in parts(tensor.detach())
        ]


def _is_offloaded(module: nn.Module) -> bool:
    """Whether tensors come and go as the module runs; quicker for most than asking accelerate."""
    return "_hf_hook" in vars(module) and has_offloaded_params(module)


def _form(tensor: Tensor | None) -> tuple[object, ...] | None:
    return tensor if tensor is None else (type(tensor), tensor.shape, tensor.dtype, tensor.device)


def _reference(value: Any) -> weakref.ref | None:
    return None if value is None else weakref.ref(value)


def _referent(reference: weakref.ref | None) -> Any:
    """What is referred to; something that nothing else is, once that is gone."""
    if reference is None:
        return None
    value = reference()
    return _GONE if value is None else value


# --------------------------------------------------------------------------------------
# Plain values


class _Same:
    """A tensor that is compared by what it is, not by its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._reference = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        mine = self._reference()
        return isinstance(other, _Same) and mine is not None and mine is other._reference()

    __hash__ = None  # type: ignore[assignment]  # it is never a key


def _plain(module: nn.Module, with_config: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Plain values of a module and of its configs, each with the dict that they are from.

    Of a model's own modules, what they may keep as they run is left out: all tensors, names with
    an underscore, and everything beside buffers that are not saved, as in rotary embeddings.
    """
    own, attributes = has_own_state(module), vars(module)
    chosen: dict[str, Any] = {}
    names = () if own and module._non_persistent_buffers_set else attributes.keys() - _OF_TORCH
    for name in names:
        value = attributes[name]
        if own and (isinstance(value, Tensor) or name.startswith("_")):
            continue
        if isinstance(value, _SINGLE):
            chosen[name] = value
        elif isinstance(value, Tensor):
            chosen[name] = _Same(value)
        elif _is_plain(value):
            chosen[name] = copy.deepcopy(value)
    yield chosen, attributes
    if with_config:
        for values in _configs(attributes["config"]):
            plain = {name: value for name, value in values.items() if _is_plain(value)}
            yield copy.deepcopy(plain), values


def _configs(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    yield config.__dict__
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _SINGLE)
