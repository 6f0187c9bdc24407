"""An exported folder is the pruned model: in plain transformers, for every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload, dispatch_model
from exports import MORE, assert_close, logits, made, masked, selected
from helpers import (
    ARCHITECTURES,
    VOCABULARY,
    build,
    generate,
    hooks_of,
    letters,
    random_ids,
    tokens,
)  # fmt: skip
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

import flocking
from flocking.feedforward import moe
from flocking.pruning import exporting

# An encoder, a width that the config cannot say, and a model that does not go on from a cache.
_NOT_EXPORTED = ("bert", "bloom", "recurrent_gemma")
EXPORTED = [name for name in (*ARCHITECTURES, *MORE) if name not in _NOT_EXPORTED]


def marks(model: tf.PreTrainedModel) -> list[object]:
    """What must stay as it is in a model."""
    values = [(name, value.clone()) for name, value in model.state_dict().items()]
    return [
        *((name, value.sum().item(), value.shape) for name, value in values),
        [id(parameter) for parameter in model.parameters()],
        [id(module) for module in model.modules()],
        model.config.to_dict(),
        model.generation_config.to_dict(),
        hooks_of(model),
        [{*vars(module)} - {"_output_capturing_hooks_installed"} for module in model.modules()],
        model.training,
    ]


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each weight in a folder's files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


@pytest.mark.parametrize("name", EXPORTED)
def test_is_the_pruned_model(name: str, tmp_path: Path) -> None:
    model = made(name)
    kept = selected(model)
    before = marks(model)
    done = flocking.export(model, kept, tmp_path / "out")
    assert marks(model) == before

    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(model)
    ids = tokens(20, seed=3)
    reference = masked(model, kept)
    got, expected = logits(again, ids), logits(reference, ids)
    assert_close(got, expected)
    assert not torch.allclose(expected, logits(model, ids), rtol=1e-2)  # it makes a difference
    assert torch.equal(generate(again, ids, n=6), generate(reference, ids, n=6))

    blocks = [block for block in flocking.feedforwards(again) if block.call == 0]
    assert {block.layer: block.d_ff for block in blocks} == done.stored
    assert done.kept == {n: int(kept.sel(layer=n).sum()) for n in done.stored}
    assert done.zeros == sum(done.stored.values()) - sum(done.kept.values()) >= 0
    assert done.parameters == again.num_parameters() < done.parameters_before
    assert done.parameters_before == model.num_parameters()
    assert done.bytes == 4 * done.parameters
    zero = sum(
        int((block.weight == 0).all(dim=-1 if by_row(block) else -2).sum()) for block in blocks
    )
    assert zero == done.zeros


def by_row(block: flocking.FeedForward) -> bool:
    """Whether neurons are rows of the down-projection."""
    if block.kind != "experts":
        return isinstance(block.down, Conv1D)
    return ("down_proj", 1, False) in [*moe.axes(block.down)]


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "gpt_oss"])
def test_zeros_add_nothing_whatever_the_activation_of_zero(name: str, tmp_path: Path) -> None:
    act = {"hidden_act": "sigmoid"} if name != "gpt2" else {"activation_function": "sigmoid"}
    model = build(name, **({} if name == "gpt_oss" else act))
    kept = selected(model)
    done = flocking.export(model, kept, tmp_path / "out")
    assert done.zeros > 0
    again = type(model).from_pretrained(tmp_path / "out").eval()
    ids = tokens(20)
    assert_close(logits(again, ids), logits(masked(model, kept), ids))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_twins_selection(name: str, tmp_path: Path) -> None:
    model = build(name)
    twin = flocking.griffin(model, 0.5)
    prompt = tokens(30)
    generate(twin, prompt, n=2)
    flocking.export(model, twin.selection, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    ids = tokens(20, seed=4)
    with torch.no_grad():  # the twin itself, as it decodes
        assert_close(logits(again, ids), twin(input_ids=ids, use_cache=False).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method topk, density 0.5; the prompt had 30 tokens" in card


def test_selections_in_other_forms_give_the_same_files(tmp_path: Path) -> None:
    model = build("llama")
    kept = selected(model)
    indices = {n: np.flatnonzero(kept[n].values)[::-1].copy() for n in (1, 0)}
    shuffled = kept.isel(neuron=np.random.default_rng(0).permutation(160), layer=[1, 0])
    for number, form in enumerate((kept, shuffled.T, indices, kept.expand_dims("sequence"))):
        flocking.export(model, form, tmp_path / str(number))
    files = {(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(4)}
    assert len(files) == 1


def test_all_neurons_are_the_model(tmp_path: Path) -> None:
    for name in ("llama", "bloom"):  # which needs no other width
        model = build(name)
        kept = flocking.select(flocking.weight_magnitude(model), 1.0)
        done = flocking.export(model, kept, tmp_path / name)
        assert done.zeros == 0
        assert done.parameters == done.parameters_before
        again = type(model).from_pretrained(tmp_path / name).eval()
        assert torch.equal(logits(again, tokens(9)), logits(model, tokens(9)))


def test_is_read_without_this_package(tmp_path: Path) -> None:
    """In a process of its own, which cannot import it."""
    model, tokenizer = build("qwen2"), letters("<s> $A")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.generation_config.max_new_tokens = 7
    kept = selected(model)
    flocking.export(model, kept, tmp_path / "out", tokenizer=tokenizer)
    program = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.partition('.')[0] == 'flocking':
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.chat_template.startswith('{% for m')
inputs = tokenizer('birds', return_tensors='pt')
print(model.generate(inputs.input_ids, do_sample=False)[0].tolist())
assert 'flocking' not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    ids = tokenizer("birds", return_tensors="pt").input_ids
    expected = masked(model, kept).generate(ids, do_sample=False)[0].tolist()
    assert json.loads(done.stdout) == expected
    assert len(expected) > ids.shape[1]


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_SHARD", "100KB")
    model = build("llama")
    kept = selected(model)
    flocking.export(model, kept, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("model-*-of-*.safetensors")]) > 2
    again = type(model).from_pretrained(tmp_path / "out")
    assert_close(logits(again, tokens(9)), logits(masked(model, kept), tokens(9)))


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    flocking.export(model, selected(model), tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if name != "llama" and dtype == torch.float64:
        pytest.skip("grouped matrix products are not made in float64")
    model = build(name).to(dtype)
    done = flocking.export(model, selected(model), tmp_path / "out")
    short = {torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]
    assert {kind for kind, _ in stored(tmp_path / "out").values()} == {short}
    assert done.bytes == done.parameters * dtype.itemsize
    again = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == dtype


@pytest.mark.parametrize("offload", ["cpu", "disk", "a map"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_offloaded_models(name: str, offload: str, tmp_path: Path) -> None:
    kept = selected(build(name, tie_word_embeddings=True))
    flocking.export(build(name, tie_word_embeddings=True), kept, tmp_path / "plain")
    model = build(name, tie_word_embeddings=True)
    if offload == "cpu":
        model = cpu_offload(model, execution_device="cpu")
    elif offload == "disk":
        model = disk_offload(model, str(tmp_path / "disk"), execution_device="cpu")
    else:
        parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
        places = dict.fromkeys((*(f"model.{part}" for part in parts), "lm_head"), "cpu")
        model = dispatch_model(
            model, places | {"model.layers.1": "disk"}, main_device="cpu",
            offload_dir=str(tmp_path / "disk"), force_hooks=True,
        )  # fmt: skip
    before = [parameter.is_meta for parameter in model.parameters()]
    done = flocking.export(model, kept, tmp_path / "out")
    assert [parameter.is_meta for parameter in model.parameters()] == before
    assert any(before)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "out")]
    assert files[0] == files[1]
    assert done.bytes == done.parameters * 4


def test_generation_config_and_other_settings_go_over(tmp_path: Path) -> None:
    model = build("gemma2")
    model.generation_config.update(top_k=7, do_sample=True)
    model.config.final_logit_softcapping = 5.0
    flocking.export(model, selected(model), tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert (again.generation_config.top_k, again.generation_config.do_sample) == (7, True)
    before, after = (dict(each.config.to_dict()) for each in (model, again))
    ours = {"intermediate_size", "dtype", "architectures", "transformers_version", "_name_or_path"}
    assert {key for key in before if before[key] != after[key]} <= ours


def test_the_tokenizer_that_recording_finds(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), letters("<s> $A")
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    model = flocking.load(tmp_path / "source")[0]
    flocking.export(model, selected(model), tmp_path / "out")
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("ab") == tokenizer("ab")


def test_recordings_of_it_are_of_the_kept_neurons(tmp_path: Path) -> None:
    """Each of them takes the share of the activations that pruned ones had."""
    model = build("llama")
    kept = flocking.select(flocking.weight_magnitude(model), 0.5)
    flocking.export(model, kept, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    ids = random_ids(12)
    got = flocking.record(again, ids, progress=False)
    expected = flocking.record(masked(model, kept), ids, progress=False)
    for layer in (0, 1):
        mine = got.energy.sel(layer=layer).isel(sequence=0).sum("window").values
        theirs = expected.energy.sel(layer=layer).isel(sequence=0).sum("window").values
        assert len(mine) == int(kept.sel(layer=layer).sum())
        assert (mine >= theirs[kept.sel(layer=layer).values] * (1 - 1e-5)).all()


def test_whatever_torch_is_set_to(tmp_path: Path) -> None:
    model = build("mixtral").train()
    kept = selected(model)

    @contextmanager
    def default(setter: Callable, value: object, before: object) -> Iterator[None]:
        setter(value)
        try:
            yield
        finally:
            setter(before)

    settings = {
        "usual": nullcontext(),
        "device": default(torch.set_default_device, "meta", None),
        "dtype": default(torch.set_default_dtype, torch.float64, torch.float32),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    for name, setting in settings.items():
        with setting:
            flocking.export(model, kept, tmp_path / name)
    assert model.training
    assert len({(tmp_path / n / "model.safetensors").read_bytes() for n in settings}) == 1


@pytest.mark.filterwarnings("ignore:.* layers hold no feed-forward block")
def test_layers_that_share_weights_can_keep_different_neurons(tmp_path: Path) -> None:
    """They no longer share them in the files."""
    config = tf.ZambaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_mamba_heads=2, mamba_dt_rank=8,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.ZambaForCausalLM(config).eval()
    downs = [block.down for block in flocking.feedforwards(model)]
    assert downs[0].weight is downs[1].weight
    kept = selected(model)
    assert (kept[0] != kept[1]).any()
    flocking.export(model, kept, tmp_path / "out")
    again = tf.ZambaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close(logits(again, tokens(9)), logits(masked(model, kept), tokens(9)))


def test_a_device_without_room_for_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is then proved on the CPU, within rounding."""
    tried: list[bool] = []

    def full(model: tf.PreTrainedModel, device: torch.device) -> bool:
        tried.append(moved(model, device))
        return tried[-1]

    def without_room(self: tf.PreTrainedModel, device: object) -> tf.PreTrainedModel:
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self

    model, moved = build("llama"), exporting._moved
    kept = flocking.select(flocking.weight_magnitude(model))
    monkeypatch.setattr(tf.PreTrainedModel, "to", without_room)
    monkeypatch.setattr(exporting, "_moved", full)
    flocking.export(model, kept, tmp_path / "small")
    assert tried == [False]
    # It is still held against the twin: by what rounding explains, as devices differ.
    asked: list[torch.dtype] = []
    monkeypatch.setattr(exporting, "tolerance", lambda dtype: asked.append(dtype) or -1.0)
    with pytest.raises(ValueError, match="its logits differ"):
        flocking.export(model, kept, tmp_path / "other")
    assert asked == [torch.float32]
