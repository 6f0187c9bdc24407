"""Files that make one output together: whole, replaced together, and no others touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from flocking.artifacts import FileGroup


def is_ours(path: Path) -> bool:
    return path.read_text(encoding="utf-8").startswith("ours")


GROUP = FileGroup(("table.csv",), ("one", "two"), is_ours, "is not ours: go elsewhere")


def write(folder: Path, figures: list[str]) -> None:
    with GROUP.replacing(folder, figures) as partial:
        for path in GROUP.paths(partial, figures):
            path.write_text(f"ours: {path.name}", encoding="utf-8")


def test_a_figure_that_is_not_drawn_any_more_goes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of the user")
    write(tmp_path, ["one", "two"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("table.csv", "one.png", "one.svg", "two.png", "two.svg", "notes.txt")
    }
    write(tmp_path, ["two"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("table.csv", "two.png", "two.svg", "notes.txt")
    }


@pytest.mark.parametrize("name", ["table.csv", "one.svg", "two.png"])
@pytest.mark.parametrize("content", [b"theirs", b"\xff\xfe"])
def test_a_file_of_that_name_that_is_not_of_one_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    """Also where it would only be removed, and where it cannot be read."""
    write(tmp_path, ["one"])
    (tmp_path / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{name} exists and is not ours: go elsewhere"):
        write(tmp_path, ["one"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_fails_on_the_way_leaves_all_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, ["one"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail() -> None:
        with GROUP.replacing(tmp_path, ["two"]) as partial:
            (partial / "table.csv").write_text("ours, and new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
