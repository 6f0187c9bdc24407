"""Models whose files would not compute what they compute, and cannot be exported."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from flocking.feedforward import is_observed
from flocking.models import hooks_on, hooks_on_everything
from flocking.pruning.twin import Twin


def refuse_unsaveable(model: PreTrainedModel) -> None:
    """Refuse models whose files would not compute what they compute."""
    name = type(model).__name__
    if isinstance(model, Twin):
        raise ValueError("model is a twin: give the original, and the twin's selection.")
    if is_observed(model):
        raise RuntimeError("the model is observed: leave the `with` of flocking.observe first.")
    state = model.state_dict().values()
    if getattr(model.config, "quantization_config", None) is not None or any(
        is_traceable_wrapper_subclass(value) for value in state
    ):
        raise ValueError(
            f"{name} is quantised, and the files of a smaller model could not be: load it "
            "unquantised, in float32 or bfloat16."
        )
    for path, module in model.named_modules():
        at = path or "the model itself"
        if is_parametrized(module):
            raise ValueError(
                f"{name} has a parametrization at {at}, which no file of weights has: make it "
                "permanent with torch.nn.utils.parametrize.remove_parametrizations."
            )
        if hasattr(module, "base_layer") or type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name} has an adapter at {at}: merge it into the weights (merge_and_unload)."
            )
        if hooks := hooks_on(module):
            raise ValueError(
                f"{name} has a hook at {at} ({_called(hooks[0])}), and what it does would be in no "
                "file: remove it, or make it permanent (torch.nn.utils.prune.remove)."
            )
    if hooks := hooks_on_everything():
        raise ValueError(
            f"there is a hook on all modules ({_called(hooks[0])}), and what it does would be in "
            "no file: remove it."
        )
    _refuse_configs(model)


def _called(hook: Any) -> str:
    return str(getattr(hook, "__name__", type(hook).__name__))


def _refuse_configs(model: PreTrainedModel) -> None:
    """Refuse configs that transformers would not write, which it says when it has to."""
    configs: dict[str, Any] = {"config": model.config}
    if model.can_generate():
        configs["generation_config"] = model.generation_config
    for name, config in configs.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                copy.deepcopy(config).save_pretrained(folder)
        except Exception as problem:  # of whichever kind
            why = " ".join(str(problem).split())
            raise ValueError(
                f"model.{name} cannot be saved: correct it first. transformers says: {why}"
            ) from problem
