"""What a card says of the weights' source holds: weights changed in memory are not its files'."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers as tf
from helpers import build

import flocking
from flocking.models import identity

NOTHING = "Nothing was trained or changed"


def said(model: tf.PreTrainedModel, folder: Path) -> str:
    flocking.export(model, flocking.select(flocking.weight_magnitude(model)), folder)
    return huggingface_hub.ModelCard.load(folder / "README.md").text


def read(folder: Path, **more: object) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **more)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gpt_oss", "tied", "shards", "bin"])
def test_weights_as_in_the_files(name: str, tmp_path: Path) -> None:
    """Whatever they are called there, and in whichever dtype they were read."""
    more = {"tie_word_embeddings": True} if name == "tied" else {}
    model = build("llama" if name in ("tied", "shards", "bin") else name, **more)
    source = tmp_path / "mine"
    model.save_pretrained(source, max_shard_size="50KB" if name == "shards" else "5GB")
    if name == "bin":
        (source / "model.safetensors").unlink()
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    for dtype in ("float32", "bfloat16"):
        text = said(read(source, dtype=dtype), tmp_path / dtype)
        assert NOTHING in text
        assert f"mine ({type(model).__name__}), its files' SHA-256 {identity(source)}" in text


@pytest.mark.parametrize("name", ["llama", "mixtral", "tied", "bin"])
def test_weights_changed_in_memory(name: str, tmp_path: Path) -> None:
    more = {"tie_word_embeddings": True} if name == "tied" else {}
    model = build("llama" if name in ("tied", "bin") else name, **more)
    source = tmp_path / "mine"
    model.save_pretrained(source)
    if name == "bin":
        (source / "model.safetensors").unlink()
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    model = read(source)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] += 1e-3
    text = said(model, tmp_path / "out")
    assert NOTHING not in text
    assert "SHA-256" not in text
    assert identity(source) not in text
    for words in (
        "Its weights were changed after loading", "1 of its tensors", "layers.1.self_attn.q_proj",
        f"From: mine ({type(model).__name__})",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_a_merged_adapter_is_a_change(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "mine")
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    merged = peft.get_peft_model(read(tmp_path / "mine"), config).merge_and_unload()
    text = said(merged, tmp_path / "out")
    assert "2 of its tensors" in text
    assert NOTHING not in text
    assert "SHA-256" not in text


def test_more_rows_are_a_change(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "mine")
    model = read(tmp_path / "mine")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert "2 of its tensors" in said(model, tmp_path / "out")


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said that was not compared, and a relative name is no hub id."""
    assert "as they were in memory." in said(build("llama"), tmp_path / "nameless")
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("models/mine")
    model = read(Path("models/mine"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    text = said(model, tmp_path / "out")
    assert "could not be compared" in text
    assert NOTHING not in text
    assert "huggingface.co" not in text
