"""Every public measure by brute force: loops over tokens and pairs of raw relative activations.

Nothing here reads a recording. A text is its relative activations in one layer, with each token's
window by a rule of its own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection
from typing import NamedTuple

import helpers
import numpy as np
import transformers as tf
import xarray as xr
from scipy.stats import rankdata

DENSITY = 0.5


class Span(NamedTuple):
    """Tokens of one text in one layer: r in float64 (token, neuron)."""

    ids: np.ndarray
    r: np.ndarray
    window: np.ndarray
    phase: np.ndarray

    def of(self, windows: Collection[int], phases: Collection[str]) -> Span:
        kept = np.isin(self.window, list(windows)) & np.isin(self.phase, list(phases))
        return Span(*(each[kept] for each in self))


class Reference(NamedTuple):
    """What a recording of these texts must give."""

    spans: list[dict[int, Span]]  # by sequence, then by layer
    experts: int
    width: int

    @classmethod
    def of(
        cls, model: tf.PreTrainedModel, fed: list[list[int]], prompts: list[int], window: int
    ) -> Reference:
        """From a model, the tokens that it read, and how many of them are the prompt's."""
        rest = max(-(-(n - 1) // window) for n in prompts)
        spans = []
        for ids, n in zip(fed, prompts, strict=True):
            numbers, phases = [], []
            for t in range(len(ids)):
                own = 0 if t == 0 else 1 + (t - 1) // window
                numbers.append(own if t < n else 1 + rest + (t - n) // window)
                phases.append("first" if t == 0 else "prompt" if t < n else "generation")
            labels = (np.array(numbers), np.array(phases))
            spans.append(
                {
                    layer: Span(np.array(ids), helpers.relative(z), *labels)
                    for layer, z in helpers.activations(model, ids).items()
                }
            )
        return cls(spans, getattr(model.config, "num_local_experts", 1) or 1, window)


# --------------------------------------------------------------------------------------
# One sequence


def _pairs(vectors: np.ndarray) -> float:
    found = [a @ b for a, b in itertools.combinations(vectors, 2)]
    return float(np.mean(found)) if found else np.nan


def _consistency(span: Span) -> float:
    return _pairs(span.r)


def _different(span: Span) -> float:
    found = [
        span.r[t] @ span.r[u]
        for t, u in itertools.combinations(range(len(span.r)), 2)
        if span.ids[t] != span.ids[u]
    ]
    return float(np.mean(found))


def _chance(span: Span) -> float:
    sums = span.r.sum(1)
    return float(np.mean([a * b for a, b in itertools.combinations(sums, 2)])) / span.r.shape[1]


def _score(span: Span) -> float:
    return (_consistency(span) - _chance(span)) / (1 - _chance(span))


def _ranks(span: Span) -> float:
    ranks = np.stack([rankdata(row) for row in span.r])
    ranks -= ranks.mean(1, keepdims=True)
    return _pairs(ranks / np.linalg.norm(ranks, axis=1, keepdims=True))


def _effective(span: Span) -> float:
    energy = (span.r**2).sum(0)
    return float(energy.sum() ** 2 / (energy**2).sum())


def _statistic(span: Span) -> np.ndarray:
    return np.sqrt((span.r**2).sum(0))


def kept(s: np.ndarray, experts: int) -> set[int]:
    """Indices of the neurons with the largest statistic, half of each expert's."""
    size = len(s) // experts
    found = set()
    for expert in range(experts):
        mine = range(expert * size, (expert + 1) * size)
        ordered = sorted(mine, key=lambda j: (-s[j], j))
        found |= set(ordered[: int(DENSITY * size + 1e-9)])
    return found


def _overlap(parts: list[Span], experts: int) -> float:
    """Jaccard overlap of what two parts select, in experts that had a token in both."""
    statistics = [_statistic(part) for part in parts]
    size = len(statistics[0]) // experts
    there = [
        j
        for expert in range(experts)
        for j in range(expert * size, (expert + 1) * size)
        if all(s[expert * size : (expert + 1) * size].any() for s in statistics)
    ]
    a, b = (kept(s, experts) & {*there} for s in statistics)
    return len(a & b) / len(a | b)


# --------------------------------------------------------------------------------------
# All sequences, layer by layer: a measure is a function of a reference, windows, and a sequence


def _one(function: Callable[[Span], object]) -> Callable[..., object]:
    def of(reference: Reference, windows: Collection[int], sequence: int, layer: int) -> object:
        return function(reference.spans[sequence][layer].of(windows, ("prompt", "generation")))

    return of


def _whole_statistic(
    reference: Reference, windows: Collection[int], sequence: int, layer: int
) -> np.ndarray:
    span = reference.spans[sequence][layer]
    return _statistic(span.of(windows, ("first", "prompt", "generation")))


def _phases(reference: Reference, windows: Collection[int], sequence: int, layer: int) -> float:
    span = reference.spans[sequence][layer]
    parts = [span.of(windows, ("first", "prompt")), span.of(windows, ("generation",))]
    if not all(len(part.r) for part in parts):
        return np.nan
    return _overlap(parts, reference.experts)


def _common(reference: Reference, windows: Collection[int]) -> list[int]:
    """Windows of the prompt that every text fills."""
    texts = [spans[0] for spans in reference.spans]
    counts = {
        w: [int(((text.window == w) & (text.phase == "prompt")).sum()) for text in texts]
        for w in sorted(windows)
    }
    return [w for w, each in counts.items() if min(each) == max(each) > 0]


def _between(
    reference: Reference, windows: Collection[int], a: int, b: int, layer: int, different: bool
) -> float:
    common = _common(reference, windows)
    one, two = (reference.spans[n][layer].of(common, ("prompt",)) for n in (a, b))
    found = [
        x @ y
        for i, x in zip(one.ids, one.r, strict=True)
        for j, y in zip(two.ids, two.r, strict=True)
        if not different or i != j
    ]
    return float(np.mean(found))


def _specificity(
    reference: Reference, windows: Collection[int], a: int, b: int, layer: int, different: bool
) -> float:
    common = _common(reference, windows)
    own = [reference.spans[n][layer].of(common, ("prompt",)) for n in (a, b)]
    c = np.mean([(_different if different else _consistency)(span) for span in own])
    between = _between(reference, windows, a, b, layer, different)
    return float((c - between) / (1 - between))


def _halves(reference: Reference, windows: Collection[int], a: int, b: int, layer: int) -> float:
    common = _common(reference, windows)
    span = reference.spans[0][0]
    sizes = [int((span.window == window).sum()) for window in common]
    common = [w for w, size in zip(common, sizes, strict=True) if size == max(sizes)]
    half = len(common) // 2
    first = reference.spans[a][layer].of(common[:half], ("prompt",))
    second = reference.spans[b][layer].of(common[half : 2 * half], ("prompt",))
    return _overlap([first, second], reference.experts)


_SINGLE: dict[str, Callable[..., object]] = {
    "consistency": _one(_consistency),
    "different_tokens": _one(_different),
    "chance_consistency": _one(_chance),
    "flocking_score": _one(_score),
    "rank_consistency": _one(_ranks),
    "effective_neurons": _one(_effective),
    "statistic": _whole_statistic,
    "prompt_generation_overlap": _phases,
    "within": lambda reference, windows, n, layer: _halves(reference, windows, n, n, layer),
}
_PAIRS: dict[str, Callable[..., float]] = {
    "between_consistency": lambda *args: _between(*args, different=False),
    "between_different": lambda *args: _between(*args, different=True),
    "specificity": lambda *args: _specificity(*args, different=False),
    "specificity_different": lambda *args: _specificity(*args, different=True),
    "between": _halves,
}


def expected(name: str, reference: Reference, windows: Collection[int]) -> xr.DataArray:
    """A measure of all sequences and layers, labelled 0, 1, ..."""
    sequences, layers = range(len(reference.spans)), sorted(reference.spans[0])
    labels = {"sequence": list(sequences), "layer": layers}
    with warnings.catch_warnings(action="ignore"):
        if name in _SINGLE:
            values = [
                [_SINGLE[name](reference, windows, n, layer) for layer in layers] for n in sequences
            ]
            dims = ("sequence", "layer", *(("neuron",) if name == "statistic" else ()))
            return xr.DataArray(np.array(values), labels, dims)
        values = np.full((len(sequences), len(sequences), len(layers)), np.nan)
        for a, b in itertools.permutations(sequences, 2):
            for place, layer in enumerate(layers):
                values[a, b, place] = _PAIRS[name](reference, windows, a, b, layer)
    return xr.DataArray(values, labels | {"other": list(sequences)}, ("sequence", "other", "layer"))
