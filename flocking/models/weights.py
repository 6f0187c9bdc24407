"""Where a weight is kept, of what it consists, and where it is computed with."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of: numbers and scales, if it is quantised."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    return [
        part for name in weight.__tensor_flatten__()[0] for part in parts(getattr(weight, name))
    ]


def byte_count(weight: Tensor) -> int:
    """Of memory."""
    return sum(part.numel() * part.element_size() for part in parts(weight))


# --------------------------------------------------------------------------------------
# Offloading


def loaded(module: nn.Module) -> AbstractContextManager:
    """For reading the parameters of a module that may be offloaded."""
    return align_module_device(module)


def is_loaded(module: nn.Module) -> bool:
    """Whether a module's own parameters have values, at least while it runs."""
    return has_offloaded_params(module) or not any(
        p is not None and p.is_meta for p in module._parameters.values()
    )


def device_of(module: nn.Module, parameter: str = "weight") -> torch.device:
    """Where a module computes."""
    if has_offloaded_params(module):
        return torch.device(module._hf_hook.execution_device)
    return getattr(module, parameter).device


def embeddings_of(model: nn.Module) -> nn.Module:
    """What looks up a model's tokens; the first, if it has several."""
    found = model.get_input_embeddings().modules()
    return next(module for module in found if getattr(module, "weight", None) is not None)


def without_accelerate(module: nn.Module) -> nn.Module:
    """The same module, a copy, whose parameters are its own: nothing is brought or sent away."""
    for name in ("_hf_hook", "_old_forward", "forward"):
        vars(module).pop(name, None)
    return module
