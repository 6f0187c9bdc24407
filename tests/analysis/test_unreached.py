"""Experts that no token was routed to, in measures of overlap: nothing was selected of them."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking

EXPERTS, WIDTH = 4, 10


def made(reached: list[list[int]], seed: int = 0, **options: object) -> xr.Dataset:
    """Windows of 4 tokens of one mixture of four experts, of which these have energy in each."""
    model = helpers.proved("llama")
    ids = helpers.random_ids(1 + 4 * (len(reached) - 1))
    recording = helpers.record(model, ids, window=4, **options)
    recording = recording.isel(neuron=slice(0, EXPERTS * WIDTH), layer=[0]).load()
    energy = np.random.default_rng(seed).random((len(reached), EXPERTS, WIDTH))
    for window, experts in enumerate(reached):
        energy[window, [e for e in range(EXPERTS) if e not in experts]] = 0
    values = energy.reshape(1, 1, len(reached), -1).astype(np.float32)
    return recording.assign(energy=(recording.energy.dims, values)).assign_coords(
        d_ff=("layer", [EXPERTS * WIDTH]), experts=("layer", [EXPERTS])
    )


def by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of the larger half of each expert that has energy in both."""
    sets: list[set[tuple[int, int]]] = [set(), set()]
    for expert, pair in enumerate(
        zip(first.reshape(EXPERTS, -1), second.reshape(EXPERTS, -1), strict=True)
    ):
        if all(each.any() for each in pair):
            for found, each in zip(sets, pair, strict=True):
                found.update((expert, int(j)) for j in np.argsort(-each)[: WIDTH // 2])
    a, b = sets
    return len(a & b) / len(a | b) if a and b else np.nan


PHASES = ("prompt", "generation")
REACHED = [[0, 1], [0, 1, 2], [0], [1, 2], [3]]


def test_drift() -> None:
    recording = made(REACHED)
    energy = recording.energy.values[0, 0].astype(np.float64)
    got = flocking.drift(recording, 0.5).isel(sequence=0, layer=0)
    for cut, length in enumerate((1, 5, 9, 13), start=1):
        prompt = energy[:cut].sum(axis=0)
        for later in range(cut, len(REACHED)):
            here = got.sel(prompt_length=length, distance=4 * (later - cut))
            np.testing.assert_allclose(here.jaccard, by_hand(prompt, energy[later]))
    assert np.isnan(got.jaccard.sel(prompt_length=13, distance=0))  # expert 3 alone
    assert not np.isnan(got.captured_energy.sel(prompt_length=13, distance=0))


def test_halves() -> None:
    recording = made(REACHED)
    other = made([[0], [3], [3], [2, 3], [0, 1]], seed=1).assign_coords(sequence=[1])
    both = flocking.concat([recording, other])
    got = flocking.between_sequence_overlap(both, 0.5).isel(layer=0)
    halves = [
        [each.energy.values[0, 0, part].sum(axis=0) for part in (slice(1, 3), slice(3, 5))]
        for each in (recording, other)
    ]
    for one in range(2):
        np.testing.assert_allclose(got.within[one], by_hand(*halves[one]))
        np.testing.assert_allclose(
            got.between[one, 1 - one], by_hand(halves[one][0], halves[1 - one][1])
        )


def test_prompt_and_generation() -> None:
    recording = made(REACHED, prompt_tokens=9)
    energy = recording.energy.values[0, 0].astype(np.float64)
    got = flocking.prompt_generation_overlap(recording, densities=[0.5])
    expected = by_hand(energy[:3].sum(axis=0), energy[3:].sum(axis=0))
    np.testing.assert_allclose(got.squeeze(), expected)
    # Unlike the selections themselves, in which what was not reached agrees by its order.
    parts = [flocking.select(flocking.statistic(recording, phase=p)) for p in PHASES]
    assert flocking.jaccard(*parts).item() != pytest.approx(expected)


def test_nothing_in_common_is_no_overlap() -> None:
    recording = made([[0], [0], [1], [2], [3]])
    assert np.isnan(flocking.drift(recording).jaccard).sum() > 0
    assert np.isnan(
        flocking.between_sequence_overlap(
            flocking.concat([recording, recording.assign_coords(sequence=[1])])
        ).within
    ).all()


def test_the_oracle_of_an_expert_that_keeps_nothing() -> None:
    recording = made([[0, 1, 2, 3]] * 3)
    later = flocking.statistic(recording)
    kept = flocking.select(later)
    kept = kept & (kept.neuron >= WIDTH)  # nothing of the first expert
    share = flocking.captured_energy(kept, later, of="oracle")
    np.testing.assert_allclose(share, 1)
