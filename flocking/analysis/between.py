"""How similar the tokens of two sequences are, beside those of one.

Every function takes the Dataset of :func:`flocking.record` and returns a DataArray in float64 with
dimensions (sequence, other, layer), or (pair, layer) for some of the pairs. Sequences are compared
over windows in which they have the same number of tokens. Pairs are computed when a function is
called, some at a time if the recording is in chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from flocking.analysis.chunks import is_chunked, measure
from flocking.analysis.couples import Pairs, chosen, of_all_pairs, of_pairs
from flocking.analysis.metrics import MASS, RAW, consistency_of, named
from flocking.analysis.token_pairs import different_between, token_count
from flocking.recording import PROMPT


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
    if PROMPT not in recording.phase.values:
        raise ValueError(
            "the recording has no window of a prompt after the first token, and sequences are "
            "compared by these: give them, or record what was generated as a prompt."
        )
    if not len(found):
        short = int(tokens[:, recording.phase.values == PROMPT].sum(axis=1).min())
        raise ValueError(
            f"the shortest of these sequences has {short} tokens of a prompt after the first, "
            "fewer than a window: record longer texts, or with a smaller window."
        )
    return found


@measure(*MASS, "tokens", different_tokens=RAW)
def between_consistency(
    recording: xr.Dataset,
    *,
    different_tokens: bool = False,
    pairs: Pairs | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """Mean cosine between the relative activations of tokens of two sequences.

    ``B = <sum_t r_t, sum_u r'_u> / (T T')``: :func:`consistency` over pairs whose tokens come
    from two sequences. Only windows of the prompt that all sequences fill are counted, so that
    each brings as many tokens; what is generated is left out.

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
    distinct = ~np.eye(part.sizes["sequence"], dtype=bool)
    if different_tokens:
        total, pairs = (_by_pair(part, each) for each in different_between(part, distinct))
    else:
        mass = part.mass.sum("window", dtype=np.float64, skipna=False)
        sums = mass.transpose("layer", "sequence", "neuron").values
        total = _by_pair(part, np.moveaxis(sums @ sums.swapaxes(1, 2), 0, 2))
        count = token_count(part)
        pairs = count * _other(count)
    values = total / pairs.where(pairs > 0)
    values = values.where(xr.DataArray(distinct, dims=("sequence", "other")))
    values = values.transpose("sequence", "other", "layer")
    return named(values, "between_consistency", "consistency between sequences")


@measure(*MASS, "tokens", different_tokens=RAW)
def specificity(
    recording: xr.Dataset,
    *,
    different_tokens: bool = False,
    pairs: Pairs | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """How much of the consistency belongs to the sequence rather than to the model.

    ``(C - B) / (1 - B)`` for each pair of sequences, with :func:`between_consistency` B and the
    mean C of their two :func:`consistency`, from the same windows of the prompt. 0: tokens of one
    text are not more similar than tokens of two, so that a static selection would serve as well.
    1: a text's tokens are identical, but differ from the other's.

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
        within = consistency_of(part, different_tokens).compute()
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


def _by_pair(recording: xr.Dataset, values: np.ndarray) -> xr.DataArray:
    names = recording.sequence.values
    coordinates = {"sequence": names, "other": names, "layer": recording.layer.values}
    return xr.DataArray(values, coordinates, ("sequence", "other", "layer"))
