"""On the embedded model and packaged passages, every number from raw activations, to 1e-4."""

from __future__ import annotations

import itertools

import helpers
import numpy as np
import pytest
import xarray as xr
from scipy.stats import rankdata

import flocking

TOKENS, WINDOW = 65, 16


@pytest.fixture(scope="module")
def real() -> tuple[list[list[int]], np.ndarray, xr.Dataset]:
    """Ids, r as float64 (sequence, layer, token, neuron), and the recording."""
    model, tokenizer = flocking.load()
    ids = [tokenizer(text)["input_ids"][:TOKENS] for text in flocking.passages()[4:7]]
    z = [list(helpers.activations(model, row).values()) for row in ids]
    z = np.abs(np.array([[layer.numpy() for layer in row] for row in z], np.float64))
    recording = flocking.record(
        model, ids, tokenizer=tokenizer, window=WINDOW, ranks=True, relative=True, progress=False
    )
    return ids, z / np.linalg.norm(z, axis=-1, keepdims=True), recording


def over_pairs(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Mean over wanted (token, token) of a gram matrix, (..., token, token)."""
    return (values * wanted).sum((-2, -1)) / wanted.sum()


def test_within(real: tuple) -> None:
    ids, r, recording = real
    r = r[:, :, 1:]
    distinct = ~np.eye(TOKENS - 1, dtype=bool)
    gram = r @ r.swapaxes(-1, -2)
    consistency = over_pairs(gram, distinct)
    l1 = r.sum(-1)
    chance = over_pairs(l1[..., None] * l1[..., None, :] / r.shape[-1], distinct)
    ranks = rankdata(r, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=-1, keepdims=True)
    energy = (r**2).sum(2)
    expected = {
        flocking.consistency: consistency,
        flocking.chance_consistency: chance,
        flocking.flocking_score: (consistency - chance) / (1 - chance),
        flocking.rank_consistency: over_pairs(ranks @ ranks.swapaxes(-1, -2), distinct),
    }
    for metric, values in expected.items():
        np.testing.assert_allclose(metric(recording), values, atol=1e-4)
    neurons = energy.sum(-1) ** 2 / (energy**2).sum(-1)
    np.testing.assert_allclose(flocking.effective_neurons(recording), neurons, rtol=1e-4)
    other = np.array([np.not_equal.outer(row[1:], row[1:]) for row in ids])
    values = [over_pairs(g, o) for g, o in zip(gram, other, strict=True)]
    got = flocking.consistency(recording, different_tokens=True)
    np.testing.assert_allclose(got, values, atol=1e-4)


@pytest.mark.parametrize("different", [False, True])
def test_between(real: tuple, different: bool) -> None:
    ids, r, recording = real
    r = r[:, :, 1:]
    between = flocking.between_consistency(recording, different_tokens=different)
    specificity = flocking.specificity(recording, different_tokens=different)
    own = flocking.consistency(recording, different_tokens=different).values
    for a, b in itertools.permutations(range(3), 2):
        wanted = np.ones((TOKENS - 1, TOKENS - 1), bool)
        if different:
            wanted = np.not_equal.outer(ids[a][1:], ids[b][1:])
        expected = over_pairs(r[a] @ r[b].swapaxes(-1, -2), wanted)
        np.testing.assert_allclose(between.values[a, b], expected, atol=1e-4)
        c = (own[a] + own[b]) / 2  # all texts are of one length, in whole windows
        np.testing.assert_allclose(
            specificity.values[a, b], (c - expected) / (1 - expected), atol=1e-4
        )


def test_selections(real: tuple) -> None:
    _, r, recording = real
    early, late = r[:, :, :33], r[:, :, 33:]
    k = r.shape[-1] // 2
    energies = [(part**2).sum(2) for part in (early, late)]
    order = [np.argsort(-energy, axis=-1, kind="stable")[..., :k] for energy in energies]
    masks = [np.zeros(energies[0].shape, bool) for _ in order]
    for mask, chosen in zip(masks, order, strict=True):
        np.put_along_axis(mask, chosen, True, axis=-1)
    prompt = flocking.select(flocking.statistic(recording, stop=33))
    later = flocking.statistic(recording, start=33)
    union = (masks[0] | masks[1]).sum(-1)
    expected = (masks[0] & masks[1]).sum(-1) / union
    got = flocking.jaccard(prompt, flocking.select(later))
    np.testing.assert_allclose(got, expected, atol=2.5 / k)  # a near-tie or two may flip
    assert np.isclose(got, expected, atol=1e-9).mean() > 0.9
    share = (masks[0] * energies[1]).sum(-1) / energies[1].sum(-1)
    np.testing.assert_allclose(flocking.captured_energy(prompt, later), share, atol=1e-4)
    drift = flocking.drift(recording, prompt_lengths=[33])
    np.testing.assert_allclose(drift.captured_energy[:, :, 0].mean("distance"), share, atol=1e-4)
