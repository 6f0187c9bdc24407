"""Ranges of tokens in a recording: which windows they are, where each begins and ends."""

from __future__ import annotations

import numpy as np
import xarray as xr

from flocking.recording import GENERATION, PROMPT, require


def windows_of(
    recording: xr.Dataset, phase: str | None
) -> tuple[np.ndarray, list[float], list[float]]:
    """Numbers of the phase's windows, and the tokens at which each begins and ends."""
    if phase not in (None, PROMPT, GENERATION):
        raise ValueError(f"phase={phase!r}: give {PROMPT!r}, {GENERATION!r} or nothing.")
    phases = recording.phase.values
    if phase is None:
        windows = np.arange(len(phases))
    else:
        windows = np.flatnonzero((phases == GENERATION) == (phase == GENERATION))
    if not len(windows):
        require(recording, phase=phase or PROMPT)
    starts = recording.start.values[windows].tolist()
    counts = recording.tokens.values[:, windows].max(axis=0, initial=0).tolist()
    stops = [start + int(count) for start, count in zip(starts, counts, strict=True)]
    for number in np.flatnonzero(_followed(recording, windows)):
        stops[number] = starts[number + 1]  # also where no sequence fills it
    if phase is None and GENERATION in phases and len({*phases}) > 1:
        # A generation is counted from its first token.
        starts, stops = [np.nan] * len(starts), [np.nan] * (len(stops) - 1) + stops[-1:]
    return windows, starts, stops


def _followed(recording: xr.Dataset, windows: np.ndarray) -> np.ndarray:
    """For all of these windows but the last: whether the next one follows without a gap."""
    return np.diff(recording.window.values[windows]) == 1


def refuse_gaps(recording: xr.Dataset, windows: np.ndarray) -> None:
    """Refuse a range of tokens in which windows are missing."""
    labels = recording.window.values[windows]
    gaps = np.flatnonzero(~_followed(recording, windows))
    if len(gaps):
        before, after = labels[gaps[0]], labels[gaps[0] + 1]
        raise ValueError(
            f"windows between {before:.0f} and {after:.0f} are missing from the recording: give it "
            "whole where a range of tokens is asked for, or leave start, stop and by='length' out."
        )


def edge_at(name: str, value: float, edges: list[float]) -> int:
    """Number of the edge at a token; an error says where the nearest edges are."""
    if not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}={value!r}: give a number of tokens.")
    if np.isnan(edges[0]):
        raise ValueError(f"{name}={value} in a recording with a generation: give a phase, too.")
    if value not in edges:
        near = sorted(edges, key=lambda edge: abs(edge - value))[:2]
        raise ValueError(
            f"{name}={value} is not an edge of a window: the nearest are at "
            f"{' and '.join(map(str, sorted(near)))}; or record with a smaller window."
        )
    return edges.index(value)
