"""What an evaluation says of itself, written and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flocking.evaluation import sources

SOURCE = {
    "model": "tiny",
    "identity": "a" * 64,
    "parameters": 12_345,
    "ff_parameters": 6_000,
    "layers": 2,
    "d_ff": [8, 9],
    "dtype": "float32",
    "device": "cpu",
    "calibration": "the packaged passages",
    "calibration_digest": "b" * 64,
    "seed": 3,
    "code": "c" * 64,
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "tasks": {"piqa": {"protocol": "context", "limit": 2, "digest": "d" * 64, "items": 2}},
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "source.json"
    path.write_text(sources.written(SOURCE), encoding="utf-8")
    found = sources.read(path)
    expected = {**SOURCE, "d_ff": (8, 9)}
    tasks = expected.pop("tasks")
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.tasks == {"piqa": sources.Asked(**tasks["piqa"])}
    assert json.loads(path.read_text())["format"] == sources.FORMAT


def test_what_is_not_said_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "source.json"
    path.write_text(sources.written({"model": "tiny"}), encoding="utf-8")
    assert sources.read(path) == sources.Source("tiny")
    assert sources.read(path).parameters is None


def test_in_words() -> None:
    assert sources.in_words(SOURCE) == (
        "model tiny; parameters 12,345; dtype float32; device cpu; calibration the packaged "
        "passages; seed 3; python 3.11; torch 2.13.0"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it has no number of a format"),
        ('{"model": "x"}', "it has no number of a format"),
        ('{"format": 1}', "it names no model"),
        ('{"format": 1, "model": "x", "parameters": "many"}', "invalid literal"),
        ('{"format": 1, "model": "x", "tasks": {"piqa": {"odd": 1}}}', "unexpected keyword"),
        ('{"format": 1, "model": "x", "versions": 3}', "has no attribute"),
        ("[" * 100_000, ""),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "source.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as what flocking evaluate writes") as told:
        sources.read(path)
    assert str(told.value).startswith(str(path))
    assert why in str(told.value)
    assert "remove it, and run flocking evaluate again" in str(told.value)


def test_a_later_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "source.json"
    path.write_text('{"format": 7, "model": "x"}', encoding="utf-8")
    with pytest.raises(ValueError, match="has format 7, and this version of flocking reads 1"):
        sources.read(path)
