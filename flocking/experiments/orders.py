"""How much of flocking is the order of tokens, which words they are, and the model alone.

The controls of the appendix of Dong, Chen and Chi (2024, arXiv 2404.01365): the same tokens
permuted, and tokens drawn at random from the vocabulary, beside the text as it is. Called as the
experiments of :mod:`flocking.experiments.activations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap
from flocking.experiments.common import (
    against_control,
    counted,
    dimension,
    finished,
    said,
    same_length,
)
from flocking.models import vocabulary_of

ORDERS = ["in order", "permuted", "drawn"]
STEPS = ["order", "words"]  # from a text in order to its permutation, and on to drawn tokens
COMPARED = ["permuted", "drawn", "another text"]
MEASURES = ("flocking_score", "rank_consistency")
_DENSITY = 0.5


def token_order(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Flocking of texts in order, of the same tokens permuted, and of tokens drawn at random.

    All three have as many tokens. Special tokens and the first one stay where they are, in all
    three: models treat the first token unlike any other. The others are permuted within each
    text, or drawn uniformly, with replacement, from the vocabulary without special tokens.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens : int
        Of each text, from the first on.
    seed : int
        Of the permutations, of the drawn tokens, and of the control's weights.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        ``flocking_score`` and ``rank_consistency`` (interval, weights, order, layer);
        ``flocking_score_change`` and ``rank_consistency_change`` (interval, weights, step,
        layer), the paired differences in order - permuted (step "order") and permuted - drawn
        (step "words"); ``overlap`` (interval, weights, compared, layer), the Jaccard overlap at
        density 0.5 of the text's selection with that of its permutation, of drawn tokens, and of
        another text in order (mean over these). Means over layers are ``*_mean``;
        ``over_control_mean`` (interval, order) is the trained model's score minus the control's.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    ids, names = same_length(model, tokenizer, texts, tokens, 16)
    rows = [row for reading in readings(model, tokenizer, ids, seed).values() for row in reading]

    def measure(recording: xr.Dataset) -> xr.Dataset:
        parts = [
            recording.isel(sequence=slice(at, at + len(ids))).assign_coords(sequence=names)
            for at in range(0, len(rows), len(ids))
        ]
        measured = [
            xr.Dataset({name: getattr(analysis, name)(part) for name in MEASURES}) for part in parts
        ]
        values = xr.concat(
            [part.reset_coords(drop=True) for part in measured], dimension("order", ORDERS)
        )
        return values.assign(_overlaps(*parts))

    labels = list(range(len(rows)))
    values, source = against_control(
        model, tokenizer, rows, labels, seed, progress, measure, window=None, ranks=True
    )
    data = _with_changes(values)
    chance = analysis.chance_jaccard(_DENSITY)
    caption = _caption(data, source["model"], ids, chance)
    return finished(data, source, names, ids, seed, caption, chance=chance, density=_DENSITY)


def readings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    seed: int,
) -> dict[str, list[list[int]]]:
    """Each text in each of ``ORDERS``, of the same length; each has its own random numbers."""
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = set(tokenizer.get_vocab().values()) - special
    words = np.array(sorted(number for number in known if number < vocabulary_of(model)))
    permuted, drawn = [], []
    for number, text in enumerate(ids):
        random = np.random.default_rng((seed, number))
        row = np.array(text)
        free = np.flatnonzero([at > 0 and token not in special for at, token in enumerate(text)])
        mixed, other = row.copy(), row.copy()
        mixed[free] = random.permutation(row[free])
        other[free] = random.choice(words, len(free))
        permuted.append(mixed.tolist())
        drawn.append(other.tolist())
    return dict(zip(ORDERS, (ids, permuted, drawn), strict=True))


def _overlaps(*parts: xr.Dataset) -> dict[str, xr.DataArray]:
    """Of the selections of texts in order.

    ``overlap`` with those of the same text's other readings, (sequence, layer, compared), and
    ``another`` with those of all other texts in order, (sequence, layer, other).
    """
    own, *others = (_bare(analysis.statistic(part, start=1)) for part in parts)
    same = [analysis.overlap_of(own, other, _DENSITY).reset_coords(drop=True) for other in others]
    pairs = analysis.overlap_of(own, own.rename(sequence="other"), _DENSITY)
    pairs = pairs.reset_coords(drop=True)
    return {
        "overlap": xr.concat(same, dimension("compared", COMPARED[: len(same)])),
        "another": pairs.where(pairs.sequence != pairs.other),
    }


def _bare(values: xr.DataArray) -> xr.DataArray:
    """Values without what is said of them, but for the widths of layers and their experts."""
    needed = {*values.dims, "d_ff", "experts"}
    return values.drop_vars([name for name in values.coords if name not in needed])


def _with_changes(values: xr.Dataset) -> xr.Dataset:
    """All measures and their paired differences with intervals, by layer and over all layers."""
    changes = {}
    for name in MEASURES:
        text, permuted, drawn = (values[name].sel(order=order, drop=True) for order in ORDERS)
        changes[f"{name}_change"] = xr.concat(
            [text - permuted, permuted - drawn], dimension("step", STEPS)
        )
    values = values.assign(changes)
    means = values.mean("layer")
    score = means.flocking_score
    over = score.sel(weights="trained", drop=True) - score.sel(weights="control", drop=True)
    means = means.rename({name: f"{name}_mean" for name in means}).assign(over_control_mean=over)
    data = _compared(bootstrap(values.merge(means)))
    labels = {"flocking_score": "flocking score", "rank_consistency": "rank consistency"}
    for name, label in labels.items():
        data[name].attrs = {"long_name": label, "units": "1"}
        data[f"{name}_change"].attrs = {"long_name": f"difference in {label}", "units": "1"}
    data.overlap.attrs = {"long_name": "overlap with the text's selection", "units": "1"}
    return data.transpose("interval", "weights", "order", "step", "compared", "layer")


def _compared(data: xr.Dataset) -> xr.Dataset:
    """The overlaps with another text as one more of those that are compared.

    They came as values of pairs: each text is in several, and their intervals are of draws of
    texts, not of means over pairs.
    """
    overlaps = {}
    for name, another in (("overlap", "another"), ("overlap_mean", "another_mean")):
        added = data[another].expand_dims(compared=COMPARED[-1:])
        overlaps[name] = xr.concat([data[name], added], "compared")
    data = data.drop_dims("compared").drop_vars(["another", "another_mean"]).assign(overlaps)
    return data.assign_coords(compared=COMPARED)  # as text: concat makes objects of it


def _caption(data: xr.Dataset, name: str, ids: list[list[int]], chance: float) -> str:
    def each(variable: str, weights: str = "trained") -> str:
        values = data[f"{variable}_mean"].sel(weights=weights)
        (labels,) = set(values.dims) - {"interval"}
        return ", ".join(f"{label} {said(values, label, 3)}" for label in values[labels].values)

    score = data.flocking_score_mean.sel(weights="trained", interval="estimate")
    change = data.flocking_score_change_mean.sel(weights="trained", interval="estimate")
    text = float(score.sel(order="in order"))
    order, words = (float(change.sel(step=step)) / text for step in STEPS)
    alone = float(score.sel(order="drawn")) / text
    over = ", ".join(f"{label} {said(data.over_control_mean, label, 3)}" for label in ORDERS)
    return (
        f"Flocking of {name} on {counted(ids)} in order, on the same tokens permuted within each "
        "text, and on as many drawn at random from the vocabulary (the first token stays), with "
        f"95% bootstrap bands. Score over all layers (chance 0), model: {each('flocking_score')};"
        f" random weights: {each('flocking_score', 'control')}. Paired differences on the same "
        "texts, order: in order - permuted, words: permuted - drawn. Model: "
        f"{each('flocking_score_change')}; random weights: "
        f"{each('flocking_score_change', 'control')}. So, of the model's score on text, "
        f"the order {_adds(order)}, and the choice of words {_adds(words)} (their repetition "
        f"included: {_identical(ids):.1%} of a text's pairs of tokens are identical); random "
        f"tokens, where only the model is left, have {alone:.0%} of it. Model minus random "
        f"weights: {over}. Rank consistency, model: "
        f"{each('rank_consistency')}, differences {each('rank_consistency_change')}. Overlap of "
        f"the text's selection at density {_DENSITY} with the others', model: "
        f"{each('overlap')}; random weights: {each('overlap', 'control')}; chance {chance:.2f}."
    )


def _adds(share: float) -> str:
    return f"{'adds' if share > 0 else 'takes away'} {abs(share):.0%}"


def _identical(ids: list[list[int]]) -> float:
    """Share of a text's pairs of tokens, the first left out, that are one token twice."""
    shares = []
    for row in ids:
        counts = np.unique(row[1:], return_counts=True)[1]
        shares.append((counts * (counts - 1)).sum() / (len(row) - 1) / (len(row) - 2))
    return float(np.mean(shares))


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {token_order.__name__: token_order}
