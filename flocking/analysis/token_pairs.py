"""Tokens that count in a measure, and pairs of them.

The first token is left out, and so are tokens without activation. Pairs of tokens with different
ids are measured apart, since two of the same id may be similar only because they are the same word:
all pairs without those, both from ``relative``. (The recording's moments have more digits, so that
in repetitive texts little but the difference between two roundings would be left.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr
from scipy import sparse

from flocking.analysis.chunks import by_chunk
from flocking.models import warn
from flocking.recording import FIRST


def without_first(recording: xr.Dataset) -> xr.Dataset:
    """The recording without the first token's window."""
    return recording.isel(window=np.flatnonzero(recording.phase.values != FIRST))


def counting(recording: xr.Dataset) -> xr.DataArray:
    """Which tokens count, (sequence, layer, token): those in a window that are not all zero."""
    inside = recording.token_window.isin(without_first(recording).window)
    return inside & (recording.norm > 0)


def token_sum(recording: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """Sum over the tokens that lie in the recording's windows."""
    inside = recording.token_window.isin(without_first(recording).window)
    return values.where(inside, 0).sum("token", dtype=np.float64)


def token_count(recording: xr.Dataset) -> xr.DataArray:
    """Tokens that count, (sequence, layer), in memory: whose activations are not all zero."""
    return token_sum(recording, recording.norm > 0).compute()


def pairs_of_tokens(recording: xr.Dataset) -> xr.DataArray:
    """Ordered pairs of different tokens, (sequence, layer); NaN, with a warning, if none."""
    count = token_count(recording)
    pairs = count * (count - 1)
    few = (pairs <= 0).any("layer").values
    if few.any():
        warn(
            f"{few.sum()} of {few.size} sequences have fewer than two tokens after the first "
            "(tokens with all activations zero do not count): the result is NaN there.",
        )
    return pairs.where(pairs > 0)


def pairs_of_different(recording: xr.Dataset) -> xr.DataArray:
    """Ordered pairs of tokens with different ids, (sequence, layer), in memory.

    NaN, with a warning, if there are none. What has neurons is not read for it.
    """
    several = pairs_of_tokens(recording).notnull()
    dims = ("sequence", "layer")
    real = counting(recording).transpose(*dims, "token").compute()
    ids = recording.token_id.transpose("sequence", "token").values
    count = several.transpose(*dims).astype(np.float64)
    for sequence, layer in np.ndindex(count.shape):
        number = np.unique(ids[sequence][real.values[sequence, layer]], return_counts=True)[1]
        count[sequence, layer] = number.sum() ** 2 - (number**2).sum()
    if (few := (several & (count == 0)).any("layer").values).any():
        warn(
            f"{few.sum()} of {few.size} sequences have no two tokens with different ids after the "
            "first: the result is NaN there.",
        )
    return count.where(count > 0)


def different_within(recording: xr.Dataset) -> xr.DataArray:
    """Sum of cosines over pairs of tokens with different ids within each sequence."""
    dims = ("sequence", "layer")
    sums = by_chunk(
        _different_of,
        recording.relative.variable.transpose(*dims, "token", "neuron"),
        recording.token_id.variable,
        counting(recording).variable.transpose(*dims, "token"),
        recording.d_ff.variable,
        inner=[["token", "neuron"], ["token"], ["token"], []],
        outer=[],
        sizes={},
        dtype=np.float64,
    ).transpose(*dims)
    return xr.DataArray(sums, {dim: recording[dim] for dim in dims}, dims)


def _different_of(
    relative: np.ndarray, ids: np.ndarray, counted: np.ndarray, d_ff: np.ndarray
) -> np.ndarray:
    """As :func:`different_within`, (sequence, layer), of arrays that can be broadcast."""
    result = np.zeros(relative.shape[:2])
    ids = np.broadcast_to(ids, counted.shape)
    widths = np.broadcast_to(d_ff, counted.shape[:2])
    for place in np.ndindex(*relative.shape[:2]):
        real = counted[place]
        _, sums, _ = _by_id(ids[place][real], relative[place][real], int(widths[place]))
        total = sums.sum(axis=0)
        result[place] = total @ total - np.vdot(sums, sums)
    return result


def different_between(recording: xr.Dataset, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of cosines over, and number of, pairs of tokens with different ids, by pair of sequences.

    ``<sum_v S_v, sum_v S'_v> - sum_v <S_v, S'_v>``, where S_v sums r over a sequence's tokens v.
    """
    n = recording.sizes["sequence"]
    sums = np.zeros((n, n, recording.sizes["layer"]))
    counts = np.zeros_like(sums)
    for layer in range(recording.sizes["layer"]):
        members = list(_by_token_id(recording.isel(layer=layer)))
        totals = [(total.sum(axis=0), number.sum()) for _, total, number in members]
        for a, b in np.argwhere(wanted):
            _, mine, theirs = np.intersect1d(
                members[a][0], members[b][0], assume_unique=True, return_indices=True
            )
            same = np.vdot(members[a][1][mine], members[b][1][theirs])
            sums[a, b, layer] = totals[a][0] @ totals[b][0] - same
            number = members[a][2][mine] @ members[b][2][theirs]
            counts[a, b, layer] = totals[a][1] * totals[b][1] - number
    return sums, counts


def _by_token_id(
    recording: xr.Dataset,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per sequence of one layer: its token ids, and the sum of r and the number for each."""
    for sequence, real in enumerate(counting(recording).values):
        r = recording.relative[sequence].transpose("token", "neuron").values[real]
        ids = recording.token_id[sequence].values[real]
        yield _by_id(ids, r, int(recording.d_ff))


def _by_id(ids: np.ndarray, r: np.ndarray, d_ff: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different token ids, and the sum of r, (token, neuron), and the number for each."""
    ids, group = np.unique(ids, return_inverse=True)
    if np.isnan(r[:, :d_ff]).any():
        raise ValueError(
            "'relative' has no value at some tokens: select with isel and sel instead of where."
        )
    r = np.nan_to_num(r.astype(np.float64))  # beyond the width of a narrower layer
    r /= np.linalg.norm(r, axis=1, keepdims=True)  # 1 but for the rounding of 16 bits
    places = group, np.arange(len(group))
    member = sparse.csr_matrix((np.ones(len(group)), places), shape=(len(ids), len(group)))
    number = np.bincount(group, minlength=len(ids)).astype(np.float64)
    return ids, member @ r, number
