"""Changes of a model since working copies of it were made: followed, or noticed and refused.

Copies share the model's parameters, most of its buffers and what modules of the user's keep, so
that these are as they are there at any time. What else a user changes is compared here by
identity, and no weight by value.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from flocking.models.attributes import (
    Same,
    changing,
    has_own_state,
    holds_modules,
    instead_of_method,
    kept,
    mark,
    not_by_itself,
    updates_itself,
)
from flocking.models.copies import forward_of, hook_keys
from flocking.models.fields import GENERATION, Fields, configs_of
from flocking.models.weights import parts

_TENSORS = ("_parameters", "_buffers")
_GONE = object()
_LITTLE = 1024  # elements
# What gives, for each module of the model, the one that stands for it in a copy.
_Counterparts = weakref.WeakKeyDictionary[nn.Module, Callable[[], nn.Module | None]]
_SINGLE = (bool, int, float, complex, str, bytes, type(None))  # have no identity


class Original:
    """A model of which working copies were made, and which they follow.

    Neither the model nor the copies are kept alive.

    Parameters
    ----------
    model : torch.nn.Module
    *copies : torch.nn.Module
        Working copies of it, or copies of such copies, with the same modules. A module that takes
        the place of one of theirs later does not follow.
    check : callable
        Raises an error if the copies have become what they must not be. It is called after they
        followed anything but tensors, until it raises none.
    """

    def __init__(
        self, model: nn.Module, *copies: nn.Module, check: Callable[[], object] = lambda: None
    ) -> None:
        self._check, self._is_checked = check, True
        rows = list(zip(model.named_modules(), *(each.modules() for each in copies), strict=True))
        self._parts, self._settings = [], []
        seen: set[int] = set()  # configs
        for (path, module), *mine in rows:
            self._parts.append(_Part(path, module, mine))
            for names, config in configs_of(module):
                if id(config) not in seen:
                    seen.add(id(config))
                    self._settings.append(Fields(names, module, mine))
        # What stands for a module of the model in each of the copies.
        self._counterparts: list[_Counterparts] = [
            weakref.WeakKeyDictionary(
                {module: _finder(row[n], path) for (path, module), *row in rows}
            )
            for n in range(len(copies))
        ]

    def put_aside(self, paths: set[str]) -> None:
        """Say of modules that others stand in their place in a copy, with values of their own."""
        for part in self._parts:
            part.is_replaced = part.path in paths

    def follow(self) -> None:
        """Let the copies have what was changed in the model since the last time.

        These are parameters and buffers that were replaced by others of the same shape, and what
        else modules and configs keep, which says for example which adapter is active.

        Raises
        ------
        RuntimeError
            If anything else was changed: modules or hooks, for example. The copies are then left
            as they are.
        Exception
            What `check` raises.
        """
        news = []
        for part in self._parts:
            if (module := part.module()) is None:
                continue
            tensors, values = part.changes(module)
            if problem := part.problem(module, tensors, values):
                raise RuntimeError(
                    f"the model was changed since this twin was made ({problem}): make the twin "
                    "again."
                )
            if tensors or values:
                news.append((part, module, tensors, values))
        for part, module, tensors, values in news:
            part.follow(module, tensors, values, self._counterparts)
        followed = [each.follow() for each in self._settings]
        if any(followed) or any(values.keys() - changing(m) for _, m, _, values in news):
            self._is_checked = False
        if not self._is_checked:
            self._check()
            self._is_checked = True

    def follow_generation(self) -> None:
        """Let the copies have what was changed in the model's generation config, and only that."""
        for each in self._settings:
            if each.names == GENERATION:
                each.follow()


class _Part:
    """One module of a model, as it was at the last look, and its counterparts in the copies."""

    def __init__(self, path: str, module: nn.Module, copies: list[nn.Module]) -> None:
        self.path = path
        self.module = weakref.ref(module)
        self.copies = [weakref.ref(each) for each in copies]
        self.kind, self.forward = type(module), _forward(module)
        self.children = {name: _reference(child) for name, child in module._modules.items()}
        self.hooks = hook_keys(module)
        self.is_replaced, self.is_own = False, has_own_state(module)
        self.values = self._look(module, {})
        self.tensors = {
            kind: {
                name: _Seen(tensor, [vars(each)[kind].get(name) for each in copies], kind)
                for name, tensor in vars(module)[kind].items()
            }
            for kind in _TENSORS
        }

    def changes(self, module: nn.Module) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """What is not as it was: parameters and buffers, and marks of what else is kept.

        Parameters and buffers are the dict that holds each, and its name.
        """
        tensors = [
            (kind, name)
            for kind in _TENSORS
            if vars(module)[kind] or self.tensors[kind]
            for name in {**vars(module)[kind], **self.tensors[kind]}
            if not self._is_as_it_was(kind, name, vars(module)[kind].get(name, _GONE))
        ]
        if tensors and _is_offloaded(module):  # these come and go as the model runs
            tensors = [
                (kind, name)
                for kind, name in tensors
                if kind == "_buffers" and not self._is_away(module, name)
            ]
        now = self._look(module, self.values)
        if not tensors and now == self.values:  # nearly always
            return [], {}
        if self._ran(module, tensors):
            for kind, name in tensors:
                self._look_at(kind, name, module)
            self.values = now
            return [], {}
        return tensors, {
            name: now.get(name, _GONE)
            for name in {**self.values, **now}
            if name not in now or name not in self.values or now[name] != self.values[name]
        }

    def _is_as_it_was(self, kind: str, name: str, tensor: Any) -> bool:
        seen = self.tensors[kind].get(name)
        return seen is not None and tensor is not _GONE and seen.is_same(tensor)

    def _is_away(self, module: nn.Module, name: str) -> bool:
        """Whether accelerate holds a buffer, now or at the last look."""
        tensor, seen = module._buffers.get(name), self.tensors["_buffers"].get(name)
        return tensor is None or tensor.is_meta or seen is None or seen.was_away

    def _ran(self, module: nn.Module, changed: list[tuple[str, str]]) -> bool:
        """Whether the changes are what one of the model's own modules did as it ran.

        It computed buffers for a longer text, or, if it is of that kind, at any time.
        """
        unsaved = module._non_persistent_buffers_set
        mine = [name for kind, name in changed if kind == "_buffers" and name in unsaved]
        if not self.is_own or len(mine) < len(changed):
            return False
        return updates_itself(module) or any(
            name in self.tensors["_buffers"]
            and not self.tensors["_buffers"][name].can_become(module._buffers.get(name), "_buffers")
            for name in mine
        )

    def _look(self, module: nn.Module, before: dict[str, Any]) -> dict[str, Any]:
        """What the module keeps, as it is now."""
        looked = {}
        for name, value in kept(module).items():
            then = before.get(name)
            # (Nearly all are numbers and strings; a twin looks at each of them for every prompt.)
            known = then is not None and then.is_single(value)
            looked[name] = then if known else _Kept(value, then, self.is_own)
        return looked

    def _look_at(self, kind: str, name: str, module: nn.Module) -> None:
        tensor, mine = vars(module)[kind].get(name), self._here()
        if (seen := self.tensors[kind].get(name)) is not None:
            seen.look(tensor)
        else:
            found = [vars(each)[kind].get(name) for each in mine]
            self.tensors[kind][name] = _Seen(tensor, found, kind)

    def _here(self) -> list[nn.Module]:
        return [each for ref in self.copies if (each := ref()) is not None]

    def problem(
        self, module: nn.Module, tensors: list[tuple[str, str]], values: dict[str, Any]
    ) -> str:
        """What was changed that the copies cannot follow; empty if there is nothing."""
        named = self.path or "the model itself"
        if type(module) is not self.kind:
            return f"{named} is a {type(module).__name__} now"
        if _forward(module) != self.forward:
            return f"{named} has another forward"
        children = module._modules
        for name in {**self.children, **children} if children or self.children else ():
            was_there, is_there = name in self.children, name in children
            if not (was_there and is_there) or children[name] is not _referent(self.children[name]):
                return self._what(name, was_there, is_there)
        if hook_keys(module) - self.hooks:
            return f"a hook was registered on {named}"
        if values and self.is_replaced:
            return f"an attribute of {named} was changed"
        for name, value in kept(module).items() if values else ():
            if name in values and instead_of_method(module, name, value):
                return self._what(name, True, True)
        return self._problem_of(module, tensors)

    def _problem_of(self, module: nn.Module, tensors: list[tuple[str, str]]) -> str:
        for kind, name in tensors:
            seen, is_there = self.tensors[kind].get(name), name in vars(module)[kind]
            tensor = vars(module)[kind].get(name)
            if seen is None and (kind == "_parameters" or self.is_replaced):
                return self._what(name, False, True)
            if not is_there:
                return self._what(name, True, False)
            if seen is not None and not seen.can_become(tensor, kind):
                return f"{self.path}.{name} {seen.difference(tensor)}".lstrip(".")
        return ""

    def _what(self, name: str, was_there: bool, is_there: bool) -> str:
        done = "replaced" if was_there and is_there else "added" if is_there else "removed"
        return f"{self.path}.{name} was {done}".lstrip(".")

    def follow(
        self,
        module: nn.Module,
        tensors: list[tuple[str, str]],
        values: dict[str, Any],
        counterparts: list[_Counterparts],
    ) -> None:
        """Bring what has changed to the copies."""
        attributes = vars(module)
        for number, ref in enumerate(self.copies):
            if (mine := ref()) is None:
                continue
            for name, value in values.items():
                if value is _GONE:
                    vars(mine).pop(name, None)
                else:
                    there = vars(mine).get(name)
                    known = counterparts[number]
                    vars(mine)[name] = value.of_copy(attributes[name], there, known)
            not_by_itself(mine, values)
            for kind, name in tensors:
                seen, there = self.tensors[kind].get(name), vars(mine)[kind].get(name)
                shared = not self._is_unsaved(module, name) if seen is None else seen.shared
                tensor = attributes[kind][name]
                vars(mine)[kind][name] = tensor if shared else _own(tensor, there)
            mine._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for kind, name in tensors:
            self._look_at(kind, name, module)
        self.values = self._look(module, self.values)

    def _is_unsaved(self, module: nn.Module, name: str) -> bool:
        return self.is_own and name in module._non_persistent_buffers_set


class _Kept:
    """Something that a module keeps, as it was at the last look.

    Attributes
    ----------
    shared : bool
        Whether the copies are to have this very object, and with it all that is done to it.
    """

    shared: bool
    _it: Same

    def __init__(self, value: Any, before: _Kept | None, is_own: bool) -> None:
        if before is not None and before._it.is_it(value) and not is_own:
            self.shared, self._it = before.shared, before._it
        else:
            self.shared = not is_own and not holds_modules(value)
            self._it = Same(value, hold=self.shared)
        self._mark = mark(value, objects=not is_own)
        if self.shared and not isinstance(value, _SINGLE):
            self._mark = (self._it, self._mark)
        elif isinstance(value, Tensor):
            self._mark = (self._it, _written(value))

    def is_single(self, value: Any) -> bool:
        """Whether this is that very number, string or flag, which cannot have changed."""
        return type(value) in _SINGLE and value is self._mark

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Kept) and self._mark == other._mark)

    __hash__ = None  # type: ignore[assignment]  # it is never a key

    def of_copy(self, value: Any, there: Any, counterparts: _Counterparts) -> Any:
        """What a copy gets where the model has this value, instead of what is there."""
        if isinstance(value, Tensor):
            is_elsewhere = isinstance(there, Tensor) and there.device != value.device
            return value if self.shared and not is_elsewhere else _own(value, there)
        if self.shared:
            return value
        memo: dict[int, Any] = {
            id(module): mine
            for module, find in counterparts.items()
            if (mine := find()) is not None
        }
        return copy.deepcopy(value, memo)


def _own(tensor: Tensor | None, there: Any) -> Tensor | None:
    """A copy of a tensor, on the device of the one that was there."""
    if tensor is None:
        return None
    return tensor.detach().clone().to(there.device if isinstance(there, Tensor) else tensor.device)


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

    @property
    def was_away(self) -> bool:
        """Whether it had no values at the last look."""
        return self._form is None or torch.device("meta") in self._form

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
        if kind == "_buffers" and self.shared and (tensor is None or self._form is None):
            return True
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

    def _state(self, tensor: Tensor | None) -> list[tuple[int, int, bytes]]:
        return [] if self.shared or tensor is None else _written(tensor)


def _written(tensor: Tensor) -> list[tuple[int, int, bytes]]:
    """Where an unshared tensor is, how often it was written to, as far as torch counts, and more.

    That is what is in it, if that is little: rotary frequencies, for example.
    """
    return [
        (part.data_ptr(), 0 if part.is_inference() else part._version, _content(part))
        for part in parts(tensor.detach())
    ]


def _content(tensor: Tensor) -> bytes:
    if tensor.is_meta or tensor.numel() > _LITTLE:
        return b""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_offloaded(module: nn.Module) -> bool:
    """Whether tensors come and go as the module runs; quicker for most than asking accelerate."""
    return "_hf_hook" in vars(module) and has_offloaded_params(module)


def _form(tensor: Tensor | None) -> tuple[object, ...] | None:
    return tensor if tensor is None else (type(tensor), tensor.shape, tensor.dtype, tensor.device)


def _finder(module: nn.Module, path: str) -> Callable[[], nn.Module | None]:
    """A function that gives a module of a copy; not the copy itself once that is gone.

    (A twin holds these, and would otherwise keep itself in memory.)
    """
    return (lambda: module) if path else weakref.ref(module)


def _forward(module: nn.Module) -> Any:
    """What the module computes with, if that is not its class's."""
    function = forward_of(module)
    is_bound = function is None or isinstance(function, types.MethodType)
    return mark(function) if is_bound else Same(function)


def _reference(value: Any) -> weakref.ref | None:
    return None if value is None else weakref.ref(value)


def _referent(reference: weakref.ref | None) -> Any:
    """What is referred to; something that nothing else is, once that is gone."""
    if reference is None:
        return None
    value = reference()
    return _GONE if value is None else value
