"""What modules keep beside parameters, buffers, hooks and other modules, and whether it changed.

Results depend on it: flags, numbers, functions, and whatever else a user's module looks at. It is
compared in two ways: what a proof is remembered for (:mod:`flocking.models.memo`), and what working
copies have of their model (:mod:`flocking.models.following`).
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from flocking.models.trees import modules_of

# Methods that accelerate wraps and binds to one model: a copy's would act on the original.
WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")

_NOT_KEPT = (
    frozenset(vars(nn.Module()))
    | {"forward", "config", "generation_config", "warnings_issued", "gradient_checkpointing"}
    | {"_hf_hook", "_old_forward", *WRAPPED}
    | {"_griffin", "_reread", "_ends"}  # of flocking's own, on a twin
)
_SINGLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_QUICK = frozenset(_SINGLE)
_CONTAINERS = (dict, list, tuple, set, frozenset)
# What refers to nothing that a copy would have another of.
_ALONE = (*_SINGLE, Enum, np.generic, np.ndarray, Tensor, type, types.ModuleType, weakref.ref)
_VALUES = (*_SINGLE, Enum)
_IDENTITIES = (*_ALONE, types.FunctionType, nn.Module, PreTrainedConfig, GenerationConfig)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# Of configs: what a proof sets for itself, and names; of private fields, which do matter.
_NO_MATTER = frozenset(
    {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"return_dict", "architectures", "id2label", "label2id", "transformers_version"}
)
_PRIVATE = frozenset({"_attn_implementation_internal", "_experts_implementation_internal"})
_DEPTH, _LENGTH = 4, 256  # how far down, and how long a container, is compared by what is in it

# Attributes that are replaced for a while, by module and name: what they were before.
overridden: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def has_own_state(module: nn.Module) -> bool:
    """Whether a module is of a model's own code, and may keep there what it needs as it runs.

    Others are torch's, an adapter's or the user's.
    """
    return type(module).__module__.startswith(("transformers.", "transformers_modules."))


def updates_itself(module: nn.Module) -> bool:
    """Whether a model's own module computes its buffers anew as it runs: dynamic rotary ones."""
    if (kind := vars(module).get("rope_type")) is None:
        return False
    return has_own_state(module) and ("dynamic" in str(kind) or "longrope" in str(kind))


def kept(module: nn.Module) -> dict[str, Any]:
    """What a module keeps, by name.

    Of a model's own modules, what they may keep as they run is left out: names with an underscore,
    and everything that is beside dynamic rotary embeddings.
    """
    if updates_itself(module):
        return {}
    own = has_own_state(module)
    before = overridden.get(module, {}) if overridden else {}
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _NOT_KEPT
        and name not in before
        and (type(value) in _QUICK or not hasattr(value, "_torchdynamo_orig_callable"))
        and (not own or not name.startswith("_") or instead_of_method(module, name, value))
    }


def instead_of_method(module: nn.Module, name: str, value: Any) -> bool:
    """Whether a function stands in the place of a method, on this very object."""
    return isinstance(value, _FUNCTIONS) and callable(getattr(type(module), name, None))


def holds_modules(value: Any, depth: int = 0) -> bool:
    """Whether a value refers to modules or configs, of which a copy has others.

    What is deeper than is looked counts as such.
    """
    if isinstance(value, (*_ALONE, types.FunctionType)):
        return False
    if isinstance(value, nn.Module | PreTrainedConfig | GenerationConfig) or depth > _DEPTH:
        return True
    inside: Any = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, types.MethodType | types.BuiltinFunctionType):
        inside = (value.__self__,)
    elif isinstance(value, functools.partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        inside = (*value.keys(), *value.values(), *inside)
    elif isinstance(value, _CONTAINERS):
        inside = (*value, *inside)
    return any(holds_modules(each, depth + 1) for each in inside)


class Same:
    """Something that is compared by what it is, not by its value.

    What cannot be referred to weakly is known by its id, unless `hold` keeps it alive.
    """

    __slots__ = ("_held", "_id", "_reference")

    def __init__(self, value: Any, *, hold: bool = False) -> None:
        self._id, self._held = id(value), None
        self._reference: weakref.ref | None = None
        try:
            self._reference = weakref.ref(value)
        except TypeError:  # a list, for example
            self._held = value if hold else None

    def is_it(self, value: Any) -> bool:
        """Whether this is the very object."""
        return id(value) == self._id and (self._reference is None or self._reference() is value)

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same object, which is still there."""
        if not isinstance(other, Same) or self._id != other._id:
            return False
        if self._reference is None or other._reference is None:
            return self._reference is other._reference
        mine = self._reference()
        return mine is not None and mine is other._reference()

    __hash__ = None  # type: ignore[assignment]  # it is never a key


def mark(value: Any, *, objects: bool = True, by_kind: bool = False, depth: int = 0) -> Any:
    """What two values have in common if, and as far as can be told, nothing has changed.

    Numbers, strings, flags and containers of these are compared by value, everything else by what
    it is; with `objects`, also by what is in its attributes. Tensors and arrays are compared by
    what they are, or `by_kind`.
    """
    kind = type(value)
    if kind in _QUICK:
        return value
    if isinstance(value, _CONTAINERS):
        if depth > _DEPTH or len(value) > _LENGTH:
            return Same(value)
        every = (*value, *value.values()) if isinstance(value, dict) else value
        return kind, [
            mark(each, objects=objects, by_kind=by_kind, depth=depth + 1) for each in every
        ]
    if isinstance(value, _VALUES):
        return value
    if by_kind and isinstance(value, Tensor | np.ndarray):
        return kind, value.dtype, getattr(value, "device", None)
    return _mark_of_object(value, objects, by_kind, depth)


def _mark_of_object(value: Any, objects: bool, by_kind: bool, depth: int) -> Any:
    if isinstance(value, np.generic):
        return value.dtype, value.tobytes()
    if isinstance(value, types.MethodType):
        return Same(value.__func__), Same(value.__self__)
    if depth > _DEPTH or isinstance(value, _IDENTITIES):
        return Same(value)
    further = functools.partial(mark, objects=objects, by_kind=by_kind, depth=depth + 1)
    if isinstance(value, functools.partial):
        return further(value.func), further(value.args), further(value.keywords)
    attributes = getattr(value, "__dict__", None)
    if objects and isinstance(attributes, dict):
        return Same(value), further(attributes)
    return Same(value)


def settings(model: nn.Module, *, by_kind: bool = False) -> list[dict[str, Any]]:
    """What all modules of a model keep, to be compared with what they keep later.

    Tensors and arrays are `by_kind` if they are of one kind.
    """
    return [_marks(module, by_kind) for module in modules_of(model)]


def _marks(module: nn.Module, by_kind: bool = False) -> dict[str, Any]:
    objects = not has_own_state(module)
    return {
        name: value if type(value) in _QUICK else mark(value, objects=objects, by_kind=by_kind)
        for name, value in kept(module).items()
    }


def config_marks(model: nn.Module) -> list[dict[str, Any]]:
    """Marks of what matters in the configs of all modules of a model, each config once."""
    read: set[int] = set()
    found = []
    for module in modules_of(model):
        if id(vars(module).get("config")) not in read:  # most modules of a model share one
            for _, config in configs(module):
                if id(config) not in read:
                    read.add(id(config))
                    found.append({k: mark(v) for k, v in vars(config).items() if _matters(k)})
    return found


def _matters(field: str) -> bool:
    return field in _PRIVATE or not (field.startswith("_") or field in _NO_MATTER)


def configs(module: nn.Module) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """A module's config and those in it, each with its names."""
    config = vars(module).get("config")
    if isinstance(config, PreTrainedConfig) and "config" not in overridden.get(module, {}):
        yield from _nested(("config",), config)


def _nested(
    names: tuple[str, ...], config: PreTrainedConfig
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    yield names, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _nested((*names, name), value)


# --------------------------------------------------------------------------------------
# What changes as a model runs

# By module; a module and its copies have the same set.
_changing: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
# What modules kept at the beginning of each `with` in which changes are noted.
_noting: dict[int, dict[nn.Module, dict[str, Any]]] = {}


def share_changing(module: nn.Module, copied: nn.Module) -> None:
    """Let what is noted of a module hold for a copy of it, and the other way round."""
    _changing[copied] = _changing.setdefault(module, set())


@contextmanager
def noting_changes(*modules: nn.Module) -> Iterator[None]:
    """Note what modules change by themselves as they run inside of the ``with``: a counter."""
    before = {module: _marks(module) for module in modules}
    _noting[id(before)] = before
    try:
        yield
    finally:
        del _noting[id(before)]
        for module, then in before.items():
            now = _marks(module)
            if now != then:
                names = {name for name in {**then, **now} if _differs(then, now, name)}
                _changing.setdefault(module, set()).update(names)


def not_by_itself(module: nn.Module, names: Iterable[str]) -> None:
    """Do not note what these attributes are now: they were set from outside of the model."""
    for before in tuple(_noting.values()):
        if module in before:
            now, then = _marks(module), before[module]
            for name in names:
                then.pop(name, None)
                if name in now:
                    then[name] = now[name]


def changing(module: nn.Module) -> set[str]:
    """Names that the module was seen to change by itself."""
    return _changing.get(module, set())


def _differs(then: dict[str, Any], now: dict[str, Any], name: str) -> bool:
    return name not in then or name not in now or then[name] != now[name]


def unlike(then: dict[str, Any], now: dict[str, Any], besides: set[str]) -> bool:
    """Whether two dicts of marks differ in other names than those `besides`."""
    return then != now and any(
        _differs(then, now, name) for name in {**then, **now} if name not in besides
    )
