"""What a reader sees of a store that grows by blocks (:mod:`flocking.recording.growing`)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from flocking.recording.growing import (
    BOOKKEEPING,
    DONE,
    LEFT_OUT,
    PROBLEM,
    RECORDED,
    GrowingStore,
)
from flocking.recording.locations import Location


def is_growing(place: Location) -> bool:
    """Whether what is at a place is a store that grows, or has grown, by blocks."""
    try:
        return RECORDED in place.opened("r")
    except (OSError, ValueError):  # zarr's, of what is no group
        return False


def refuse_appended(place: Location) -> None:
    """Raise a ValueError for a finished store that something else has appended sequences to."""
    if not is_growing(place):
        return
    group = place.opened("r")
    kept = group[RECORDED]
    lengths = [
        array.shape[0]
        for _, array in group.arrays()
        if list(array.attrs.get("_ARRAY_DIMENSIONS", ()))[:1] == ["sequence"]
    ]
    more = max(lengths) - kept.shape[0]
    if more and kept.attrs["finished"]:  # (one that is not may have been cut off as it grew)
        raise ValueError(
            f"{place} holds more sequences (by {more}) than record(out=...) wrote: they were "
            "appended, which only the stores of save_recording take. All are in "
            f"xarray.open_zarr(path, drop_variables={list(BOOKKEEPING)}): save that elsewhere with "
            "flocking.save_recording."
        )


def done_so_far(place: Location) -> str:
    """How many texts are recorded in a store, in words; empty where there is none."""
    if not is_growing(place):
        return ""
    store = GrowingStore(place)
    done = int((store.state(slice(0, store.sequences)) > 0).sum())
    return _done(done, store.asked["texts"])


def _done(texts: int, of: int | None) -> str:
    whole = f" of {of:,}" if of else ""
    return f"{texts:,}{whole} texts are recorded so far"


def without_bookkeeping(recording: xr.Dataset) -> tuple[xr.Dataset, str]:
    """The texts that are recorded, as a recording, and what is missing, in words.

    Parameters
    ----------
    recording : xarray.Dataset
        As it stands in the store.
    """
    asked = recording[RECORDED].attrs
    state = recording[RECORDED].values
    there = np.flatnonzero(state == DONE)
    left_out = np.flatnonzero(state == LEFT_OUT)
    skipped = [
        f"{number}: {why}"
        for number, why in zip(
            left_out.tolist(), recording[PROBLEM].values[left_out].tolist(), strict=True
        )
    ]
    recording = recording.drop_vars(BOOKKEEPING)
    if len(there) < len(state):
        recording = recording.isel(sequence=there)
    if skipped:
        recording = recording.assign_attrs(skipped=skipped)
    missing = ""
    if not asked["finished"]:
        missing = _done(len(there) + len(left_out), asked["texts"])
    return recording, missing
