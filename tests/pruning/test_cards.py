"""The model card says what a smaller model was made from, how, and what it loses."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import transformers as tf
from helpers import build, generate, letters, random_ids, tokens

import flocking
from flocking.models import identity
from flocking.pruning import lost
from flocking.pruning.lost import Lost

TEXTS = random_ids(30, 20)


def card(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_what_it_was_made_from(tmp_path: Path) -> None:
    source = tmp_path / "my-llama"
    build("llama").save_pretrained(source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: house\nbase_model: a/b\ntags: [x]\n---\n\n# My llama\n"
    )
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    statistic = flocking.global_statistic(model, TEXTS, progress=False)
    done = flocking.export(model, flocking.select(statistic, [0.5, 0.25]), tmp_path / "small")
    found = card(tmp_path / "small")
    header = found.data.to_dict()
    assert (header["license"], header["license_name"]) == ("other", "house")
    assert header["base_model"] == "a/b"
    assert header["library_name"] == "transformers"
    assert "flocking" in header["tags"]
    assert "x" not in header["tags"]
    for words in (
        "# small",
        f"my-llama (LlamaForCausalLM), its files' SHA-256 {identity(source)}",
        "static statistic (root of the mean over texts of energy per token) of 2 texts of 50 tok",
        "those with the largest, densities from 0.25 to 0.5",
        "layer 0: 80 of 160 neurons (50.0%); layer 1: 40 of 160 neurons (25.0%)",
        "40 neurons in the files have zero weights (25.0% of all)",
        "`intermediate_size` 80 (was 160)",
        f"| parameters | {done.parameters:,} | {done.parameters_before:,} |",
        "Not measured.",
        "held_out=texts",
        'AutoModelForCausalLM.from_pretrained("small", dtype="auto")',
        f"transformers {tf.__version__}",
    ):
        assert words in found.text, words
    assert str(tmp_path) not in found.content  # where it lies on a disk is nobody's business
    assert "AutoTokenizer" not in found.content


def test_a_model_from_a_hub(tmp_path: Path) -> None:
    model = build("mixtral")
    model.name_or_path, model.config._commit_hash = "somebody/their-model", "abc123"
    flocking.export(model, flocking.select(flocking.weight_magnitude(model)), tmp_path / "small")
    found = card(tmp_path / "small")
    assert found.data.base_model == "somebody/their-model"
    assert found.data.license is None
    for words in (
        "[somebody/their-model](https://huggingface.co/somebody/their-model)", "commit abc123",
        "norms of the weights (magnitude), without any text",
        "80 of 160 neurons (50.0%), 20 of 40 in each of 4 experts in each of 2 layers",
    ):  # fmt: skip
        assert words in found.text, words


def test_a_name_that_is_no_model_s_on_a_hub(tmp_path: Path) -> None:
    model = flocking.control(build("llama"))
    flocking.export(model, flocking.select(flocking.weight_magnitude(model)), tmp_path / "small")
    found = card(tmp_path / "small")
    assert "random weights (seed 0) like  (LlamaForCausalLM)" in found.text
    assert "huggingface.co" not in found.text
    assert found.data.base_model is None


def test_how_it_was_selected(tmp_path: Path) -> None:
    """As far as a selection says, and whatever its maker says."""
    model = build("llama")
    twin = flocking.griffin(model, 0.5)
    generate(twin, tokens(9, 9), n=2)
    said = {
        "twin": (twin.selection, "griffin, method topk, density 0.5; the 2 prompts had 18 tokens"),
        "indices": (dict(twin.selection), "not known"),
        "history": (twin.history, "griffin, method topk, density 0.5"),
    }
    recording = flocking.record(model, TEXTS, progress=False)
    kept = flocking.select(flocking.statistic(recording, phase="prompt"), 0.25)
    said["recording"] = kept[1], "over the prompt of its tokens; those with the largest, density"
    said["which"] = kept[1], "of sequence 1 of the recording"
    told = kept[0].assign_attrs(made_from="my own idea")
    said["told"] = told, "my own idea"
    reference = flocking.global_statistic(model, TEXTS, progress=False)
    static = flocking.griffin(model, 0.5, method="static", reference=reference)
    generate(static, tokens(9), n=2)
    said["static"] = static.selection, "method static with static statistic (root of the mean"
    selection = static.selection
    selection.attrs["made_from"] = "what I like"
    said["told of indices"] = selection, "what I like"
    for name, (selection, words) in said.items():
        flocking.export(model, selection, tmp_path / name)
        assert words in card(tmp_path / name).text, name


def test_statistics_say_which_texts_without_quoting_them() -> None:
    model, tokenizer = build("llama"), letters("<s> $A")
    texts = ["birds", "secret"]
    told = [
        flocking.global_statistic(model, given, tokenizer=tokenizer, progress=False).made_from
        for given in (texts, texts, [*texts[:1], "secrets"])
    ]
    assert told[0] == told[1] != told[2]
    assert "2 texts of 13 tokens" in told[0]
    assert "secret" not in told[0]
    own = flocking.global_statistic(model, sequences=2, tokens=5, prompt=[1], progress=False)
    assert "2 texts of 12 tokens" in own.made_from
    assert "the model wrote itself" in own.made_from


def test_what_it_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is the model that was read again from the files."""
    asked = []

    def measured(full: object, pruned: tf.PreTrainedModel, texts: object, **more: object) -> Lost:
        asked.append((full, pruned.config.intermediate_size, texts, more))
        return Lost(2, 48, 10.0, 15.0, 1.25, 1.75, 0.75, 0.125)

    monkeypatch.setattr(lost, "measure_lost", measured, raising=False)
    model, tokenizer = build("llama"), letters("<s> $A")
    kept = flocking.select(flocking.weight_magnitude(model))
    done = flocking.export(model, kept, tmp_path / "out", tokenizer=tokenizer, held_out=TEXTS)
    assert asked == [(model, 80, TEXTS, {"tokenizer": tokenizer})]
    assert done.lost == measured(model, model, TEXTS)
    text = card(tmp_path / "out").text
    for words in (
        "On 2 held-out texts of 48 tokens", "| perplexity | 15 (1.5 times, 95% interval 1.25 to "
        "1.75) | 10 |", "75.0%", "0.125",
    ):  # fmt: skip
        assert words in text, words
    assert "Not measured" not in text
    assert "AutoTokenizer" in text
