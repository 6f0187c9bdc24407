"""Loading GGUF files: their names, and the copy of each in the cache."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ggufs
import huggingface_hub
import psutil
import pytest
import torch
import transformers as tf

import flocking
from flocking.models import dequantising, loading, origins

pytestmark = pytest.mark.usefixtures("cache")


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
        expected = ggufs.logits(model) if expected is None else expected
        assert torch.equal(ggufs.logits(model), expected)
    # (A file in Q8_0 is close to the model that it is of.)
    assert torch.allclose(expected, ggufs.logits(ggufs.tiny("llama")), atol=0.1)
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


def test_a_copy_whose_texts_are_split_otherwise_is_another(file: Path, counted: list[Path]) -> None:
    """As that of the embedded model, of the same bytes."""
    for splits in (True, True, False, False, True):
        dequantising.dequantised(file, "birds", splits=splits)
    assert len(counted) == 2


def test_converted_once_and_said_before(
    file: Path,
    cache: Path,
    counted: list[Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_weights = dequantising._size  # 4,000 times as large, to be seen in GB
    monkeypatch.setattr(dequantising, "_size", lambda contents: 4000 * of_weights(contents))
    size = 16_000 * sum(p.numel() for p in flocking.load(file)[0].parameters())
    assert size > 1e9
    said = capfd.readouterr().err
    once = f"birds.Q8_0.gguf: its weights are converted to float32 once, {size / 1e9:.1f} GB in"
    assert once in said
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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_that_cannot_be_are_one_sentence(file: Path) -> None:
    """Whatever transformers, tokenizers or torch say of bytes that were changed."""
    whole = file.read_bytes()
    first, last = whole.index(b"tokenizer.ggml.padding"), dequantising.contents_of(file).start
    said = []
    for seed in range(24):
        draw = random.Random(seed)
        new = bytearray(whole)
        for _ in range(draw.choice([1, 2])):
            new[draw.randrange(first, last)] = draw.choice([0, 1, 2, 0x7F, 0xFF])
        file.write_bytes(new)
        try:
            flocking.load(file)
        except (OSError, ValueError) as problem:
            said.append(str(problem))
    assert len(said) > 8
    assert all(text.startswith(f"{file} ") and "\n" not in text for text in said)


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
    assert math.isfinite(ggufs.logits(model).sum())


@pytest.mark.parametrize("place", ["cuda:7", 7, {"": "cuda:7"}, torch.device("cuda", 7)])
def test_a_device_that_is_not_there(
    place: object, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is named with the file that was given, before that is converted."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = f"^{file} cannot be loaded: device_map names cuda:7, and torch finds no such device"
    with pytest.raises(ValueError, match=text):
        flocking.load(file, device_map=place)
    assert not cache.exists()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"finds devices 0 to 1 of the kind cuda: give 'cuda:0'"):
        flocking.load(file, device_map=place)
    with pytest.raises(ValueError, match=r"device_map names 'gpu', which is no device: give 'cpu'"):
        flocking.load(file, device_map="gpu")


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_a_device_that_is_there(place: object, file: Path) -> None:
    model, _ = flocking.load(file, device_map=place)
    places = {parameter.device.type for parameter in model.parameters()}
    assert places == {"cpu"} or place == "auto"
