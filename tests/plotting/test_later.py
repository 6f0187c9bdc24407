"""Drift: what a prompt's selection captures of later windows, by distance."""

from __future__ import annotations

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes

import flocking


def line(ax: Axes, label: str) -> np.ndarray:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(found.get_ydata(), float)


@pytest.fixture(scope="module")
def plain() -> xr.Dataset:
    return helpers.record(helpers.proved("llama"), helpers.random_ids(65, 57, seed=3), window=8)


@pytest.fixture(scope="module")
def random() -> xr.Dataset:
    """The same texts, read by other random weights."""
    control = flocking.control(helpers.proved("llama"), seed=1)
    return helpers.record(control, helpers.random_ids(65, 57, seed=3), window=8)


def mean_of(values: xr.DataArray) -> xr.DataArray:
    """What a line shows: the mean over layers and texts, where there is one."""
    return values.mean("layer").mean("sequence").dropna("distance")


def test_draws_what_the_measure_says(plain: xr.Dataset, random: xr.Dataset) -> None:
    axes = flocking.plot.drift(plain, 0.25, prompt_lengths=[9, 33], control=random)
    found = flocking.drift(plain, 0.25, prompt_lengths=[9, 33])
    control = flocking.drift(random, 0.25, prompt_lengths=[33]).sel(prompt_length=33)
    for ax, name in zip(axes, ("captured_energy", "jaccard"), strict=True):
        for length in (9, 33):
            values = mean_of(found[name].sel(prompt_length=length))
            np.testing.assert_allclose(line(ax, f"prompt of {length}"), values)
        drawn = line(ax, "random weights (control)")
        np.testing.assert_allclose(drawn, mean_of(control[name]))
        assert np.abs(drawn - line(ax, "prompt of 33")).max() > 0.01
    oracle = mean_of(found.oracle.sel(prompt_length=33))  # of the model, not of the control
    np.testing.assert_allclose(line(axes[0], "best in hindsight"), oracle)
    assert np.abs(oracle - mean_of(control.oracle)).max() > 0.01
    assert set(line(axes[0], "chance")) == {0.25}
    assert set(line(axes[1], "chance")) == {0.25 / 1.75}


def test_chooses_prompts_from_the_first_half(plain: xr.Dataset) -> None:
    axes = flocking.plot.drift(plain)
    labels = [one.get_label() for one in axes[1].lines]
    assert labels == ["prompt of 9", "prompt of 17", "prompt of 25", "prompt of 33", "chance"]


def test_takes_results_and_their_averages(plain: xr.Dataset) -> None:
    values = flocking.drift(plain, prompt_lengths=[9, 33])
    expected = values.captured_energy.mean(["layer", "sequence"]).sel(prompt_length=9)
    for given in (values, flocking.bootstrap(values.mean("layer")), values.sel(prompt_length=[9])):
        axes = flocking.plot.drift(given)
        np.testing.assert_allclose(line(axes[0], "prompt of 9"), expected.dropna("distance"))
    axes = flocking.plot.drift(values.sel(prompt_length=9, sequence=0, layer=1))
    expected = values.captured_energy.sel(prompt_length=9, sequence=0, layer=1)
    np.testing.assert_allclose(line(axes[0], "prompt of 9"), expected.dropna("distance"))
    axes = flocking.plot.drift(values, prompt_lengths=[33])
    assert [one.get_label() for one in axes[1].lines] == ["prompt of 33", "chance"]


def test_one_sequence_and_layer(plain: xr.Dataset) -> None:
    one = plain.isel(sequence=0, layer=1)
    axes = flocking.plot.drift(one, axes=plt.subplots(1, 2)[1])
    expected = flocking.drift(one, prompt_lengths=[17]).jaccard.squeeze()
    np.testing.assert_allclose(line(axes[1], "prompt of 17"), expected.dropna("distance"))


def test_says_what_is_missing(plain: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="expected three windows of prompt or more, got 2"):
        flocking.plot.drift(plain.isel(window=[0, 1]))
    with pytest.raises(ValueError, match="data has 8 prompt lengths: draw at most 4"):
        flocking.plot.drift(flocking.drift(plain))
    with pytest.raises(ValueError, match="give one to 4 numbers of tokens"):
        flocking.plot.drift(plain, prompt_lengths=[1, 9, 17, 25, 33])
    with pytest.raises(ValueError, match="prompt_lengths=10 is not an edge of a window"):
        flocking.plot.drift(plain, prompt_lengths=[10])
    with pytest.raises(ValueError, match="data has no 'captured_energy'"):
        flocking.plot.drift(plain[["energy"]].reset_coords(drop=True))
    with pytest.raises(ValueError, match="axes: give 2"):
        flocking.plot.drift(plain, axes=plt.subplots(3)[1])


def test_prompt_lengths_in_any_order(plain: xr.Dataset) -> None:
    expected = flocking.plot.drift(plain, prompt_lengths=[9, 25])
    ordered = flocking.drift(plain, prompt_lengths=[25, 9])
    for axes in (
        flocking.plot.drift(plain, prompt_lengths=[25, 9]),
        flocking.plot.drift(plain, prompt_lengths=iter([25, 9, 25])),
        flocking.plot.drift(ordered),
        flocking.plot.drift(ordered, prompt_lengths=[25, 9]),
    ):
        for ax, other in zip(axes, expected, strict=True):
            labels = [one.get_label() for one in ax.lines]
            assert labels == [one.get_label() for one in other.lines]
            for label in labels:
                np.testing.assert_array_equal(line(ax, label), line(other, label))


@pytest.mark.parametrize(
    ("lengths", "kind", "message"),
    [
        ([10], ValueError, "10"),
        ([], ValueError, "give one to 4 numbers of tokens"),
        (["a"], TypeError, "'a' is not a number of tokens"),
        ([True], TypeError, "True is not a number of tokens"),
        ("17", TypeError, r"prompt_lengths='17': give a list of numbers, as in \[17\]"),
        (9, TypeError, r"prompt_lengths=9: give a list of numbers, as in \[17\]"),
        ([float("nan")], ValueError, "nan"),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_prompt_lengths_that_are_not_there(
    plain: xr.Dataset, lengths: object, kind: type[Exception], message: str, measured: bool
) -> None:
    data = flocking.drift(plain, prompt_lengths=[9, 25]) if measured else plain
    with pytest.raises(kind, match=message):
        flocking.plot.drift(data, prompt_lengths=lengths)
    one = flocking.drift(plain, prompt_lengths=[9, 25]).isel(prompt_length=0)
    with pytest.raises(ValueError, match="25 is not among those of data"):
        flocking.plot.drift(one, prompt_lengths=[25])
    assert plt.get_fignums() == []


def test_the_control_is_drawn_after_the_same_prompt(plain: xr.Dataset, random: xr.Dataset) -> None:
    results, control = (flocking.drift(each, prompt_lengths=[9, 33]) for each in (plain, random))
    for given in (control, random):
        axes = flocking.plot.drift(results, prompt_lengths=[9], control=given)
        for ax, name in zip(axes, ("captured_energy", "jaccard"), strict=True):
            drawn = line(ax, "random weights (control)")
            short, long = (mean_of(control[name].sel(prompt_length=length)) for length in (9, 33))
            np.testing.assert_allclose(drawn, short)
            assert np.abs(drawn[: len(long)] - long.values).max() > 0.01
            assert np.abs(drawn - line(ax, "prompt of 9")).max() > 0.01
    with pytest.raises(ValueError, match="33 is not among those of control"):
        flocking.plot.drift(results, control=control.sel(prompt_length=[9]))


def test_a_control_at_another_density_is_refused(plain: xr.Dataset) -> None:
    some, most = (flocking.drift(plain, density, prompt_lengths=[9]) for density in (0.5, 0.9))
    with pytest.raises(ValueError, match=r"control is of density 0\.9, and data of 0\.5"):
        flocking.plot.drift(some, control=most)
    some, most = (flocking.between_sequence_overlap(plain, density) for density in (0.5, 0.9))
    with pytest.raises(ValueError, match=r"control is of density 0\.9, and data of 0\.5"):
        flocking.plot.overlap(some, control=most)
    assert not plt.get_fignums()


def test_chance_of_densities_by_layer_is_their_mean(plain: xr.Dataset) -> None:
    axes = flocking.plot.drift(plain, [0.2, 0.6], prompt_lengths=[9])
    chance = [ax.get_lines()[-1] for ax in axes]
    assert [line.get_label() for line in chance] == ["chance", "chance"]
    overlaps = [0.2 / 1.8, 0.6 / 1.4]
    found = [line.get_ydata()[0] for line in chance]
    assert found == [pytest.approx(0.4), pytest.approx(np.mean(overlaps))]


def test_a_control_that_is_too_short_is_named(recording: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="control has no window that begins after 17 tokens"):
        flocking.plot.drift(recording, control=recording.isel(window=slice(0, 3)))


def test_a_density_that_results_do_not_have_is_refused(
    plain: xr.Dataset, random: xr.Dataset
) -> None:
    """It would be ignored; a recording beside results is measured at theirs."""
    drifts = flocking.drift(plain, 0.25, prompt_lengths=[9])
    overlaps = flocking.between_sequence_overlap(plain, 0.25)
    for draw, found in ((flocking.plot.drift, drifts), (flocking.plot.overlap, overlaps)):
        with pytest.raises(ValueError, match=r"density=0\.5: data are results, which are of 0\.25"):
            draw(found, 0.5)
        draw(found, 0.25)
        draw(found, control=random)
    with pytest.raises(ValueError, match="data are results, which do not say theirs: leave"):
        flocking.plot.overlap(overlaps.drop_vars("density"), 0.25)
    plt.close("all")
