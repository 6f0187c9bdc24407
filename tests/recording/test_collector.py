"""Sums of a batch: how many there are, and for how long."""

from __future__ import annotations

import weakref
from typing import Any

import helpers
import pytest

import flocking
from flocking.recording import collector
from flocking.recording.moments import Moments


def test_a_batch_has_the_windows_of_its_own_texts_and_goes_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not those of the longest of all texts; and no two batches are held at the same time."""
    windows, alive = [], []
    held: list[Any] = []

    class Watched(Moments):
        @classmethod
        def zeros(cls, sequences: int, windows_: int, *args: Any, **kwargs: Any) -> Moments:
            made = Moments.zeros(sequences, windows_, *args, **kwargs)
            windows.append(windows_)
            alive.append(sum(one() is not None for one in held))
            held.append(weakref.ref(made))
            return made

    monkeypatch.setattr(collector, "Moments", Watched)
    texts = helpers.random_ids(5, 60, 7, 58)
    options = {"window": 4, "batch_size": 2, "progress": False, "prompt_tokens": [3, 30, 5, 50]}
    got = flocking.record(helpers.proved("llama"), texts, **options)
    # Of the first token, prompts and generations: 1 + 13 + 8, and 1 + 1 + 1.
    assert sorted(windows) == [3, 3, 22, 22]
    assert max(alive) == 1  # the other layer's of the same batch
    monkeypatch.undo()
    for row, text in enumerate(texts):
        alone = flocking.record(
            helpers.proved("llama"),
            [text],
            window=4,
            prompt_tokens=options["prompt_tokens"][row],  # type: ignore[index]
            progress=False,
        )
        own = got.isel(sequence=[row])
        own = own.isel(window=own.tokens.values[0] > 0, token=slice(len(text)))
        for name in ("energy", "mass", "norm", "l1", "tokens"):
            assert own[name].shape == alone[name].shape
            assert abs(own[name].values - alone[name].values).max() < 1e-5
