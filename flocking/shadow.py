"""A model's shadow: a copy of its modules that shares its weights, to change at will.

Whatever flocking tries on a model, or turns it into, happens on a shadow: other modules
are put in place, projections are cut down, and the model itself is never touched.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# --------------------------------------------------------------------------------------
# Projections: the one place that knows how a weight matrix lies in memory


def width(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a projection, or None if `module` is not one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    if isinstance(module, Conv1D):  # GPT-2's, stored transposed
        return weight.shape[0], weight.shape[1]
    return None


def stored_transposed(projection: nn.Module) -> bool:
    """Whether a weight has one column, instead of one row, for each output, as GPT-2's has."""
    return isinstance(projection, Conv1D)


def cut(
    projection: nn.Module, *, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> nn.Module:
    """A copy of `projection` that keeps only the given outputs (with bias) or inputs.

    Parameters
    ----------
    projection : torch.nn.Module
        An ``nn.Linear`` or transformers' ``Conv1D``; left as it is.
    outputs, inputs : Tensor of int64, shape (k,), optional
        Indices to keep.
    """
    compact = separate(projection)
    vars(compact).pop("forward", None)  # accelerate's wrapper would call the whole projection
    compact._parameters = parameters = dict(projection._parameters)
    out_axis = 1 if stored_transposed(projection) else 0
    for index, axis in ((outputs, out_axis), (inputs, 1 - out_axis)):
        if index is not None:
            kept = parameters["weight"].index_select(axis, index)
            parameters["weight"] = nn.Parameter(kept, requires_grad=False)
    if outputs is not None and parameters.get("bias") is not None:
        kept = parameters["bias"].index_select(0, outputs)
        parameters["bias"] = nn.Parameter(kept, requires_grad=False)
    d_in, d_out = width(compact)
    if stored_transposed(projection):
        compact.nx, compact.nf = d_in, d_out
    else:
        compact.in_features, compact.out_features = d_in, d_out
    return compact


def fused_rows(neurons: Tensor, d_ff: int, interleaved: bool) -> Tensor:
    """Output indices of `neurons`, gate and up, in a fused matrix of ``2 * d_ff`` outputs."""
    if interleaved:
        return torch.stack((2 * neurons, 2 * neurons + 1), dim=1).flatten()
    return torch.cat((neurons, neurons + d_ff))


# --------------------------------------------------------------------------------------
# The shadow: a copy of the modules that shares the weights, to try things on


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, where `model` is what ``torch.compile`` made of it."""
    return getattr(model, "_orig_mod", model)


def shadow(model: nn.Module) -> nn.Module:
    """A deep copy of `model`'s modules that shares every parameter.

    Buffers are its own (some models update theirs as they run). Hooks stay behind, since
    they are the user's and would fire, and so do compiled calls, which would run the
    original model instead of the copy. The copy is in eval mode.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        memo.update({id(hooks): type(hooks)() for hooks in _hooks_of(module).values()})
    twin = copy.deepcopy(model, memo)
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
    return copied


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


# --------------------------------------------------------------------------------------
# Finding something out once per model

_Found = TypeVar("_Found")


def per_model(find: Callable[[nn.Module], _Found]) -> Callable[[nn.Module], _Found]:
    """Remember what `find` says of a model, until the model's modules or weights change kind."""
    known: weakref.WeakKeyDictionary[nn.Module, tuple[object, _Found]] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def remembering(model: nn.Module) -> _Found:
        state = _state_of(model)
        if model not in known or known[model][0] != state:
            known[model] = (state, find(model))
        return known[model][1]

    def remember(model: nn.Module, found: _Found) -> None:
        known[model] = (_state_of(model), found)

    remembering.remember = remember  # what is known of a model already, such as of its shadow
    return remembering


def _state_of(model: nn.Module) -> tuple[object, ...]:
    config = getattr(model, "config", None)
    modules, kinds = {}, set()
    for path, module in model.named_modules():
        modules[path] = id(module)
        for p in module._parameters.values():
            kinds.add(p if p is None else (p.device.type, p.dtype))
    return (
        modules,
        kinds,
        getattr(model, "name_or_path", None),
        getattr(config, "is_decoder", None),
        getattr(config, "_attn_implementation", None),
    )
