"""Pairs of sequences: which ones, and what is measured of them, some sequences at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import numpy as np
import xarray as xr

from flocking.models import warn
from flocking.recording import whole_number

Pairs = int | Literal["all"]
ROOM = 2**25  # bytes of what is held of sequences that are compared with each other
MOST = 256  # of these sequences, since the matrix of all their pairs is made

_Data = TypeVar("_Data", xr.DataArray, xr.Dataset)


def chosen(sequences: int, pairs: Pairs, seed: int) -> np.ndarray:
    """Numbers of both members of each pair, (pair, 2), the lower first and in ascending order.

    Raises
    ------
    TypeError
        If `pairs` is neither a number nor "all".
    ValueError
        If there are fewer pairs, or a number is no whole one.
    """
    total = sequences * (sequences - 1) // 2
    if isinstance(pairs, str):
        if pairs != "all":
            raise ValueError(f"pairs={pairs!r}: give a number of pairs, or 'all'.")
        numbers = np.arange(total)
    else:
        if isinstance(pairs, bool) or not isinstance(pairs, int | float | np.number):
            raise TypeError(f"pairs={pairs!r}: give a number of pairs, or 'all'.")
        whole_number("pairs", pairs, 1)
        whole_number("seed", seed, 0)
        if pairs > total:
            raise ValueError(
                f"pairs={pairs}: {sequences} sequences have {total} pairs of two different ones: "
                f"give {total} or fewer, or 'all'."
            )
        numbers = np.random.default_rng(seed).choice(total, int(pairs), replace=False)
        numbers.sort()
    # Those of sequence i with later ones begin at i * n - i * (i + 1) / 2.
    first = np.arange(sequences)
    begins = first * sequences - first * (first + 1) // 2
    mine = np.searchsorted(begins[:-1], numbers, side="right") - 1
    return np.stack([mine, numbers - begins[mine] + mine + 1], axis=1)


def at_a_time(each: int) -> int:
    """How many sequences are compared with each other at a time, if each takes so many bytes."""
    return max(2, min(MOST, ROOM // max(1, each)))


def groups(couples: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of pairs, and the sequences in them: some pairs at a time, of few sequences.

    Parameters
    ----------
    couples : ndarray of int, (pair, 2)
    most : int
        Sequences at a time, 2 or more.
    """
    side = max(1, most // 2)
    low, high = np.sort(couples, axis=1).T  # both orders of a pair are in one group
    order = np.lexsort((high, low, high // side, low // side))
    begin, members = 0, set[int]()
    for place, number in enumerate(order):
        more = members | {*couples[number].tolist()}
        if len(more) > most:
            yield order[begin:place], np.array(sorted(members))
            begin, more = place, {*couples[number].tolist()}
        members = more
    if begin < len(order):
        yield order[begin:], np.array(sorted(members))


def of_pairs(
    recording: xr.Dataset,
    couples: np.ndarray,
    matrix: Callable[[xr.Dataset], _Data],
    each: int,
) -> _Data:
    """What `matrix` gives of some sequences, (sequence, other, ...), for these pairs alone.

    Parameters
    ----------
    recording : xarray.Dataset
        Canonical.
    couples : ndarray of int, (pair, 2)
    matrix : callable
        From a recording of some sequences to values of all their pairs.
    each : int
        Bytes that it holds of each sequence.

    Returns
    -------
    xarray.DataArray or xarray.Dataset, (pair, ...)
        With coordinates ``sequence`` and ``other`` along ``pair``.
    """
    labels: np.ndarray = recording.sequence.values  # also if they have none
    if len({*labels.tolist()}) < len(labels):
        warn("Names of sequences repeat: they are numbered in the pairs.")
        labels = np.arange(len(labels))
    recording = recording.assign_coords(sequence=labels)
    parts: list[_Data] = []
    places: list[np.ndarray] = []
    for numbers, rows in groups(couples, at_a_time(each)):
        mine, theirs = (
            xr.DataArray(np.searchsorted(rows, couples[numbers, side]), dims="pair")
            for side in (0, 1)
        )
        parts.append(matrix(recording.isel(sequence=rows)).isel(sequence=mine, other=theirs))
        places.append(numbers)
    joined = xr.concat(parts, "pair", coords="minimal", compat="override", join="override")
    return joined.isel(pair=np.argsort(np.concatenate(places)))


def of_all_pairs(
    recording: xr.Dataset, matrix: Callable[[xr.Dataset], xr.DataArray], each: int
) -> xr.DataArray:
    """What `matrix` gives of all sequences, (sequence, other, ...), from some at a time.

    As :func:`of_pairs`, but for the result.
    """
    recording = recording.assign_coords(sequence=recording.sequence.values)
    n = recording.sizes["sequence"]
    side = at_a_time(each) // 2
    begins = range(0, n, side)
    tiles = [*itertools.combinations(begins, 2)] or [(0, n)]
    result = None
    for begin, other in tiles:
        rows = np.r_[begin : min(begin + side, n), other : min(other + side, n)]
        part = matrix(recording.isel(sequence=rows))
        if result is None:
            result = np.full((n, n, *part.shape[2:]), np.nan)
        result[np.ix_(rows, rows)] = part.values
    labels = {
        name: recording[name].variable if "sequence" in c.dims else c.variable
        for name, c in part.coords.items()
        if name != "other"
    }
    others = recording.sequence.values
    return xr.DataArray(result, {**labels, "other": others}, part.dims, part.name, part.attrs)
