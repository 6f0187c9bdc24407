"""How far a mean over a few texts can be trusted: the bootstrap over sequences."""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import xarray as xr
from scipy import stats

from flocking.models import warn


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
    ``flocking.analysis.tails``, since plain ones are too narrow for few sequences.

    Parameters
    ----------
    values : xarray.DataArray or xarray.Dataset
        Measures of a recording, with a dimension ``sequence``; values of pairs have ``other``, too,
        with the same labels in any order. NaN counts as missing. Variables of a Dataset without
        ``sequence`` are left out.
    level : float
        Coverage of the interval.
    resamples : int
    seed : int

    Returns
    -------
    xarray.DataArray or xarray.Dataset, float64
        As `values`, with ``interval`` ("estimate", "low", "high") instead of ``sequence`` (and
        ``other``). With one sequence, the interval is NaN.

    Raises
    ------
    TypeError
        If `values` is neither a DataArray nor a Dataset of measures.
    ValueError
        If `values` has no dimension ``sequence`` or no sequence in it, ``other`` has other labels,
        `level` is not between 0 and 1, or `resamples` is below 1.

    Warns
    -----
    UserWarning
        If there is one sequence only.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:4], progress=False)
    >>> score = flocking.bootstrap(flocking.flocking_score(recording))
    >>> score.dims, score.interval.values.tolist()
    (('interval', 'layer'), ['estimate', 'low', 'high'])
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: give the interval's coverage, between 0 and 1.")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: give how often to draw, 1 or more.")
    if isinstance(values, xr.Dataset):
        if "energy" in values and "phase" in values.coords:
            raise TypeError(
                "values is a recording: give a measure of it, such as "
                "flocking.flocking_score(recording)."
            )
        parts = {name: part for name, part in values.items() if "sequence" in part.dims}
        if not parts:
            raise ValueError(
                f"no variable has the dimension 'sequence' to draw from: {_before(values)}"
            )
        means = {
            name: intervals(part, level=level, resamples=resamples, seed=seed)
            for name, part in parts.items()
        }
        _warn_of_one(values)
        return xr.Dataset(means, attrs=values.attrs)
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"values is a {type(values).__name__}: give a DataArray or a Dataset.")
    if "sequence" not in values.dims:
        raise ValueError(
            f"values has dimensions {values.dims}, so that there is no 'sequence' to draw from: "
            f"{_before(values)}"
        )
    result = intervals(values, level=level, resamples=resamples, seed=seed)
    _warn_of_one(values)
    return result


def _before(values: xr.DataArray | xr.Dataset) -> str:
    """What to do where there are not several sequences."""
    done = "one is selected" if "sequence" in values.coords else "they are averaged"
    return f"give the values of several, before {done}."


def _warn_of_one(values: xr.DataArray | xr.Dataset) -> None:
    if values.sizes["sequence"] == 1:
        warn("There is one sequence only, so its interval is NaN: record several texts.")


def intervals(
    values: xr.DataArray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> xr.DataArray:
    """What :func:`bootstrap` gives for one variable, without a warning if there is one sequence."""
    if values.dtype.kind not in "biuf":
        raise TypeError(f"values of dtype {values.dtype} have no mean: give numbers.")
    if "other" in values.dims:
        values = _in_order(values)
    if not values.sizes["sequence"]:
        raise ValueError("values have no sequence to draw from: give those of several.")
    drawn = [dim for dim in ("sequence", "other") if dim in values.dims]
    rest = [dim for dim in values.dims if dim not in drawn]
    stacked = values.transpose(*drawn, *rest)
    data = stacked.values.astype(np.float64).reshape([stacked.sizes[d] for d in drawn] + [-1])
    means = _resampled_means(data, resamples, seed)
    n = len(data)
    bounds = np.full((2, means.shape[1]), np.nan)
    known = np.isfinite(means[0]) & (n > 1)
    if known.any():
        bounds[:, known] = np.nanquantile(means[1:, known], tails(n, level), axis=0)
    shape = [3, *(stacked.sizes[dim] for dim in rest)]
    kept = {name: c for name, c in values.coords.items() if not set(c.dims) & set(drawn)}
    return xr.DataArray(
        np.concatenate([means[:1], bounds]).reshape(shape),
        {"interval": ["estimate", "low", "high"], **kept},
        ("interval", *rest),
        values.name,
        {**values.attrs, "level": level},
    )


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
    # How often each sequence is drawn. The first row draws each once: the estimate.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    draws = np.concatenate([np.ones((1, n)), draws])

    def total(x: np.ndarray) -> np.ndarray:
        if not pairs:
            return draws @ x
        return np.stack([((draws @ x[..., c]) * draws).sum(1) for c in range(x.shape[-1])], axis=1)

    count = total(np.isfinite(data).astype(np.float64))
    sums = total(np.nan_to_num(data, nan=0))
    return np.divide(sums, count, out=np.full(count.shape, np.nan), where=count > 0)


def tails(n: int, level: float = 0.95) -> tuple[float, float]:
    """Quantiles of a bootstrap's means that bound an interval with a given coverage.

    Those of the expanded percentile interval (Hesterberg 2015, The American Statistician 69,
    371-386): ``Phi(-t * sqrt(n / (n - 1)))`` and its complement, with ``t`` Student's quantile
    for ``n - 1`` degrees of freedom. For means of normal values this is close to the t interval.

    Parameters
    ----------
    n : int
        Number of sequences, 2 or more.
    level : float
        Coverage of the interval.

    Returns
    -------
    low, high : float
    """
    t = stats.t.ppf((1 + level) / 2, n - 1)
    low = float(stats.norm.cdf(-t * math.sqrt(n / (n - 1))))
    return low, 1 - low
