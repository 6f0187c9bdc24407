"""Copies of a model's modules that share its weights, so that the model itself is never changed.

There are two kinds. A *trial copy* runs on random tokens, to find something out: hooks on the
model do not fire there. A *working copy* computes what the user will read (a twin, what reads its
prompts, what writes a continuation): it has all hooks of the model, and with them the masks and
norms that are kept as hooks.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_leaves

from flocking.models.attributes import (
    WRAPPED,
    has_own_state,
    holds_modules,
    kept,
    noting_changes,
    overridden,
    share_changing,
)

_Module = TypeVar("_Module", bound=nn.Module)

_CALLED = ("_forward_pre_hooks", "_forward_hooks")  # hooks that a forward pass calls


def trial_copy(model: _Module) -> _Module:
    """A copy to run on random tokens: no hooks, and outputs in the usual form.

    Every parameter is shared; buffers are copied, since some models update theirs as they run.
    The copy is in eval mode.

    Raises
    ------
    ValueError
        As :func:`working_copy`.
    """
    copied = _copied(model, with_hooks=False)
    for module in copied.modules():
        # Set once hooks that capture outputs are there, so that they are not registered again.
        vars(module).pop("_output_capturing_hooks_installed", None)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "return_dict"):
            config.return_dict = True
        # It is compiled, which it is not where what is run is watched, as in a trial.
        if getattr(config, "_attn_implementation_internal", None) == "flex_attention":
            config._attn_implementation_internal = "eager"
    return copied


def working_copy(model: _Module) -> _Module:
    """A copy that computes what `model` does now, with all of its hooks.

    A hook is called with the module that it was registered on, not with its copy, so that one that
    tells modules apart, or keeps what it sees by module, does what it does in the model. It is no
    longer called once it was removed there, by itself for example; one that is registered later
    does not matter to the other. Buffers are shared, too, but for those that transformers' modules
    do not save, which they may compute anew as they run. So is whatever else the user's, an
    adapter's and torch's modules keep, but for what refers to modules. Otherwise as
    :func:`trial_copy`.

    Raises
    ------
    ValueError
        If a module's ``forward`` was replaced by a function that would go on running the model
        instead of the copy.
    """
    return _copied(model, with_hooks=True)


@torch.inference_mode(False)
def _copied(model: _Module, *, with_hooks: bool) -> _Module:
    _refuse_replaced(model)
    memo = _kept_as_they_are(model)
    if with_hooks:
        memo |= {id(value): value for value in _shared(model)}
    copied = copy.deepcopy(model, memo)
    copies = dict(zip(model.modules(), copied.modules(), strict=True))
    for module, mine in copies.items():
        _without_overrides(module, mine, memo)
        share_changing(module, mine)
        if with_hooks:
            for name, hooks in _hooks_of(module).items():
                called = name in _CALLED
                vars(mine)[name].update(
                    {
                        key: _OfOriginal(hook, module, name, key) if called else hook
                        for key, hook in hooks.items()
                    }
                )
    _leave_out_compiled(copied)
    return copied.eval()


def _kept_as_they_are(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` is to put in the place of some objects, by their id."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        memo.update({id(hooks): type(hooks)() for hooks in _hooks_of(module).values()})
        if hasattr(module, "_hf_hook"):  # accelerate's, which holds the values of what it offloads
            memo[id(module._hf_hook)] = module._hf_hook
        for name in overridden.get(module, {}):  # a temporary replacement is not the model's
            memo[id(vars(module)[name])] = object()
        for value in tree_leaves(vars(module)):  # what a mask makes of a parameter, for example
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    return memo


def _shared(model: nn.Module) -> Iterator[Any]:
    """What a working copy is to have itself, beside parameters, so that it is as it is there."""
    for module in model.modules():
        own, unsaved = has_own_state(module), module._non_persistent_buffers_set
        found = [b for name, b in module._buffers.items() if not (own and name in unsaved)]
        found += [] if own else kept(module).values()
        for value in found:
            computed = isinstance(value, Tensor) and value.grad_fn is not None
            if not computed and not holds_modules(value):
                yield value


def _leave_out_compiled(copied: nn.Module) -> None:
    """Delete what is bound to the original model: wrapped methods, and compiled calls."""
    for name in WRAPPED:
        vars(copied).pop(name, None)
    for module in copied.modules():
        # A compiled forward, or what generate keeps once it has compiled for a static cache.
        for name, value in list(vars(module).items()):
            if hasattr(value, "_torchdynamo_orig_callable"):
                delattr(module, name)


class _OfOriginal:
    """A hook as a copy has it: called with the module that it was registered on.

    Hooks tell modules apart by what they are, and find what belongs to them by it. What a hook
    computes for its module, as a mask computes a weight, is given to the copy.
    """

    def __init__(self, hook: Any, original: nn.Module, kind: str, key: int) -> None:
        self.hook, self.original = hook, original
        self._kind, self._key = kind, key
        self.__module__ = str(getattr(hook, "__module__", ""))

    @property
    def is_in_force(self) -> bool:
        """Whether the original still has the hook."""
        hook = vars(self.original)[self._kind].get(self._key)
        return hook is self.hook and getattr(hook, "is_in_force", True)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.is_in_force:
            return None
        if torch.compiler.is_compiling():  # transformers' own hooks, which change nothing
            result = self.hook(self.original, *args, **kwargs)
        else:
            with noting_changes(self.original):
                result = self.hook(self.original, *args, **kwargs)
        for name, value in vars(self.original).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value
        return result


def _refuse_replaced(model: nn.Module) -> None:
    """Raise a ValueError for a ``forward`` that would run the model itself on a copy, too."""
    inside = set(model.modules())
    for path, module in model.named_modules():
        function = vars(module).get("forward")
        compiled = hasattr(function, "_torchdynamo_orig_callable")  # is left out of copies
        if function is not None and not compiled and _holds(function, inside):
            raise ValueError(
                f"{path or type(model).__name__} has another forward than its class, which holds "
                "a module of this model, so that a copy would run the model itself: change what "
                "it computes with a forward hook instead."
            )


def _holds(function: Any, modules: set[nn.Module]) -> bool:
    """Whether a plain function refers to one of these modules, itself or through another."""
    if isinstance(function, functools.partial):  # is copied with its arguments
        return _holds(function.func, modules)
    if not isinstance(function, types.FunctionType):
        return False
    held = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing is in it yet
            held.append(cell.cell_contents)
    owners = [getattr(each, "__self__", each) for each in held]
    return any(isinstance(each, nn.Module) and each in modules for each in owners) or any(
        _holds(each, modules) for each in held if each is not function
    )


def _hooks_of(module: nn.Module) -> dict[str, dict]:
    """Hooks of every kind, by the attribute that holds them."""
    return {k: v for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}


_NOT_THE_USERS = ("transformers.", "flocking.")
_OF_WEIGHTS = "torch.nn.utils."  # masks and norms, which compute a weight from others


def hooks_on(
    module: nn.Module, kinds: tuple[str, ...] = _CALLED, *, of_weights: bool = True
) -> list[Any]:
    """The user's hooks on a module, which a forward pass calls.

    A copy has those of its original that are still registered there. Left out are transformers'
    own, which capture outputs that are asked for, and those of ``observe``; without `of_weights`,
    also those of ``torch.nn.utils``.
    """
    if not any(map(vars(module).__getitem__, kinds)):  # nearly always
        return []
    left_out = _NOT_THE_USERS if of_weights else (*_NOT_THE_USERS, _OF_WEIGHTS)
    return [
        hook
        for name in kinds
        for hook in vars(module)[name].values()
        if not str(getattr(hook, "__module__", "")).startswith(left_out)
        and getattr(hook, "is_in_force", True)
    ]


def hooks_on_everything() -> list[Any]:
    """The user's hooks on all modules, of whatever model."""
    registered = (*_global_forward_pre_hooks.values(), *_global_forward_hooks.values())
    modules = (str(getattr(hook, "__module__", "")) for hook in registered)
    return [
        hook
        for hook, name in zip(registered, modules, strict=True)
        if not name.startswith(_NOT_THE_USERS)
    ]


def hook_keys(module: nn.Module) -> set[tuple[int, int]]:
    """Numbers that torch gave the user's hooks on a module, each with the id of the hook."""
    if not any(vars(module)[kind] for kind in _CALLED):
        return set()
    users = set(map(id, hooks_on(module)))
    registered = [pair for kind in _CALLED for pair in vars(module)[kind].items()]
    return {(key, id(hook)) for key, hook in registered if id(hook) in users}


def forward_of(module: nn.Module) -> Any:
    """The ``forward`` of this very object; None if it has that of its class, maybe compiled."""
    values = overridden.get(module, {}) if overridden else {}
    function = values["forward"] if "forward" in values else vars(module).get("forward")
    if function is _ABSENT or hasattr(function, "_torchdynamo_orig_callable"):
        return None
    return function


def separate(module: _Module) -> _Module:
    """A shallow copy of a module, without its hooks."""
    copied = type(module).__new__(type(module))  # (copy.copy refuses parametrized modules)
    vars(copied).update(vars(module))
    vars(copied).update({name: type(hooks)() for name, hooks in _hooks_of(module).items()})
    _without_overrides(module, copied)
    return copied


_ABSENT = object()


@contextmanager
def overriding(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's attribute inside of the ``with``; copies do not get it."""
    before = vars(module).get(name, _ABSENT)
    overridden.setdefault(module, {})[name] = before
    vars(module)[name] = value
    try:
        yield
    finally:
        _restore(module, name, before)
        del overridden[module][name]


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = before


def _without_overrides(module: nn.Module, copied: nn.Module, memo: dict | None = None) -> None:
    for name, before in overridden.get(module, {}).items():
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
