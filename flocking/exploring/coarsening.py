"""How a recording is cut to a size that a browser holds: runs of windows, runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

CELLS = 4_000_000  # of one layer's picture that a notebook is sent
_COARSEST = 2**20  # windows in a run, and tokens in a row: more than any text has
_ENOUGH = 16  # windows of a text, at least, before texts are left out
_COARSE = 16  # tokens in a row, at most, before texts are left out
_FEWEST = 4  # windows of a text, at least, beside the first token


@dataclass(frozen=True)
class Coarse:
    """What is shown of a recording.

    Attributes
    ----------
    sequences : int
        The first of them, which are shown.
    windows : int
        Neighbouring windows of a phase that are added up.
    tokens : int or None
        Neighbouring tokens of a window that make one row; None for no rows of tokens.
    rounded : bool
        Rows have a byte for each value in place of two.
    """

    sequences: int
    windows: int = 1
    tokens: int | None = 1
    rounded: bool = False


@dataclass(frozen=True)
class Runs:
    """A text's windows as they are shown, and the rows of tokens in them.

    Attributes
    ----------
    windows : list of ndarray of int
        Numbers of the recording's windows that are added up, without those that have no token.
    rows : list of ndarray of int
        Numbers of the tokens that each row is the mean of.
    row_windows : list of int
        The run of windows that each row lies in.
    tokens : list of ndarray of int
        Numbers of the tokens in each run of windows.
    """

    windows: list[np.ndarray]
    rows: list[np.ndarray]
    row_windows: list[int]
    tokens: list[np.ndarray]


def runs_of(recording: xr.Dataset, sequence: int, coarse: Coarse) -> Runs:
    """The runs of one text.

    Parameters
    ----------
    recording : xarray.Dataset
        In its canonical form.
    sequence : int
        Its number.
    coarse : Coarse
    """
    labels, phases = recording.window.values, recording.phase.values
    inside = recording.token_window.values[sequence]
    windows, tokens, rows, row_windows = [], [], [], []
    for phase in dict.fromkeys(phases.tolist()):
        there = np.flatnonzero(phases == phase)
        there = there[recording.tokens.values[sequence, there] > 0]
        for first in range(0, len(there), coarse.windows):
            run = there[first : first + coarse.windows]
            members = np.flatnonzero(np.isin(inside, labels[run]))
            windows.append(run)
            tokens.append(members)
            step = coarse.tokens or max(1, len(members))
            for start in range(0, len(members), step):
                rows.append(members[start : start + step])
                row_windows.append(len(windows) - 1)
    return Runs(windows, rows, row_windows, tokens)


def _counts(recording: xr.Dataset, step: int) -> tuple[int, int]:
    """Runs of windows and of tokens of the longest text, at most: windows alone, rows in them."""
    phases = recording.phase.values
    windows = sum(-(-int((phases == phase).sum()) // step) for phase in {*phases.tolist()})
    return windows, int(recording.tokens.sum("window").values.max(initial=0))


def for_a_notebook(recording: xr.Dataset) -> Coarse:
    """Everything, but of one layer no more than `CELLS` cells."""
    neurons = max(1, recording.sizes["neuron"])
    step = 1
    while step < _COARSEST and _counts(recording, step)[0] * neurons > CELLS:
        step *= 2
    windows, tokens = _counts(recording, step)
    rows = 1
    while rows < tokens and (tokens / rows + windows) * neurons > CELLS:
        rows *= 2
    return Coarse(recording.sizes["sequence"], step, rows if rows < tokens or rows == 1 else None)


def for_a_page(recording: xr.Dataset, layers: int, room: int) -> Coarse | None:
    """The finest that is not larger than `room` bytes; None if nothing is small enough.

    Windows are added up first, down to `_ENOUGH`, then texts are left out, then windows are added
    up again. Rows of tokens take what room is left; coarse ones only where there is no other way.

    Parameters
    ----------
    recording : xarray.Dataset
        In its canonical form.
    layers : int
        Those that have ``relative``.
    room : int
        Bytes.
    """
    found = None
    for sequences, step in _choices(recording):
        windows, tokens = _counts(recording, step)
        neurons = sequences * recording.sizes["neuron"]
        more = recording.sizes["sequence"] > 1  # what tells texts apart
        left = room - 4 * neurons * recording.sizes["layer"] * (windows + more)
        if left < 0:
            continue
        rows, size = _rows(windows, tokens, left / (neurons * layers) if layers else 0)
        coarse = Coarse(sequences, step, rows, size == 1)
        found = found or coarse
        if not layers or (rows and rows <= _COARSE):
            return coarse
    return found


def _rows(windows: int, tokens: int, room: float) -> tuple[int | None, int]:
    """Tokens in a row and bytes of a value, so that rows take `room` bytes a neuron or less."""
    if 2 * tokens <= room:
        return 1, 2
    rows = 1
    while tokens / rows + windows * (rows > 1) > room:
        rows *= 2
        if rows * windows >= tokens:
            return None, 2
    return rows, 1


def _choices(recording: xr.Dataset) -> Iterator[tuple[int, int]]:
    """Numbers of texts and of windows that are added up, from the finest on."""
    finest = for_a_notebook(recording)
    step, sequences = finest.windows, finest.sequences
    yield sequences, step
    while _counts(recording, step + 1)[0] >= _ENOUGH:
        step += 1
        yield sequences, step
    while sequences > 1:
        sequences -= 1
        yield sequences, step
    while _counts(recording, step + 1)[0] > _FEWEST:
        step += 1
        yield sequences, step
