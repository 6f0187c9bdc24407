"""Configs of models in GGUF files: what transformers' reader leaves out of them is put in.

It takes some keys of the metadata, by architecture, and drops the others without a word: scaling of
the rotary embedding, widths of heads, widths of experts, scales of attention. llama.cpp's code
(src/llama-model.cpp, and gguf-py/gguf/constants.py for the names) says what the keys mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from flocking.models.gguf import Contents
from flocking.models.gguf_rope import rope_of

# Names that configs have for the same number.
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_INNER = ("intermediate_size", "n_inner", "ffn_hidden_size")
_QUERIES = "query_pre_attn_scalar"
# Layers of the models whose queries llama.cpp scales by hidden size over heads: of 27 billion
# parameters. Its files say nothing of this.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# Keys whose numbers are compared, or which the reader or a check of the tensors' shapes takes.
_TAKEN = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.layer_norm_epsilon", "attention.sliding_window"),
    *("attention.layer_norm_rms_epsilon", "attn_logit_softcapping", "final_logit_softcapping"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_weights_norm"),
    *("expert_shared_feed_forward_length", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor", "rope.scale_linear"),
    *("attention.sliding_window_pattern", "rope.freq_base_swa"),
    # These say nothing about numbers, or what the tensors say, too.
    *("tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "use_parallel_residual"),
}
# Settings for sampling, and their names in transformers.
_SAMPLING = (
    *(("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")),
    ("penalty_repeat", "repetition_penalty"),
)
# Architectures that transformers reads by functions of their own, which take all keys.
_COMPLETE = ("qwen35", "qwen35moe", "lfm2", "mamba", "gemma4", "minimax-m2")


def changes_of(config: PreTrainedConfig, contents: Contents) -> dict[str, Any]:
    """What a config has to say otherwise, for the metadata and tensors of its file.

    Parameters
    ----------
    config : PreTrainedConfig
        As transformers makes it from the file.
    contents : Contents
        Of the file.

    Raises
    ------
    ValueError
        If transformers' class cannot be what the file says; the file's name is to be added.
    """
    architecture = contents.metadata["general.architecture"]
    if architecture in _COMPLETE:
        return {}
    facts = {
        key.removeprefix(f"{architecture}."): value
        for key, value in contents.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    names = {tensor.name for tensor in contents.tensors}
    wanted: dict[str, Any] = {}
    for part in (_sizes, _heads, _attention, _experts, _switches):
        wanted |= part(config, facts, names)
    changed = _differing(config, wanted)
    changed |= _differing(config, rope_of(config, facts, contents, wanted.get("head_dim")))
    return changed


def ignored(contents: Contents) -> list[str]:
    """Keys of a file's metadata on its architecture that nothing here takes notice of."""
    architecture = contents.metadata["general.architecture"]
    if architecture in _COMPLETE:
        return []
    start = f"{architecture}."
    return [
        f"{key}={value}"
        for key, value in contents.metadata.items()
        if key.startswith(start) and key.removeprefix(start) not in _TAKEN and value
    ]


def generation_of(contents: Contents) -> dict[str, Any]:
    """Settings for generating in a file's metadata that transformers' reader leaves out."""
    metadata = contents.metadata
    found: dict[str, Any] = {
        name: metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING
        if f"general.sampling.{key}" in metadata
    }
    if found:
        found["do_sample"] = found.get("temperature", 1.0) > 0
        if not found["do_sample"]:  # beside which transformers saves no settings of drawing
            found = {"do_sample": False}
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    if len(known) > 1:  # text of a chat ends with another token than a text
        found["eos_token_id"] = known
    return found


def _differing(config: PreTrainedConfig, wanted: Mapping[str, Any]) -> dict[str, Any]:
    missing = object()
    return {
        name: value for name, value in wanted.items() if getattr(config, name, missing) != value
    }


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> str | None:
    """The name that a config has for a number of several names."""
    own = config.to_dict()
    return next((name for name in names if name in own), None)


def _sizes(config: PreTrainedConfig, facts: dict[str, Any], names: set[str]) -> dict[str, Any]:
    found = {}
    epsilon = facts.get("attention.layer_norm_rms_epsilon") or facts.get(
        "attention.layer_norm_epsilon"
    )
    for key, value in (
        (_first(config, _EPSILONS), epsilon),
        (_first(config, _POSITIONS), facts.get("context_length")),
        (_first(config, _INNER), facts.get("feed_forward_length")),
    ):
        if key is not None and value is not None and not isinstance(value, list):
            found[key] = value
    return found


def _heads(config: PreTrainedConfig, facts: dict[str, Any], names: set[str]) -> dict[str, Any]:
    keys, values = facts.get("attention.key_length"), facts.get("attention.value_length")
    if keys is not None and values is not None and keys != values:
        raise ValueError(
            f"has keys of {keys} and values of {values} dimensions, which transformers' "
            f"{type(config).__name__} cannot have"
        )
    several = facts.get("attention.head_count_kv")
    if hasattr(config, "new_decoder_architecture") and several not in (None, 1):
        raise ValueError(
            f"has {several} heads of keys in an architecture whose queries, keys and values "
            "transformers' GGUF reader puts into another order where there is more than one"
        )
    heads, width = facts.get("attention.head_count"), facts.get("embedding_length")
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return {}
    size = keys or width // heads  # as llama.cpp does
    if "head_dim" in config.to_dict() or size != width // heads:
        return {"head_dim": size}
    return {}


def _attention(config: PreTrainedConfig, facts: dict[str, Any], names: set[str]) -> dict[str, Any]:
    found = {
        name: facts[key]
        for key, name in (
            ("attention.sliding_window", "sliding_window"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        )
        if facts.get(key) and hasattr(config, name)
    }
    if config.model_type == "mistral":  # by the file's name alone; llama.cpp has no window there
        found.setdefault("sliding_window", None)
    if (every := facts.get("attention.sliding_window_pattern")) and hasattr(config, "layer_types"):
        layers = config.num_hidden_layers
        local = every if isinstance(every, list) else [bool((n + 1) % every) for n in range(layers)]
        kinds = {True: "sliding_attention", False: "full_attention"}
        found["layer_types"] = [kinds[bool(one)] for one in local]
    if hasattr(config, _QUERIES):
        heads, width = facts["attention.head_count"], facts["embedding_length"]
        large = _SCALED_BY_WIDTH.get(config.model_type.removesuffix("_text"))
        size = facts.get("attention.key_length") or width // heads
        found[_QUERIES] = width // heads if facts.get("block_count") == large else size
    return found


def _experts(config: PreTrainedConfig, facts: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {
        name: facts[key]
        for key, name in (
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
            ("expert_weights_norm", "norm_topk_prob"),
        )
        if key in facts and hasattr(config, name)
    }


def _switches(config: PreTrainedConfig, facts: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Which parts a model has, by its tensors."""
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in names}
    there: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("attention_bias", lambda name: name.endswith((".attn_q.bias", ".attn_qkv.bias"))),
        ("use_qkv_bias", lambda name: name.endswith((".attn_q.bias", ".attn_qkv.bias"))),
        ("mlp_bias", lambda name: name.endswith(".ffn_up.bias")),
        ("use_bias", lambda name: name.endswith(".ffn_up.bias")),
        ("qk_layernorm", lambda name: name.endswith(".attn_q_norm.weight")),
    )
    for switch, has in there:
        if hasattr(config, switch):
            found[switch] = any(map(has, names))
    return found
