"""What may be given as texts, above all what can be gone through only once."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from streams import TEXTS, assert_same_values, by_block, stream
from tqdm import tqdm

import flocking
from flocking.models.forms import held, is_lasting
from flocking.texts import TextFiles


class Handle:
    """Reads on where it was, as what is around an open file does."""

    def __init__(self, values: Any) -> None:
        self._values = iter(values)

    def __iter__(self) -> Iterator[Any]:
        yield from self._values


class Counted(Handle):
    """The same, where the number of texts is known."""

    def __init__(self, values: Any) -> None:
        super().__init__(values)
        self._number = len(values)

    def __len__(self) -> int:
        return self._number


def _barred(values: Any) -> Any:
    return tqdm((value for value in values), total=len(values), file=io.StringIO())


def _barred_without_a_length(values: Any) -> Any:
    return tqdm((value for value in values), disable=True)


ONCE = [Handle, Counted, _barred, _barred_without_a_length, iter]


@pytest.mark.parametrize("kind", ONCE)
def test_no_text_is_lost_of_what_is_gone_through_once(tmp_path: Path, kind: Any) -> None:
    got = stream(tmp_path / "x.zarr", kind(TEXTS)).load()
    assert_same_values(got, by_block("llama", TEXTS))
    again = stream(tmp_path / "x.zarr", kind(TEXTS))  # it is finished
    assert again.sizes["sequence"] == len(TEXTS)


def test_it_is_looked_at_and_its_first_text_may_be_left_out(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr", Counted([[], *TEXTS]), on_error="skip").load()
    assert got.sequence.values.tolist() == list(range(1, 1 + len(TEXTS)))


def test_continuations_that_are_gone_through_once(tmp_path: Path) -> None:
    later = [ids[:5] for ids in TEXTS[::-1]]
    got = stream(tmp_path / "x.zarr", TEXTS, continuation=_barred(later), max_tokens=120).load()
    tokens = [ids + more for ids, more in zip(TEXTS, later, strict=True)]
    assert [row[row >= 0].tolist() for row in got.token_id.values] == tokens


@pytest.mark.parametrize("kind", ONCE)
def test_in_memory_they_are_read_once(kind: Any) -> None:
    model, options = helpers.proved("llama"), {"window": 8, "progress": False}
    expected = flocking.record(model, TEXTS[:3], **options)
    helpers.assert_same(flocking.record(model, kind(TEXTS[:3]), **options), expected)
    got = flocking.mean_scores(model, kind(TEXTS[:3]), progress=False)
    assert got.flocking_score.sel(summary="texts").values.tolist() == [3, 3]


def test_a_length_that_is_wrong_is_said(tmp_path: Path) -> None:
    shorter = tqdm((ids for ids in TEXTS), total=3, file=io.StringIO())
    with pytest.raises(ValueError, match="text has more texts than the 3 that were expected"):
        stream(tmp_path / "x.zarr", shorter)


def test_what_can_be_gone_through_again(tmp_path: Path) -> None:
    """Of which lengths are counted before anything is recorded."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('"two"\n\n{"text": "three"}\n')
    files = TextFiles([str(tmp_path)])
    assert [files[number] for number in range(3)] == list(files) == ["one", "two", "three"]
    assert files[-1] == "three"
    with pytest.raises(IndexError):
        files[3]
    for values in (["a"], ("a",), np.arange(3), deque(["a"]), files):
        assert is_lasting(values)
        assert held(values) is values
    for kind in ONCE:
        assert not is_lasting(kind(TEXTS))
    assert held(dict(enumerate(TEXTS)).values()) == TEXTS
    with (tmp_path / "a.txt").open() as file:
        for refused in ({1, 2}, tmp_path, file, 3):
            assert held(refused) is refused
