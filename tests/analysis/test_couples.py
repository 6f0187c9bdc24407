"""Some pairs of sequences instead of all: which are drawn, and that their values are the same."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import helpers
import numpy as np
import pytest
import xarray as xr
from scipy import stats

import flocking
from flocking.analysis import between, couples, overlap

NAMES = [f"text {letter}" for letter in "dbaecf"]


@functools.cache
def made() -> xr.Dataset:
    ids = helpers.random_ids(41, 33, 65, 57, 49, 38, seed=4)
    recording = helpers.record(helpers.proved("llama"), ids, window=8, relative=True)
    return recording.assign_coords(sequence=NAMES)


MEASURES: dict[str, tuple[Callable[..., Any], Callable[[Any], xr.DataArray]]] = {
    "between_consistency": (flocking.between_consistency, lambda v: v),
    "between_different": (
        functools.partial(flocking.between_consistency, different_tokens=True),
        lambda v: v,
    ),
    "specificity": (flocking.specificity, lambda v: v),
    "specificity_different": (
        functools.partial(flocking.specificity, different_tokens=True),
        lambda v: v,
    ),
    "between_sequence_overlap": (flocking.between_sequence_overlap, lambda v: v.between),
}


@pytest.mark.parametrize("room", [2**25, 1])  # all sequences at a time, or two
@pytest.mark.parametrize("pairs", [1, 4, 15, "all"])
@pytest.mark.parametrize("measure", MEASURES)
def test_values_of_pairs_are_those_of_the_matrix(
    measure: str, pairs: Any, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(couples, "ROOM", room)
    function, taken = MEASURES[measure]
    matrix = taken(function(made()))
    got = taken(function(made(), pairs=pairs, seed=3))
    assert got.dims == ("pair", "layer")
    assert got.sizes["pair"] == (15 if pairs == "all" else pairs)
    assert got.attrs == matrix.attrs
    assert got.sequence.dims == got.other.dims == ("pair",)
    for number in range(got.sizes["pair"]):
        one = got.isel(pair=number)
        expected = matrix.sel(sequence=one.sequence.item(), other=one.other.item())
        np.testing.assert_allclose(one.values, expected.values, rtol=1e-12)
    assert got.layer.values.tolist() == [0, 1]
    assert set(matrix.coords) == set(got.coords)


def test_within_is_of_the_pairs_two_sequences() -> None:
    whole = flocking.between_sequence_overlap(made()).within
    for got in (
        flocking.between_sequence_overlap(made(), pairs=5),
        flocking.between_sequence_overlap(made().isel(layer=1), pairs=5),
    ):
        first, second = (whole.sel(sequence=got[name].values) for name in ("sequence", "other"))
        mean = (first.values + second.values) / 2
        if "layer" not in got.dims:
            mean = mean[:, 1]
        np.testing.assert_allclose(got.within.values, mean, rtol=1e-15)


def test_what_is_drawn() -> None:
    for n in (2, 3, 7, 40):
        every = [*itertools.combinations(range(n), 2)]
        assert couples.chosen(n, "all", 0).tolist() == [[*pair] for pair in every]
        for count in {1, len(every) // 2 or 1, len(every)}:
            drawn = [tuple(pair) for pair in couples.chosen(n, count, 5).tolist()]
            assert len({*drawn}) == count
            assert {*drawn} <= {*every}
            assert drawn == sorted(drawn)
            assert drawn == [tuple(pair) for pair in couples.chosen(n, count, 5).tolist()]
    assert couples.chosen(40, 9, 1).tolist() != couples.chosen(40, 9, 2).tolist()
    many = couples.chosen(100_000, 1000, 0)  # of five billion, which are not listed
    assert (many[:, 0] < many[:, 1]).all()
    assert many.max() < 100_000
    assert len(np.unique(many, axis=0)) == 1000


def test_every_pair_is_as_likely() -> None:
    counts = np.zeros((5, 5))
    for seed in range(2000):
        for i, j in couples.chosen(5, 3, seed):
            counts[i, j] += 1
    share = counts[np.triu_indices(5, 1)] / 2000  # 0.3 each, with a standard error of 0.01
    assert np.abs(share - 0.3).max() < 0.05


def test_groups_hold_every_pair_once_and_few_sequences() -> None:
    drawn = couples.chosen(60, 500, 1)
    for most in (2, 5, 16, 60):
        places, loads = [], 0
        for numbers, rows in couples.groups(drawn, most):
            assert len(rows) <= most
            assert {*rows.tolist()} == {*drawn[numbers].flatten().tolist()}
            places += numbers.tolist()
            loads += len(rows)
        assert sorted(places) == list(range(500))
        assert loads <= 2 * 500


def test_cost_does_not_grow_with_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences outside the drawn pairs are not looked at, and the others once."""
    measured: list[str] = []
    of_pairs = couples.of_pairs

    def counted(recording: xr.Dataset, drawn: np.ndarray, matrix: Any, each: int) -> Any:
        def counting(part: xr.Dataset) -> Any:
            measured.extend(part.sequence.values.tolist())
            return matrix(part)

        return of_pairs(recording, drawn, counting, each)

    for room in (between, overlap):
        monkeypatch.setattr(room, "of_pairs", counted)
    for measure, _ in MEASURES.values():
        measured.clear()
        drawn = measure(made(), pairs=2, seed=0)
        used = {*drawn.sequence.values.tolist(), *drawn.other.values.tolist()}
        assert len(used) < 6
        assert sorted(measured) == sorted(used)


@pytest.mark.parametrize(
    ("pairs", "kind", "message"),
    [
        (16, ValueError, "pairs=16: 6 sequences have 15 pairs of two different ones: give 15 or"),
        (0, ValueError, "pairs=0: give a whole number from 1 up"),
        (2.5, ValueError, "pairs=2.5: give a whole number"),
        ("some", ValueError, "pairs='some': give a number of pairs, or 'all'"),
        (True, TypeError, "pairs=True: give a number of pairs, or 'all'"),
        ([1, 2], TypeError, r"pairs=\[1, 2\]: give a number of pairs, or 'all'"),
    ],
)
@pytest.mark.parametrize("measure", ["between_consistency", "between_sequence_overlap"])
def test_other_pairs_are_refused(measure: str, pairs: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        MEASURES[measure][0](made(), pairs=pairs)
    with pytest.raises(ValueError, match="seed=-1: give a whole number from 0 up"):
        MEASURES[measure][0](made(), pairs=2, seed=-1)


# --------------------------------------------------------------------------------------
# Their bootstrap


def test_bootstrap_of_all_pairs_is_that_of_the_matrix() -> None:
    """The measure is symmetric, so that each pair once says what both orders say."""
    expected = flocking.bootstrap(flocking.between_consistency(made()), resamples=200, seed=2)
    names = sorted(range(6), key=NAMES.__getitem__)  # the bootstrap goes by sorted names
    ordered = flocking.between_consistency(made().isel(sequence=names), pairs="all")
    matrix = flocking.bootstrap(
        flocking.between_consistency(made().isel(sequence=names)), resamples=200, seed=2
    )
    got = flocking.bootstrap(ordered, resamples=200, seed=2)
    np.testing.assert_allclose(got.values, matrix.values, rtol=1e-12)
    assert got.dims == expected.dims
    np.testing.assert_allclose(
        got.sel(interval="estimate"), expected.sel(interval="estimate"), rtol=1e-12
    )


def test_bootstrap_of_drawn_pairs_by_hand() -> None:
    values = flocking.between_consistency(made(), pairs=6, seed=1)
    values = values.where(values.pair != 2)  # one is missing
    got = flocking.bootstrap(values, resamples=40, seed=7)
    names = np.unique([values.sequence.values, values.other.values])
    place = {name: number for number, name in enumerate(names)}
    draws = np.random.default_rng(7).multinomial(
        len(names), np.full(len(names), 1 / len(names)), 40
    )
    means = []
    for draw in draws:
        weights = [
            draw[place[s]] * draw[place[o]] if number != 2 else 0
            for number, (s, o) in enumerate(
                zip(values.sequence.values, values.other.values, strict=True)
            )
        ]
        total = sum(weights)
        row = values.fillna(0).values
        means.append(np.dot(weights, row) / total if total else np.full(2, np.nan))
    known = values.dropna("pair")
    count = len(np.unique([known.sequence.values, known.other.values]))
    assert count <= 6  # of so few, draws give no quantiles
    reach = stats.t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1)) * np.nanstd(means, axis=0)
    bounds = values.mean("pair").values + np.outer([-1, 1], reach)
    np.testing.assert_allclose(got.sel(interval=["low", "high"]), bounds, rtol=1e-12)
    np.testing.assert_allclose(got.sel(interval="estimate"), values.mean("pair"), rtol=1e-12)
    with pytest.raises(ValueError, match="have a dimension 'pair' without coordinates"):
        flocking.bootstrap(values.drop_vars("other"))
    both = flocking.bootstrap(flocking.between_sequence_overlap(made(), pairs=6), resamples=40)
    assert both.within.dims == both.between.dims == ("interval", "layer")


def test_sequences_whose_names_repeat_are_told_apart() -> None:
    """As of texts that were appended to a store: an interval is drawn over texts, not names."""
    recording = made().assign_coords(sequence=range(6))
    numbered = flocking.between_consistency(recording, pairs="all")
    repeated = recording.assign_coords(sequence=[0, 1, 2, 0, 1, 2])
    with pytest.warns(UserWarning, match="Names of sequences repeat"):
        got = flocking.between_consistency(repeated, pairs="all")
    assert got.sequence.values.tolist() == numbered.sequence.values.tolist()
    assert got.other.values.tolist() == numbered.other.values.tolist()
    xr.testing.assert_allclose(flocking.bootstrap(got), flocking.bootstrap(numbered))
