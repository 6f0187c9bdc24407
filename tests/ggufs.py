"""Tiny GGUF files of tiny models, as llama.cpp's own converter writes them.

What it changes is changed here: names, llama's order of the rows of queries and keys, norms that
models keep less one. So the readers under test undo it, and llama.cpp runs the same file.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from helpers import ARCHITECTURES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import flocking

VOCABULARY = 320
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)
_CONTROL, _NORMAL = 3, 1  # gguf.TokenType
_NUMBER, _FLOAT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}

# The architecture's name in a file, by that of `helpers.ARCHITECTURES` or of its config's class;
# and what differs from the tiny model there, since a reader does not ask the file for it: gemma's
# queries are scaled for 256 dimensions a head, Qwen3 has 128 of them, GPT-2 and others have four
# times as many neurons as dimensions, and mixtures have the widths of transformers' defaults.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", {"head_dim": 256}),
    "gemma3": ("gemma3", {"head_dim": 256}),
    "phi3": ("phi3", {}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {"hidden_act": "relu2"}),
    "gpt2": ("gpt2", {"n_inner": 256, "n_positions": 1024}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"ffn_hidden_size": 256}),
    "qwen3_moe": ("qwen3moe", {**_EXPERTS, "norm_topk_prob": True, "moe_intermediate_size": 768}),
    "qwen2_moe": ("qwen2moe", {**_EXPERTS, "num_experts": 3, "moe_intermediate_size": 1408,
                               "shared_expert_intermediate_size": 5632}),
}  # fmt: skip


# What llama.cpp reads, and transformers does not, or as another architecture.
MORE: dict[str, tuple[str, dict[str, Any]]] = {"mixtral": ("llama", {"intermediate_size": 160})}


def tiny(name: str, **changes: Any) -> tf.PreTrainedModel:
    """A tiny model of an architecture that a file can hold. Not to be changed."""
    return _tiny(name, tuple(sorted(changes.items())))


def _known(name: str) -> tuple[str, dict[str, Any]]:
    return (FILES | MORE)[name.removesuffix("_text")]


@functools.cache
def _tiny(name: str, changes: tuple[tuple[str, Any], ...]) -> tf.PreTrainedModel:
    if name in ARCHITECTURES:
        config = ARCHITECTURES[name]()
    else:
        config = tf.CONFIG_MAPPING[name](**ARCHITECTURES["llama"]().to_diff_dict())
    config = type(config).from_dict(
        {**config.to_dict(), "vocab_size": VOCABULARY, **_known(name)[1], **dict(changes)}
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases too: nothing stays 0 or 1
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def without(model: tf.PreTrainedModel, kept: Mapping[int, np.ndarray]) -> tf.PreTrainedModel:
    """A copy in which the down-projections have zeros for all neurons but those that are kept."""
    copied = copy.deepcopy(model)
    for block in flocking.feedforwards(copied):
        mask = torch.zeros(block.d_ff).index_fill(0, torch.as_tensor(kept[block.layer]), 1)
        weight = block.weight.data
        if block.experts > 1:
            weight *= mask.reshape(block.experts, 1, -1)
        else:
            weight *= mask if isinstance(block.down, torch.nn.Linear) else mask[:, None]
    return copied


def chosen(*counts: int, d_ff: int = 160, experts: int = 1, seed: int = 0) -> dict[int, np.ndarray]:
    """Random kept neurons, as many of each expert, by layer."""
    rng = np.random.default_rng(seed)
    return {
        layer: np.concatenate(
            [np.sort(rng.permutation(d_ff)[:k]) + d_ff * expert for expert in range(experts)]
        )
        for layer, k in enumerate(counts)
    }


@functools.cache
def tokens() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A byte-level vocabulary of `VOCABULARY` tokens, the first three special, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(flocking.passages()), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    spelled = tuple(sorted(model["vocab"], key=model["vocab"].get))
    return spelled, tuple(" ".join(pair) for pair in model["merges"])


def write(
    path: Path,
    model: tf.PreTrainedModel,
    quantized: str = "F32",
    *,
    metadata: Mapping[str, tuple[Any, ...]] | None = None,
    alignment: int = 32,
) -> Path:
    """Write a model as a GGUF file, its matrices in one type that `gguf` can write.

    ``metadata``: further keys, each with the arguments of ``GGUFWriter.add_key_value`` after it.
    """
    architecture, _ = _known(model.config.model_type)
    given = {
        f"{architecture}.{key}": (value, _FLOAT if isinstance(value, float) else _NUMBER)
        for key, value in sizes_of(model, architecture).items()
    }
    kind = gguf.GGMLQuantizationType[quantized]
    written = (
        (name, values, kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32)
        for name, values in tensors(model, architecture)
    )
    return write_file(
        path, architecture, written, metadata={**given, **(metadata or {})}, alignment=alignment
    )


def write_file(
    path: Path,
    architecture: str,
    named: Iterable[tuple[str, np.ndarray, gguf.GGMLQuantizationType]],
    *,
    metadata: Mapping[str, tuple[Any, ...]],
    alignment: int = 32,
) -> Path:
    """Write any tensors as a GGUF file, with the tiny tokenizer; `metadata` as in `write`."""
    writer = gguf.GGUFWriter(path, architecture)
    # llama.cpp looks for a Phi-3's tokens by its name, so that this is not the architecture's.
    writer.add_string("general.name", "tiny")
    if alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
        writer.add_custom_alignment(alignment)
    _add_tokenizer(writer)
    for key, arguments in metadata.items():
        writer.add_key_value(key, *arguments)
    for name, values, kind in named:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: tf.PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, by their names in it."""
    config = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for own, tensor in state.items():
        values = tensor.detach().cpu().float().numpy()
        if own.endswith("experts.gate_up_proj"):
            block = names.get_name(own.removesuffix("gate_up_proj") + "down_proj")
            for name, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                yield f"{block.replace('down', name)}.weight", np.ascontiguousarray(half)
            continue
        own = own.removeprefix("transformer.") if architecture == "bloom" else own
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf knows no {own} in {architecture}"
        name += "" if name.endswith((".weight", ".bias")) else ".weight"
        values = _converted(values, name, config, architecture)
        yield name, np.ascontiguousarray(values)


def _converted(
    values: np.ndarray, name: str, config: tf.PretrainedConfig, architecture: str
) -> np.ndarray:
    """The values of a tensor as the converter writes them."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        keys = config.num_key_value_heads
        return _interleaved(values, keys if "_k." in name else config.num_attention_heads)
    if architecture == "bloom" and ".attn_qkv." in name:
        heads = values.reshape(config.n_head, 3, -1, *values.shape[1:])
        return heads.swapaxes(0, 1).reshape(values.shape)
    if architecture == "gpt2" and name.startswith("blk.") and values.ndim == 2:
        return values.T
    if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return values + 1
    return values[0] if "ffn_gate_inp_shexp" in name else values


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection with the two halves of each head interleaved."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def sizes_of(model: tf.PreTrainedModel, architecture: str) -> dict[str, int | float]:
    """What a file says of a model's shape, without the architecture's name before it."""
    config = model.config
    (d_ff,) = {block.d_ff // block.experts for block in flocking.feedforwards(model)[:1]}
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    epsilons = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
    epsilon = next(name for name in epsilons if hasattr(config, name))
    rms = "rms_" if epsilon == "rms_norm_eps" else ""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    sizes: dict[str, int | float] = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 256),
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or d_ff,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        f"attention.layer_norm_{rms}epsilon": float(getattr(config, epsilon)),
        "vocab_size": config.vocab_size,
    }
    if architecture == "nemotron":  # llama.cpp asks for one name, transformers for the other
        sizes |= {f"attention.layer_norm_{kind}epsilon": config.norm_eps for kind in ("", "rms_")}
    if architecture == "falcon":
        sizes["attention.head_count_kv"] = 1
    if rope:
        sizes["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
        sizes["rope.freq_base"] = float(rope["rope_theta"])
        sizes |= {"attention.key_length": head, "attention.value_length": head}
    if architecture in ("gemma2", "gemma3"):
        sizes["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        sizes["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        sizes["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture == "phi3":
        sizes["rope.scaling.original_context_length"] = config.max_position_embeddings
    if architecture == "stablelm":
        sizes["use_parallel_residual"] = int(config.use_parallel_residual)
    if architecture.endswith("moe"):
        sizes["expert_count"] = config.num_experts
        sizes["expert_used_count"] = config.num_experts_per_tok
        sizes["expert_feed_forward_length"] = config.moe_intermediate_size
    if hasattr(config, "num_local_experts"):
        sizes["expert_count"] = config.num_local_experts
        sizes["expert_used_count"] = config.num_experts_per_tok
    if hasattr(config, "shared_expert_intermediate_size"):
        sizes["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return sizes


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    spelled, merges = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(spelled)
    writer.add_token_types([_CONTROL] * 3 + [_NORMAL] * (len(spelled) - 3))
    writer.add_token_merges(merges)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    """Of some tokens, (1, token, vocabulary)."""
    ids = torch.arange(3, 43)[None] * 7 % VOCABULARY
    with torch.no_grad():
        return model(ids % model.config.vocab_size).logits
