"""Where a weight is kept, which tensors it consists of, and where it is computed with."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

_Module = TypeVar("_Module", bound=nn.Module)


def tensor_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's tensor of that name: a parameter, or what an adapter gives for one."""
    return getattr(module, name)


def any_tensor_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's tensor of that name; of one that keeps its values under others, the first.

    For its device and dtype, as of packed weights (GPTQ's), or of two matrices in one's place.
    """
    found = getattr(module, name, None)
    if found is None:
        found = next(itertools.chain(module.parameters(), module.buffers()), None)
    if found is None:
        raise ValueError(f"{type(module).__name__} has neither weights nor buffers.")
    return found


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter that a module holds under that name itself, and that is not None."""
    parameter = module._parameters[name]
    if parameter is None:
        raise KeyError(name)
    return parameter


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of: numbers and scales, if it is quantised."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    return [
        part for name in weight.__tensor_flatten__()[0] for part in parts(getattr(weight, name))
    ]


def byte_count(weight: Tensor) -> int:
    """Bytes of memory that a weight takes."""
    return sum(part.numel() * part.element_size() for part in parts(weight))


def why_not_finite(model: PreTrainedModel) -> str:
    """Which is the first weight that has values that are not finite, in a sentence; else empty.

    For an error about activations, since those of the layers after it are not finite either. It
    reads all weights.
    """
    for name, weight in model.named_parameters():
        for part in parts(weight):
            if part.is_floating_point() and not part.is_meta and not _is_finite(part):
                return (
                    f"{type(model).__name__}: {name} has values that are not finite, and so have "
                    "the activations from there on: get its files again, or load it in float32 or "
                    "bfloat16."
                )
    return ""


def _is_finite(part: Tensor) -> bool:
    try:
        return bool(part.isfinite().all())
    except (RuntimeError, TypeError):  # of a dtype that nothing is computed in
        return True


# --------------------------------------------------------------------------------------
# Offloading


def loaded(module: nn.Module) -> AbstractContextManager:
    """A context in which the parameters of a module that may be offloaded can be read.

    Inside of another one for the same module nothing is loaded again.
    """
    away = any(p is not None and p.is_meta for p in module._parameters.values())
    return align_module_device(module) if away else nullcontext()


def is_loaded(module: nn.Module) -> bool:
    """Whether a module's parameters have values, at least while it runs."""
    return has_offloaded_params(module) or not any(
        p is not None and p.is_meta for p in module._parameters.values()
    )


def device_of(module: nn.Module, parameter: str = "weight") -> torch.device:
    """Where a module computes."""
    if has_offloaded_params(module):
        hook: Any = module._hf_hook
        return torch.device(hook.execution_device)
    return any_tensor_of(module, parameter).device


def embeddings_of(model: PreTrainedModel) -> nn.Module:
    """The module that looks up a model's tokens; the first, if it has several.

    Raises
    ------
    ValueError
        If transformers knows none, as of CLIP, which reads images beside texts.
    """
    try:
        found = model.get_input_embeddings().modules()
    except NotImplementedError as problem:
        raise ValueError(
            f"{type(model).__name__} has no table of tokens that transformers knows of "
            "(get_input_embeddings): give the part of it that reads text."
        ) from problem
    return next(module for module in found if getattr(module, "weight", None) is not None)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of token ids that a model can look up."""
    return tensor_of(embeddings_of(model)).shape[0]


def without_accelerate(module: _Module) -> _Module:
    """`module`, a copy of one that may be offloaded, as a plain one: nothing is moved any more."""
    for name in ("_hf_hook", "_old_forward", "forward"):
        vars(module).pop(name, None)
    return module
