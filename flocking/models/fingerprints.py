"""What tells that a model computes as it did before, without running it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from flocking.models.copies import forward_of, hooks_on, hooks_on_everything
from flocking.models.weights import loaded

NONE = "none"


def weights(model: nn.Module) -> str:
    """Some of each tensor's values, so that other weights are noticed without reading all."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        _take(digest, name, tensor)
    return digest.hexdigest()


def adapters(model: nn.Module) -> str:
    """PEFT's active or merged adapters, by name, and a digest of what they add; or "none".

    Nothing tells of those that ``merge_and_unload`` has made a part of the weights.
    """
    names: dict[str, None] = {}
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        for name in _active(module):
            names[name] = None
            scaling = getattr(module, "scaling", {})
            factor = scaling.get(name) if isinstance(scaling, dict) else scaling
            digest.update(f"{path} {name} {factor}".encode())
            for kind in module.adapter_layer_names:
                held = cast(Any, getattr(module, str(kind), {}))
                if name not in held:
                    continue
                owners = (held[name], held, module)
                with loaded(next(each for each in owners if isinstance(each, nn.Module))):
                    part = held[name]
                    found = part.state_dict() if isinstance(part, nn.Module) else {"": part}
                    for key, tensor in found.items():
                        _take(digest, f"{kind} {key}", tensor)
    return f"{', '.join(names)} ({digest.hexdigest()[:8]})" if names else NONE


def _active(module: nn.Module) -> list[str]:
    """Names of the adapters with which one of PEFT's modules computes."""
    if not hasattr(module, "adapter_layer_names") or not hasattr(module, "active_adapters"):
        return []
    if getattr(module, "disable_adapters", False):
        return []
    if getattr(module, "merged", False):
        return list(map(str, cast(Any, module).merged_adapters))
    return [str(name) for name in cast(Any, module.active_adapters)]


def autocast(device: torch.device) -> str:
    """What ``torch.autocast`` computes in at the moment, such as "bfloat16"; or "none"."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return NONE
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")


def modules(model: nn.Module) -> str:
    """The kinds of all modules, activation functions and their settings among them."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        # (Code that came with a model has its folder's name in its own, and may be moved.)
        told = [path, type(module).__qualname__]
        if next(module.parameters(), None) is None:
            told.append(module.extra_repr())
        # (accelerate's says where weights lie.)
        if (forward := forward_of(module)) is not None and not hasattr(module, "_hf_hook"):
            told.append(_named(forward))
        digest.update(" ".join(told).encode() + b"\n")
    return digest.hexdigest()


def hooks(model: nn.Module) -> list[str]:
    """The user's hooks that a forward pass calls: the module of each, and the function's name."""
    return [*_hooks(model)]


def _hooks(model: nn.Module) -> Iterator[str]:
    yield from (f"all modules: {_named(hook)}" for hook in hooks_on_everything())
    for path, module in model.named_modules():
        yield from (f"{path or 'the model'}: {_named(hook)}" for hook in hooks_on(module))


def _named(it: Any) -> str:
    while isinstance(it, functools.partial):
        it = it.func
    kind = it if hasattr(it, "__qualname__") else type(it)
    return str(kind.__qualname__)


def _take(digest: Any, name: str, tensor: Any) -> None:
    """Add a tensor's name, shape, dtype and some of its values."""
    if not isinstance(tensor, Tensor):
        return
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.is_meta:
        return
    try:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 256)][:512]
        digest.update(some.cpu().to(torch.float64).numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError):  # formats that cannot be taken apart
        return
