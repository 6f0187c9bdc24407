"""What a card says of the weights' source holds: weights changed in memory are not its files'."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers as tf
from helpers import build, letters

import flocking
from flocking.models import identity
from flocking.pruning.cards import _licence
from flocking.pruning.sources import Source

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


def test_what_stands_beside_the_weights_goes_with_them(tmp_path: Path) -> None:
    """What other programs read there, as long as it is still true."""
    source = tmp_path / "mine"
    build("llama").save_pretrained(source)
    tokenizer = letters("<s> $A")
    tokenizer.save_pretrained(source)
    beside = {"tokenizer.model": b"pieces", "LICENSE": b"yours", "processor_config.json": b"{}"}
    for name, content in {**beside, "training_args.bin": b"x", "notes.md": b"x"}.items():
        (source / name).write_bytes(content)
    model = read(source)
    kept = flocking.select(flocking.weight_magnitude(model))
    flocking.export(model, kept, tmp_path / "small")
    for name, content in beside.items():
        assert (tmp_path / "small" / name).read_bytes() == content
    assert not (tmp_path / "small" / "training_args.bin").exists()
    assert not (tmp_path / "small" / "notes.md").exists()
    # Another tokenizer than the one that the vocabulary is of.
    tokenizer.add_tokens(["zz"])
    flocking.export(model, kept, tmp_path / "other", tokenizer=tokenizer)
    assert not (tmp_path / "other" / "tokenizer.model").exists()
    assert (tmp_path / "other" / "LICENSE").exists()
    # An export is a model's folder with all of it, and can be replaced.
    flocking.export(model, kept, tmp_path / "small", overwrite=True)


@pytest.mark.parametrize(
    ("link", "files", "expected"),
    [
        ("LICENSE", ["LICENSE"], "LICENSE"),
        ("LICENSE", [], None),
        ("terms/mine.md", [], None),
        ("https://example.org/terms", [], "https://example.org/terms"),
    ],
)
def test_a_licence_is_linked_where_it_is(
    link: str, files: list[str], expected: str | None, tmp_path: Path
) -> None:
    source = tmp_path / "mine"
    build("llama").save_pretrained(source)
    (source / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: house\nlicense_link: {link}\n---\n"
    )
    for name in files:
        (source / name).write_text("yours")
    said(read(source), tmp_path / "small")
    header = huggingface_hub.ModelCard.load(tmp_path / "small" / "README.md").data.to_dict()
    assert header["license_name"] == "house"
    assert header.get("license_link") == expected


def test_a_licence_on_a_hub() -> None:
    source = Source("somebody/their-model", None, "abc123", None)
    place = "https://huggingface.co/somebody/their-model/blob/abc123/LICENSE"
    assert _licence("LICENSE", source) == place
