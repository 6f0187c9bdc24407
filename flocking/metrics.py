"""How strongly neurons flock: closed forms on a recording's moments.

Every function takes the Dataset of :func:`flocking.record` and returns a DataArray over
(sequence, layer), in float64. The first token is left out throughout: its norm is often
hundreds of times the others', and it says little about the sequence. To look at a part of
a recording, select its windows: ``recording.sel(window=recording.phase == "generation")``.
"""

from __future__ import annotations

import numpy as np
import xarray as xr


def _windows(recording: xr.Dataset) -> xr.Dataset:
    """The recording without the first token's window."""
    return recording.isel(window=np.flatnonzero(recording.phase.values != "first"))


def _token_sum(recording: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """Sum over the tokens that lie in the recording's windows."""
    inside = recording.token_window.isin(_windows(recording).window)
    return values.where(inside, 0).sum("token", dtype=np.float64)


def _token_count(recording: xr.Dataset) -> xr.DataArray:
    """Tokens that count, (sequence, layer): those whose activations are not all zero."""
    return _token_sum(recording, recording.norm > 0)


def _mean_cosine(recording: xr.Dataset, sums: xr.DataArray) -> xr.DataArray:
    """Mean pairwise product of unit vectors, from their sums by window."""
    total = sums.sum("window", dtype=np.float64)
    count = _token_count(recording)
    pairs = count * (count - 1)
    return ((total**2).sum("neuron") - count) / pairs.where(pairs > 0)


def _named(values: xr.DataArray, name: str, long_name: str) -> xr.DataArray:
    return values.rename(name).assign_attrs(long_name=long_name, units="1")


def consistency(recording: xr.Dataset) -> xr.DataArray:
    """Mean cosine between the relative activations of two tokens of a sequence.

    ``C = (||sum_t r_t||^2 - T) / (T (T - 1))``, the mean of ``<r_t, r_u>`` over all pairs
    of different tokens in closed form. Flocking is Dong, Chen and Chi's observation
    (2024, arXiv 2404.01365, section 3) that tokens of a sequence share their relative
    activations; the measure is this project's. Read it beside
    :func:`chance_consistency`: all ``r_t`` are non-negative, so even unrelated tokens have
    a positive cosine.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, at most 1; NaN with fewer than two tokens beside the first.
    """
    values = _mean_cosine(recording, _windows(recording).mass)
    return _named(values, "consistency", "consistency")


def chance_consistency(recording: xr.Dataset) -> xr.DataArray:
    """What :func:`consistency` would be if neurons had no identity: its chance level.

    The expectation of C when every token keeps its values and the neurons are permuted
    independently for each token, ``C0 = ((sum_t a_t)^2 - sum_t a_t^2) / (d_ff T (T - 1))``
    with ``a_t = ||r_t||_1``.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, in [0, 1]; NaN with fewer than two tokens beside the first.
    """
    count = _token_count(recording)
    pairs = count * (count - 1)
    l1 = recording.l1.astype(np.float64)
    excess = _token_sum(recording, l1) ** 2 - _token_sum(recording, l1**2)
    values = excess / (recording.d_ff * pairs.where(pairs > 0))
    return _named(values.drop_vars("d_ff"), "chance_consistency", "chance level of consistency")


def flocking_score(recording: xr.Dataset) -> xr.DataArray:
    """Consistency on a scale from chance (0) to identical patterns (1).

    ``(C - C0) / (1 - C0)`` with :func:`consistency` C and :func:`chance_consistency` C0.
    A high score need not mean much by itself: networks with random weights score high as
    well, and so do layers where a few neurons dominate (see :func:`effective_neurons`
    and :func:`rank_consistency`).

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, at most 1; NaN with fewer than two tokens beside the first.
    """
    chance = chance_consistency(recording)
    values = (consistency(recording) - chance) / (1 - chance)
    return _named(values, "flocking_score", "flocking score")


def rank_consistency(recording: xr.Dataset) -> xr.DataArray:
    """Mean Spearman correlation between two tokens' activations; its chance level is 0.

    The closed form of :func:`consistency` on each token's standardised ranks. GRIFFIN
    selects neurons by rank, and ranks do not let a few outlier neurons decide.

    Parameters
    ----------
    recording : xarray.Dataset
        From ``flocking.record(..., ranks=True)``.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, in [-1, 1]; NaN with fewer than two tokens beside the first.

    Raises
    ------
    ValueError
        If the recording has no ranks.
    """
    if "rank" not in recording:
        raise ValueError("the recording has no ranks: make it with record(..., ranks=True).")
    values = _mean_cosine(recording, _windows(recording)["rank"])
    return _named(values, "rank_consistency", "rank consistency")


def effective_neurons(recording: xr.Dataset) -> xr.DataArray:
    """Number of neurons that share the energy: its participation ratio.

    ``(sum_j E_j)^2 / sum_j E_j^2`` with E the energy over all windows beside the first
    token's. From 1 (one neuron has it all) to ``d_ff`` (all have the same).

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        In neurons; NaN without a token beside the first.
    """
    energy = _windows(recording).energy.sum("window", dtype=np.float64)
    squares = (energy**2).sum("neuron")
    values = energy.sum("neuron") ** 2 / squares.where(squares > 0)
    return _named(values, "effective_neurons", "effective neurons").assign_attrs(units="neurons")
