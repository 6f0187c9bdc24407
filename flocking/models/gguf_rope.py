"""Rotary embeddings of models in GGUF files: base, width and scaling, which the reader drops.

llama.cpp keeps what is scaled by frequency as tensors: ``rope_freqs`` for Llama 3.1 and later (see
``LlamaModel.generate_extra_tensors`` in its convert_hf_to_gguf.py), ``rope_factors_long`` and
``rope_factors_short`` for Phi-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from flocking.models.gguf import Contents, values_of

_KINDS = ("full_attention", "sliding_attention")  # of layers
_BASE = 10_000.0  # where a file says no other, as in llama.cpp
FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# The context that the models were trained on whose scaling is kept as frequencies; for others the
# file would have to be asked for more than it says.
_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


def rope_of(
    config: PreTrainedConfig, facts: dict[str, Any], contents: Contents, head: int | None
) -> dict[str, Any]:
    """What a config has to say of the rotary embedding; empty for a model without one."""
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, dict) or not given:
        return {}
    own = given.get("full_attention", given)
    wanted = {
        key: value for key, value in own.items() if key in ("partial_rotary_factor", "rope_theta")
    }
    wanted["rope_theta"] = float(facts.get("rope.freq_base", _BASE))
    if head is None:
        head = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
    width = facts.get("rope.dimension_count", head)
    if width != head or own.get("partial_rotary_factor", 1.0) != 1.0:
        if "partial_rotary_factor" not in own:
            raise ValueError(
                f"turns {width} of the {head} dimensions of a head, which transformers' "
                f"{type(config).__name__} cannot do"
            )
        wanted["partial_rotary_factor"] = width / head
    wanted |= _scaling(facts, contents, wanted["rope_theta"], width, config)
    found: dict[str, Any] = wanted
    if own is not given:  # one for each kind of layer, of which the others are not scaled
        found = {**given, "full_attention": wanted}
        if (base := facts.get("rope.freq_base_swa")) and "sliding_attention" in given:
            found["sliding_attention"] = {**given["sliding_attention"], "rope_theta": float(base)}
    if all(_same(given.get(key) or own, found.get(key) or wanted) for key in _KINDS):
        return {}
    original = wanted.get("original_max_position_embeddings")
    changes: dict[str, Any] = {"rope_parameters": found}
    if original is not None and hasattr(config, "original_max_position_embeddings"):
        changes["original_max_position_embeddings"] = original
    return changes


def _same(own: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return {"rope_type": "default", **own} == {"rope_type": "default", **wanted}


def _scaling(
    facts: dict[str, Any],
    contents: Contents,
    base: float,
    width: int,
    config: PreTrainedConfig,
) -> dict[str, Any]:
    names = {tensor.name for tensor in contents.tensors}
    if FREQUENCIES in names:
        return _by_frequency(values_of(contents, FREQUENCIES), base, width)
    original = facts.get("rope.scaling.original_context_length")
    if {LONG, SHORT} <= names:
        return _long(facts, contents, original, config)
    kind = facts.get("rope.scaling.type", "linear")
    factor = facts.get("rope.scaling.factor") or facts.get("rope.scale_linear") or 1.0
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn":
        raise ValueError(f"scales its rotary embedding by {kind!r}, which is not known here")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
    found["original_max_position_embeddings"] = original or facts["context_length"]
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (value := facts.get(f"rope.scaling.{key}")) is not None:
            found[name] = value
    attention = facts.get("rope.scaling.yarn_attn_factor") or facts.get("rope.scaling.attn_factor")
    if attention is not None and attention != 1.0:
        found["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    if facts.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise ValueError("has another rope.scaling.yarn_ext_factor than 1, which is not known here")
    return found


def _long(
    facts: dict[str, Any], contents: Contents, original: int | None, config: PreTrainedConfig
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": values_of(contents, LONG).tolist(),
        "short_factor": values_of(contents, SHORT).tolist(),
        "original_max_position_embeddings": original or config.max_position_embeddings,
    }
    if (attention := facts.get("rope.scaling.attn_factor")) is not None:
        found["attention_factor"] = attention
    return found


def _by_frequency(divisors: np.ndarray, base: float, width: int) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling, from what each frequency is divided by."""
    if (divisors == 1).all():
        return {"rope_type": "default"}
    for tried in _tried(divisors):
        if np.allclose(_divisors(base, width, **tried), divisors, rtol=1e-4):
            low, high = tried["low"], tried["high"]
            return {
                "rope_type": "llama3",
                "factor": tried["factor"],
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": tried["context"],
            }
    raise ValueError(
        f"scales its rotary embedding by frequencies ({FREQUENCIES}) that are not those of "
        "Llama 3.1's rule with its usual context"
    )


def _tried(divisors: np.ndarray) -> Iterator[dict[str, Any]]:
    factor = float(divisors.max())
    for context in _CONTEXTS:
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 32.0)):
            yield {"factor": factor, "low": low, "high": high, "context": context}


def _divisors(
    base: float, width: int, factor: float, low: float, high: float, context: int
) -> np.ndarray:
    lengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = (context / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(
        lengths < context / high, 1.0, np.where(lengths > context / low, factor, between)
    )
