"""Closed forms against all pairs of tokens, permutations, and cases with a known answer."""

from __future__ import annotations

import itertools

import conftest
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

import flocking
from flocking.moments import Moments, Windows


def recording_of(z: np.ndarray, window: int = 5) -> xr.Dataset:
    """A recording of one layer made from given activations, (token, neuron)."""
    tokens, d_ff = z.shape
    numbers = np.concatenate([[0], 1 + np.arange(tokens - 1) // window])
    moments = Moments.zeros(1, numbers[-1] + 1, d_ff, ranks=True)
    norm, l1 = moments.update(
        torch.tensor(z, dtype=torch.float32)[None], Windows.of(torch.tensor(numbers)[None])
    )
    dims = ("sequence", "layer", "window", "neuron")
    return xr.Dataset(
        {
            "energy": (dims, moments.energy[:, None].numpy()),
            "mass": (dims, moments.mass[:, None].numpy()),
            "rank": (dims, moments.rank[:, None].numpy()),
            "norm": (("sequence", "layer", "token"), norm[:, None].numpy()),
            "l1": (("sequence", "layer", "token"), l1[:, None].numpy()),
        },
        {
            "window": np.arange(numbers[-1] + 1),
            "phase": ("window", ["first"] + ["prompt"] * numbers[-1]),
            "d_ff": ("layer", [d_ff]),
            "token_window": (("sequence", "token"), numbers[None]),
        },
    )


def relative(z: np.ndarray) -> np.ndarray:
    return np.abs(z) / np.linalg.norm(z, axis=1, keepdims=True)


def mean_over_pairs(vectors: np.ndarray) -> float:
    return float(np.mean([a @ b for a, b in itertools.combinations(vectors, 2)]))


@pytest.fixture
def z() -> np.ndarray:
    """23 tokens, 40 neurons that flock somewhat; the first token is an outlier."""
    random = np.random.default_rng(0)
    z = random.standard_normal((23, 40)) * np.exp(random.standard_normal(40))
    z[0] *= 300
    return z


def test_consistency_is_the_mean_over_all_pairs(z: np.ndarray) -> None:
    got = flocking.consistency(recording_of(z)).item()
    assert got == pytest.approx(mean_over_pairs(relative(z)[1:]), rel=1e-5)


def test_chance_is_what_permuting_neurons_gives(z: np.ndarray) -> None:
    """Within four standard errors of a simulation; and exact in expectation."""
    random = np.random.default_rng(1)
    r = relative(z)[1:]
    simulated = [mean_over_pairs(random.permuted(r, axis=1)) for _ in range(400)]
    got = flocking.chance_consistency(recording_of(z)).item()
    error = np.std(simulated) / np.sqrt(len(simulated))
    assert error < 1e-3
    assert abs(got - np.mean(simulated)) < 4 * error
    sums = r.sum(1)
    exact = np.mean([a * b / 40 for a, b in itertools.combinations(sums, 2)])
    assert got == pytest.approx(exact, rel=1e-5)


def test_score_is_consistency_between_chance_and_one(z: np.ndarray) -> None:
    recording = recording_of(z)
    c, c0 = flocking.consistency(recording).item(), flocking.chance_consistency(recording).item()
    assert 0 < c0 < c < 1
    assert flocking.flocking_score(recording).item() == pytest.approx((c - c0) / (1 - c0))


def test_rank_consistency_is_spearmans_mean(z: np.ndarray) -> None:
    r = relative(z)[1:]
    pairs = [spearmanr(a, b).statistic for a, b in itertools.combinations(r, 2)]
    got = flocking.rank_consistency(recording_of(z)).item()
    assert got == pytest.approx(np.mean(pairs), rel=1e-4)


def test_effective_neurons_is_the_participation_ratio(z: np.ndarray) -> None:
    energy = (relative(z)[1:] ** 2).sum(0)
    got = flocking.effective_neurons(recording_of(z)).item()
    assert got == pytest.approx(energy.sum() ** 2 / (energy**2).sum(), rel=1e-5)


def test_known_answers() -> None:
    random = np.random.default_rng(2)
    same = recording_of(np.tile(random.standard_normal(64), (20, 1)))
    assert flocking.consistency(same).item() == pytest.approx(1, abs=1e-5)
    assert flocking.flocking_score(same).item() == pytest.approx(1, abs=1e-5)
    assert flocking.rank_consistency(same).item() == pytest.approx(1, abs=1e-5)

    independent = recording_of(random.standard_normal((400, 512)))
    assert flocking.flocking_score(independent).item() == pytest.approx(0, abs=2e-3)
    assert flocking.rank_consistency(independent).item() == pytest.approx(0, abs=2e-3)

    uniform = recording_of(np.ones((9, 32)))
    assert flocking.effective_neurons(uniform).item() == pytest.approx(32)
    one = np.zeros((9, 32))
    one[:, 3] = 1
    assert flocking.effective_neurons(recording_of(one)).item() == pytest.approx(1)
    disjoint = recording_of(np.repeat(np.eye(10), 1, axis=0))
    assert flocking.consistency(disjoint).item() == pytest.approx(0, abs=1e-6)


def test_tokens_of_zeros_count_as_none(z: np.ndarray) -> None:
    without = recording_of(z)
    zeros = recording_of(np.insert(z, [5, 9], 0, axis=0))
    for metric in (flocking.consistency, flocking.chance_consistency, flocking.rank_consistency):
        assert metric(zeros).item() == pytest.approx(metric(without).item(), rel=1e-5)


def test_a_part_of_a_recording(z: np.ndarray) -> None:
    """Windows that are selected bring their own tokens with them."""
    part = recording_of(z).isel(window=[2, 3])
    r = relative(z)[6:16]
    assert flocking.consistency(part).item() == pytest.approx(mean_over_pairs(r), rel=1e-5)
    sums = r.sum(1)
    exact = np.mean([a * b / 40 for a, b in itertools.combinations(sums, 2)])
    assert flocking.chance_consistency(part).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("length", [1, 2])
def test_too_few_tokens_give_nan(llama, length: int) -> None:
    recording = flocking.record(llama, [list(range(5, 5 + length))], progress=False)
    assert bool(flocking.flocking_score(recording).isnull().all())
    assert bool(flocking.effective_neurons(recording).isnull().all()) == (length == 1)


def test_from_record_to_metric(tiny) -> None:
    """Over a padded batch, on every architecture, from raw activations."""
    texts = conftest.random_ids(40, 15)
    recording = flocking.record(tiny, texts, ranks=True, window=8, progress=False)
    for number, text in enumerate(texts):
        for layer, z in conftest.activations(tiny, text).items():
            mine = recording.sel(sequence=[number], layer=[layer])
            reference = recording_of(z.double().numpy(), window=8)
            r = relative(z.double().numpy())[1:]
            assert flocking.consistency(mine).item() == pytest.approx(mean_over_pairs(r), rel=1e-4)
            for metric in (
                flocking.chance_consistency,
                flocking.rank_consistency,
                flocking.effective_neurons,
            ):
                assert metric(mine).item() == pytest.approx(metric(reference).item(), rel=1e-4)


def test_labelled_results(llama) -> None:
    recording = flocking.record(llama, conftest.random_ids(20, 9), progress=False)
    for metric in ("consistency", "chance_consistency", "flocking_score", "effective_neurons"):
        values = getattr(flocking, metric)(recording)
        assert values.name == metric
        assert values.dims == ("sequence", "layer")
        assert values.dtype == np.float64
        assert values.attrs["units"]
        assert values.module.values.tolist() == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_ranks_must_have_been_recorded(llama) -> None:
    recording = flocking.record(llama, [5, 6, 7], progress=False)
    with pytest.raises(ValueError, match=r"record\(\.\.\., ranks=True\)"):
        flocking.rank_consistency(recording)
