"""Functions of statistics and selections: by label, of single layers, and what they refuse."""

from __future__ import annotations

import functools

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking

NEURONS = "a part of the neurons cannot be measured"


@functools.cache
def recording() -> xr.Dataset:
    """Prompts of one length, with a generation."""
    return helpers.record(
        helpers.proved("llama"), helpers.random_ids(33, 33, 33, seed=4), window=8, max_new_tokens=9
    )


def statistics() -> tuple[xr.DataArray, xr.DataArray]:
    return tuple(flocking.statistic(recording(), phase=p) for p in ("prompt", "generation"))


def best(s: np.ndarray, k: int) -> set[int]:
    return set(sorted(range(len(s)), key=lambda j: (-s[j], j))[:k])


# --------------------------------------------------------------------------------------
# What is selected


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.transpose("neuron", "layer", "sequence"),
        lambda s: s.isel(layer=[1, 0], sequence=[2, 0, 1]),
        lambda s: s.isel(neuron=slice(None, None, -1)),
        lambda s: s.assign_coords(sequence=["a", "b", "b"]),
        lambda s: s.sel(layer=1),
        lambda s: s.sel(layer=1, sequence=2),
        lambda s: s.astype(np.float16),
        lambda s: s.drop_vars(["layer", "sequence", "neuron"]),
    ],
)
def test_select(change) -> None:
    prompt, _ = statistics()
    given = change(prompt)
    got = flocking.select(given, 0.25)
    assert got.dtype == bool
    assert got.dims == (*(dim for dim in given.dims if dim != "neuron"), "neuron")
    assert got.sizes["neuron"] == 160
    if "neuron" in got.coords:
        assert got.neuron.values.tolist() == list(range(160))
        given = given.sortby("neuron")
    rows = given.transpose(*got.dims).values.reshape(-1, 160)
    for mask, s in zip(got.values.reshape(-1, 160), rows, strict=True):
        assert set(np.flatnonzero(mask)) == best(s, 40)


def test_jaccard_and_captured_energy_by_label() -> None:
    prompt, later = statistics()
    kept, own = flocking.select(prompt), flocking.select(later)
    overlap, share = flocking.jaccard(kept, own), flocking.captured_energy(kept, later)
    for number in range(3):
        for layer in (0, 1):
            a, b = (set(np.flatnonzero(each.values[number, layer])) for each in (kept, own))
            assert overlap.values[number, layer] == len(a & b) / len(a | b)
            energy = later.values[number, layer] ** 2
            expected = energy[list(a)].sum() / energy.sum()
            assert share.values[number, layer] == pytest.approx(expected, rel=1e-12)
    moved = {"layer": [1, 0], "sequence": [2, 0, 1], "neuron": slice(None, None, -1)}
    for given in (own.isel(moved), own.isel(moved).transpose()):
        xr.testing.assert_equal(flocking.jaccard(kept, given), overlap)
    got = flocking.captured_energy(kept, later.isel(moved).transpose())
    xr.testing.assert_allclose(got.transpose("sequence", "layer"), share, rtol=1e-12)
    for where in ({"layer": 1}, {"sequence": 2}, {"layer": 0, "sequence": 1}):
        xr.testing.assert_equal(
            flocking.jaccard(kept.sel(where), own.sel(where)), overlap.sel(where)
        )
        for of in ("all", "oracle"):
            xr.testing.assert_allclose(
                flocking.captured_energy(kept.sel(where), later.sel(where), of=of),
                flocking.captured_energy(kept, later, of=of).sel(where),
                rtol=1e-12,
            )


def test_one_text_against_all_is_compared() -> None:
    """Texts may be compared with each other, layers may not."""
    kept = flocking.select(statistics()[0])
    one = flocking.jaccard(kept.sel(sequence=1, drop=True), kept)
    assert one.dims == ("layer", "sequence") or one.dims == ("sequence", "layer")
    assert one.sel(sequence=1).values.tolist() == [1, 1]
    assert (one.sel(sequence=[0, 2]) < 1).all()
    two = flocking.jaccard(kept.sel(sequence=0), kept.sel(sequence=1))
    np.testing.assert_array_equal(two, one.sel(sequence=0))


def test_repeated_labels_are_taken_in_order() -> None:
    names = ["a", "b", "a"]
    prompt, later = (each.assign_coords(sequence=names) for each in statistics())
    got = flocking.jaccard(flocking.select(prompt), flocking.select(later))
    expected = flocking.jaccard(*map(flocking.select, statistics()))
    np.testing.assert_array_equal(got, expected)
    static = flocking.statistic_of_others(prompt)
    np.testing.assert_array_equal(static, flocking.statistic_of_others(statistics()[0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.transpose(),
        lambda s: s.sel(layer=1),
        lambda s: s.isel(layer=[1, 0], sequence=[2, 0, 1]),
    ],
)
def test_statistic_of_others(change) -> None:
    given = change(statistics()[0])
    got = flocking.statistic_of_others(given)
    assert got.dims == given.dims
    for name in given.sequence.values:
        energy = given.drop_sel(sequence=name) ** 2 / given.tokens.drop_sel(sequence=name)
        expected = np.sqrt(energy.mean("sequence"))
        here = got.sel(sequence=name, drop=True)
        np.testing.assert_allclose(here, expected.transpose(*here.dims), rtol=1e-6)


# --------------------------------------------------------------------------------------
# What is refused


def test_a_recording_is_not_a_statistic() -> None:
    message = r"is a recording: give flocking.statistic\(recording, ...\)"
    kept = flocking.select(statistics()[0])
    for function in (
        flocking.select,
        flocking.statistic_of_others,
        lambda r: flocking.captured_energy(kept, r),
    ):
        with pytest.raises(TypeError, match=message):
            function(recording())
    for function in (
        lambda r: flocking.jaccard(r, kept),
        lambda r: flocking.captured_energy(r, statistics()[1]),
    ):
        with pytest.raises(TypeError, match=r"is a Dataset: give the DataArray that flocking\.sel"):
            function(recording())
    with pytest.raises(TypeError, match="values is a recording: give a measure of it"):
        flocking.bootstrap(recording())
    with pytest.raises(TypeError, match="values is a ndarray: give a DataArray over neurons"):
        flocking.select(np.ones((2, 160)))
    for function in (flocking.select, lambda a: flocking.captured_energy(kept, a)):
        with pytest.raises(TypeError, match="is a selection: give a statistic"):
            function(kept)
    with pytest.raises(TypeError, match="values of dtype object have no mean"):
        flocking.bootstrap(recording().text)


def test_numbers_of_tokens_are_numbers() -> None:
    with pytest.raises(TypeError, match=r"prompt_lengths=17: give a list of numbers, as in \[17\]"):
        flocking.drift(recording(), prompt_lengths=17)
    with pytest.raises(ValueError, match=r"prompt_lengths=\[\]: each must leave a prompt"):
        flocking.drift(recording(), prompt_lengths=[])
    with pytest.raises(TypeError, match=r"start=\[1\]: give a number of tokens"):
        flocking.statistic(recording(), phase="prompt", start=[1])


@pytest.mark.parametrize("part", [slice(80), [3], 3, slice(None, None, 2)])
def test_a_part_of_the_neurons(part: object) -> None:
    prompt, later = statistics()
    kept = flocking.select(prompt)
    for function in (
        lambda: flocking.select(prompt.isel(neuron=part)),
        lambda: flocking.statistic_of_others(prompt.isel(neuron=part)),
        lambda: flocking.captured_energy(kept, later.isel(neuron=part)),
    ):
        with pytest.raises(ValueError, match=NEURONS):
            function()
    for function in (
        lambda: flocking.jaccard(kept.isel(neuron=part), kept),
        lambda: flocking.captured_energy(kept.isel(neuron=part), later),
    ):
        with pytest.raises(ValueError, match=f"{NEURONS}|not a selection along 'neuron'"):
            function()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"layer": 0}, {"layer": 1}, r"of different layers \(0; 1\).*nothing in common"),
        ({"layer": 0}, {}, r"of different layers \(0; 0, 1\)"),
        ({"sequence": [0, 1]}, {}, "cannot be aligned along 'sequence'"),
        ({"sequence": [0, 1]}, {"sequence": [1, 2]}, "cannot be aligned along 'sequence'"),
        ({"layer": [0]}, {"layer": [1]}, "cannot be aligned along 'layer'"),
    ],
)
def test_what_has_other_labels(a: dict, b: dict, message: str) -> None:
    prompt, later = statistics()
    kept, own = flocking.select(prompt), flocking.select(later)
    with pytest.raises(ValueError, match=message):
        flocking.jaccard(kept.sel(a), own.sel(b))
    with pytest.raises(ValueError, match=message):
        flocking.captured_energy(kept.sel(a), later.sel(b))


def test_others_need_several_sequences_and_their_tokens() -> None:
    prompt, _ = statistics()
    for one in (prompt.sel(sequence=1), prompt.isel(sequence=[1])):
        with pytest.raises(ValueError, match="expected two sequences or more, got 1"):
            flocking.statistic_of_others(one)
    with pytest.raises(ValueError, match=r"no coordinate 'tokens': give what flocking\.stat"):
        flocking.statistic_of_others(prompt.drop_vars("tokens"))


# --------------------------------------------------------------------------------------
# Ranges of tokens where windows are missing


def test_a_range_must_be_there() -> None:
    """Windows 2 and 3 are missing: what ends or begins there has no edge, what spans them none."""
    some = recording().isel(window=[0, 1, 4, 5])
    whole = recording()
    for options in ({"start": 1, "stop": 9}, {"stop": 9}, {"start": 25}):
        options = {**options, "phase": "prompt"}
        got = flocking.statistic(some, **options)
        xr.testing.assert_identical(got, flocking.statistic(whole, **options))
    with pytest.raises(ValueError, match="windows between 1 and 4 are missing from the recording"):
        flocking.statistic(some, phase="prompt", stop=33)
    with pytest.raises(ValueError, match="windows between 1 and 4 are missing"):
        flocking.statistic(some, phase="prompt", by="length")
    with pytest.raises(ValueError, match="stop=25 is not an edge of a window"):
        flocking.statistic(some, phase="prompt", stop=25)
    each = flocking.statistic(some, phase="prompt", by="window")
    assert each.start.values.tolist() == [0, 1, 25]
    assert each.stop.values.tolist() == [1, 9, 33]
    together = flocking.statistic(some, phase="prompt")
    energy = (flocking.statistic(whole, by="window").isel(window=[0, 1, 4]) ** 2).sum("window")
    np.testing.assert_allclose(together, np.sqrt(energy), rtol=1e-12)


def test_drift_of_parts() -> None:
    whole = recording()
    expected = flocking.drift(whole, prompt_lengths=[9, 17])
    got = flocking.drift(whole.isel(window=[3, 1, 2, 0]), prompt_lengths=[9, 17])
    ends = expected.prompt_length + expected.distance + 8
    wanted = expected.where(ends <= 25).isel(distance=slice(2))
    xr.testing.assert_equal(got, wanted)
    for where in ({"layer": 1}, {"sequence": 2}, {"layer": 0, "sequence": 1}):
        one = flocking.drift(whole.sel(where), prompt_lengths=[9, 17])
        xr.testing.assert_identical(one, expected.sel(where))
    moved = flocking.drift(whole.isel(layer=[1, 0]).transpose(), prompt_lengths=[9, 17])
    xr.testing.assert_allclose(moved, expected.isel(layer=[1, 0]), rtol=1e-12)
    assert moved.jaccard.dims == ("sequence", "layer", "prompt_length", "distance")
    with pytest.raises(ValueError, match="windows between 1 and 3 are missing"):
        flocking.drift(whole.isel(window=[0, 1, 3, 4]))
    with pytest.raises(ValueError, match="window of the first token is missing"):
        flocking.drift(whole.isel(window=[1, 2, 3, 4]))


def test_densities_of_a_single_layer() -> None:
    whole = recording()
    expected = flocking.prompt_generation_overlap(whole, densities=[0.25, 0.5])
    got = flocking.prompt_generation_overlap(whole.sel(layer=1), densities=[0.25, 0.5])
    assert got.dims == ("density", "sequence")
    xr.testing.assert_identical(got, expected.sel(layer=1))
    mixed = flocking.prompt_generation_overlap(whole, [0.25, 0.5])
    alone = flocking.prompt_generation_overlap(whole.sel(layer=1), [0.5])
    np.testing.assert_array_equal(alone, mixed.sel(layer=1))
