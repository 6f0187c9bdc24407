"""Numbers of figures as JSON, and what is noticed when a file was changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from flocking.artifacts import Key, UnreadableError, from_json, read_content, to_json

KEY = Key("code", "inputs", {"torch": "2"})


@pytest.fixture
def data() -> xr.Dataset:
    return xr.Dataset(
        {
            "x": (("a", "b"), np.array([[1.0, np.nan], [0.1 + 0.2, -1e-9]]), {"units": "1"}),
            "y": ("a", np.array([1.23456, 7.0], np.float32)),
        },
        {"a": ["one", "two"], "b": [3, 4]},
        {"caption": "Zöe", "texts": ["one", "two"], "seed": 0},
    )


def test_what_was_written_is_read(tmp_path: Path, data: xr.Dataset) -> None:
    path = tmp_path / "x.json"
    path.write_text(to_json(data, KEY), encoding="utf-8")
    assert Key.read(read_content(path)["key"]) == KEY
    rounded = data.assign(y=("a", [1.23, 7.0]))
    xr.testing.assert_identical(from_json(path.read_text("utf-8")), rounded)
    # Its layout does not matter, nor does a key that was written by hand.
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "key": "0123"}, indent=3, ensure_ascii=False), "utf-8")
    assert read_content(path)["key"] == "0123"
    del content["checksum"]  # as earlier versions wrote them
    path.write_text(json.dumps(content))
    assert read_content(path) == content


def test_labels_that_were_put_together_are_texts(data: xr.Dataset) -> None:
    """``xarray.concat`` makes objects of them."""
    labels = np.array(["one", "three"], dtype=object)
    together = data.assign_coords(a=("a", labels))
    assert together.a.dtype == object
    found = from_json(to_json(together, KEY))
    assert found.a.values.tolist() == ["one", "three"]
    xr.testing.assert_identical(found.x, together.assign_coords(a=["one", "three"]).x)


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.30000000000000004", "0.3000000000000001"), ("null", "0.0"), ("1.23", "1.24"),
     ("one", "eno"), ('"seed": 0', '"seed": 1'), ("[3, 4]", "[3, 5]")],
)  # fmt: skip
def test_a_changed_digit_is_noticed(tmp_path: Path, data: xr.Dataset, old: str, new: str) -> None:
    path, written = tmp_path / "x.json", to_json(data, KEY)
    assert old in written
    path.write_text(written.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UnreadableError, match=r"x\.json was changed after it was") as caught:
        read_content(path)
    assert caught.value.changed


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '{"key": 1}', "[" * 100_000, '{"a": "\\ud800"}', "\0", "9" * 9999]
)
def test_what_is_not_such_a_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=r"x\.json (cannot be read|does not have)"):
        read_content(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UnreadableError, match="cannot be read"):
        read_content(path)
    with pytest.raises(UnreadableError, match="cannot be read"):
        read_content(tmp_path)
