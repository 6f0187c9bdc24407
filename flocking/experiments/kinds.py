"""An atlas of kinds of text: which neurons every kind keeps, which none, and which only one.

A kind is a text, or a file of them; its pieces are spans of equally many tokens. Called as the
experiments of :mod:`flocking.experiments.activations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from scipy.stats import binom
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap
from flocking.experiments.common import (
    WEIGHTS,
    against_control,
    dimension,
    finished,
    said,
    same_length,
)
from flocking.feedforward import feedforwards

DEALT = ["by kind", "at random"]  # how pieces are put together
_DENSITY = 0.5
_DRAWS = 20
_LEAST = 2  # pieces of a kind


def atlas(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 1025,
    piece: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Neurons kept by kinds of text, their overlap, and how many pieces a static selection takes.

    Each text is one kind. Its tokens after the first are cut into pieces; a piece's selection is
    that of GRIFFIN's statistic over its tokens, the kind's that over all of them.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens : int
        Of each text, from the first on.
    piece : int
        Tokens in a piece.
    seed : int
        Of the random draws, and of the control's weights.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        ``overlap`` (weights, kind, other): Jaccard overlap at density 0.5 of the selections of a
        kind's pieces with those of another's, or of other pieces of the same kind, mean over pairs
        and layers. ``within`` and ``between`` (interval, weights): means over kinds. ``share``
        (weights, dealt, kinds): of the neurons of a layer, mean over layers, how many are kept by
        so many kinds; with pieces dealt to kinds at random, where no two kinds differ, beside it.
        ``chance`` (kinds): the same for selections at random. ``settled`` (interval, weights,
        pieces): overlap of the static selection of so many pieces, of all kinds, with that of as
        many others, mean over layers and 20 draws; its interval has 95% of the draws.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    ids, names = same_length(model, tokenizer, texts, tokens, piece, least=1 + _LEAST * piece)
    pieces = (len(ids[0]) - 1) // piece
    random = np.random.default_rng(seed)
    orders = [np.arange(len(ids) * pieces), random.permutation(len(ids) * pieces)]
    draws = [random.permutation(len(ids) * pieces) for _ in range(_DRAWS)]

    def measure(recording: xr.Dataset) -> xr.Dataset:
        energy = _energy_of_pieces(recording)
        shares = [_shares(energy.isel(sequence=order), len(names)) for order in orders]
        return xr.Dataset(
            {
                "overlap": _overlaps(energy, names),
                "share": xr.concat(shares, dimension("dealt", DEALT)),
                "settled": _settled(energy, draws),
            }
        )

    values, source = against_control(
        model, tokenizer, ids, names, seed, progress, measure, window=piece
    )
    data = _with_intervals(values).assign(chance=_chance(model, len(names)))
    data.overlap.attrs = {"long_name": "overlap of pieces' selections", "units": "1"}
    data.share.attrs = {"long_name": "share of a layer's neurons", "units": "1"}
    chance = analysis.chance_jaccard(_DENSITY)
    caption = _caption(data, source["model"], pieces, piece, chance)
    more = {"density": _DENSITY, "piece": piece, "pieces": pieces, "chance_jaccard": chance}
    return finished(data, source, names, ids, seed, caption, **more)


def _energy_of_pieces(recording: xr.Dataset) -> xr.DataArray:
    """Energy of each window of each text after the first token, (sequence, layer, neuron)."""
    each = analysis.statistic(recording, start=1, by="window") ** 2
    values = each.transpose("sequence", "window", "layer", "neuron").values
    return _like(recording, values.reshape(-1, *values.shape[2:]))


def _like(data: xr.Dataset | xr.DataArray, values: np.ndarray) -> xr.DataArray:
    """Values (sequence, layer, neuron) of the layers of other data."""
    labels = {"sequence": np.arange(len(values)), "layer": data.layer.values}
    found = xr.DataArray(values, labels, ("sequence", "layer", "neuron"))
    told = [name for name in ("d_ff", "experts") if name in data.coords]  # as selections need them
    return found.assign_coords({name: ("layer", data[name].values) for name in told})


def _kept(energy: xr.DataArray) -> xr.DataArray:
    """What GRIFFIN's statistic selects."""
    return analysis.select(energy**0.5, _DENSITY)


def _overlap(energy: xr.DataArray, other: xr.DataArray) -> np.ndarray:
    """Overlap of what both select, mean over layers, (sequence,)."""
    overlap = analysis.overlap_of(energy**0.5, other**0.5, _DENSITY)
    return np.asarray(overlap.mean("layer").values)


def _overlaps(energy: xr.DataArray, names: list[str]) -> xr.DataArray:
    """Mean overlap of pieces by kind, (kind, other): no piece with itself."""
    count = energy.sizes["sequence"]
    pairs = np.full((count, count), np.nan)
    here = np.arange(count)
    for step in range(1, count):
        other = energy.roll(sequence=step).assign_coords(sequence=energy.sequence)
        pairs[here, (here - step) % count] = _overlap(energy, other)
    by_kind = pairs.reshape(len(names), count // len(names), len(names), -1)
    labels = {"kind": names, "other": names}
    return xr.DataArray(np.nanmean(by_kind, axis=(1, 3)), labels, ("kind", "other"))


def _shares(energy: xr.DataArray, kinds: int) -> xr.DataArray:
    """Share of neurons kept by so many kinds, of pieces that follow each other, (kinds,).

    In mixtures, of the neurons in experts that every kind reaches: what is kept in another one says
    nothing about the kind.
    """
    count = energy.sizes["sequence"] // kinds
    sums = energy.values.reshape(kinds, count, *energy.shape[1:]).sum(axis=1)
    whole = _like(energy, sums)
    times = _kept(whole).sum("sequence")
    inside = analysis.where_reached(whole).all("sequence")
    shares = [
        float((((times == number) & inside).sum("neuron") / inside.sum("neuron")).mean("layer"))
        for number in range(kinds + 1)
    ]
    return xr.DataArray(shares, {"kinds": range(kinds + 1)}, ("kinds",))


def _settled(energy: xr.DataArray, draws: list[np.ndarray]) -> xr.DataArray:
    """Overlap of the static selections of as many pieces and other pieces, (draw, pieces)."""
    found = []
    for number in _numbers(energy.sizes["sequence"]):
        means = [
            [energy.values[order[start : start + number]].mean(axis=0) for order in draws]
            for start in (0, number)
        ]
        found.append(_overlap(*(_like(energy, np.array(part)) for part in means)))
    labels = {"pieces": _numbers(energy.sizes["sequence"])}
    return xr.DataArray(np.array(found).T, labels, ("draw", "pieces"))


def _numbers(pieces: int) -> list[int]:
    """Powers of two up to half of the pieces."""
    return [2**power for power in range(pieces.bit_length()) if 2 * 2**power <= pieces]


def _with_intervals(values: xr.Dataset) -> xr.Dataset:
    """Within and between kinds with intervals over kinds, settling with a range of draws."""
    overlap = values.overlap
    same = overlap.kind == overlap.other
    # Each kind is in several pairs: their interval is of draws of kinds, not of means over pairs.
    parts = {"within": overlap.where(same).mean("other"), "between": overlap.where(~same)}
    over_kinds = bootstrap(xr.Dataset(parts).rename(kind="sequence"))
    drawn = values.settled
    low, high = (drawn.quantile(q, "draw").drop_vars("quantile") for q in (0.025, 0.975))
    settled = xr.concat([drawn.mean("draw"), low, high], over_kinds.interval)
    settled.attrs = {"long_name": "overlap with others' static selection", "units": "1"}
    return values.drop_vars("settled").assign(
        within=over_kinds.within, between=over_kinds.between, settled=settled
    )


def _chance(model: PreTrainedModel, kinds: int) -> xr.DataArray:
    """Share of neurons that so many random selections keep, mean over layers."""
    widths = [block.d_ff for block in feedforwards(model)]
    each = [
        binom.pmf(np.arange(kinds + 1), kinds, analysis.kept_count(_DENSITY, width) / width)
        for width in widths
    ]
    return xr.DataArray(np.mean(each, axis=0), dims="kinds")


def _caption(data: xr.Dataset, name: str, pieces: int, piece: int, chance: float) -> str:
    kinds = data.sizes["kind"]
    share = data.share.sel(weights="trained")

    def shares(number: int) -> str:
        kind, random = (float(share.sel(dealt=dealt, kinds=number)) for dealt in DEALT)
        return f"{kind:.3f} (pieces dealt at random {random:.3f}, chance {data.chance[number]:.4f})"

    def both(values: xr.DataArray) -> str:
        model, other = (said(values.sel(weights=weights)) for weights in WEIGHTS)
        return f"model {model}, random weights {other}"

    most = int(data.pieces[-1])
    return (
        f"Neurons that {name} keeps at density {_DENSITY} for {kinds} kinds of text, each of "
        f"{pieces} pieces of {piece} tokens; means over layers. Overlap of the selections of two "
        f"pieces (chance {chance:.2f}), of one kind: {both(data.within)}; of two kinds: "
        f"{both(data.between)} (95% bootstrap intervals over kinds). Share of a layer's neurons "
        f"that are kept by all kinds: {shares(kinds)}; by none: {shares(0)}; by one only: "
        f"{shares(1)}. Overlap of the static selection of one piece with that of another: "
        f"{both(data.settled.isel(pieces=0, drop=True))}; of {most} pieces with {most} others: "
        f"{both(data.settled.isel(pieces=-1, drop=True))} (bands: 95% of {_DRAWS} draws)."
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {atlas.__name__: atlas}
