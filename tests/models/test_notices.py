"""Warnings are shown at the user's line."""

from __future__ import annotations

import warnings
from pathlib import Path

import xarray as xr
from helpers import build, random_ids

import flocking


def test_warnings_are_at_the_users_line() -> None:
    model = build("llama").train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recording = flocking.record(model, random_ids(2, 9), window=4, progress=False)
        flocking.flocking_score(recording)
        flocking.consistency(recording)
        flocking.specificity(recording.isel(sequence=[0, 0]))
        flocking.statistic(recording, start=5)
        flocking.drift(recording.isel(sequence=[1]), prompt_lengths=[5])
    assert len(caught) >= 4
    assert {Path(one.filename).name for one in caught} == {Path(__file__).name}
    assert isinstance(recording, xr.Dataset)
