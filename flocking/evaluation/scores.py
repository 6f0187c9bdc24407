"""Intervals of scores: the bootstrap's, and where all items have the same value, one of counts."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from scipy import stats

from flocking.analysis import intervals

_LEVEL = 0.95


def means(
    values: np.ndarray, highest: float | None, *, differences: bool, seed: int = 0
) -> np.ndarray:
    """Mean of each row with its 95% interval, over items.

    The interval is :func:`flocking.bootstrap`'s. Where all items have the same value, so has every
    draw of a bootstrap, and its interval would have no width, however few the items are. Then it
    is one of counts: for scores Wilson's (1927, Journal of the American Statistical Association 22,
    209-212), for differences Bonett and Price's (2012, Journal of Educational and Behavioral
    Statistics 37, 479-488), which adds an item to either side. Of scores that are not all or
    nothing these are too wide rather than too narrow.

    Parameters
    ----------
    values : ndarray of float, shape (row, item)
    highest : float or None
        The highest score that an item can have, 1 or 100, where 0 is the lowest; None of what has
        none, such as losses, which get the bootstrap's interval alone.
    differences : bool
        Whether values are differences of two scores.
    seed : int
        Of the bootstrap.

    Returns
    -------
    ndarray of float64, shape (row, 3)
        Estimate, low and high; bounds are NaN for a single item.

    Examples
    --------
    Where no item of 40 is answered differently, there is still room for 6.6 points:

    >>> means(np.zeros((1, 40)), 1, differences=True).round(3).tolist()
    [[0.0, -0.066, 0.066]]
    """
    array = xr.DataArray(np.asarray(values, dtype=float), dims=("row", "sequence"))
    found = np.array(intervals(array, level=_LEVEL, seed=seed).to_numpy().T)
    items = array.sizes["sequence"]
    if highest is None or items < 2:
        return found
    for row, own in enumerate(array.to_numpy() / highest):
        if (own == own[0]).all() and own[0] in (-1, 0, 1):
            bounds = _of_difference if differences else _of_score
            found[row, 1:] = np.multiply(highest, bounds(own[0], items))
    return found


def _of_score(value: float, items: int) -> tuple[float, float]:
    """Bounds for a score that is 0, or 1, for each of the items."""
    found = stats.binomtest(int(value * items), items).proportion_ci(_LEVEL, method="wilson")
    return found.low, found.high


def _of_difference(value: float, items: int) -> tuple[float, float]:
    """Bounds for a difference that is -1, 0 or 1 for each of the items."""
    z = stats.norm.ppf((1 + _LEVEL) / 2)
    gains, losses = ((items * (value == sign) + 1) / (items + 2) for sign in (1, -1))
    middle = gains - losses
    reach = z * math.sqrt((gains + losses - middle**2) / (items + 2))
    return max(-1.0, middle - reach), min(1.0, middle + reach)
