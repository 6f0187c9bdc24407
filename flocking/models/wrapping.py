"""The transformers model inside of what a user hands over."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def unwrap(model: nn.Module) -> nn.Module:
    """The model without what ``torch.compile`` or PEFT wrapped around it."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        for name in inner.active_adapters:
            _refuse_outside(inner.peft_config[name])
        inner = inner.get_base_model()  # its adapters are inside, in the place of projections
    return inner


def _refuse_outside(config: Any) -> None:
    """Refuse adapters that work outside of the base model, and so would be left out."""
    kind = config.peft_type.value.lower()
    if config.is_prompt_learning:
        raise ValueError(
            f"model adds {kind} tokens, which belong to no text: give its get_base_model(), which "
            "does not add them."
        )
    if kind == "xlora" or getattr(config, "alora_invocation_tokens", None):
        name = "X-LoRA" if kind == "xlora" else "aLoRA"
        raise ValueError(
            f"model has an adapter of {name}, which looks at the whole input outside of the model: "
            "give its get_base_model(), which is recorded without the adapter."
        )


def require_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that `model` is or wraps.

    Raises
    ------
    TypeError
        If it is not one.
    ValueError
        If ``torch.compile`` is wrapped around a part of it.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model is a {type(inner).__name__}{_instead_of(inner)}.")
    for path, module in inner.named_modules():
        if "_orig_mod" in module._modules:  # around the whole model, it was taken off
            raise ValueError(
                f"{path} is wrapped by torch.compile, which hides what is inside: compile it in "
                "place, with its .compile(), or compile the whole model."
            )
    return inner


def _instead_of(given: object) -> str:
    """What a user may have meant, who gave what is no model."""
    if isinstance(given, str | os.PathLike):
        return f": load it first, with model, tokenizer = flocking.load({os.fspath(given)!r})"
    if isinstance(given, PreTrainedTokenizerBase):
        return ": give the model before its tokenizer"
    if isinstance(given, tuple) and any(isinstance(part, PreTrainedModel) for part in given):
        return ": give the model in it, as in `model, tokenizer = flocking.load()`"
    if isinstance(given, type) and issubclass(given, PreTrainedModel):
        return f" (a class): give a model, as {given.__name__}.from_pretrained gives one"
    held = getattr(given, "module", None) or getattr(given, "model", None)
    if isinstance(held, PreTrainedModel):
        where = "module" if held is getattr(given, "module", None) else "model"
        return f": give the model that is in it, its .{where}"
    return ": give a transformers model (PreTrainedModel)"
