"""The bootstrap against an explicit loop, and where it must cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import flocking
from flocking.analysis import tails


def pairs(n: int = 8, seed: int = 0) -> xr.DataArray:
    """A statistic of pairs, with a diagonal that resembles itself perfectly."""
    random = np.random.default_rng(seed)
    own = random.normal(0.3, 0.05, n)
    values = (own[:, None] + own) / 2 + random.normal(0, 0.01, (n, n))
    np.fill_diagonal(values, 1)
    return xr.DataArray(values[..., None], dims=("sequence", "other", "layer"))


def test_against_a_loop_over_resamples() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(9, 2))
    values[4, 1] = np.nan
    got = flocking.bootstrap(
        xr.DataArray(values, dims=("sequence", "layer")), resamples=500, level=0.8, seed=3
    )
    draws = np.random.default_rng(3).multinomial(9, np.full(9, 1 / 9), size=500)
    means = np.array([np.nanmean(np.repeat(values, row, axis=0), axis=0) for row in draws])
    np.testing.assert_allclose(got.sel(interval="estimate"), np.nanmean(values, axis=0))
    for column, known in enumerate((9, 8)):  # as many sequences have a value
        low, high = tails(known, 0.8)
        assert 0.05 < low < 0.1
        assert low + high == 1
        bounds = got.isel(layer=column).sel(interval=["low", "high"])
        np.testing.assert_allclose(bounds, np.quantile(means[:, column], [low, high]))


def test_pairs_against_a_loop() -> None:
    values = pairs()
    got = flocking.bootstrap(values, resamples=300, seed=5)
    draws = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=300)
    means = []
    for row in draws:
        members = np.repeat(np.arange(8), row)
        kept = [values.values[a, b, 0] for a in members for b in members if a != b]
        means.append(np.mean(kept))
    low, high = np.quantile(means, tails(8))
    assert got.sel(interval="low").item() == pytest.approx(low)
    assert got.sel(interval="high").item() == pytest.approx(high)


def test_pairs_that_resampling_made_identical_are_dropped() -> None:
    """Were they kept, the interval would miss the estimate."""
    values = pairs()
    estimate, low, high = flocking.bootstrap(values).values[:, 0]
    off = values.values[~np.eye(8, dtype=bool)]
    assert estimate == pytest.approx(off.mean())
    assert low < estimate < high
    draws = np.random.default_rng(0).integers(0, 8, (500, 8))
    careless = []
    for members in draws:
        a, b = np.meshgrid(members, members)
        distinct = ~np.eye(8, dtype=bool)  # drops only each drawn place with itself
        careless.append(values.values[a, b, 0][distinct].mean())
    assert np.quantile(careless, tails(8)[0]) > estimate


@pytest.mark.parametrize(
    ("n", "missing"), [(2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (8, 0), (12, 0), (30, 0), (5, 25)]
)
def test_coverage_is_near_the_level(n: int, missing: int) -> None:
    """For few sequences, too, where plain percentiles cover less (0.91 for twelve, 0.5 for two)."""
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(size=(n, 4000)), np.full((missing, 4000), np.nan)])
    data = xr.DataArray(values, dims=("sequence", "draw"))
    _, low, high = flocking.bootstrap(data, resamples=1000).values
    covered = ((low < 0) & (high > 0)).mean()
    assert 0.91 < covered < 0.97


@pytest.mark.parametrize("n", [3, 4, 5, 6, 12])
@pytest.mark.parametrize("form", ["other", "pair"])
def test_coverage_of_pairs(n: int, form: str) -> None:
    """Values of pairs, of which each has a part that is its own beside those of its two texts."""
    random = np.random.default_rng(0)
    alone, together = random.normal(size=(n, 1000)), random.normal(size=(n, n, 1000))
    values = alone[:, None] + alone + (together + together.swapaxes(0, 1)) / 4
    data = xr.DataArray(
        values, {"sequence": range(n), "other": range(n)}, ("sequence", "other", "draw")
    )
    if form == "pair":
        first, second = np.triu_indices(n, 1)
        data = xr.DataArray(
            values[first, second],
            {"sequence": ("pair", first), "other": ("pair", second)},
            ("pair", "draw"),
        )
    _, low, high = flocking.bootstrap(data, resamples=1000).values
    assert 0.89 < ((low < 0) & (high > 0)).mean() < 0.97


def test_interval_of_two_is_more_than_these_two() -> None:
    values = xr.DataArray([1.0, 2.0], dims="sequence")
    _, low, high = flocking.bootstrap(values, resamples=20_000).values
    expected = stats.t.interval(0.95, 1, 1.5, stats.sem(values))
    assert (low, high) == pytest.approx(expected, rel=0.05)
    _, low, high = flocking.bootstrap(values, level=0.5).values
    assert high - low < 2  # the level counts, as it does of many


def test_interval_of_normal_values_is_students() -> None:
    values = np.random.default_rng(2).normal(size=12)
    _, low, high = flocking.bootstrap(xr.DataArray(values, dims="sequence"), resamples=20_000)
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (high - low).item() == pytest.approx(expected[1] - expected[0], rel=0.05)


def test_labels_datasets_and_seeds() -> None:
    values = pairs().assign_coords(layer=[7]).rename("specificity")
    data = xr.Dataset({"a": values, "b": ("layer", [1.0])})
    got = flocking.bootstrap(data, seed=1)
    assert list(got) == ["a"]
    assert got.a.dims == ("interval", "layer")
    assert got.layer.values.tolist() == [7]
    assert got.interval.values.tolist() == ["estimate", "low", "high"]
    xr.testing.assert_identical(got.a, flocking.bootstrap(values, seed=1).rename("a"))
    assert not got.a.equals(flocking.bootstrap(values, seed=2))


def test_one_sequence_has_no_interval_and_says_so() -> None:
    values = xr.DataArray([[2.0]], dims=("sequence", "layer"))
    for given in (values, xr.Dataset({"score": values})):
        with pytest.warns(UserWarning, match="one sequence only, so its interval is NaN: record"):
            got = flocking.bootstrap(given)
        got = got if isinstance(got, xr.DataArray) else got.score
        assert got.values[0] == 2
        assert np.isnan(got.values[1:]).all()


def test_pairs_are_matched_by_their_labels() -> None:
    """A sequence's pair with itself is left out, wherever it lies."""
    names = [f"text {number}" for number in range(8)]
    values = pairs().assign_coords(sequence=names, other=names)
    expected = flocking.bootstrap(values, seed=1)
    moved = values.isel(other=[3, 1, 0, 2, 7, 6, 5, 4])
    xr.testing.assert_identical(flocking.bootstrap(moved, seed=1), expected)
    repeated = values.assign_coords(sequence=names[:4] * 2, other=names[:4] * 2)
    np.testing.assert_array_equal(flocking.bootstrap(repeated, seed=1), expected)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (xr.DataArray([1.0], dims="layer"), ValueError, "no 'sequence' to draw from.*averaged"),
        (pairs().isel(sequence=0, other=0), ValueError, "no 'sequence' to draw from"),
        (
            xr.DataArray([1.0, 2], {"sequence": [4, 5]}, "sequence").sel(sequence=4),
            ValueError,
            "no 'sequence' to draw from.*before one is selected",
        ),
        (xr.Dataset({"x": ("layer", [1.0])}), ValueError, "no variable has the dimension"),
        (pairs().isel(sequence=[]), ValueError, "differ in length"),
        (pairs().isel(sequence=[], other=[]), ValueError, "no sequence to draw from"),
        (pairs().isel(other=[0, 1]), ValueError, "sequence and other differ in length"),
        (
            pairs(2).assign_coords(sequence=[0, 1], other=[1, 2]),
            ValueError,
            "different labels: give all pairs",
        ),
        ([1.0, 2.0], TypeError, "values is a list: give a DataArray or a Dataset"),
    ],
)
def test_refusals(values: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        flocking.bootstrap(values)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="level=95"):
        flocking.bootstrap(pairs(), level=95)
    with pytest.raises(ValueError, match="resamples=0"):
        flocking.bootstrap(pairs(), resamples=0)
    with pytest.raises(ValueError, match=r"resamples=10000\.0: give a whole number"):
        flocking.bootstrap(pairs(), resamples=1e4)
    with pytest.raises(ValueError, match="seed=-1: give a whole number from 0"):
        flocking.bootstrap(pairs(), seed=-1)
    with pytest.raises(TypeError, match=r"level='0[.]9': give a number"):
        flocking.bootstrap(pairs(), level="0.9")


def test_infinite_values_count_as_missing() -> None:
    values = xr.DataArray([1.0, 2.0, 4.0, np.nan], dims="sequence")
    infinite = values.where(values.notnull(), np.inf)
    xr.testing.assert_identical(flocking.bootstrap(infinite), flocking.bootstrap(values))


def test_each_value_has_the_interval_of_the_sequences_that_have_it() -> None:
    values = xr.DataArray(np.random.default_rng(0).normal(size=(6, 3)), dims=("sequence", "layer"))
    values[1:, 0] = np.nan  # known of one
    values[3:, 1] = np.nan  # known of three
    found = flocking.bootstrap(values)
    assert np.isfinite(found.sel(interval="estimate")).all()
    assert np.isnan(found.sel(layer=0)).values.tolist() == [False, True, True]
    for layer, count in ((1, 3), (2, 6)):
        some = values[:count, layer].values
        low, high = found.isel(layer=layer, interval=slice(1, None)).values
        assert low < some.mean() < high


def test_pairs_of_two_sequences_have_no_interval() -> None:
    labels = {"sequence": ("pair", [0, 0, 1]), "other": ("pair", [1, 2, 2])}
    values = xr.DataArray([[1.0, 1.0], [np.nan, 2.0], [np.nan, 4.0]], labels, ("pair", "layer"))
    square = np.full((3, 3, 2), np.nan)
    for (a, b), each in zip(((0, 1), (0, 2), (1, 2)), values.values, strict=True):
        square[a, b] = square[b, a] = each
    for given in (values, xr.DataArray(square, dims=("sequence", "other", "layer"))):
        found = flocking.bootstrap(given)
        assert np.isnan(found).values.tolist() == [[False, False], [True, False], [True, False]]
        with pytest.warns(UserWarning, match="of one sequence only, or of pairs of two"):
            flocking.bootstrap(given.isel(layer=0))
