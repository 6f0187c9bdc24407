"""How well what GRIFFIN selects from one part of a recording serves another part.

Selections are boolean DataArrays over neurons, statistics float64 ones. Both keep their labels, so
that xarray's broadcasting compares parts of a text, texts and models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal, overload

import numpy as np
import xarray as xr

from flocking.analysis.between import common_windows
from flocking.analysis.chunks import is_chunked, measure
from flocking.analysis.couples import Pairs, chosen, of_all_pairs, of_pairs
from flocking.analysis.densities import density_by_layer, kept_count, several_densities
from flocking.analysis.labels import aligned, checked, checked_selection
from flocking.analysis.metrics import named
from flocking.analysis.selection import select, statistic, where_reached


def jaccard(a: xr.DataArray, b: xr.DataArray, dim: str = "neuron") -> xr.DataArray:
    """Overlap of two selections: ``|A and B| / |A or B|``. See :func:`chance_jaccard`.

    It compares what was selected, whatever that was from: experts of a mixture without a token in
    both parts, and neurons without energy that make up for a density, agree by their order alone.
    (:func:`prompt_generation_overlap`, :func:`between_sequence_overlap` and :func:`drift` leave
    such experts out.)

    Parameters
    ----------
    a, b : xarray.DataArray, bool, (..., neuron)
        Selections. A dimension that both have must have the same labels, in any order; other
        dimensions are broadcast. Those of different layers are not compared.
    dim : str
        Dimension that is selected from, if not neurons (``"routed_expert"``, say).

    Returns
    -------
    xarray.DataArray, float64
        Unitless, in [0, 1]; NaN where one of the two is empty.

    Raises
    ------
    TypeError
        If `a` or `b` is not a DataArray.
    ValueError
        If `a` or `b` is not a selection along `dim` or has a part of the neurons, if the labels
        differ along a dimension that both have, or the layers of the two differ.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> early = flocking.select(flocking.statistic(recording, stop=257), density=0.5)
    >>> late = flocking.select(flocking.statistic(recording, start=257), density=0.5)
    >>> flocking.jaccard(early, late).dims
    ('sequence', 'layer')
    >>> flocking.jaccard(early, early).values.tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    a, b = checked_selection("a", a, dim), checked_selection("b", b, dim)
    a, b = aligned({"a": a, "b": b})
    with xr.set_options(keep_attrs=False):
        both = (a & b).sum(dim)
        sizes = a.sum(dim), b.sum(dim)
        values = both / (sizes[0] + sizes[1] - both).where((sizes[0] > 0) & (sizes[1] > 0))
    return named(values, "jaccard", "Jaccard overlap")


@overload
def chance_jaccard(density: float) -> float: ...


@overload
def chance_jaccard(density: Iterable[float]) -> list[float]: ...


def chance_jaccard(density: float | Iterable[float]) -> float | list[float]:
    """Overlap of two selections made at random: ``density / (2 - density)``.

    The ratio of expectations, ``d^2 / (2 d - d^2)``; the expectation of the ratio differs
    from it by less than ``1 / d_ff``.

    Parameters
    ----------
    density : float or iterable of float
        Fraction of neurons kept, or one for each layer, as the coordinate ``density`` of a
        selection has them.

    Returns
    -------
    float, or list of float
        As many as densities.

    Raises
    ------
    TypeError
        If a density is no number.
    ValueError
        If a density is not in (0, 1].

    Examples
    --------
    >>> flocking.chance_jaccard(0.5)
    0.333...
    >>> flocking.chance_jaccard([0.5, 1.0])
    [0.333..., 1.0]
    """
    if (
        isinstance(density, Iterable)
        and getattr(density, "ndim", 1) > 0
        and not isinstance(density, str | bytes)
    ):
        by_layer = density.values() if isinstance(density, Mapping) else density
        return [chance_jaccard(each) for each in by_layer]
    one = _number(density)
    kept_count(one, 1 << 62)  # raises unless it is in (0, 1]
    return one / (2 - one)


def _number(density: Any) -> float:
    one = density.item() if hasattr(density, "item") else density  # an array of no dimension
    if isinstance(one, bool) or not isinstance(one, Real):
        raise TypeError(f"density={density!r}: give a number in (0, 1], or several.")
    return float(one)


def captured_energy(
    selection: xr.DataArray, later: xr.DataArray, *, of: Literal["all", "oracle"] = "all"
) -> xr.DataArray:
    """Share of a range's energy that a selection keeps: ``sum_(j in S) E_j / sum_j E_j``.

    Its chance level is the density; with ``of="oracle"``, the density divided by the oracle's
    share.

    Parameters
    ----------
    selection : xarray.DataArray, bool, (..., neuron)
        From :func:`select`.
    later : xarray.DataArray, (..., neuron)
        :func:`statistic` of the range to be served. Its square is the energy.
    of : {"all", "oracle"}
        Divide by the energy of all neurons, or by the energy that as many neurons (in a mixture,
        as many of each expert) would keep if they were selected in hindsight, from `later` itself.

    Returns
    -------
    xarray.DataArray, float64
        Unitless, in [0, 1]; NaN where the selection is empty or there is no energy.

    Raises
    ------
    TypeError
        If `selection` or `later` is not a DataArray.
    ValueError
        If `selection` is not a selection, the labels differ along a dimension that both have, the
        layers of the two differ, or one has a part of the neurons.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> kept = flocking.select(flocking.statistic(recording, stop=257), density=0.5)
    >>> later = flocking.statistic(recording, start=257)
    >>> share = flocking.captured_energy(kept, later)
    >>> share.dims, bool((share <= flocking.captured_energy(kept, later, of="oracle")).all())
    (('sequence', 'layer'), True)
    """
    selection, later = checked_selection("selection", selection, "neuron"), checked("later", later)
    if of not in ("all", "oracle"):
        raise ValueError(f"of={of!r}: give 'all' or 'oracle'.")
    selection, later = aligned({"selection": selection, "later": later})
    with xr.set_options(keep_attrs=False):
        energy = later**2
        count = selection.sum("neuron")
        kept = xr.dot(selection.astype(np.float64), energy.fillna(0), dim="neuron")
        total = energy.sum("neuron", skipna=False)
        if of == "oracle":
            total = _oracle(selection, energy)
        values = kept / total.where((total > 0) & (count > 0))
    return named(values, "captured_energy", f"captured energy, of {of}")


def _oracle(selection: xr.DataArray, energy: xr.DataArray) -> xr.DataArray:
    """The energy that as many neurons, of each expert in a mixture, would keep in hindsight."""
    mixtures, widths = (
        next((each.coords[name] for each in (energy, selection) if name in each.coords), otherwise)
        for name, otherwise in (
            ("experts", xr.DataArray(1)),
            ("d_ff", xr.DataArray(energy.sizes["neuron"])),
        )
    )
    return xr.apply_ufunc(
        _most_of_each,
        energy,
        selection,
        mixtures.reset_coords(drop=True),
        widths.reset_coords(drop=True),
        input_core_dims=[["neuron"], ["neuron"], [], []],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"allow_rechunk": True},
    )


def _most_of_each(
    energy: np.ndarray, kept: np.ndarray, mixtures: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """The most energy that as many neurons of each expert can keep, (...) of (..., neuron)."""
    shape = np.broadcast_shapes(
        energy.shape[:-1], kept.shape[:-1], np.shape(mixtures), np.shape(widths)
    )
    mixtures, widths = (np.broadcast_to(each, shape) for each in (mixtures, widths))
    found = np.zeros(shape)
    for experts, d_ff in sorted({*zip(mixtures.flat, widths.flat, strict=True)}):
        here = (mixtures == experts) & (widths == d_ff)
        whole = bool(here.all())
        parts = (
            np.broadcast_to(each, (*shape, each.shape[-1]))[... if whole else here]
            for each in (energy, kept)
        )
        own, mask = (
            part[..., : int(d_ff)].reshape(*part.shape[:-1], int(experts), -1) for part in parts
        )
        found[here] = _most(own, mask.sum(-1)).sum(-1).ravel()
    return found


def _most(energy: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The most energy that so many neurons can keep: a sum in descending order."""
    best = np.cumsum(-np.sort(-np.nan_to_num(energy), axis=-1), axis=-1)
    count = np.asarray(count)
    last = np.maximum(count - 1, 0)[..., None]
    shape = np.broadcast_shapes(best.shape[:-1], last.shape[:-1])
    best = np.broadcast_to(best, (*shape, best.shape[-1]))
    most = np.take_along_axis(best, np.broadcast_to(last, (*shape, 1)), axis=-1)[..., 0]
    return np.where(count > 0, most, 0)


# --------------------------------------------------------------------------------------
# Measures from a recording


@measure("energy", "tokens", "start")
def prompt_generation_overlap(
    recording: xr.Dataset,
    density: float | Iterable[float] = 0.5,
    *,
    densities: Iterable[float] | None = None,
) -> xr.DataArray:
    """Jaccard overlap of the selections from the prompt and from the generation.

    Experts of a mixture that had no token in one of the two are left out: nothing says which of
    their neurons matter there.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record` with `max_new_tokens`, `prompt_tokens` or `continuation`, or of
        chats that end in an answer.
    density : float or iterable of float
        Fraction of neurons kept, or one for each layer.
    densities : iterable of float, optional
        Several to compare, instead of `density`, as in :func:`select`.

    Returns
    -------
    xarray.DataArray, float64, ([density,] sequence, layer)
        Chance level: :func:`chance_jaccard`.

    Raises
    ------
    TypeError
        If `recording` is not a recording, `density` is neither a number nor several, or `densities`
        is not a list of one number or more.
    ValueError
        If `recording` has a part of the neurons, no energy, or no prompt or no generation; if a
        density is not in (0, 1] or keeps no neuron, or there are as many as neither one nor the
        layers, or they are of other layers.

    Warns
    -----
    UserWarning
        If a sequence has no token of the prompt or of the generation.

    Examples
    --------
    >>> texts = ["Birds of a feather", "The starlings turned as one."]
    >>> recording = flocking.record(model, texts, max_new_tokens=16, progress=False)
    >>> flocking.prompt_generation_overlap(recording, density=0.5).dims
    ('sequence', 'layer')
    >>> flocking.prompt_generation_overlap(recording, densities=[0.25, 0.5]).dims
    ('density', 'sequence', 'layer')
    """
    density = density_by_layer(density, recording.sizes["layer"], recording.layer.values.tolist())
    densities = None if densities is None else several_densities(densities)
    prompt, generation = (statistic(recording, phase=phase) for phase in ("prompt", "generation"))
    overlap = overlap_of(prompt, generation, density, densities=densities)
    overlap = overlap.transpose("density", "sequence", "layer", missing_dims="ignore")
    return named(overlap, "jaccard", "Jaccard overlap of prompt and generation")


def overlap_of(
    first: xr.DataArray,
    second: xr.DataArray,
    density: float | Iterable[float],
    *,
    densities: Iterable[float] | None = None,
) -> xr.DataArray:
    """Jaccard overlap of what two statistics select, in experts that had a token in both.

    Parameters
    ----------
    first, second : xarray.DataArray, (..., neuron)
        Statistics, with coordinates ``d_ff`` and ``experts`` if there are mixtures.
    density, densities
        As of :func:`select`.

    Returns
    -------
    xarray.DataArray, float64
        As of :func:`jaccard`.
    """
    in_both = where_reached(first) & where_reached(second)
    one, other = (select(part, density, densities=densities) for part in (first, second))
    return jaccard(one & in_both, other & in_both)


@measure("energy", "tokens")
def between_sequence_overlap(
    recording: xr.Dataset,
    density: float | Iterable[float] = 0.5,
    *,
    pairs: Pairs | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Overlap of the selections from different sequences, and from the halves of one sequence.

    The selection from the first half of each sequence is compared with that from the second half of
    each: within a sequence and between two, from equally many tokens (after a figure of Dong, Chen
    and Chi 2024, arXiv 2404.01365, section 3). The first token, what is generated, and windows that
    not all sequences fill, are left out; and experts of a mixture that had no token in a half.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`, of two sequences or more, each of two windows or more.
    density : float or iterable of float
        Fraction of neurons kept, or one for each layer.
    pairs : int or "all", optional
        Of so many pairs of sequences, as in :func:`flocking.between_consistency`, which draws the
        same.
    seed : int
        Of what is drawn.

    Returns
    -------
    xarray.Dataset
        ``within`` (sequence, layer): Jaccard overlap of a sequence's two halves.
        ``between`` (sequence, other, layer): of its first half and the other's second half;
        NaN where both are the same sequence. Chance level: :func:`chance_jaccard`.
        With `pairs`, both are (pair, layer), with coordinates ``sequence`` and ``other``:
        ``within`` is the mean of the two sequences', ``between`` of the first half of ``sequence``
        and the second half of ``other``, the later one.

    Raises
    ------
    TypeError
        If `recording` is not a recording, or `pairs` neither a number nor "all".
    ValueError
        If there is only one sequence, or fewer than two windows that all sequences fill, or than
        `pairs` pairs.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:3], progress=False)
    >>> overlap = flocking.between_sequence_overlap(recording, density=0.5)
    >>> overlap.within.dims, overlap.between.dims
    (('sequence', 'layer'), ('sequence', 'other', 'layer'))
    >>> drawn = flocking.between_sequence_overlap(recording, density=0.5, pairs=2)
    >>> drawn.within.dims, drawn.between.sequence.dims
    (('pair', 'layer'), ('pair',))
    """
    windows = common_windows(recording)
    sizes = recording.tokens.values[0, windows]
    windows = windows[sizes == sizes.max()]  # the last one may have fewer tokens than its half
    half = len(windows) // 2
    if half == 0:
        raise ValueError(
            "expected two full windows or more, got 1: record with a smaller window, or "
            "longer texts."
        )
    density = density_by_layer(density, recording.sizes["layer"], recording.layer.values.tolist())
    halves = windows[:half], windows[half : 2 * half]
    n = recording.sizes["sequence"]
    each = 24 * recording.sizes["neuron"] * recording.sizes["layer"]

    def matrix(part: xr.Dataset) -> xr.DataArray:
        return _overlap_of_halves(part, halves, density)

    def within_and_between(part: xr.Dataset) -> xr.Dataset:
        between = matrix(part)
        own = _own(between).values
        mean = between.copy(data=(own[:, None] + own[None]) / 2)  # of the two members
        return xr.Dataset({"within": mean, "between": between})

    if pairs is not None:
        found = of_pairs(recording, chosen(n, pairs, seed), within_and_between, each)
        within, between = found.within, found.between
    else:
        chunked = is_chunked(recording)
        overlap = of_all_pairs(recording, matrix, each) if chunked else matrix(recording)
        within = _own(overlap)
        between = overlap.where(~xr.DataArray(np.eye(n, dtype=bool), dims=("sequence", "other")))
    return xr.Dataset(
        {
            "within": named(within, "within", "Jaccard overlap of a sequence's halves"),
            "between": named(between, "between", "Jaccard overlap between sequences"),
        }
    )


def _overlap_of_halves(
    recording: xr.Dataset, halves: tuple[np.ndarray, np.ndarray], density: list[float]
) -> xr.DataArray:
    """Overlap of each sequence's first half with each one's second, its own as well."""
    dims = ("layer", "sequence", "neuron")
    arrays = []
    for part in halves:
        energy = recording.energy.isel(window=part).sum("window", dtype=np.float64, skipna=False)
        values = np.sqrt(energy.compute())
        kept = select(values, density).transpose(*dims)
        arrays += [kept.values, where_reached(values).transpose(*dims).values]
    coordinates = {name: c for name, c in kept.coords.items() if "neuron" not in c.dims}
    return xr.DataArray(
        np.moveaxis(overlap_of_all(*arrays), 0, -1),
        {**coordinates, "other": recording["sequence"].values},
        ("sequence", "other", "layer"),
    )


def _own(overlap: xr.DataArray) -> xr.DataArray:
    """Values of each sequence with itself."""
    number = xr.DataArray(np.arange(overlap.sizes["sequence"]), dims="sequence")
    return overlap.isel(sequence=number, other=number).drop_vars("other")


def overlap_of_all(
    first: np.ndarray, in_first: np.ndarray, second: np.ndarray, in_second: np.ndarray
) -> np.ndarray:
    """Jaccard overlap of each first selection with each second one.

    Parameters
    ----------
    first, second : ndarray of bool, (layer, first or second, neuron)
        Selections.
    in_first, in_second : ndarray of bool
        Which neurons are of experts that had a token, as :func:`reached` says it; others are left
        out of both selections.

    Returns
    -------
    ndarray of float64, (layer, first, second)
        NaN where one of the two is empty.
    """
    result = np.full((*first.shape[:2], second.shape[1]), np.nan)
    for layer, found in enumerate(result):  # counts below 2^24 are exact in float32
        there = [each[layer].astype(np.float32) for each in (in_first, in_second)]
        a, b = (each[layer] * part for each, part in zip((first, second), there, strict=True))
        both = (a @ b.T).astype(np.float64)
        if all(part.all() for part in there):
            sizes = a.sum(1, dtype=np.float64)[:, None], b.sum(1, dtype=np.float64)[None]
        else:
            sizes = (a @ there[1].T).astype(np.float64), (there[0] @ b.T).astype(np.float64)
        union = sizes[0] + sizes[1] - both
        np.divide(both, union, out=found, where=(sizes[0] > 0) & (sizes[1] > 0))
    return result
