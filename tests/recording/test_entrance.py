"""What xarray can do to a recording that its sums do not survive is refused, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.recording import require

NEURONS = "a part of the neurons cannot be measured"
TOKENS = "tokens do not fit the windows.*Select windows instead"
NO_VALUE = "has no value .*flocking.concat"
DIMENSIONS = "has dimensions .*measure before averaging or grouping.*flocking.concat"
NO_COORDINATE = "has no coordinate .*measure before averaging.*without drop=True"
START = "do not begin where 'start', 'phase' and 'prompt_tokens' say.*flocking.concat"

MEASURES = [
    flocking.consistency,
    flocking.flocking_score,
    flocking.rank_consistency,
    flocking.effective_neurons,
    flocking.between_consistency,
    flocking.specificity,
    flocking.statistic,
    flocking.prompt_generation_overlap,
    flocking.between_sequence_overlap,
    flocking.drift,
]


@functools.cache
def recordings() -> tuple[xr.Dataset, xr.Dataset]:
    """Two of different lengths and numbers of windows: 4 of prompt and 2 of generation, 5 and 1."""
    model = helpers.proved("llama")
    options = {"window": 8, "ranks": True}
    longer = helpers.random_ids(17, 40, seed=5)
    return (
        helpers.record(model, helpers.random_ids(17, 33, 29, seed=4), max_new_tokens=13, **options),
        helpers.record(model, longer, max_new_tokens=8, **options),
    )


def phases(first: int, prompt: int, new: int) -> tuple[str, list[str]]:
    return "window", ["first"] * first + ["prompt"] * prompt + ["generation"] * new


def joined(**options: object) -> Callable[[xr.Dataset], xr.Dataset]:
    return lambda r: xr.concat([r, recordings()[1]], "sequence", **options)


MINIMAL = {"coords": "minimal", "compat": "override", "data_vars": "minimal"}
# What is done, and what the refusal says.
CASES: dict[str, tuple[Callable[[xr.Dataset], xr.Dataset], str]] = {
    "some neurons": (lambda r: r.isel(neuron=slice(80)), f"{NEURONS}.*80 neurons of 160"),
    "other neurons": (lambda r: r.isel(neuron=slice(80, None)), NEURONS),
    "every other neuron": (lambda r: r.isel(neuron=slice(None, None, 2)), NEURONS),
    "a neuron twice": (lambda r: r.isel(neuron=[0, *range(159)]), NEURONS),
    "one neuron": (lambda r: r.isel(neuron=3), NEURONS),
    "unlabelled neurons": (lambda r: r.isel(neuron=slice(80)).drop_vars("neuron"), NEURONS),
    "coarse neurons": (lambda r: r.coarsen(neuron=2).sum(), NEURONS),
    "padded neurons": (lambda r: r.pad(neuron=(0, 4)), NEURONS),
    "some tokens": (lambda r: r.isel(token=slice(5, 20)), TOKENS),
    "the first tokens": (lambda r: r.head(token=10), TOKENS),
    "every other token": (lambda r: r.isel(token=slice(None, None, 2)), TOKENS),
    "a token twice": (lambda r: r.isel(token=[0, *range(45)]), TOKENS),
    "one token": (lambda r: r.isel(token=3), TOKENS),
    "tokens of all": (lambda r: r.dropna("token"), TOKENS),
    "windows numbered anew": (
        lambda r: r.isel(window=[1, 2, 3]).assign_coords(window=[0, 1, 2]),
        TOKENS,
    ),
    "rolled windows": (lambda r: r.roll(window=1), TOKENS),
    "cumulated windows": (lambda r: r.cumsum("window"), TOKENS),
    "doubled": (lambda r: r * 2, TOKENS),
    "a window twice": (lambda r: r.isel(window=[0, 1, 1]), "'window' repeat"),
    "windows between": (
        lambda r: (
            r.drop_vars(["phase", "token_text", "text"])
            .interp(window=[0.5, 2])
            .assign_coords(phase=phases(0, 2, 0))
        ),
        "'window' is not whole numbers",
    ),
    "layers between": (
        lambda r: r.drop_vars(["module", "token_text", "text"]).interp(layer=[0.5]),
        "'layer' is not whole numbers",
    ),
    "shifted windows": (lambda r: r.shift(window=1), f"'tokens' {NO_VALUE}"),
    "padded windows": (lambda r: r.pad(window=(0, 1)), f"'window' {NO_VALUE}"),
    "absent layers": (lambda r: r.reindex(layer=[0, 1, 2]), f"'d_ff' {NO_VALUE}"),
    "absent sequences": (lambda r: r.reindex(sequence=[0, 9]), f"'tokens' {NO_VALUE}"),
    "absent tokens": (lambda r: r.reindex(token=range(99)), f"'token_window' {NO_VALUE}"),
    "where of layers": (lambda r: r.where(r.layer > 0), f"'tokens' {DIMENSIONS}"),
    "mean of sequences": (lambda r: r.mean("sequence"), f"{DIMENSIONS}|{NO_COORDINATE}"),
    "mean of layers": (lambda r: r.mean("layer"), NO_COORDINATE),
    "sums of phases": (lambda r: r.groupby("phase").sum(), NO_COORDINATE),
    "stacked": (lambda r: r.stack(both=("sequence", "layer")), DIMENSIONS),
    "other dimensions": (lambda r: r.swap_dims(layer="module"), DIMENSIONS),
    "other names": (lambda r: r.rename(sequence="document"), DIMENSIONS),
    "runs": (lambda r: xr.concat([r, r], "run"), DIMENSIONS),
    "dropped layer": (lambda r: r.isel(layer=0, drop=True), NO_COORDINATE),
    "no windows": (lambda r: r.drop_vars("window"), NO_COORDINATE),
    "concat": (joined(coords="different", compat="equals"), "flocking.concat"),
    "concat, inner": (joined(join="inner", coords="different", compat="equals"), "flocking.concat"),
    "concat, one's phases": (joined(join="outer", **MINIMAL), "flocking.concat"),
    "concat, same size": (
        lambda r: xr.concat(
            [each.isel(token=slice(44)) for each in (r, recordings()[1])],
            "sequence",
            join="override",
            **MINIMAL,
        ),
        "flocking.concat|Select windows",
    ),
    "another's phases": (lambda r: r.assign_coords(phase=phases(1, 3, 3)), START),
    "another's starts": (lambda r: r.assign_coords(start=r.start + 1), START),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_refused_by_name(measure: Callable[[xr.Dataset], object], case: str) -> None:
    change, message = CASES[case]
    changed = change(recordings()[0])
    with pytest.raises(ValueError, match=message):
        measure(changed)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_what_is_not_a_recording(measure: Callable[[object], object]) -> None:
    recording = recordings()[0]
    for other in (recording.energy, recording.to_dict(), None, "article.zarr"):
        with pytest.raises(TypeError, match=r"expected a recording .*, got a"):
            measure(other)
    with pytest.raises(TypeError, match="got a Dataset without 'phase': measure before averaging"):
        measure(recording.sum("window"))


def test_absent_norms_are_refused_where_they_are_used() -> None:
    recording = recordings()[0]
    masked = recording.assign(norm=recording.norm.where(recording.norm > 5))
    with pytest.raises(ValueError, match=f"'norm' {NO_VALUE}"):
        flocking.consistency(masked)
    assert flocking.statistic(masked).equals(flocking.statistic(recording))


@pytest.mark.parametrize("name", ["l1", "relative", "token_id"])
def test_whatever_is_absent_of_tokens_is_refused_where_it_is_used(name: str) -> None:
    model = helpers.proved("llama")
    recording = helpers.record(model, helpers.random_ids(17, 20), relative=True)
    outside = recording.token_window >= 0
    padded = recording.assign({name: recording[name].where(outside)})
    masked = recording.assign({name: recording[name].where(outside & (recording.token != 5))})

    def different(data: xr.Dataset) -> xr.DataArray:
        return flocking.consistency(data, different_tokens=True)

    using = [different] if name != "l1" else [flocking.flocking_score, flocking.chance_consistency]
    for measure in using:
        assert measure(padded).equals(measure(recording))
        with pytest.raises(ValueError, match=f"'{name}' has no value at some tokens"):
            measure(masked)
    assert flocking.consistency(masked).equals(flocking.consistency(recording))


def test_layers_without_a_neuron_are_refused() -> None:
    """As of a store that lost its widths."""
    recording = recordings()[0]
    for measure in MEASURES:
        with pytest.raises(ValueError, match="'d_ff' is below 1"):
            measure(recording.assign_coords(d_ff=("layer", [0, 0])))


def test_a_recording_appended_to_one_with_other_windows(tmp_path) -> None:
    """As many windows of the same names, but three of prompt and three of generation."""
    model = helpers.proved("llama")
    parts = [
        helpers.record(model, helpers.random_ids(n, seed=5), window=8, max_new_tokens=new)
        for n, new in ((33, 17), (25, 25))
    ]
    assert [part.sizes["window"] for part in parts] == [7, 7]
    parts[0].to_zarr(tmp_path / "r.zarr", zarr_format=2)
    parts[1].to_zarr(tmp_path / "r.zarr", append_dim="sequence")
    both = xr.open_zarr(tmp_path / "r.zarr", chunks=None)
    with pytest.raises(ValueError, match=START):
        flocking.effective_neurons(both)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"schema_version": 2, "flocking_version": "9.1"},
            r"schema version 2, written by flocking 9.1, and flocking .* reads version 1: update",
        ),
        ({"schema_version": 0}, "schema version 0.*: record again"),
        ({"schema_version": "new"}, "schema version 'new'.*: record again"),
        ({"schema_version": None}, "schema version None.*: record again"),
    ],
)
def test_other_versions_of_the_schema(attributes: dict, message: str) -> None:
    other = recordings()[0].assign_attrs(attributes)
    for measure in (*MEASURES, require, lambda r: flocking.concat([r])):
        with pytest.raises(ValueError, match=message):
            measure(other)


def test_a_recording_without_a_version_is_read() -> None:
    """One from before there was a number, or whose attributes xarray has dropped."""
    recording = recordings()[0]
    for measure in MEASURES:
        got, expected = measure(recording.drop_attrs(deep=False)), measure(recording)
        xr.testing.assert_identical(got, expected)
    loaded = recording.assign_attrs(schema_version=np.int64(1))  # as netCDF gives it back
    assert flocking.consistency(loaded).equals(flocking.consistency(recording))


def test_a_part_of_relative_that_has_all_layers_that_are_left() -> None:
    model = helpers.proved("llama")
    texts = helpers.random_ids(20, 20)
    some = helpers.record(model, texts, relative=[1])
    every = helpers.record(model, texts, relative=True)
    for layers in ([1], 1):
        got = flocking.consistency(some.sel(layer=layers), different_tokens=True)
        expected = flocking.consistency(every, different_tokens=True).sel(layer=layers)
        xr.testing.assert_identical(got, expected)
    with pytest.raises(ValueError, match=r"of some layers only: .*relative=True.*or select these"):
        flocking.consistency(some, different_tokens=True)


def test_trimmed_padding_and_nothing_at_all() -> None:
    """A part that holds all there is, is whole."""
    recording = recordings()[0]
    one = recording.isel(sequence=[0])
    trimmed = one.isel(token=one.token_id.values[0] >= 0)
    assert trimmed.sizes["token"] < one.sizes["token"]
    xr.testing.assert_identical(flocking.consistency(trimmed), flocking.consistency(one))
    for nothing in (recording.isel(sequence=[]), recording.isel(layer=[])):
        assert flocking.consistency(nothing).size == 0
        assert flocking.statistic(nothing).size == 0
    with pytest.warns(UserWarning, match="fewer than two tokens"):
        assert flocking.consistency(recording.isel(window=[])).isnull().all()
