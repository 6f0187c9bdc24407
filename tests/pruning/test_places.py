"""What an export may replace: what a model's folder has in it, and never the model itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import build, contents, letters

import flocking


@pytest.fixture
def kept(llama: tf.PreTrainedModel) -> xr.DataArray:
    return flocking.select(flocking.weight_magnitude(llama), 0.5)


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "train.py", "results.json", "thoughts.md", "data.bin", "my.model", ".git/config",
     ".env", "data.safetensors", "optimizer.bin", "additional_chat_templates/mine.txt",
     "tokenizer.json/mine", "model.safetensors.bak", "LICENSE.docx", "checkpoint-5/config.json"],
)  # fmt: skip
def test_what_is_somebody_s_own_stays(
    name: str, llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flocking.export(llama, kept, out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"there is {name.partition('/')[0]} in it"):
        flocking.export(llama, kept, out, overwrite=True)
    assert contents(tmp_path) == before


def test_a_project_with_a_config_is_no_model(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for config, weights, why in (
        ('{"port": 80}', True, "its config.json is of no model"),
        ("[1]", True, "its config.json is of no model"),
        ("not json", True, "its config.json is of no model"),
        ('{"model_type": "llama"}', False, "it has no weights"),
    ):
        (out / "config.json").write_text(config)
        (out / "README.md").write_text("mine")
        (out / "model.safetensors").unlink(missing_ok=True)
        if weights:
            (out / "model.safetensors").write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=why):
            flocking.export(llama, kept, out, overwrite=True)
        assert contents(tmp_path) == before


def test_models_that_others_wrote_are_replaced(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    """In shards, with all that tokenizers and processors have, and with code of their own."""
    out = tmp_path / "out"
    smaller = build("llama", intermediate_size=48)
    smaller.save_pretrained(out, max_shard_size="50KB")
    assert (out / "model.safetensors.index.json").exists()
    letters("<s> $A").save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "additional_chat_templates").mkdir()
    for name in (
        "modeling_mine.py", ".gitattributes", "LICENSE", "preprocessor_config.json", "merges.txt",
        "additional_chat_templates/tools.jinja", "pytorch_model-00001-of-00002.bin",
    ):  # fmt: skip
        (out / name).write_text("")
    flocking.export(llama, kept, out, overwrite=True)
    assert not (out / "modeling_mine.py").exists()
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 80


@pytest.mark.parametrize("how", ["flocking", "transformers"])
def test_the_source_stays_wherever_we_are(
    how: str, kept: xr.DataArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name means another folder, or none, once the working directory is another."""
    build("llama").save_pretrained(tmp_path / "mine")
    letters("<s> $A").save_pretrained(tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    if how == "flocking":
        model, _ = flocking.load("mine")
    else:
        model = tf.AutoModelForCausalLM.from_pretrained("mine")
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = contents(tmp_path)
    why = "where the model itself is from" if how == "flocking" else "may be where this one is from"
    with pytest.raises(ValueError, match=why):
        flocking.export(model, kept, tmp_path / "mine", overwrite=True)
    assert contents(tmp_path) == before
    flocking.export(model, kept, "smaller")
    flocking.export(model, kept, "smaller", overwrite=True)  # that is another model
    if how == "flocking":
        assert (tmp_path / "elsewhere" / "smaller" / "tokenizer.json").exists()
        build("llama").save_pretrained("other")
        flocking.export(model, kept, "other", overwrite=True)  # known to be another one


def test_changed_in_memory_it_is_still_the_source(
    kept: xr.DataArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained("mine")
    monkeypatch.chdir(os.sep)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="may be where this one is from"):
        flocking.export(model, kept, tmp_path / "mine", overwrite=True)


def test_yes_and_no_are_no_texts(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    for value in ("no", "False", 0, 1, None):
        with pytest.raises(TypeError, match=rf"overwrite={value!r}: give True or False\."):
            flocking.export(llama, kept, tmp_path / "out", overwrite=value)
        with pytest.raises(TypeError, match=rf"overwrite={value!r}: give True or False\."):
            flocking.export_gguf("a.gguf", kept, tmp_path / "b.gguf", overwrite=value)


def test_no_name_has_nul(llama: tf.PreTrainedModel, kept: xr.DataArray) -> None:
    with pytest.raises(ValueError, match=r"^folder='a\\x00b' has a NUL character"):
        flocking.export(llama, kept, "a\0b")
    with pytest.raises(ValueError, match=r"^path='a\\x00b.gguf' has a NUL character"):
        flocking.export_gguf("a.gguf", kept, "a\0b.gguf")
