"""What strangers give the command line that nobody meant to: one sentence each, and code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ggufs
import helpers
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import flocking
from flocking.cli import app

LONG = "x" * 300


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in it, a text, items, links to nothing, and a user's folder."""
    folder = tmp_path_factory.mktemp("place")
    helpers.build("llama").save_pretrained(folder / "model")
    helpers.letters("<s> $A").save_pretrained(folder / "model")
    (folder / "t.txt").write_text("birds of a feather")
    for name in ("folder", "items", "of folders", "of links", "texts"):
        (folder / name).mkdir()
    item = {"context": "a", "choices": ["b", "c"], "label": 0}
    (folder / "items" / "piqa.jsonl").write_text(json.dumps(item) + "\n")
    (folder / "of folders" / "piqa.jsonl").mkdir()
    (folder / "of links" / "piqa.jsonl").symlink_to("nowhere")
    (folder / "texts" / "a.txt").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    return folder


def run(*arguments: object, **options: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


RECORD = ("record", "{}/t.txt", "-o", "{}/new.zarr", "--model", "{}/model")
GENERATE = ("generate", "birds", "--model", "{}/model", "--max-new-tokens", "3")
EVALUATE = (
    *("evaluate", "--tasks", "piqa", "--model", "{}/model", "--out", "{}/out"),
    *("--data-dir", "{}/items"),
)
STATIC = (*EVALUATE, "--methods", "static")


def recording(*texts: str) -> tuple[str, ...]:
    return ("record", *texts, *RECORD[2:])


def writing(out: str) -> tuple[str, ...]:
    return (*RECORD[:3], out, *RECORD[4:])


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (recording(""), "the name of a text file is empty: name text files"),
    (recording(LONG), f"{LONG} cannot be read (File name too long): name a text file"),
    (recording("{}/folder"), "folder has no files whose names end in .txt or .jsonl"),
    (recording("{}/dangling"), "dangling is a link to nowhere, which is not there: name a text"),
    (recording("{}/loop"), "loop cannot be read (Too many levels of symbolic links)"),
    (recording("/proc/self/mem"), "/proc/self/mem cannot be read (Input/output error)"),
    (recording("/dev/zero"), "/dev/zero is a device or socket, which may never end"),
    (recording("a\0b"), r"a\x00b cannot be read (embedded null byte)"),
    (
        writing("{}/dangling"),
        "dangling is a link to nowhere, which is not there: name another place",
    ),
    (writing("{}/loop"), "loop is a link to loop, which is not there: name another place"),
    (writing("{}/" + LONG + ".zarr"), "its name is longer than 255 bytes"),
    (writing("{}/" + LONG + "/x.zarr"), "cannot be written (File name too long)"),
    ((*RECORD, "--window", "1" * 23), f"window={'1' * 23}: give a number below 2 ** 63"),
    ((*RECORD, "--max-new-tokens", "1" * 23), f"max_new_tokens={'1' * 23}: give a number below"),
    ((*RECORD, "--device", "meta"), "--device meta holds no values: give cpu"),
    ((*RECORD, "--device", "meta:0"), "--device meta:0 holds no values"),
    ((*RECORD, "--device", "hpu"), "--device hpu cannot be used here"),
    (("inspect", "{}/model", "--device", "meta"), "--device meta holds no values"),
    (("check", "{}/model", "--device", "meta"), "--device meta holds no values"),
    (("inspect", LONG), "is no folder here"),
    (("inspect", "/" + LONG), "there is no such folder"),
    (("inspect", "{}/dangling"), "dangling is a link to nowhere, which is not there"),
    (("inspect", "~/none"), "/none: there is no such folder"),
    (("inspect", "{}/none.gguf"), "none.gguf: there is no such file: give a GGUF file"),
    (("inspect", "{}/t.txt"), "t.txt is a file: give the folder that it is in, or a GGUF file"),
    ((*GENERATE, "--device", "meta"), "--device meta holds no values"),
    ((*GENERATE, "--max-new-tokens", "1" * 23), "give a number below 2 ** 63"),
    (("generate", "a \ud83d b", *GENERATE[2:]), "the prompt is not text in UTF-8 (byte 2)"),
    (("generate", "a\udcff", *GENERATE[2:]), "the prompt is not text in UTF-8 (byte 1)"),
    (("generate", "\ufeff", *GENERATE[2:]), "the prompt is empty"),
    ((*EVALUATE, "--limit", "1" * 23), f"--limit {'1' * 23}: give a number below 2 ** 63"),
    ((*EVALUATE, "--limit", "piqa=" + "1" * 23), "give a number below 2 ** 63"),
    ((*EVALUATE, "--limit", "1.5"), "--limit: '1.5' is not a number"),
    ((*EVALUATE, "--batch-size", "1" * 23), "give a number below 2 ** 63"),
    ((*EVALUATE, "--seed", "1" * 23), "give a number below 2 ** 63"),
    ((*EVALUATE, "--device", "meta"), "--device meta holds no values"),
    ((*EVALUATE, "--data-dir", LONG), "this folder cannot be read (File name too long)"),
    ((*EVALUATE, "--data-dir", "{}/t.txt"), "t.txt: this folder is a file"),
    ((*EVALUATE, "--data-dir", "{}/dangling"), "dangling is a link to nowhere, which is not"),
    ((*EVALUATE, "--data-dir", "{}/of folders"), "piqa.jsonl is a folder: name a text file"),
    ((*EVALUATE, "--data-dir", "{}/of links"), "piqa.jsonl is a link to nowhere, which is not"),
    ((*STATIC, "--calibration", LONG), "cannot be read (File name too long)"),
    ((*STATIC, "--calibration", "{}/dangling"), "dangling is a link to nowhere, which is not"),
    ((*STATIC, "--calibration", "{}/texts"), "a.txt is a folder: name a text file"),
    ((*STATIC, "--calibration", "/proc/self/mem"), "cannot be read (Input/output error)"),
    ((*EVALUATE, "--out", "{}/dangling/deeper"), "deeper is below {}/dangling, a link to nowhere"),
    ((*EVALUATE, "--out", "{}/" + LONG), "File name too long: name another file or place"),
    (
        ("figures", "--out", "{}/" + LONG, "--model", "{}/model", "--only", "drift"),
        "File name too long: name another file or place",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    REFUSED,
    ids=[ascii(f"{arguments[0]}: {message}"[:60]) for arguments, message in REFUSED],
)
def test_one_sentence_and_code_2(
    arguments: tuple[str, ...],
    message: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if arguments[0] == "evaluate":
        pytest.importorskip("lm_eval")
    monkeypatch.setenv("HOME", str(tmp_path))

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flocking.models.checkpoints.read_model", never)
    before = sorted(place.rglob("*"))
    result = run(*(argument.replace("{}", str(place)) for argument in arguments))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("flocking: ")]
    assert message.replace("{}", str(place)) in line
    assert result.output.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_a_tilde_is_the_users_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(place)
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "t.txt", tmp_path)
    before = sorted(place.rglob("*"))
    result = run("record", "~/t.txt", "-o", "~/deep/x.zarr", "--model", "~/model")
    assert result.exit_code == 0, result.output
    with xr.open_zarr(tmp_path / "deep" / "x.zarr") as stored:
        assert stored.text.values.tolist() == ["birds of a feather"]
    assert f"wrote {tmp_path}/deep/x.zarr" in result.output
    assert run("inspect", "~/model").exit_code == 0
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["~/birds.Q8_0.gguf", "birds.Q8_0.gguf", "link"])
def test_models_in_gguf_files(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ggufs.write(tmp_path / "birds.Q8_0.gguf", ggufs.tiny("llama"), "Q8_0")
    (tmp_path / "link").symlink_to(file)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = run("record", place / "t.txt", "-o", "x.zarr", "--model", name)
    assert result.exit_code == 0, result.output
    with xr.open_zarr(tmp_path / "x.zarr") as stored:
        assert Path(stored.attrs["model"]).name == Path(name).name.removesuffix(".gguf")
    result = run("generate", "birds", "--model", name, "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    result = run("inspect", name)
    assert result.exit_code == 0, result.output
    assert "converted" not in result.output  # a second time


def test_a_gguf_file_is_known_by_its_digest(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of results have that of the file, not of what it was converted to."""
    pytest.importorskip("lm_eval")
    file = ggufs.write(tmp_path / "birds.gguf", ggufs.tiny("llama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = []
    for model in (file, shutil.copy(file, tmp_path / "other.gguf")):
        result = run(
            *("evaluate", "--tasks", "piqa", "--model", model, "--out", tmp_path / "out"),
            *("--data-dir", place / "items", "--methods", "topk", "--densities", "0.5"),
        )
        assert result.exit_code == 0, result.output
        names.append({path.name for path in (tmp_path / "out" / "cells").rglob("*.json.gz")})
    assert names[0]
    assert names[0] == names[1]
    ggufs.write(file, ggufs.tiny("llama"), "Q8_0")
    result = run(
        *("evaluate", "--tasks", "piqa", "--model", file, "--out", tmp_path / "out"),
        *("--data-dir", place / "items", "--methods", "topk", "--densities", "0.5"),
    )
    assert {path.name for path in (tmp_path / "out" / "cells").rglob("*.json.gz")} > names[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: get the file again"),
        (b"Once upon a time", "no GGUF file but another format"),
        (b"GGUF\3\0\0\0" + b"\xff" * 32, "tensors, which it cannot hold: get the file again"),
    ],
)
def test_bad_gguf_files_are_one_sentence_and_code_2(
    content: bytes, message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    for command in (
        ("inspect", file),
        ("check", file),
        ("record", place / "t.txt", "-o", tmp_path / "x.zarr", "--model", file),
        ("generate", "birds", "--model", file),
    ):
        result = run(*command)
        assert result.exit_code == 2, result.output
        assert result.output.startswith(f"flocking: {file} ")
        assert message in result.output
        assert result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [("<s>birds", "special token <s>.* adds it once more"), ("t.txt", "the name of a file")],
)
def test_a_prompt_is_doubted_as_texts_are(
    prompt: str, match: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.warns(UserWarning, match=match):
        result = run("generate", prompt, *(one.replace("{}", str(place)) for one in GENERATE[2:]))
    assert result.exit_code == 0, result.output


def test_generate_reads_the_prompt_as_record_does(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    original = flocking.pruning.twin.Twin.generate

    def generate(self: object, **inputs: object) -> object:
        seen.append({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return original(self, **inputs)

    monkeypatch.setattr(flocking.pruning.twin.Twin, "generate", generate)
    result = run(*(one.replace("{}", str(place)) for one in GENERATE))
    assert result.exit_code == 0, result.output
    (inputs,) = seen
    assert inputs["input_ids"].tolist() == [[1, 11, 18, 27, 13, 28]]  # <s> and letters from 10 on
    assert inputs["attention_mask"].tolist() == [[1] * 6]
    assert inputs.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", [TypeError, KeyError, ImportError, RuntimeError])
def test_what_nobody_foresaw_is_one_sentence_too(
    kind: type[Exception], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> Callable[[], None]:
        raise kind("something odd")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(flocking, "feedforwards", fail)
    result = run("inspect", place / "model")
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("flocking: ")]
    assert f"{kind.__name__}: " in line
    (file,) = tmp_path.glob("flocking-*.txt")
    assert str(file) in line
    assert "Traceback" not in result.output
    text = file.read_text()
    assert text.startswith("Traceback")
    assert "something odd" in text


def test_a_package_that_a_library_misses_is_named_as_it_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> Callable[[], None]:
        raise ImportError("\nThis needs the timm library:\n`pip install timm`")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(flocking, "feedforwards", fail)
    result = run("inspect", place / "model")
    assert result.exit_code == 2
    assert "flocking: This needs the timm library: `pip install timm`\n" in result.output
    assert not list(tmp_path.glob("flocking-*.txt"))
