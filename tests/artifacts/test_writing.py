"""Files that are whole or not there, whatever else writes, ends or is killed meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from flocking.artifacts import BusyError, refuse_unwritable, replacing
from flocking.artifacts import claims


def test_files_take_their_places_together(tmp_path: Path) -> None:
    one, two = tmp_path / "new" / "one.txt", tmp_path / "new" / "two.txt"
    with replacing(one, two) as partial:
        partial.write_text("1")
        partial.with_name("two.txt").write_text("2")
        assert not one.exists()
    assert (one.read_text(), two.read_text()) == ("1", "2")
    with pytest.raises(FileNotFoundError), replacing(two, one) as partial:
        partial.with_name("one.txt").write_text("3")  # and nothing in the place of the other
    assert one.read_text() == "1"
    assert sorted(path.name for path in one.parent.iterdir()) == ["one.txt", "two.txt"]


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("first", "second"):
        with replacing(store) as partial:
            partial.mkdir()
            (partial / name).touch()
        assert [path.name for path in store.iterdir()] == [name]
    with pytest.raises(FileNotFoundError), replacing(store):  # nothing was written
        pass
    assert [path.name for path in store.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_there_by_then_may_stay(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with replacing(store, overwrite=False) as partial:
        partial.mkdir()
        store.mkdir()  # another process was faster
        (store / "theirs").touch()
    assert [path.name for path in store.iterdir()] == ["theirs"]
