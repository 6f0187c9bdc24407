"""Models of GGUF files: their numbers, texts and settings, the copy in the cache, refusals."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import ggufs
import huggingface_hub
import numpy as np
import platformdirs
import psutil
import pytest
import torch
import transformers as tf
from gguf import GGUFValueType as Value

import flocking
from flocking.models import dequantising, loading, origins

IDS = torch.arange(3, 43)[None] * 7 % ggufs.VOCABULARY


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's file."""
    folder = tmp_path_factory.mktemp("made")
    return ggufs.write(folder / "birds.Q8_0.gguf", ggufs.tiny("llama"), "Q8_0")


@pytest.fixture
def file(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path))


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS % model.config.vocab_size).logits


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


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_numbers_are_those_of_the_model_that_was_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, metadata = MODELS[what]
    if name == "qwen2":  # transformers reads no other rule with this architecture
        monkeypatch.setattr(ggufs, "_add_tokenizer", lambda writer: words(writer, "qwen2"))
    original = ggufs.tiny(name, **frozen(changes))
    file = ggufs.write(tmp_path / "a.gguf", original, metadata=metadata)
    model, _ = flocking.load(file)
    assert type(model) is type(original)
    difference = (logits(model) - logits(original)).abs().max()
    assert difference < 1e-4 * logits(original).abs().max()


class _Frozen(dict):
    """A dict that a cache of arguments takes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def frozen(changes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _Frozen(value) if isinstance(value, dict) else value for key, value in changes.items()
    }


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
    assert torch.allclose(logits(model), logits(original), atol=1e-4)
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
    assert flocking.load(file)[1].pad_token == "<pad>"


# --------------------------------------------------------------------------------------
# Names


def test_a_file_is_given_in_many_ways(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(file)
    expected = None
    for args, kwargs in (
        ((str(file),), {}),
        ((file,), {}),
        (("~/birds.Q8_0.gguf",), {}),
        (("birds.Q8_0.gguf",), {}),
        ((tmp_path,), {"gguf_file": "birds.Q8_0.gguf"}),
        ((tmp_path.parent,), {"gguf_file": "birds.Q8_0.gguf", "subfolder": tmp_path.name}),
        (("link",), {}),
    ):
        model, tokenizer = flocking.load(*args, **kwargs)
        assert Path(model.name_or_path).name == ("link" if args == ("link",) else "birds.Q8_0")
        assert len(tokenizer) == ggufs.VOCABULARY
        assert not model.training
        expected = logits(model) if expected is None else expected
        assert torch.equal(logits(model), expected)
    # (A file in Q8_0 is close to the model that it is of.)
    assert torch.allclose(expected, logits(ggufs.tiny("llama")), atol=0.1)
    recording = flocking.record(model, "birds of a feather", progress=False)
    assert recording.attrs["model"].endswith("link")


def test_arguments_reach_the_second_stage(file: Path) -> None:
    model, _ = flocking.load(file, dtype="bfloat16", revision="main", token="secret")
    assert model.dtype == torch.bfloat16
    assert flocking.load(file)[0].dtype == torch.float32
    with pytest.raises(TypeError, match="no_such"):
        flocking.load(file, no_such=1)
    with pytest.raises(ValueError, match=r"leave out gguf_file='x\.gguf'"):
        flocking.load(file, gguf_file="x.gguf")
    with pytest.raises(ValueError, match="gguf_file='x' belongs to no model"):
        flocking.load(gguf_file="x")
    with pytest.raises(TypeError, match="gguf_file is a int"):
        flocking.load(file.parent, gguf_file=3)


def test_names_of_files_that_are_not_there(file: Path, tmp_path: Path) -> None:
    for name, words in (
        ("none.gguf", "there is no such file: give a GGUF file"),
        (tmp_path / "none.gguf", "there is no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            flocking.load(name)
    with pytest.raises(FileNotFoundError, match=r"has no file x\.gguf"):
        flocking.load(tmp_path, gguf_file="x.gguf")
    with pytest.raises(FileNotFoundError, match=r"give such a file itself, as in .*birds\.Q8_0"):
        flocking.load(file.parent)
    (tmp_path / "note.txt").write_text("GGU")
    with pytest.raises(NotADirectoryError, match="give the folder that it is in, or a GGUF file"):
        flocking.load(tmp_path / "note.txt")


def test_a_file_in_a_hub_repository_is_downloaded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, inside: str, **kwargs: object) -> str:
        asked.append((name, inside, kwargs["revision"]))
        if inside != "x.gguf":
            raise FileNotFoundError("404: no such entry")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, _ = flocking.load("somebody/birds-GGUF", gguf_file="x.gguf", revision="v1")
    assert asked == [("somebody/birds-GGUF", "x.gguf", "v1")]
    assert Path(model.name_or_path).name == "birds.Q8_0"
    with pytest.raises(OSError, match="cannot be had from the Hugging Face hub"):
        flocking.load("somebody/birds-GGUF", gguf_file="y.gguf", revision="v1")


def test_identity_is_the_files(file: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert loading.identity(file) == digest
    assert not (tmp_path / "cache").exists()
    folder = Path(flocking.load(file)[0].name_or_path)
    assert loading.identity(folder) == digest
    assert origins.source_of(folder) == file
    assert origins.source_of(tmp_path) is None


def test_other_files_beside_it_are_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "model.gguf"):
        (file.parent / name).write_text("no JSON")
    monkeypatch.chdir(file.parent)
    assert len(flocking.load(file)[1]) == ggufs.VOCABULARY


# --------------------------------------------------------------------------------------
# The copy in the cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are converted."""
    real, made = dequantising._dequantised, []

    def dequantised(contents: Any) -> Any:
        made.append(contents.file)
        return real(contents)

    monkeypatch.setattr(dequantising, "_dequantised", dequantised)
    return made


def test_converted_once_and_said_before(
    file: Path, cache: Path, counted: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    flocking.load(file)
    said = capfd.readouterr().err
    assert "birds.Q8_0.gguf: its weights are converted to float32 once, 0.0 GB in" in said
    assert str(cache) in said
    flocking.load(file)
    assert "converted" not in capfd.readouterr().err
    assert counted == [file]
    other = file.with_name("other.gguf")
    ggufs.write(other, ggufs.tiny("llama"), "F16")
    flocking.load(other)
    assert counted == [file, other]


def test_a_file_that_cannot_be_read_leaves_nothing(file: Path, cache: Path) -> None:
    whole = file.read_bytes()
    for cut in (3, 100, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:cut])
        with pytest.raises((OSError, ValueError), match=r"birds\.Q8_0\.gguf "):
            flocking.load(file)
    assert not list(cache.rglob("*"))


@pytest.mark.parametrize("short", [0, 1])
def test_room_is_asked_for_before(
    short: int, file: Path, cache: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ggufs.tiny("llama")
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=needed - short))
    monkeypatch.setattr("flocking.artifacts.writing._LEAST_ROOM", 0)
    if short:
        with pytest.raises(
            OSError, match=r"Cannot write .*birds\.Q8_0\.gguf .* MB are needed, and"
        ):
            flocking.load(file)
        assert not list(cache.rglob("*"))
    else:
        flocking.load(file)
    assert len(counted) == 1 - short


def test_memory_is_asked_for_before(
    file: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = psutil.virtual_memory()._replace(total=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)
    monkeypatch.setattr(psutil, "swap_memory", lambda: total)
    with pytest.raises(MemoryError, match=r"birds\.Q8_0\.gguf holds weights that take .* GiB"):
        flocking.load(file)
    assert not counted


def test_a_full_disk_says_so(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"copy of birds.*no space.*make room .*XDG_CACHE_HOME"):
        flocking.load(file)
    assert not list(cache.rglob("*"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_is_read_only_says_so(file: Path, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    try:
        with pytest.raises(OSError, match="make it writable, or set XDG_CACHE_HOME"):
            flocking.load(file)
    finally:
        cache.chmod(0o700)


def test_a_cache_that_is_a_file_says_so(file: Path, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(OSError, match="make it writable, or set XDG_CACHE_HOME"):
        flocking.load(file)


def test_two_threads_convert_it_once(
    file: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dequantising._dequantised

    def slowly(contents: Any) -> Any:
        time.sleep(0.3)
        return slow(contents)

    monkeypatch.setattr(dequantising, "_dequantised", slowly)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(flocking.load(file)[0].name_or_path))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len({*found}) == len(counted) == 1


def test_a_conversion_that_was_killed_is_done_again(file: Path, cache: Path) -> None:
    code = f"""
import os, platformdirs
from pathlib import Path
platformdirs.user_cache_path = lambda name: Path({str(cache)!r}) / name
import flocking
from flocking.models import dequantising
dequantising.correct = lambda *args, **kwargs: os.kill(os.getpid(), 9)
flocking.load({str(file)!r})
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ran.returncode == -9
    assert list(cache.rglob("model.safetensors"))
    model, _ = flocking.load(file)
    assert len(list(cache.rglob("model.safetensors"))) == 1
    assert not [path for path in cache.rglob(".*") if path.name != origins.NOTE]
    assert math.isfinite(logits(model).sum())
