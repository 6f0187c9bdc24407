"""How strongly neurons flock: closed forms on a recording's moments.

Every function takes the Dataset of :func:`flocking.record` and returns a DataArray in float64 with
dimensions (sequence, layer), or (sequence, other, layer) for pairs of sequences, (pair, layer) for
some of them. The first token is always left out: its norm is often hundreds of times the others',
and it says little about the sequence.

Sequences, layers and windows may be selected first, in any order, one alone included, and the
dimensions transposed: ``recording.sel(window=recording.phase == "generation")``, or
``recording.sel(layer=3)``, whose results have no dimension ``layer``. A part of the neurons or of a
window's tokens is refused.

A recording in chunks is measured chunk by chunk: what is within a sequence gives a chunked result,
and what compares sequences is computed when it is called, some of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import xarray as xr
from scipy import sparse

from flocking.analysis.chunks import by_chunk, is_chunked, measure
from flocking.analysis.couples import Pairs, chosen, of_all_pairs, of_pairs
from flocking.models import warn
from flocking.recording import FIRST, PROMPT

_MASS = ("mass", "norm", "token_window")
_RAW = ("relative", "token_id")


def named(values: xr.DataArray, name: str, long_name: str) -> xr.DataArray:
    """The values with a name, and the attributes that plots and tables show."""
    return values.rename(name).assign_attrs(long_name=long_name, units="1")


def common_windows(recording: xr.Dataset) -> np.ndarray:
    """Numbers of the prompt's windows in which all sequences have the same number of tokens."""
    if recording.sizes["sequence"] < 2:
        raise ValueError(
            f"expected two sequences or more, got {recording.sizes['sequence']}: record several "
            "texts."
        )
    tokens = recording.tokens.values
    same = (tokens == tokens.max(axis=0, initial=0)).all(axis=0) & (tokens > 0).all(axis=0)
    found = np.flatnonzero(same & (recording.phase.values == PROMPT))
    if not len(found):
        short = int(tokens[:, recording.phase.values == PROMPT].sum(axis=1).min())
        raise ValueError(
            f"the shortest of these sequences has {short} tokens of a prompt after the first, "
            "fewer than a window: record longer texts, or with a smaller window."
        )
    return found


def _windows(recording: xr.Dataset) -> xr.Dataset:
    """The recording without the first token's window."""
    return recording.isel(window=np.flatnonzero(recording.phase.values != FIRST))


def _counting(recording: xr.Dataset) -> xr.DataArray:
    """Which tokens count, (sequence, layer, token): those in a window that are not all zero."""
    inside = recording.token_window.isin(_windows(recording).window)
    return inside & (recording.norm > 0)


def _token_sum(recording: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """Sum over the tokens that lie in the recording's windows."""
    inside = recording.token_window.isin(_windows(recording).window)
    return values.where(inside, 0).sum("token", dtype=np.float64)


def _token_count(recording: xr.Dataset) -> xr.DataArray:
    """Tokens that count, (sequence, layer), in memory: whose activations are not all zero."""
    return _token_sum(recording, recording.norm > 0).compute()


def _pairs(recording: xr.Dataset) -> xr.DataArray:
    """Ordered pairs of different tokens, (sequence, layer); NaN, with a warning, if none."""
    count = _token_count(recording)
    pairs = count * (count - 1)
    few = (pairs <= 0).any("layer").values
    if few.any():
        warn(
            f"{few.sum()} of {few.size} sequences have fewer than two tokens after the first "
            "(tokens with all activations zero do not count): the result is NaN there.",
        )
    return pairs.where(pairs > 0)


def _mean_cosine(recording: xr.Dataset, sums: xr.DataArray) -> xr.DataArray:
    """Mean pairwise product of unit vectors, from their sums by window."""
    total = sums.sum("window", dtype=np.float64, skipna=False)  # what was masked is not measured
    return ((total**2).sum("neuron", skipna=False) - _token_count(recording)) / _pairs(recording)


# --------------------------------------------------------------------------------------
# Within a sequence


@measure(*_MASS, different_tokens=_RAW)
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
        Unitless, at most 1; NaN with fewer than two tokens after the first.

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
        If a sequence has fewer than two tokens after the first.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> values = flocking.consistency(recording)
    >>> values.dims, values.shape
    (('sequence', 'layer'), (2, 2))
    """
    return _consistency(recording, different_tokens)


def _consistency(recording: xr.Dataset, different_tokens: bool = False) -> xr.DataArray:
    values = _mean_cosine(recording, _windows(recording).mass)
    if different_tokens:
        pairs = _pairs(recording)
        same, count = _identical_within(recording)
        own = same - _token_count(recording)  # a token is not a pair with itself
        left = pairs - (count - _token_count(recording))
        values = (values * pairs - own) / left.where(left > 0)
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
    pairs = _pairs(recording)
    l1 = recording.l1.astype(np.float64)
    excess = _token_sum(recording, l1) ** 2 - _token_sum(recording, l1**2)
    values = excess / (recording.d_ff * pairs)
    return named(values.drop_vars("d_ff"), "chance_consistency", "chance level of consistency")


@measure(*_MASS, "l1")
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
    values = (_consistency(recording) - chance) / (1 - chance)
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
    values = _mean_cosine(recording, _windows(recording)["rank"])
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
    energy = _windows(recording).energy.sum("window", dtype=np.float64, skipna=False)
    squares = (energy**2).sum("neuron", skipna=False)
    values = energy.sum("neuron", skipna=False) ** 2 / squares.where(squares > 0)
    return named(values, "effective_neurons", "effective neurons").assign_attrs(units="neurons")


# --------------------------------------------------------------------------------------
# Between sequences


@measure(*_MASS, "tokens", different_tokens=_RAW)
def between_consistency(
    recording: xr.Dataset,
    *,
    different_tokens: bool = False,
    pairs: Pairs | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """Mean cosine between the relative activations of tokens of two sequences.

    ``B = <sum_t r_t, sum_u r'_u> / (T T')``: :func:`consistency` over pairs whose tokens come
    from two sequences. Only windows that all sequences fill are counted, so that each brings
    as many tokens.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`, of two sequences or more.
    different_tokens : bool
        Leave out pairs of tokens with the same id. Needs ``record(..., relative=True)``.
    pairs : int or "all", optional
        Of so many pairs of sequences, drawn without repetition, the same for all layers; or of
        all, each once. What it costs grows with the pairs instead of with the square of the
        sequences. By default a matrix of all.
    seed : int
        Of what is drawn.

    Returns
    -------
    xarray.DataArray, float64, (sequence, other, layer), or (pair, layer)
        Unitless, symmetric in the two sequences; NaN where both are the same sequence. Along
        ``pair``, coordinates ``sequence`` and ``other`` are the labels of the two.

    Raises
    ------
    TypeError
        If `recording` is not a recording, or `pairs` neither a number nor "all".
    ValueError
        If there is only one sequence, one is shorter than the first window, or there are fewer
        than `pairs` pairs; with `different_tokens`, if the recording has no ``relative`` for all
        layers.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:3], progress=False)
    >>> values = flocking.between_consistency(recording)
    >>> values.dims, values.shape
    (('sequence', 'other', 'layer'), (3, 3, 2))
    >>> drawn = flocking.between_consistency(recording, pairs=2, seed=1)
    >>> drawn.dims, drawn.shape
    (('pair', 'layer'), (2, 2))
    """

    def matrix(part: xr.Dataset) -> xr.DataArray:
        return _between(part, different_tokens)

    return _compared(recording, matrix, pairs, seed, different_tokens)


def _between(part: xr.Dataset, different_tokens: bool) -> xr.DataArray:
    mass = part.mass.sum("window", dtype=np.float64, skipna=False)
    count = _token_count(part)
    n = part.sizes["sequence"]
    values = mass.transpose("layer", "sequence", "neuron").values
    total = _of_pairs(part, np.moveaxis(values @ values.swapaxes(1, 2), 0, 2))
    pairs = count * _other(count)
    if different_tokens:
        same, number = _identical(part, ~np.eye(n, dtype=bool))
        total, pairs = total - same, pairs - number
    distinct = ~xr.DataArray(np.eye(n, dtype=bool), dims=("sequence", "other"))
    values = (total / pairs.where(pairs > 0)).where(distinct)
    values = values.transpose("sequence", "other", "layer")
    return named(values, "between_consistency", "consistency between sequences")


@measure(*_MASS, "tokens", different_tokens=_RAW)
def specificity(
    recording: xr.Dataset,
    *,
    different_tokens: bool = False,
    pairs: Pairs | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """How much of the consistency belongs to the sequence rather than to the model.

    ``(C - B) / (1 - B)`` for each pair of sequences, with :func:`between_consistency` B and the
    mean C of their two :func:`consistency`, from the same windows. 0: tokens of one text are not
    more similar than tokens of two, so that a static selection would serve as well. 1: a text's
    tokens are identical, but differ from the other's.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`, of two sequences or more.
    different_tokens : bool
        Leave out pairs of tokens with the same id, both in C and in B. Needs
        ``record(..., relative=True)``.
    pairs : int or "all", optional
        Of so many pairs of sequences, as in :func:`between_consistency`, which draws the same.
    seed : int
        Of what is drawn.

    Returns
    -------
    xarray.DataArray, float64, (sequence, other, layer), or (pair, layer)
        Unitless, at most 1; NaN where both are the same sequence.

    Raises
    ------
    TypeError, ValueError
        As in :func:`between_consistency`.

    Examples
    --------
    >>> texts = [passage[:300] for passage in flocking.passages()[:2]]
    >>> recording = flocking.record(model, texts, window=8, relative=True, progress=False)
    >>> flocking.specificity(recording).shape
    (2, 2, 2)
    >>> flocking.specificity(recording, different_tokens=True).shape
    (2, 2, 2)
    >>> flocking.specificity(recording, pairs="all").dims
    ('pair', 'layer')
    """

    def matrix(part: xr.Dataset) -> xr.DataArray:
        within = _consistency(part, different_tokens).compute()
        between = _between(part, different_tokens)
        values = ((within + _other(within)) / 2 - between) / (1 - between)
        values = values.transpose("sequence", "other", "layer")
        return named(values, "specificity", "specificity")

    return _compared(recording, matrix, pairs, seed, different_tokens)


def _compared(
    recording: xr.Dataset,
    matrix: Callable[[xr.Dataset], xr.DataArray],
    pairs: Pairs | None,
    seed: int,
    different_tokens: bool,
) -> xr.DataArray:
    """What `matrix` gives of all pairs of sequences, or of some."""
    part = _at_equal_counts(recording)
    n = part.sizes["sequence"]
    each = 8 * part.sizes["neuron"] * part.sizes["layer"]
    if different_tokens:  # of one layer at a time
        each += 8 * part.sizes["neuron"] * part.sizes["token"]
    if pairs is not None:
        return of_pairs(part, chosen(n, pairs, seed), matrix, each)
    return of_all_pairs(part, matrix, each) if is_chunked(part) else matrix(part)


def _at_equal_counts(recording: xr.Dataset) -> xr.Dataset:
    return recording.isel(window=common_windows(recording))


def _other(values: xr.DataArray) -> xr.DataArray:
    """The values, for the other sequence of a pair."""
    along = [name for name, c in values.coords.items() if "sequence" in c.dims]
    return values.drop_vars(set(along) - {"sequence"}).rename(sequence="other")


def _of_pairs(recording: xr.Dataset, values: np.ndarray) -> xr.DataArray:
    names = recording.sequence.values
    coordinates = {"sequence": names, "other": names, "layer": recording.layer.values}
    return xr.DataArray(values, coordinates, ("sequence", "other", "layer"))


def _identical_within(recording: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Of pairs of tokens with the same id within each sequence: sum of cosines, and number."""
    dims = ("sequence", "layer")
    both = by_chunk(
        _identical_of,
        recording.relative.variable.transpose(*dims, "token", "neuron"),
        recording.token_id.variable,
        _counting(recording).variable.transpose(*dims, "token"),
        recording.d_ff.variable,
        inner=[["token", "neuron"], ["token"], ["token"], []],
        outer=["both"],
        sizes={"both": 2},
        dtype=np.float64,
    ).transpose("both", *dims)
    labels = {dim: recording[dim] for dim in dims}
    return xr.DataArray(both[0], labels, dims), xr.DataArray(both[1], labels, dims)


def _identical_of(
    relative: np.ndarray, ids: np.ndarray, counting: np.ndarray, d_ff: np.ndarray
) -> np.ndarray:
    """As :func:`_identical_within`, (sequence, layer, 2), of arrays that can be broadcast."""
    result = np.zeros((*relative.shape[:2], 2))
    ids = np.broadcast_to(ids, counting.shape)
    widths = np.broadcast_to(d_ff, counting.shape[:2])
    for place in np.ndindex(*relative.shape[:2]):
        real = counting[place]
        _, sums, number = _by_id(ids[place][real], relative[place][real], int(widths[place]))
        result[place] = np.vdot(sums, sums), number @ number
    return result


def _identical(recording: xr.Dataset, wanted: np.ndarray) -> tuple[xr.DataArray, xr.DataArray]:
    """Sum of cosines over, and number of, pairs of tokens with the same id, by pair of sequences.

    A sum over token ids v of ``<S_v, S'_v>``, where S_v sums r over a sequence's tokens v.
    """
    n = recording.sizes["sequence"]
    sums = np.zeros((n, n, recording.sizes["layer"]))
    counts = np.zeros_like(sums)
    for layer in range(recording.sizes["layer"]):
        members = list(_by_token_id(recording.isel(layer=layer)))
        for a, b in np.argwhere(wanted):
            _, mine, theirs = np.intersect1d(
                members[a][0], members[b][0], assume_unique=True, return_indices=True
            )
            sums[a, b, layer] = np.vdot(members[a][1][mine], members[b][1][theirs])
            counts[a, b, layer] = members[a][2][mine] @ members[b][2][theirs]
    return _of_pairs(recording, sums), _of_pairs(recording, counts)


def _by_token_id(
    recording: xr.Dataset,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per sequence of one layer: its token ids, and the sum of r and the number for each."""
    counting = _counting(recording).values
    for sequence, real in enumerate(counting):
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
    r = np.nan_to_num(r.astype(np.float32))  # beyond the width of a narrower layer
    member = sparse.csr_matrix((np.ones(len(group), np.float32), (group, np.arange(len(group)))))
    number = np.bincount(group, minlength=len(ids)).astype(np.float64)
    return ids, (member @ r if len(ids) else r), number
