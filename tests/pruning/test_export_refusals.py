"""What cannot be exported is said in one sentence, before anything slow, and nothing is left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import build, contents, generate, letters, tokens
from torch import nn
from torch.nn.utils import parametrizations, prune

import flocking
from flocking.pruning import exporting, lost, places


@pytest.fixture
def kept(llama: tf.PreTrainedModel) -> xr.DataArray:
    return flocking.select(flocking.weight_magnitude(llama), 0.5)


def refused(
    model: tf.PreTrainedModel,
    kept: object,
    folder: Path,
    text: str,
    kind: type = ValueError,
    **more,
) -> None:
    """One sentence or two, and the disk is as before."""
    before = contents(folder)
    with pytest.raises(kind, match=text) as caught:
        flocking.export(model, kept, folder / "out", **more)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing slow happens: no twin is made, and no file is written."""

    def slow(*args: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(exporting, "_logits_of_twin", slow)


@pytest.mark.usefixtures("early")
def test_the_wrong_model(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    twin = flocking.griffin(llama, 0.5)
    generate(twin, tokens(9), n=2)
    refused(twin, twin.selection, tmp_path, "model is a twin: give the original")
    refused("llama", kept, tmp_path, "load it first", TypeError)
    refused(build("bert"), kept, tmp_path, "not a decoder-only model that generates")
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    refused(empty, kept, tmp_path, "meta device")
    refused(build("bloom"), kept, tmp_path, "over 160 neurons")
    with flocking.observe(llama, lambda *args: None):
        llama(tokens(3))
        refused(llama, kept, tmp_path, "the model is observed", RuntimeError)


@pytest.mark.usefixtures("early")
def test_the_wrong_selection(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    statistic = flocking.weight_magnitude(llama)
    refused(llama, statistic, tmp_path, r"give flocking\.select", TypeError)
    recording = flocking.record(llama, [[5, 6, 7], [8, 9]], progress=False)
    several = flocking.select(flocking.statistic(recording))
    refused(llama, several, tmp_path, "of 2 sequences.*global_statistic")
    nothing = flocking.statistic(recording)[:1] * np.nan
    refused(llama, flocking.select(nothing), tmp_path, "keeps no neuron of layer 0.*NaN")


@pytest.mark.usefixtures("early")
def test_architectures_that_cannot_say_it(tmp_path: Path) -> None:
    model = build("bloom")
    kept = flocking.select(flocking.weight_magnitude(model), 0.5)
    refused(model, kept, tmp_path, "BloomForCausalLM cannot be exported: the field .*hidden_size")


@pytest.mark.usefixtures("early")
def test_what_is_in_no_file(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    norm, layer = llama.model.norm, llama.model.layers[0]
    hook = norm.register_forward_hook(lambda *args: None)
    refused(llama, kept, tmp_path, r"hook at model\.norm \(<lambda>\).*remove it")
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    refused(llama, kept, tmp_path, "hook on all modules")
    hook.remove()
    prune.l1_unstructured(layer.self_attn.q_proj, "weight", 0.5)
    refused(llama, kept, tmp_path, r"q_proj.*prune\.remove")
    prune.remove(layer.self_attn.q_proj, "weight")
    parametrizations.orthogonal(layer.self_attn.k_proj)
    refused(llama, kept, tmp_path, "k_proj.*remove_parametrizations")
    nn.utils.parametrize.remove_parametrizations(layer.self_attn.k_proj, "weight")
    llama.config.quantization_config = {"quant_method": "made-up"}
    refused(llama, kept, tmp_path, "is quantised.*load it unquantised")
    del llama.config.quantization_config
    llama.model.layers = llama.model.layers[:1]
    refused(llama, kept.isel(layer=[0]), tmp_path, r"not those of its class and config \(model\.l")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.usefixtures("early")
def test_adapters(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    refused(peft.get_peft_model(llama, config), kept, tmp_path, "q_proj: merge it.*merge_and_un")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merged_adapters(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    merged = peft.get_peft_model(llama, config).merge_and_unload()
    flocking.export(merged, kept, tmp_path / "out")


@pytest.mark.usefixtures("early")
def test_configs_that_are_not_saved(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    llama.generation_config.do_sample = False
    llama.generation_config.temperature = 0.3
    refused(llama, kept, tmp_path, r"model\.generation_config cannot be saved: .*temperature")
    llama.generation_config = tf.GenerationConfig()
    llama.generation_config.more = object()
    refused(llama, kept, tmp_path, r"model\.generation_config cannot be saved: .*serializable")
    llama.generation_config = tf.GenerationConfig()
    llama.config.do_sample = True
    refused(llama, kept, tmp_path, r"model\.config cannot be saved: .*generation_config.*do_sample")
    llama.config.do_sample = object()
    refused(llama, kept, tmp_path, r"model\.config cannot be saved")


def test_a_published_generation_config_goes_over(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    """Whatever is odd about it: transformers writes it again if nobody has changed it."""
    llama.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.3}))
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    flocking.export(model, kept, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert content["temperature"] == 0.3


@pytest.mark.usefixtures("early")
def test_other_arguments(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    refused(llama, kept, tmp_path, "tokenizer", TypeError, tokenizer="gpt2")
    refused(llama, kept, tmp_path, "No tokenizer was found", held_out="Birds of a feather.")
    refused(llama, kept, tmp_path, "text is empty", held_out=[])
    refused(llama, kept, tmp_path, "held_out: no text has two tokens", held_out=[[5], [6]])
    for folder, kind in ((5, TypeError), (None, TypeError), (b"out", TypeError), ("", ValueError)):
        with pytest.raises(kind, match="folder"):
            flocking.export(llama, kept, folder)


@pytest.mark.usefixtures("early")
def test_a_tokenizer_of_another_model(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    tokenizer = letters("<s> $A")
    rows = llama.config.vocab_size
    tokenizer.add_tokens([f"word{n}" for n in range(rows + 1 - len(tokenizer))])
    assert len(tokenizer) == rows + 1
    text = f"tokenizer has {rows + 1} tokens, and the model's embedding {rows}: give"
    refused(llama, kept, tmp_path, text, tokenizer=tokenizer)


def test_a_published_tokenizer_may_have_more(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    tokenizer = letters("<s> $A")
    tokenizer.add_tokens([f"word{n}" for n in range(llama.config.vocab_size)])
    llama.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    model, tokenizer = flocking.load(tmp_path / "source")
    flocking.export(model, kept, tmp_path / "out", tokenizer=tokenizer)
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)


@pytest.mark.usefixtures("early")
def test_output_that_exists(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    for overwrite in (False, True):
        refused(llama, kept, tmp_path, "is no model's folder .it is a file", overwrite=overwrite)
    out.unlink()
    out.mkdir()
    refused(llama, kept, tmp_path, "exists: .*overwrite=True")
    (out / "thesis.docx").write_text("mine")
    refused(llama, kept, tmp_path, "no config.json", overwrite=True)
    build("llama", intermediate_size=48).save_pretrained(out)
    refused(llama, kept, tmp_path, "there is thesis.docx in it", overwrite=True)
    (out / "thesis.docx").unlink()
    (out / "photos").mkdir()
    refused(llama, kept, tmp_path, "there is photos in it", overwrite=True)
    (out / "photos").rmdir()
    refused(llama, kept, tmp_path, "exists: choose another name, or give overwrite=True")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with pytest.raises(ValueError, match=r"a link to .*, which is not there"):
        flocking.export(llama, kept, tmp_path / "link")


def test_where_the_model_is_from(kept: xr.DataArray, tmp_path: Path) -> None:
    """A user's own model is not replaced, whatever the folder is called."""
    build("llama").save_pretrained(tmp_path / "out")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    refused(model, kept, tmp_path, "where the model itself is from", overwrite=True)
    os.symlink(tmp_path / "out", tmp_path / "link")
    with pytest.raises(ValueError, match="where the model itself is from"):
        flocking.export(model, kept, tmp_path / "link", overwrite=True)


def test_an_export_can_be_replaced(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    tokenizer = letters("<s> $A")
    flocking.export(llama, kept, tmp_path / "out", tokenizer=tokenizer)
    more = flocking.select(flocking.weight_magnitude(llama), 0.75)
    flocking.export(llama, more, str(tmp_path / "out"), overwrite=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 120
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_room(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "free_bytes", lambda folder: 1000)
    refused(llama, kept, tmp_path, "kB are needed, and 1 kB are free: make room", OSError)


@pytest.mark.parametrize("step", ["_save", "_read_again", "_prove", "card_of"])
def test_an_end_in_the_middle(
    step: str,
    llama: tf.PreTrainedModel,
    kept: xr.DataArray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = getattr(exporting, step)

    def interrupted(*args: object, **kwargs: object) -> None:
        whole(*args, **kwargs)
        raise KeyboardInterrupt

    flocking.export(llama, kept, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(exporting, step, interrupted)
    for overwrite, name in ((True, "out"), (False, "more/out")):
        with pytest.raises(KeyboardInterrupt):
            flocking.export(llama, kept, tmp_path / name, overwrite=overwrite)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --------------------------------------------------------------------------------------
# What only the proof can find


def test_a_function_that_was_replaced(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    for layer in llama.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    refused(llama, kept, tmp_path, "logits differ from those of a twin .*in none of its files")


def test_a_buffer_that_is_not_saved(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path
) -> None:
    llama.model.rotary_emb.inv_freq *= 3
    refused(llama, kept, tmp_path, "logits differ from those of a twin")


def test_several_dtypes(llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path) -> None:
    llama.model.norm.to(torch.bfloat16)
    refused(llama, kept, tmp_path, "is in bfloat16, and is read again in float32: convert")


def test_files_that_are_wrong(
    llama: tf.PreTrainedModel,
    kept: xr.DataArray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever goes wrong on the way to the files is found when they are read again."""
    state_of = exporting._state

    def with_other_values(smaller: tf.PreTrainedModel) -> dict[str, torch.Tensor]:
        state = state_of(smaller)
        name = "model.layers.1.mlp.down_proj.weight"
        state[name] = state[name].flip(1)
        return state

    monkeypatch.setattr(exporting, "_state", with_other_values)
    refused(llama, kept, tmp_path, "logits differ from those of a twin")

    def without_one(smaller: tf.PreTrainedModel) -> dict[str, torch.Tensor]:
        state = state_of(smaller)
        del state["model.norm.weight"]
        return state

    monkeypatch.setattr(exporting, "_state", without_one)
    refused(llama, kept, tmp_path, r"in no file \(model\.norm\.weight\)")

    def with_one_more(smaller: tf.PreTrainedModel) -> dict[str, torch.Tensor]:
        return state_of(smaller) | {"model.more.weight": torch.ones(3)}

    monkeypatch.setattr(exporting, "_state", with_one_more)
    refused(llama, kept, tmp_path, r"the model does not have \(model\.more\.weight\)")


def test_measuring_that_fails(
    llama: tf.PreTrainedModel, kept: xr.DataArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ValueError("texts are too short.")

    monkeypatch.setattr(lost, "measure_lost", fails, raising=False)
    refused(llama, kept, tmp_path, "too short", held_out=[[5, 6, 7]])
