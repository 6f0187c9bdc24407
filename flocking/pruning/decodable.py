"""What a model must be like to be decoded in fixed shapes, and settings that are read off it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from flocking.models import context, hooks_on, hooks_on_everything, named_modules_of
from flocking.pruning.twin import Twin


def check_arguments(model: PreTrainedModel, max_length: Any, batch_size: Any) -> None:
    """Refuse sizes that are none or too large, and models on several devices or that train."""
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        check_whole(name, value)
    if max_length < 2 or batch_size < 1:
        raise ValueError(
            f"max_length={max_length}, batch_size={batch_size}: give at least two tokens and "
            "one sequence."
        )
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, and keeps no "
            "keys and values: call model.eval() first."
        )
    if (limit := context(model)) and max_length > limit:
        raise ValueError(
            f"max_length={max_length} is more than the model's context of {limit}: give less."
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"{type(model).__name__} lies on {', '.join(devices)}: a step in fixed shapes "
            "needs all of it on one device; use generate."
        )


def check_whole(name: str, value: object) -> None:
    """Raise a TypeError for what is not a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r}: give a whole number.")


def refuse_hooks(model: PreTrainedModel) -> None:
    """Raise a ValueError if a module has hooks, which what is compiled already would leave out."""
    if hooks := hooks_on_everything():
        raise ValueError(
            f"there is a hook on all modules ({_name(hooks[0])}), as of "
            "torch.nn.modules.module.register_module_forward_hook, which a compiled step would not "
            "call if it changed: remove it, or use generate, which calls it."
        )
    for path, module in named_modules_of(model):
        if hooks_on(module) or hasattr(module, "_hf_hook"):  # accelerate's
            raise ValueError(
                f"{path or type(model).__name__} has a hook, which a compiled step would not call "
                "if it changed: remove it, or use generate, which calls it."
            )


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def special_tokens(model: Any) -> tuple[list[int], int]:
    """The tokens that end a text, and the one that fills up what has ended."""
    if isinstance(model, Twin) and model._griffin.origin is not None:
        model._griffin.origin.follow_generation()
    config = model.generation_config
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = config.pad_token_id
    return ends, (ends[0] if ends else 0) if pad is None else pad


def faster_attention(model: PreTrainedModel, device: torch.device) -> str | None:
    """The attention implementation to prefer to the model's own; None to keep that.

    If heads share keys and values, sdpa with a mask writes them out for every head; compiled,
    transformers' eager attention reads them where they are.
    """
    config = model.config.get_text_config(decoder=True)
    heads, shared = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    repeats = config._attn_implementation == "sdpa" and shared is not None and shared < heads
    return "eager" if device.type == "cuda" and repeats else None
