"""Blocks of texts, and memory: how large they are, and what is done about texts that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import psutil
import pytest
import torch
from streams import SMALL, TEXTS, assert_same_values, by_block, counted, stream

import flocking
from flocking.recording import forward_passes, planning
from flocking.recording.arguments import Options
from flocking.recording.continuations import Wanted

LONG = helpers.random_ids(120, seed=5)[0]


def _free(monkeypatch: pytest.MonkeyPatch, size: float) -> Any:
    """Let so many bytes be what a recording may take."""
    available = int(size / forward_passes._SHARE_OF_MEMORY) + 1
    free = type("Memory", (), {"total": 2**40, "available": available})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    return free


def _needed(lengths: list[int], batch_size: int = 2, window: int = 8) -> int:
    options = Options(Wanted(None, None, 0), window=window, batch_size=batch_size)
    model = helpers.proved("llama")
    return forward_passes.needed_bytes(
        *forward_passes.chosen_blocks(model, options), options, lengths, lengths
    )


@pytest.mark.parametrize("kind", [list, iter])
def test_a_block_has_one_batch_or_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """However large the texts may be: a batch is not made smaller without a word."""
    monkeypatch.setattr(planning, "_BLOCK", 1000)  # less than one text
    passes = counted(monkeypatch)
    texts = TEXTS[:7]
    options = {**SMALL, "batch_size": 3}
    got = flocking.record(helpers.proved("llama"), kind(texts), out=tmp_path / "x.zarr", **options)
    assert passes == [3, 3, 1]
    helpers.assert_same(got.load(), flocking.record(helpers.proved("llama"), texts, **options))


def test_sums_of_a_batch_count_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as the recording itself, where all texts are read at once."""
    lengths = [40] * 8
    both, arrays = _needed(lengths, batch_size=8), _needed(lengths, batch_size=1)
    _free(monkeypatch, (both + arrays) / 2)
    texts, model = helpers.random_ids(*lengths), helpers.proved("llama")
    options = {"window": 8, "progress": False}
    with pytest.raises(MemoryError, match=r"^The recording would take .*: batch_size=[124] would"):
        flocking.record(model, texts, batch_size=8, **options)
    flocking.record(model, texts, batch_size=1, **options)


def test_a_text_that_memory_has_no_room_for_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is recorded, where lengths can be counted."""
    _free(monkeypatch, _needed([110, 110]))
    passes = counted(monkeypatch)
    texts = [*TEXTS[:10], LONG, *TEXTS[10:]]
    said = r"The recording of text.* would take .* would fit"
    with pytest.raises(MemoryError, match=said):
        stream(tmp_path / "x.zarr", texts, batch_size=1)
    assert not passes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [list, iter])
def test_texts_that_memory_has_no_room_for_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    places = (3, 21)  # the second one is alone in its block
    texts = [*TEXTS[:3], LONG, *TEXTS[3:]]
    texts = [*texts[:21], LONG, *texts[21:]]
    options = {"batch_size": 1, "window": 1}
    _free(monkeypatch, _needed([115], 1, 1))
    monkeypatch.setattr(planning, "_BLOCK", 1000)
    got = stream(tmp_path / "x.zarr", kind(texts), on_error="skip", **options).load()
    assert got.sequence.values.tolist() == [n for n in range(len(texts)) if n not in places]
    for line, place in zip(got.attrs["skipped"], places, strict=True):
        assert line.startswith(f"{place}: text {place}: The recording of text {place} would take")
    monkeypatch.undo()
    expected = flocking.record(helpers.proved("llama"), TEXTS, **SMALL | options)
    helpers.assert_same(got.assign_coords(sequence=range(len(TEXTS))), expected)


def test_the_largest_of_a_block_is_left_out_until_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = helpers.random_ids(10, 30, 60, 50)
    monkeypatch.setattr(planning, "_BLOCK", 1000)
    _free(monkeypatch, _needed([10, 30, 50], 4))
    with pytest.raises(MemoryError, match=r"recording of texts 0 to 3 .*: batch_size=2 would fit"):
        stream(tmp_path / "x.zarr", texts, batch_size=4)
    got = stream(tmp_path / "x.zarr", texts, batch_size=4, on_error="skip")
    assert got.sequence.values.tolist() == [0, 1, 3]
    assert "text 2: the largest of its block: The recording of texts 0 to" in got.skipped[0]


def test_a_fault_of_all_texts_is_an_error(tmp_path: Path) -> None:
    """Also where it shows only as they are recorded; the same call tries again."""
    model, path = helpers.build("llama"), tmp_path / "x.zarr"
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    texts = [[7, *ids] for ids in TEXTS[:9]]
    said = "^no text can be recorded: layer 0 .*not finite.*of text 0"
    for kind in (list, iter):
        for _ in range(2):
            with pytest.raises(ValueError, match=said):
                flocking.record(model, kind(texts), out=path, on_error="skip", **SMALL)
            with pytest.warns(UserWarning, match="is not finished: 0 "):
                assert flocking.open_recording(path).sizes["sequence"] == 0


def test_after_a_fault_of_all_texts_they_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = _free(monkeypatch, 1000)
    with pytest.raises(ValueError, match=r"^no text can be recorded: text 0.* would take"):
        stream(tmp_path / "x.zarr", on_error="skip")
    free.available = 2**40
    assert_same_values(stream(tmp_path / "x.zarr").load(), by_block("llama", TEXTS))
