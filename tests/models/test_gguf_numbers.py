"""Models of GGUF files: their numbers, texts and settings; what is left out is refused or said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import ggufs
import numpy as np
import pytest
import torch
import transformers as tf
from gguf import GGUFValueType as Value

import flocking
from flocking.models import dequantising

pytestmark = pytest.mark.usefixtures("cache")


# --------------------------------------------------------------------------------------
# Numbers


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, "factor": 4.0, **more}}


def rope(architecture: str, kind: str, **numbers: float) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {
        f"{architecture}.rope.scaling.type": (kind, Value.STRING),
        f"{architecture}.rope.scaling.factor": (4.0, Value.FLOAT32),
    }
    for name, value in numbers.items():
        type_ = Value.UINT32 if isinstance(value, int) else Value.FLOAT32
        found[f"{architecture}.rope.scaling.{name}"] = (value, type_)
    return found


YARN = scaled("yarn", original_max_position_embeddings=32)
# What transformers' own reader drops, or takes from the defaults of its configs.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "llama": ("llama", {}, {}),
    "heads of another width": ("llama", {"head_dim": 32}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "linear": ("llama", scaled("linear"), rope("llama", "linear")),
    "yarn": ("qwen2", YARN, rope("qwen2", "yarn", original_context_length=32)),
    "epsilon": ("qwen2", {"rms_norm_eps": 0.01}, {}),
    "narrow heads": ("qwen3", {"head_dim": 16}, {}),
    "scale of queries": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}, {}),
    "window": ("gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}, {}),
    "kinds of layers": (
        "gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
            },
        },
        {
            "gemma3.attention.sliding_window_pattern": ([False, True], Value.ARRAY, Value.BOOL),
            "gemma3.rope.freq_base_swa": (5e4, Value.FLOAT32),
        },
    ),
    "fused": ("phi3", {}, {}),
    "width of experts": ("qwen3_moe", {"moe_intermediate_size": 48}, {}),
    "shared expert": (
        "qwen2_moe",
        {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 40},
        {},
    ),
    "base": ("starcoder2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, {}),
    "part of a head": (
        "stablelm",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        {},
    ),
    "positions": ("gpt2", {"n_inner": 96, "n_positions": 64, "layer_norm_epsilon": 0.01}, {}),
}


def need_rules() -> None:
    """Skip what older versions of transformers cannot read, and say so: SentencePiece of Gemma."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    if not hasattr(mapping, "GGUF_TOKENIZER_TYPES"):
        pytest.skip("this version of transformers knows fewer tokenizers of GGUF files")


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_numbers_are_those_of_the_model_that_was_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, metadata = MODELS[what]
    if name.startswith("gemma"):
        need_rules()
    if name == "qwen2":  # transformers reads no other rule with this architecture
        monkeypatch.setattr(ggufs, "_add_tokenizer", lambda writer: words(writer, "qwen2"))
    original = ggufs.tiny(name, **frozen(changes))
    file = ggufs.write(tmp_path / "a.gguf", original, metadata=metadata)
    model, _ = flocking.load(file)
    assert type(model) is type(original)
    difference = (ggufs.logits(model) - ggufs.logits(original)).abs().max()
    assert difference < 1e-4 * ggufs.logits(original).abs().max()


class _Frozen(dict):
    """A dict that a cache of arguments takes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


class _FrozenList(list):
    """A list that a cache of arguments takes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


def frozen(changes: dict[str, Any]) -> dict[str, Any]:
    kinds = {dict: _Frozen, list: _FrozenList}
    return {key: kinds.get(type(value), lambda v: v)(value) for key, value in changes.items()}


def with_tensors(path: Path, model: tf.PreTrainedModel, **more: np.ndarray) -> Path:
    """A file with more tensors than a model has."""
    named = [*ggufs.tensors(model, "llama"), *((f"{n}.weight", v) for n, v in more.items())]
    sizes = ggufs.sizes_of(model, "llama")
    metadata = {
        f"llama.{key}": (value, Value.FLOAT32 if isinstance(value, float) else Value.UINT32)
        for key, value in sizes.items()
    }
    kind = gguf.GGMLQuantizationType.F32
    return ggufs.write_file(
        path, "llama", [(name, values, kind) for name, values in named], metadata=metadata
    )


def test_the_scaling_of_llama_3_is_read_from_its_frequencies(tmp_path: Path) -> None:
    parameters = _Frozen(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    original = ggufs.tiny("llama", rope_parameters=parameters)
    unscaled = 1 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (unscaled / original.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() == pytest.approx(32)
    model, _ = flocking.load(with_tensors(tmp_path / "a.gguf", original, rope_freqs=divisors))
    assert model.config.rope_parameters == pytest.approx(parameters)
    assert torch.allclose(ggufs.logits(model), ggufs.logits(original), atol=1e-4)
    other = with_tensors(tmp_path / "b.gguf", original, rope_freqs=np.sqrt(divisors) + 3)
    with pytest.raises(OSError, match=r"b\.gguf scales .* not those of Llama 3.1's rule"):
        flocking.load(other)


def test_what_is_left_out_is_refused_or_said(tmp_path: Path) -> None:
    model = ggufs.tiny("llama")
    more = with_tensors(tmp_path / "a.gguf", model, **{"blk.0.attn_sinks": np.ones(4, np.float32)})
    with pytest.raises(OSError, match=r"more tensors than its model \(blk\.0\.attn_sinks\.weight"):
        flocking.load(more)
    short = {"llama.feed_forward_length": (96, Value.UINT32)}
    file = ggufs.write(tmp_path / "b.gguf", model, metadata=short)
    with pytest.raises(OSError, match="tensors of other sizes than its model"):
        flocking.load(file)
    layers = {"llama.block_count": (3, Value.UINT32)}
    file = ggufs.write(tmp_path / "c.gguf", model, metadata=layers)
    with pytest.raises(OSError, match=r"not all tensors of its model \(model\.layers\.2"):
        flocking.load(file)
    values = {"llama.attention.value_length": (32, Value.UINT32)}
    file = ggufs.write(tmp_path / "d.gguf", model, metadata=values)
    with pytest.raises(OSError, match="keys of 16 and values of 32 dimensions"):
        flocking.load(file)
    scale = {"llama.attention.scale": (0.125, Value.FLOAT32)}
    file = ggufs.write(tmp_path / "e.gguf", model, metadata=scale)
    with pytest.warns(UserWarning, match=r"llama\.attention\.scale=0\.125, of which no notice"):
        flocking.load(file)
    assert {path.name for path in (tmp_path / "cache/flocking").iterdir()} == {
        hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    }


UNKNOWN = {
    "architecture": (
        {"general.architecture": ("deepseek2", Value.STRING)},
        "architecture deepseek2, which the GGUF reader of transformers",
    ),
    "encoder": ({"general.architecture": ("t5", Value.STRING)}, "model with an encoder"),
    "tokenizer": (
        {"tokenizer.ggml.model": ("rwkv", Value.STRING)},
        "tokenizer of the kind rwkv, which the GGUF reader of transformers",
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_transformers_lacks_is_named_before_anything_is_read(
    what: str, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = UNKNOWN[what]
    if what == "tokenizer":
        need_rules()
    contents = dequantising.contents_of(file)
    metadata = contents.metadata | {key: value for key, (value, _) in changes.items()}
    changed = contents._replace(metadata=metadata)
    monkeypatch.setattr(dequantising, "contents_of", lambda path: changed)
    monkeypatch.setattr(dequantising, "_dequantised", None)
    with pytest.raises(ValueError, match=words) as caught:
        flocking.load(file)
    assert str(caught.value).startswith(str(file))
    assert not cache.exists()


def test_types_that_cannot_be_dequantised_are_named(file: Path, monkeypatch: Any) -> None:
    contents = dequantising.contents_of(file)
    kind = gguf.GGMLQuantizationType.Q8_1
    tensors = [contents.tensors[0]._replace(kind=kind), *contents.tensors[1:]]
    changed = contents._replace(tensors=tensors)
    monkeypatch.setattr(dequantising, "contents_of", lambda path: changed)
    with pytest.raises(ValueError, match=r"tensors of type Q8_1 \(.*\), which gguf .* cannot"):
        flocking.load(file)


# --------------------------------------------------------------------------------------
# Texts


def spelled(file: Path, texts: list[str]) -> list[list[str]]:
    _, tokenizer = flocking.load(file)
    return [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]


def words(writer: gguf.GGUFWriter, rule: str | None, *, first: bool | None = None) -> None:
    """A byte-level vocabulary in which pairs are merged that most rules keep apart."""
    alphabet, _ = ggufs.tokens()
    single = [token for token in alphabet[3:] if len(token) == 1]
    merges = ["1 2", "12 3", "123 4", "Ġ Ġ", "a !", "Ċ Ċ"]
    tokens = ["<pad>", "<bos>", "<eos>", *single, *(pair.replace(" ", "") for pair in merges)]
    tokens = [*tokens, "xyz"]
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if first is not None:
        writer.add_add_bos_token(first)


# Worked out by hand from llama.cpp's rules; its own tokens are the same.
RULES: dict[str, list[list[str]]] = {
    "gpt-2": [["1234"], ["x", "y", "z"], ["a", "!"]],
    "smollm": [["1", "2", "3", "4"], ["x", "y", "z"], ["a", "!"]],
    "starcoder": [["1", "2", "3", "4"], ["x", "y", "z"], ["a", "!"]],
    "falcon": [["123", "4"], ["x", "y", "z"], ["a", "!"]],
    "default": [["123", "4"], ["x", "y", "z"], ["a", "!"]],
    "qwen2": [["1", "2", "3", "4"], ["x", "y", "z"], ["a", "!"]],
    "llama-bpe": [["<bos>", "123", "4"], ["<bos>", "xyz"], ["<bos>", "a", "!"]],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_texts_are_split_by_the_rule_that_the_file_names(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule in ("qwen2", "llama-bpe"):
        need_rules()
    monkeypatch.setattr(ggufs, "_add_tokenizer", lambda writer: words(writer, rule))
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("llama"))
    assert spelled(file, ["1234", "xyz", "a!"]) == RULES[rule]
    # A token that the file does not have is no token, though GPT-2's class has it.
    _, tokenizer = flocking.load(file)
    assert max(tokenizer("a<|endoftext|>b")["input_ids"]) < len(tokenizer) < ggufs.VOCABULARY


def test_a_rule_that_is_not_known_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggufs, "_add_tokenizer", lambda writer: words(writer, "of-tomorrow"))
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("llama"))
    with pytest.warns(UserWarning, match=r"by the rule 'of-tomorrow' \(tokenizer\.ggml\.pre\)"):
        flocking.load(file)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_token_is_added_if_the_file_says_so(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggufs, "_add_tokenizer", lambda w: words(w, "llama-bpe", first=first))
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("llama"))
    assert spelled(file, ["x", ""]) == ([["<bos>", "x"], ["<bos>"]] if first else [["x"], []])


def pieces(writer: gguf.GGUFWriter, space: bool | None) -> None:
    """A vocabulary as SentencePiece writes it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-3.0, -2.0, -1.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 3)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if space is not None:
        writer.add_add_space_prefix(space)


@pytest.mark.parametrize("space", [None, True, False])
def test_a_first_space_is_added_as_sentencepiece_does(
    space: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggufs, "_add_tokenizer", lambda writer: pieces(writer, space))
    model = ggufs.tiny("llama", vocab_size=262)
    file = ggufs.write(tmp_path / "a.gguf", model)
    found = spelled(file, ["a", " a", "  a", "a</s>a", "!"])
    without = [["a"], ["▁a"], ["▁", "▁a"], ["a", "</s>", "a"], ["<0x21>"]]
    having = [["▁a"], ["▁", "▁a"], ["▁", "▁", "▁a"], ["▁a", "</s>", "▁a"], ["▁", "<0x21>"]]
    assert found == [["<s>", *one] for one in (without if space is False else having)]
    _, tokenizer = flocking.load(file)
    assert tokenizer.decode(tokenizer("a a", add_special_tokens=False)["input_ids"]) == "a a"


def test_chats_and_settings_for_generating_come_with_the_file(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.eot_token_id": (5, Value.UINT32),
        "general.sampling.temp": (0.5, Value.FLOAT32),
        "general.sampling.top_k": (7, Value.INT32),
    }
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("qwen2"), metadata=metadata)
    model, tokenizer = flocking.load(file)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>user: hi\n<bos>assistant: "
    settings = model.generation_config
    assert settings.eos_token_id == [2, 5]
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.5, 7)
    need_rules()
    assert flocking.load(file)[1].pad_token == "<pad>"


def test_a_file_that_asks_for_no_drawing_loads_greedily(tmp_path: Path) -> None:
    metadata = {
        "general.sampling.temp": (0.0, Value.FLOAT32),
        "general.sampling.top_p": (0.5, Value.FLOAT32),
    }
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("qwen2"), metadata=metadata)
    model, _ = flocking.load(file)
    assert model.generation_config.do_sample is False
