"""Perplexities, their ratios and rank correlations, with intervals over texts."""

from __future__ import annotations

from typing import TypeVar, cast

import numpy as np
import xarray as xr
from scipy.stats import spearmanr

from flocking.analysis import bootstrap, bounds
from flocking.experiments.common import said

_T = TypeVar("_T", xr.DataArray, xr.Dataset)

OVER_STATIC = "GRIFFIN's perplexity over static's"


def perplexities(losses: xr.DataArray) -> xr.Dataset:
    """Perplexities over all texts, from mean losses, and their ratios.

    Intervals of ratios, to the full model's and of GRIFFIN's to static's, are those of the
    differences within each text.
    """
    excess = losses - losses.sel(selection="full")
    against = losses.sel(selection="GRIFFIN", drop=True) - losses.sel(selection="static", drop=True)
    each = xr.Dataset({"perplexity": losses, "relative": excess, "over_static": against})
    intervals = bootstrap(each)
    assert isinstance(intervals, xr.Dataset)
    data = exponential(intervals)
    data.over_static.attrs = ratio(OVER_STATIC)
    data.relative.attrs = ratio("perplexity, relative to the full model's")
    data.perplexity.attrs = {"long_name": "perplexity", "units": "1"}
    return data.transpose("interval", "selection", ...)


def exponential(values: _T) -> _T:
    """``exp`` of all numbers: from losses to perplexities, from differences to ratios."""
    return cast(_T, np.exp(values))


def ratio(long_name: str) -> dict[str, str]:
    """Attributes of a variable without a unit."""
    return {"long_name": long_name, "units": "1"}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where one of the two does not vary."""
    x, y = np.ravel(x), np.ravel(y)
    return spearmanr(x, y).statistic if np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan


def between_excerpts(x: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """Rank correlation over all excerpts, with an interval over texts."""
    one, other = (values.transpose("sequence", "excerpt").values for values in (x, y))
    draws = np.random.default_rng(0).integers(len(one), size=(2000, len(one)))
    drawn = np.array([rank_correlation(one[draw], other[draw]) for draw in draws])
    estimate = rank_correlation(one, other)
    values = [estimate, *bounds(estimate, drawn, len(one))]
    return xr.DataArray(values, {"interval": ["estimate", "low", "high"]}, ("interval",))


def by_name(perplexity: xr.DataArray) -> str:
    """Each selection's perplexity, in one line."""
    return ", ".join(f"{name} {said(perplexity, name, 0)}" for name in perplexity.selection.values)
