"""Which class reads an exported folder, and whether transformers' automatic one is as good."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from flocking.models import read_config, read_model


def is_automatic(kind: type[PreTrainedModel], config: type[PreTrainedConfig]) -> bool:
    """Whether transformers' AutoModelForCausalLM makes models of this class of such a config."""
    return kind in _made_of(config)


def misread(model: PreTrainedModel, folder: Path, prove: Callable[[PreTrainedModel], None]) -> str:
    """The class of which AutoModelForCausalLM makes a wrong model of a folder; empty if of none.

    It goes by the config's model type, so that a subclass of a class that it knows is ignored.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        What the folder was made from.
    folder : Path
    prove : callable
        Raises a ValueError if a model has the wrong logits.
    """
    try:
        config = type(read_config(str(folder)))
    except (OSError, ValueError):
        return ""  # it does not read it at all, and says so
    made = _made_of(config)
    if not made or type(model) in made:
        return ""
    try:
        with torch.device("cpu"):  # whatever is the default
            found = read_model(AutoModelForCausalLM, str(folder), dtype=model.dtype).eval()
        prove(found)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError):
        return made[0].__name__
    return ""


def why_not_importable(kind: type) -> str:
    """Why nobody can import a class, in words; empty if one can."""
    if kind.__module__ == "__main__":
        return "it was defined in a script or notebook (`__main__`)"
    if "<locals>" in kind.__qualname__:
        return "it was defined inside a function"
    if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind:
        return f"the module `{kind.__module__}` has no such class"
    return ""


def _made_of(config: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config, ())
    return found if isinstance(found, tuple) else (found,)
