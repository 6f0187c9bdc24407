"""flocking record: what it is given, what it says first, and what it replaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flocking
from flocking.artifacts import claimed
from flocking.cli import app, options
from flocking.cli.pruning import texts_of


def told(*arguments: object, code: int = 2, **options: object) -> str:
    ended = CliRunner().invoke(app, ["record", *map(str, arguments)], **options)
    assert ended.exit_code == code, ended.output
    return " ".join(ended.output.split())


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is refused before a model is loaded."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(flocking, "load", load)


def test_files_without_a_text_are_refused_first(tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    for name, content in (
        ("a.jsonl", ""),
        ("b.jsonl", "\n \n"),
        ("c.txt", ""),
        ("d.txt", "\ufeff"),
    ):
        file = tmp_path / name
        file.write_text(content, encoding="utf-8")
        said = told(file, "-o", out)
        assert name in said
        assert "not foreseen" not in said
    assert "--on-error ignore: give stop or skip" in told(
        __file__, "-o", out, "--on-error", "ignore"
    )
    assert not out.exists()


def test_devices(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("A text.")
    assert "cannot be used here" in told(file, "-o", tmp_path / "x.zarr", "--device", "")


def test_several_processes_do_not_replace_a_store_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "a.txt", tmp_path / "x.zarr"
    file.write_text("A text.")
    out.mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes cannot replace it" in told(file, "-o", out, "--overwrite")
    assert out.is_dir()


def test_one_of_several_processes_asks_whether_the_output_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would meet the first one there, and take it for a stranger."""
    file, out = tmp_path / "a.txt", tmp_path / "x.zarr"
    file.write_text("A text.")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, came_to_load in (("0", False), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        with claimed(out):
            ended = CliRunner().invoke(app, ["record", str(file), "-o", str(out)])
        assert ended.exit_code != 0
        assert ("the model was loaded" in ended.output) == came_to_load, ended.output


def test_output_that_cannot_show_a_name_does_not_end_a_command(tmp_path: Path) -> None:
    program = "import sys; from flocking.cli import main; from flocking.cli.printing import say\n"
    program += "sys.argv = ['flocking', '--version']\n"
    program += "try:\n    main()\nexcept SystemExit:\n    say('\\u65e5 \\xb1')\n"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "iso-8859-1"},
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert rb"\u65e5 " + b"\xb1" in ended.stdout


def test_a_redraw_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    arguments = ["figures", "--out", tmp_path, "--redraw", "--model", "big", "--seed", "1"]
    ended = CliRunner().invoke(app, [str(each) for each in arguments])
    assert ended.exit_code == 2
    assert "leave --model and --seed out" in " ".join(ended.output.split())


def test_processes_on_one_machine_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert options._of_this_process("cuda") == "cuda"
    assert options.is_first()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, expected in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        assert options._of_this_process("cuda") == expected
        assert options._of_this_process("cpu") == "cpu"
        assert options._of_this_process("cuda:1") == "cuda:1"
        assert options.is_first() == (rank == "0")


def test_texts_to_prune_by_are_those_that_record_reads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": " "}\n')
    assert texts_of([str(tmp_path)]) == ["one", "two"]
    (tmp_path / "c.jsonl").write_text('{"body": "three"}\n')
    with pytest.raises(ValueError, match=r"no text in field 'text' .texts are in: body.: put it"):
        texts_of([str(tmp_path)])
