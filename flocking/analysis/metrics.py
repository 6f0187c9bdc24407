"""How strongly neurons flock: closed forms on a recording's moments.

Every function takes the Dataset of :func:`flocking.record` and returns a DataArray in float64 with
dimensions (sequence, layer). The first token is always left out: its norm is often hundreds of
times the others', and it says little about the sequence.

Sequences, layers and windows may be selected first, in any order, one alone included, and the
dimensions transposed: ``recording.sel(window=recording.phase == "generation")``, or
``recording.sel(layer=3)``, whose results have no dimension ``layer``. A part of the neurons or of a
window's tokens is refused.

A recording in chunks is measured chunk by chunk, and gives a chunked result.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from flocking.analysis.chunks import measure
from flocking.analysis.token_pairs import (
    different_within,
    pairs_of_different,
    pairs_of_tokens,
    token_count,
    token_sum,
    without_first,
)

MASS = ("mass", "norm", "token_window")
RAW = ("relative", "token_id")


def named(values: xr.DataArray, name: str, long_name: str) -> xr.DataArray:
    """The values with a name, and the attributes that plots and tables show."""
    return values.rename(name).assign_attrs(long_name=long_name, units="1")


def _mean_cosine(recording: xr.Dataset, sums: xr.DataArray) -> xr.DataArray:
    """Mean pairwise product of unit vectors, from their sums by window."""
    total = sums.sum("window", dtype=np.float64, skipna=False)  # what was masked is not measured
    cosines = (total**2).sum("neuron", skipna=False) - token_count(recording)
    return cosines / pairs_of_tokens(recording)


@measure(*MASS, different_tokens=RAW)
def consistency(recording: xr.Dataset, *, different_tokens: bool = False) -> xr.DataArray:
    """Mean cosine between the relative activations of two tokens of a sequence.

    ``C = (||sum_t r_t||^2 - T) / (T (T - 1))``, the mean of ``<r_t, r_u>`` over all pairs
    of different tokens in closed form. Flocking is Dong, Chen and Chi's observation
    (2024, arXiv 2404.01365, section 3) that tokens of a sequence share their relative
    activations; the measure is this project's. Compare it with :func:`chance_consistency`: all
    ``r_t`` are non-negative, so even unrelated tokens have a positive cosine.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.
    different_tokens : bool
        Leave out pairs of tokens with the same id, which may be similar only because they are
        the same word. Needs ``record(..., relative=True)``.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, at most 1; NaN with fewer than two tokens after the first, or of them, with
        `different_tokens`, no two with different ids.

    Raises
    ------
    TypeError
        If `recording` is not a recording.
    ValueError
        If it was changed so that its parts contradict each other; with `different_tokens`, if
        it has no ``relative`` for all layers.

    Warns
    -----
    UserWarning
        If a sequence has fewer than two tokens after the first, or no two that count.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> values = flocking.consistency(recording)
    >>> values.dims, values.shape
    (('sequence', 'layer'), (2, 2))
    """
    return consistency_of(recording, different_tokens)


def consistency_of(recording: xr.Dataset, different_tokens: bool = False) -> xr.DataArray:
    """What :func:`consistency` returns, of a recording that was checked."""
    if different_tokens:
        values = different_within(recording) / pairs_of_different(recording)
    else:
        values = _mean_cosine(recording, without_first(recording).mass)
    return named(values, "consistency", "consistency")


@measure("l1", "norm", "token_window")
def chance_consistency(recording: xr.Dataset) -> xr.DataArray:
    """Chance level of :func:`consistency`: its value if neurons had no identity.

    The expectation of C when the neurons are permuted independently for each token,
    ``C0 = ((sum_t a_t)^2 - sum_t a_t^2) / (d_ff T (T - 1))``
    with ``a_t = ||r_t||_1``.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, in [0, 1]; NaN with fewer than two tokens after the first.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> chance = flocking.chance_consistency(recording)
    >>> bool((chance < flocking.consistency(recording)).all())
    True
    """
    return _chance(recording)


def _chance(recording: xr.Dataset) -> xr.DataArray:
    pairs = pairs_of_tokens(recording)
    l1 = recording.l1.astype(np.float64)
    excess = token_sum(recording, l1) ** 2 - token_sum(recording, l1**2)
    values = excess / (recording.d_ff * pairs)
    return named(values.drop_vars("d_ff"), "chance_consistency", "chance level of consistency")


@measure(*MASS, "l1")
def flocking_score(recording: xr.Dataset) -> xr.DataArray:
    """Consistency on a scale from chance (0) to identical patterns (1).

    ``(C - C0) / (1 - C0)`` with :func:`consistency` C and :func:`chance_consistency` C0.
    A high score alone does not say much: networks with random weights also score high, and so do
    layers where a few neurons dominate (see :func:`effective_neurons` and
    :func:`rank_consistency`).

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, at most 1; NaN with fewer than two tokens after the first.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> flocking.flocking_score(recording).mean("sequence").dims
    ('layer',)

    The same for tokens 65 to 192 only, windows 2 and 3 of 64 tokens:

    >>> flocking.flocking_score(recording.isel(window=[2, 3])).shape
    (2, 2)
    """
    chance = _chance(recording)
    values = (consistency_of(recording) - chance) / (1 - chance)
    return named(values, "flocking_score", "flocking score")


@measure("rank", "norm", "token_window")
def rank_consistency(recording: xr.Dataset) -> xr.DataArray:
    """Mean Spearman correlation between two tokens' activations; its chance level is 0.

    The closed form of :func:`consistency` on each token's standardised ranks. GRIFFIN
    selects neurons by rank, and ranks do not depend on how large a few outlier neurons are.

    Parameters
    ----------
    recording : xarray.Dataset
        From ``flocking.record(..., ranks=True)``.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        Unitless, in [-1, 1]; NaN with fewer than two tokens after the first.

    Raises
    ------
    ValueError
        If the recording has no ranks.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], ranks=True, progress=False)
    >>> flocking.rank_consistency(recording).dims
    ('sequence', 'layer')
    """
    values = _mean_cosine(recording, without_first(recording)["rank"])
    return named(values, "rank_consistency", "rank consistency")


@measure("energy")
def effective_neurons(recording: xr.Dataset) -> xr.DataArray:
    """Number of neurons that share the energy: the participation ratio.

    ``(sum_j E_j)^2 / sum_j E_j^2`` with E the energy over all windows but the first token's.
    From 1 (one neuron has it all) to ``d_ff`` (all have the same).

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer)
        In neurons; NaN without a token after the first.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> count = flocking.effective_neurons(recording)
    >>> count.attrs["units"], bool(((count > 1) & (count <= count.d_ff)).all())
    ('neurons', True)
    """
    energy = without_first(recording).energy.sum("window", dtype=np.float64, skipna=False)
    squares = (energy**2).sum("neuron", skipna=False)
    values = energy.sum("neuron", skipna=False) ** 2 / squares.where(squares > 0)
    return named(values, "effective_neurons", "effective neurons").assign_attrs(units="neurons")
