"""Recordings that are written block by block, for their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.recording import forward_passes, growing, planning

TEXTS = helpers.random_ids(*np.random.default_rng(0).integers(3, 60, 21).tolist(), seed=2)
SMALL = {"window": 8, "batch_size": 2, "progress": False}  # blocks of 8 texts
BLOCK = 8
ASIDE = ("prompt_tokens", "continuation")  # one for each text


def stream(path: Path, text: Any = TEXTS, name: str = "llama", **changes: Any) -> xr.Dataset:
    """Record it in the smallest blocks, also where the number of texts is not known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MOST", planning.FEWEST)
        return flocking.record(helpers.proved(name), text, out=path, **SMALL | changes)


def by_block(name: str, texts: list[Any], **changes: Any) -> xr.Dataset:
    """The same, recorded in memory block by block and put together."""
    model, parts = helpers.proved(name), []
    for start in range(0, len(texts), BLOCK):
        here = slice(start, start + BLOCK)
        one = {
            key: value[here] if isinstance(value, list) and key in ASIDE else value
            for key, value in changes.items()
        }
        parts.append(flocking.record(model, texts[here], **SMALL | one))
    return flocking.concat(parts) if len(parts) > 1 else parts[0]


def assert_same_values(got: xr.Dataset, expected: xr.Dataset) -> None:
    """Bit for bit, in every variable and coordinate but the numbers of the sequences."""
    expected = expected.assign_coords(sequence=got.sequence)
    assert dict(got.sizes) == dict(expected.sizes)
    for name in expected.variables:
        assert got[name].dtype.kind == expected[name].dtype.kind, name
        np.testing.assert_array_equal(got[name].values, expected[name].values, err_msg=str(name))
    assert got.variables.keys() == expected.variables.keys()


class Ended(BaseException):
    """What no code of the package's catches."""


def ending_after(monkeypatch: pytest.MonkeyPatch, arrays: int) -> None:
    """End the run when so many arrays of blocks were written."""
    put, count = growing.GrowingStore._put, iter(range(arrays))

    def putting(self: Any, *args: Any) -> None:
        if next(count, None) is None:
            raise Ended
        put(self, *args)

    monkeypatch.setattr(growing.GrowingStore, "_put", putting)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the texts in each block that is recorded from now on."""
    found: list[int] = []
    inner = forward_passes._read

    def reading(model: Any, collector: Any, fed: Any, *args: Any) -> None:
        found.append(len(fed.ids))
        inner(model, collector, fed, *args)

    monkeypatch.setattr(forward_passes, "_read", reading)
    return found
