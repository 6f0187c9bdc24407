"""Tiny GGUF files of tiny models, as llama.cpp's own converter writes them.

What it changes is changed here: names, llama's order of the rows of queries and keys, norms that
models keep less one. So the readers under test undo it, and llama.cpp runs the same file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers as tf
from helpers import build
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import flocking

VOCABULARY = 320
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)
_CONTROL, _NORMAL = 3, 1  # gguf.TokenType

# The architecture's name in a file, by that of `helpers.ARCHITECTURES`; and what differs from the
# tiny model there, since a reader does not ask the file for it: gemma's queries are scaled for 256
# dimensions a head, and Qwen3 has 128 of them.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", {"head_dim": 256}),
    "gemma3": ("gemma3", {"head_dim": 256}),
    "phi3": ("phi3", {}),
}


@functools.cache
def tiny(name: str, **changes: Any) -> tf.PreTrainedModel:
    """A tiny model of an architecture that a file can hold. Not to be changed."""
    return build(name, vocab_size=VOCABULARY, **FILES[name][1], **changes).eval()


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
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a model as a GGUF file, its matrices in one type that `gguf` can write.

    ``metadata``: further keys, each with the arguments of ``GGUFWriter.add_key_value`` after it.
    """
    name = next(name for name in FILES if _is(model, name))
    architecture = FILES[name][0]
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    writer.add_string("general.name", "tiny")  # llama.cpp looks for a Phi-3's tokens by its name
    for key, value in _sizes(model.config, architecture).items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    _add_tokenizer(writer)
    for key, arguments in (metadata or {}).items():
        writer.add_key_value(key, *arguments)
    kind = gguf.GGMLQuantizationType[quantized]
    for tensor, values in tensors(model, architecture):
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _is(model: tf.PreTrainedModel, name: str) -> bool:
    return model.config.model_type.removesuffix("_text") == name


def tensors(model: tf.PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, by their names in it."""
    config = model.config
    names = gguf.get_tensor_name_map(_arch(architecture), config.num_hidden_layers)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for own, tensor in state.items():
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf knows no {own} in {architecture}"
        values = tensor.detach().cpu().float().numpy()
        if architecture == "llama" and ".attn_q." in name:
            values = _permuted(values, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in name:
            values = _permuted(values, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        yield name, np.ascontiguousarray(values)


def _arch(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection with the two halves of each head interleaved."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def _sizes(config: tf.PretrainedConfig, architecture: str) -> dict[str, int | float]:
    """What a file says of a model's shape, without the architecture's name before it."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    sizes: dict[str, int | float] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if architecture in ("gemma2", "gemma3"):
        sizes["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        sizes["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        sizes["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture == "phi3":
        sizes["rope.scaling.original_context_length"] = config.max_position_embeddings
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
