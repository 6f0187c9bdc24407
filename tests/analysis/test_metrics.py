"""Closed forms against all pairs of tokens, permutations, and cases with a known answer."""

from __future__ import annotations

import itertools

import helpers
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

import flocking
from flocking.recording import MOMENT_DIMS, Moments, Windows


def recording_of(z: np.ndarray, window: int = 5) -> xr.Dataset:
    """A recording of one layer made from given activations, (token, neuron)."""
    tokens, d_ff = z.shape
    numbers = np.concatenate([[0], 1 + np.arange(tokens - 1) // window])
    moments = Moments.zeros(1, numbers[-1] + 1, d_ff, ranks=True)
    norm, l1 = moments.update(
        torch.tensor(z, dtype=torch.float32)[None], Windows.of(torch.tensor(numbers)[None])
    )
    return xr.Dataset(
        {
            "energy": (MOMENT_DIMS, moments.energy[:, None].numpy()),
            "mass": (MOMENT_DIMS, moments.mass[:, None].numpy()),
            "rank": (MOMENT_DIMS, moments.rank[:, None].numpy()),
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
    with pytest.warns(UserWarning, match="1 of 1 sequences have fewer than two tokens"):
        assert bool(flocking.flocking_score(recording).isnull().all())
    assert bool(flocking.effective_neurons(recording).isnull().all()) == (length == 1)


def test_from_record_to_metric(tiny) -> None:
    """Over a padded batch, on every architecture, from raw activations."""
    texts = helpers.random_ids(40, 15)
    recording = flocking.record(tiny, texts, ranks=True, window=8, progress=False)
    for number, text in enumerate(texts):
        for layer, z in helpers.activations(tiny, text).items():
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
    recording = flocking.record(llama, helpers.random_ids(20, 9), progress=False)
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


# --------------------------------------------------------------------------------------
# Between sequences, by double loops over raw activations


@pytest.fixture(scope="module")
def repetitive() -> tuple:
    """Three texts of 9 different tokens only, of different lengths; 17 are common to all."""
    model = helpers.build("llama")
    random = np.random.default_rng(0)
    ids = [random.integers(5, 14, n).tolist() for n in (17, 25, 19)]
    recording = flocking.record(model, ids, window=8, relative=True, ranks=True, progress=False)
    raw = [
        {layer: relative(z.double().numpy()) for layer, z in helpers.activations(model, i).items()}
        for i in ids
    ]
    return ids, raw, recording


def mean_cosine(a: tuple, b: tuple, *, same_sequence: bool, different_tokens: bool) -> float:
    """Over pairs of one token each, without a token and itself; a and b are (ids, r)."""
    found = []
    for t, (i, x) in enumerate(zip(*a, strict=True)):
        for u, (j, y) in enumerate(zip(*b, strict=True)):
            if not (same_sequence and t == u) and not (different_tokens and i == j):
                found.append(x @ y)
    return float(np.mean(found))


@pytest.mark.parametrize("different", [False, True])
def test_within_and_between_against_double_loops(repetitive: tuple, different: bool) -> None:
    ids, raw, recording = repetitive
    within = flocking.consistency(recording, different_tokens=different)
    between = flocking.between_consistency(recording, different_tokens=different)
    specific = flocking.specificity(recording, different_tokens=different)
    for layer in (0, 1):
        whole = [(i[1:], r[layer][1:]) for i, r in zip(ids, raw, strict=True)]
        common = [(i[:16], r[:16]) for i, r in whole]  # equal token counts
        own = []
        for number in range(3):
            options = {"same_sequence": True, "different_tokens": different}
            expected = mean_cosine(whole[number], whole[number], **options)
            got = within.sel(sequence=number, layer=layer).item()
            assert got == pytest.approx(expected, abs=5e-5 if different else 1e-6)
            own.append(mean_cosine(common[number], common[number], **options))
        for a, b in itertools.permutations(range(3), 2):
            options = {"same_sequence": False, "different_tokens": different}
            expected = mean_cosine(common[a], common[b], **options)
            where = {"sequence": a, "other": b, "layer": layer}
            assert between.sel(where).item() == pytest.approx(expected, abs=5e-5)
            c = (own[a] + own[b]) / 2
            expected = (c - expected) / (1 - expected)
            assert specific.sel(where).item() == pytest.approx(expected, abs=2e-4)
    for values in (between, specific):
        assert values.dims == ("sequence", "other", "layer")
        assert values.where(values.sequence == values.other).isnull().all()
        assert values.where(values.sequence != values.other).notnull().sum() == 3 * 2 * 2


def test_leaving_identical_tokens_out_matters_here(repetitive: tuple) -> None:
    recording = repetitive[2]
    all_pairs = flocking.between_consistency(recording)
    different = flocking.between_consistency(recording, different_tokens=True)
    assert (different < all_pairs - 1e-3).sum() > 6


def pair_of(a: np.ndarray, b: np.ndarray) -> xr.Dataset:
    both = [recording_of(z) for z in (a, b)]
    joined = xr.concat(both, "sequence", data_vars="all", coords="minimal", compat="override")
    tokens = np.bincount(both[0].token_window.values[0])
    return joined.assign(tokens=(("sequence", "window"), np.stack([tokens, tokens]))).assign_coords(
        layer=[0],
        sequence=[0, 1],
        token_window=(("sequence", "token"), np.stack([both[0].token_window.values[0]] * 2)),
    )


def test_specificity_known_answers() -> None:
    random = np.random.default_rng(0)
    half = np.zeros((21, 40))
    left, right = half.copy(), half.copy()
    left[:, :20] = random.standard_normal(20)
    right[:, 20:] = random.standard_normal(20)
    own = flocking.specificity(pair_of(left, right)).values[0, 1, 0]
    assert own == pytest.approx(1, abs=1e-5)
    tokens = random.standard_normal((21, 40))
    shuffled = np.concatenate([tokens[:1], tokens[:0:-1]])
    c = flocking.between_consistency(pair_of(tokens, shuffled)).values[0, 1, 0]
    b = mean_over_pairs(relative(tokens)[1:])
    assert c == pytest.approx((b * 380 + 20) / 400, rel=1e-5)  # the same tokens twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.isel(sequence=[0]), "expected two sequences or more, got 1"),
        (lambda r: r.drop_vars("relative"), r"make it with record\(\.\.\., relative=True\)"),
        (lambda r: r.drop_vars("mass"), "no variable 'mass'"),
        (
            lambda r: r.drop_vars("relative").assign(
                relative=r.relative.isel(layer=[0]).rename(layer="relative_layer")
            ),
            "of some layers only",
        ),
    ],
)
def test_what_is_missing_is_named(repetitive: tuple, change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.specificity(change(repetitive[2]), different_tokens=True)


def test_sequences_that_share_no_window(llama) -> None:
    recording = flocking.record(llama, helpers.random_ids(40, 5), window=16, progress=False)
    with pytest.raises(ValueError, match="has 4 tokens of a prompt after the first"):
        flocking.between_consistency(recording)


def test_only_a_recording_is_taken(repetitive: tuple) -> None:
    for metric in (flocking.consistency, flocking.effective_neurons, flocking.specificity):
        with pytest.raises(TypeError, match=r"expected a recording .*, got a DataArray"):
            metric(repetitive[2].energy)


def test_different_tokens_of_texts_that_repeat_one_word() -> None:
    """Nearly all pairs are left out: what is measured is not the roundings of those."""
    model = helpers.build("llama", max_position_embeddings=1024)
    texts = [[5, *[7] * 899, 9], [11, 12, *[7] * 899], [5, *[7] * 900]]
    recording = flocking.record(model, texts, relative=True, progress=False)
    with pytest.warns(UserWarning, match="1 of 3 sequences have no two tokens with different ids"):
        within = flocking.consistency(recording, different_tokens=True)
    assert np.isnan(within[2]).all()
    between = flocking.between_consistency(recording, different_tokens=True)
    raw = [helpers.activations(model, ids) for ids in texts[:2]]
    for layer in range(recording.sizes["layer"]):
        r = [relative(each[layer].double().numpy())[1:] for each in raw]
        for got, a, b in ((within[0], 0, 0), (within[1], 1, 1), (between[0, 1], 0, 1)):
            different = np.array(texts[a][1:])[:, None] != np.array(texts[b][1:])
            expected = (r[a] @ r[b].T)[different].mean()
            assert got[layer].item() == pytest.approx(expected, abs=2e-5)


def test_a_text_without_tokens_that_count_is_nan_in_both_measures() -> None:
    recording = helpers.record(
        helpers.proved("llama"), [[5], *helpers.random_ids(20)], relative=True
    )
    for different in (False, True):
        with pytest.warns(UserWarning, match="1 of 2 sequences have fewer than two tokens"):
            got = flocking.consistency(recording, different_tokens=different)
        assert np.isnan(got[0]).all()
        assert not np.isnan(got[1]).any()
