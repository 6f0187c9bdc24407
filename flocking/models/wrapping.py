"""The transformers model inside of what a user hands over."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> nn.Module:
    """The model without what ``torch.compile`` or PEFT wrapped around it."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        config = inner.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"model adds {config.peft_type.value.lower()} tokens, which belong to no text: "
                "give its get_base_model(), which does not add them."
            )
        inner = inner.get_base_model()  # its adapters are inside, in the place of projections
    return inner


def require_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that `model` is or wraps.

    Raises
    ------
    TypeError
        If it is not one.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model is a {type(inner).__name__}: give a transformers model (PreTrainedModel)."
        )
    return inner
