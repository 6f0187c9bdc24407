"""How far a mean over a few texts can be trusted: the bootstrap over sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, overload

import numpy as np
import xarray as xr
from scipy import stats

from flocking.analysis.chunks import is_chunked
from flocking.models import warn
from flocking.recording import whole_number

_DRAWN = ("sequence", "pair")
ROOM = 2**22  # numbers that are held at a time, of values that are many


@overload
def bootstrap(
    values: xr.DataArray, *, level: float = ..., resamples: int = ..., seed: int = ...
) -> xr.DataArray: ...


@overload
def bootstrap(
    values: xr.Dataset, *, level: float = ..., resamples: int = ..., seed: int = ...
) -> xr.Dataset: ...


def bootstrap(
    values: xr.DataArray | xr.Dataset,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.DataArray | xr.Dataset:
    """Mean over sequences, or over pairs of them, with an expanded percentile bootstrap interval.

    Sequences are drawn with replacement (Efron and Tibshirani 1993, chapters 6 and 13). For values
    of pairs, both members are drawn, and pairs of a sequence with itself are dropped: a sequence is
    too similar to itself, and the interval would miss the estimate. The percentiles are those of
    ``flocking.analysis.tails``, since plain ones are too narrow for few sequences. Where
    these are beyond what draws can give (at level 0.95: of five sequences or fewer, or of pairs of
    six), the interval is Student's, from the standard deviation of the draws, and can reach values
    that no sequence could have. Of normal values, intervals hold the true mean in 92 to 95% of
    cases, of pairs in 91 to 94%.

    Values in chunks are read when this is called, some sequences at a time if they are many.

    Parameters
    ----------
    values : xarray.DataArray or xarray.Dataset
        Measures of a recording, with a dimension ``sequence``; values of all pairs have ``other``,
        too, with the same labels in any order. Values of some pairs have ``pair`` instead, with
        coordinates ``sequence`` and ``other``; the sequences in them are drawn. NaN and infinite
        values count as missing. Variables of a Dataset without ``sequence`` or ``pair`` are left
        out.
    level : float
        Coverage of the interval.
    resamples : int
    seed : int

    Returns
    -------
    xarray.DataArray or xarray.Dataset, float64
        As `values`, with ``interval`` ("estimate", "low", "high") instead of ``sequence`` (and
        ``other``) or ``pair``. The interval is NaN where fewer than two sequences have a value, or
        the pairs that have one are of fewer than three: drawing could only give the same again.

    Raises
    ------
    TypeError
        If `values` is neither a DataArray nor a Dataset of measures.
    ValueError
        If `values` has no dimension ``sequence`` or ``pair`` or nothing along it, ``other`` has
        other labels, `level` is not between 0 and 1, or `resamples` is below 1.

    Warns
    -----
    UserWarning
        If there are so few sequences of all values.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:4], progress=False)
    >>> score = flocking.bootstrap(flocking.flocking_score(recording))
    >>> score.dims, score.interval.values.tolist()
    (('interval', 'layer'), ['estimate', 'low', 'high'])
    """
    if isinstance(level, bool) or not isinstance(level, int | float | np.number):
        raise TypeError(f"level={level!r}: give a number, the interval's coverage.")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: give the interval's coverage, between 0 and 1.")
    whole_number("resamples", resamples, 1)
    whole_number("seed", seed, 0)
    if isinstance(values, xr.Dataset):
        if "energy" in values and "phase" in values.coords:
            raise TypeError(
                "values is a recording: give a measure of it, such as "
                "flocking.flocking_score(recording)."
            )
        parts = {name: part for name, part in values.items() if {*_DRAWN} & {*part.dims}}
        if not parts:
            raise ValueError(
                f"no variable has the dimension 'sequence' to draw from: {_before(values)}"
            )
        means = {
            name: intervals(part, level=level, resamples=resamples, seed=seed)
            for name, part in parts.items()
        }
        _warn_of_few(values, *means.values())
        return xr.Dataset(means, attrs=values.attrs)
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"values is a {type(values).__name__}: give a DataArray or a Dataset.")
    if not {*_DRAWN} & {*values.dims}:
        raise ValueError(
            f"values has dimensions {values.dims}, so that there is no 'sequence' to draw from: "
            f"{_before(values)}"
        )
    result = intervals(values, level=level, resamples=resamples, seed=seed)
    _warn_of_few(values, result)
    return result


def _before(values: xr.DataArray | xr.Dataset) -> str:
    """What to do where there are not several sequences."""
    done = "one is selected" if "sequence" in values.coords else "they are averaged"
    return f"give the values of several, before {done}."


def _warn_of_few(values: xr.DataArray | xr.Dataset, *results: xr.DataArray) -> None:
    if values.sizes.get("sequence") == 1:
        warn("There is one sequence only, so its interval is NaN: record several texts.")
    elif any(
        bool(result.sel(interval="estimate").notnull().any())
        and bool(result.sel(interval="low").isnull().all())
        for result in results
    ):
        warn(
            "The values are of one sequence only, or of pairs of two, so that their interval is "
            "NaN: record more texts."
        )


def intervals(
    values: xr.DataArray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> xr.DataArray:
    """What :func:`bootstrap` gives for one variable, without a warning if there are too few."""
    if values.dtype.kind not in "biuf":
        raise TypeError(f"values of dtype {values.dtype} have no mean: give numbers.")
    if "other" in values.dims:
        values = _in_order(values)
    drawn = [dim for dim in ("sequence", "other", "pair") if dim in values.dims]
    if "sequence" in drawn:  # a dimension "pair" beside it is of something else
        drawn = [dim for dim in drawn if dim != "pair"]
    if not values.sizes[drawn[0]]:
        raise ValueError(f"values have no {drawn[0]} to draw from: give those of several.")
    rest = [dim for dim in values.dims if dim not in drawn]
    stacked = values.transpose(*drawn, *rest)
    if "pair" in drawn and "sequence" not in values.dims:
        members, n = _members(values)
        data = stacked.values.astype(np.float64).reshape(len(members), -1)
        means = _means_of_pairs(data, members, n, resamples, seed)
        found = _interval(means, _count_of_pairs(data, members, n), n, level, pairs=True)
    elif is_chunked(stacked) and drawn == ["sequence"] and stacked.size > ROOM:
        n = stacked.sizes["sequence"]
        draws = np.concatenate([*_draws(n, resamples, seed, np.min_scalar_type(n))])
        parts = [_interval(*each, n, level) for each in _means_of_many(stacked, draws)]
        found = np.concatenate(parts, axis=1)
    else:
        data = stacked.values.astype(np.float64).reshape([stacked.sizes[d] for d in drawn] + [-1])
        means, pairs = _resampled_means(data, resamples, seed), len(drawn) == 2
        counts = _count_of_members(data) if pairs else np.isfinite(data).sum(axis=0)
        found = _interval(means, counts, len(data), level, pairs=pairs)
    shape = [3, *(stacked.sizes[dim] for dim in rest)]
    kept = {name: c for name, c in values.coords.items() if not set(c.dims) & set(drawn)}
    return xr.DataArray(
        found.reshape(shape),
        {"interval": ["estimate", "low", "high"], **kept},
        ("interval", *rest),
        values.name,
        {**values.attrs, "level": level},
    )


def _interval(
    means: np.ndarray, counts: np.ndarray, total: int, level: float, *, pairs: bool = False
) -> np.ndarray:
    """Estimate and bounds, (3, value), from means of resamples, the estimate first.

    Parameters
    ----------
    means : ndarray of float64, (1 + resample, value)
    counts : ndarray of int, (value,)
        Sequences of which there is a value; bounds are NaN where they are fewer than two, or three
        for values of pairs.
    total : int
        Sequences that are drawn from.
    """
    found = np.full((2, means.shape[1]), np.nan)
    for n in np.unique(counts[counts >= 2 + pairs]):
        here = counts == n
        missing = total - int(n)
        found[:, here] = bounds(
            means[0, here], means[1:, here], int(n), level, missing=missing, pairs=pairs
        )
    return np.concatenate([means[:1], found])


def _count_of_members(data: np.ndarray) -> np.ndarray:
    """How many sequences the known pairs are of, (value,), from (sequence, other, value)."""
    known = np.isfinite(data)
    known[np.arange(len(data)), np.arange(len(data))] = False
    return (known.any(axis=0) | known.any(axis=1)).sum(axis=0)


def _count_of_pairs(data: np.ndarray, members: np.ndarray, n: int) -> np.ndarray:
    """As :func:`_count_of_members`, from (pair, value)."""
    known = np.isfinite(data)
    present = np.zeros((n, data.shape[1]), bool)
    for each in members.T:
        np.logical_or.at(present, each, known)
    return present.sum(axis=0)


def _members(values: xr.DataArray) -> tuple[np.ndarray, int]:
    """Numbers of both sequences of each pair, (pair, 2), and how many sequences there are."""
    if not all(name in values.coords for name in ("sequence", "other")):
        raise ValueError(
            "values have a dimension 'pair' without coordinates 'sequence' and 'other', which say "
            "which sequences each is of: give what a measure returns."
        )
    labels = np.stack([values[name].values for name in ("sequence", "other")], axis=1)
    names, numbers = np.unique(labels, return_inverse=True)
    return numbers.reshape(labels.shape), len(names)


def _in_order(values: xr.DataArray) -> xr.DataArray:
    """Values of pairs whose sequences and others are the same ones in the same order."""
    if values.sizes["other"] != values.sizes["sequence"]:
        raise ValueError("sequence and other differ in length: give all pairs.")
    if not {"sequence", "other"} <= {*values.indexes}:
        return values
    mine, theirs = values.indexes["sequence"], values.indexes["other"]
    if mine.equals(theirs):
        return values
    if not (mine.is_unique and theirs.is_unique and {*mine} == {*theirs}):
        raise ValueError("sequence and other have different labels: give all pairs.")
    return values.isel(other=theirs.get_indexer(mine))


def _resampled_means(data: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over (sequence[, other]) of each resample, (1 + resample, value); first the estimate's.

    NaN is left out, and so are pairs of a sequence with itself.
    """
    n, pairs = len(data), data.ndim == 3
    if pairs:
        data = data.copy()
        data[np.arange(n), np.arange(n)] = np.nan
    means = []
    for draws in _draws(n, resamples, seed):

        def total(x: np.ndarray, draws: np.ndarray = draws) -> np.ndarray:
            if not pairs:
                return draws @ x
            columns = [((draws @ x[..., c]) * draws).sum(1) for c in range(x.shape[-1])]
            return np.stack(columns, axis=1)

        count = total(np.isfinite(data).astype(np.float64))
        means.append(_quotient(total(np.where(np.isfinite(data), data, 0)), count))
    return np.concatenate(means)


def _draws(n: int, resamples: int, seed: int, dtype: Any = np.float64) -> Iterator[np.ndarray]:
    """How often each sequence is drawn, (resample, sequence), some resamples at a time.

    The first row draws each once: the estimate.
    """
    random = np.random.default_rng(seed)
    share = np.full(n, 1 / n)
    at_a_time = max(1, ROOM // n)
    first = [np.ones((1, n), dtype)]
    for begin in range(0, resamples, at_a_time):
        size = min(at_a_time, resamples - begin)
        drawn = random.multinomial(n, share, size=size).astype(dtype)
        yield np.concatenate([*first, drawn])
        first = []


def _quotient(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(sums, count, out=np.full(count.shape, np.nan), where=count > 0)


def _means_of_pairs(
    data: np.ndarray, members: np.ndarray, n: int, resamples: int, seed: int
) -> np.ndarray:
    """As :func:`_resampled_means`, of values (pair, value): a pair counts as often as both."""
    known = np.isfinite(data)
    present, data = known.astype(np.float64), np.where(known, data, 0)
    means = []
    for draws in _draws(n, resamples, seed):
        for rows in np.array_split(draws, max(1, len(draws) * len(members) // ROOM)):
            weights = rows[:, members[:, 0]] * rows[:, members[:, 1]]
            means.append(_quotient(weights @ data, weights @ present))
    return np.concatenate(means)


def _means_of_many(
    values: xr.DataArray, draws: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As :func:`_resampled_means` of values in chunks, (sequence, ...), some of them at a time.

    With each, of how many sequences there is a value.
    """
    *outer, inner = values.dims[1:]
    width = max(1, ROOM // len(draws))
    rows = max(1, ROOM // width)
    for place in np.ndindex(*(values.sizes[dim] for dim in outer)):
        part = values.isel(dict(zip(outer, place, strict=True)))
        for left in range(0, part.sizes[inner], width):
            columns = part.isel({inner: slice(left, left + width)})
            sums = np.zeros((len(draws), columns.sizes[inner]))
            count = np.zeros_like(sums)
            for begin in range(0, part.sizes["sequence"], rows):
                here = slice(begin, begin + rows)
                data = columns.isel(sequence=here).values.astype(np.float64)
                known = np.isfinite(data)
                each = draws[:, here].astype(np.float64)
                sums += each @ np.where(known, data, 0)
                count += each @ known.astype(np.float64)
            yield _quotient(sums, count), count[0].astype(int)


def tails(n: int, level: float = 0.95) -> tuple[float, float]:
    """Quantiles of a bootstrap's means that bound an interval with a given coverage.

    Those of the expanded percentile interval (Hesterberg 2015, The American Statistician 69,
    371-386): ``Phi(-t * sqrt(n / (n - 1)))`` and its complement, with ``t`` Student's quantile
    for ``n - 1`` degrees of freedom. For means of normal values this is close to the t interval.

    Parameters
    ----------
    n : int
        Number of sequences that have a value, 2 or more.
    level : float
        Coverage of the interval.

    Returns
    -------
    low, high : float
    """
    t = stats.t.ppf((1 + level) / 2, n - 1)
    low = float(stats.norm.cdf(-t * math.sqrt(n / (n - 1))))
    return low, 1 - low


def bounds(
    estimate: np.ndarray | float,
    drawn: np.ndarray,
    n: int,
    level: float = 0.95,
    *,
    missing: int = 0,
    pairs: bool = False,
) -> np.ndarray:
    """Bounds of an interval around an estimate, from its values in the draws of a bootstrap.

    They are the quantiles of :func:`tails`, unless these are less than ten times the share of draws
    that are of one extreme sequence alone: the lowest and the highest value would be about all that
    they can give, whatever the level. Then they are Student's, ``t`` standard deviations of the
    draws (times ``sqrt(n / (n - 1))``, which makes that of a mean unbiased) from the estimate.

    Parameters
    ----------
    estimate : numpy.ndarray of float, shape (...), or float
    drawn : numpy.ndarray of float, shape (draw, ...)
        NaN is left out.
    n : int
        Sequences that have a value, 2 or more.
    level : float
        Coverage of the interval.
    missing : int
        Sequences that are drawn as well, and have none.
    pairs : bool
        Whether values are of pairs of sequences, none of them with itself: the draws of two
        sequences alone then give the extremes.

    Returns
    -------
    numpy.ndarray of float64, shape (2, ...)
    """
    quantiles, alone, all_of_them = tails(n, level), 2 if pairs else 1, n + missing
    # Draws without any of the others, but for those in which nothing has a value.
    without = (missing / all_of_them) ** all_of_them
    extreme = (((missing + alone) / all_of_them) ** all_of_them - without) / (1 - without)
    if quantiles[0] > 10 * extreme:
        return np.nanquantile(drawn, quantiles, axis=0)
    reach = stats.t.ppf((1 + level) / 2, n - 1) * math.sqrt(n / (n - 1)) * np.nanstd(drawn, axis=0)
    return np.stack([estimate - reach, estimate + reach])
