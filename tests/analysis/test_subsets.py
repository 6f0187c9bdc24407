"""Every measure of every kind of selection from a recording, against brute force."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import helpers
import numpy as np
import pytest
import references
import xarray as xr

import flocking

WINDOW = 8
PROMPTS = helpers.random_ids(17, 33, 29, 25, seed=4)


def overlap(name: str) -> Callable[[xr.Dataset], xr.DataArray]:
    return lambda recording: flocking.between_sequence_overlap(recording)[name]


MEASURES: dict[str, Callable[[xr.Dataset], xr.DataArray]] = {
    "consistency": flocking.consistency,
    "different_tokens": functools.partial(flocking.consistency, different_tokens=True),
    "chance_consistency": flocking.chance_consistency,
    "flocking_score": flocking.flocking_score,
    "rank_consistency": flocking.rank_consistency,
    "effective_neurons": flocking.effective_neurons,
    "statistic": flocking.statistic,
    "prompt_generation_overlap": flocking.prompt_generation_overlap,
    "within": overlap("within"),
    "between_consistency": flocking.between_consistency,
    "between_different": functools.partial(flocking.between_consistency, different_tokens=True),
    "specificity": flocking.specificity,
    "specificity_different": functools.partial(flocking.specificity, different_tokens=True),
    "between": overlap("between"),
}
BETWEEN = {
    "within",
    "between",
    *(name for name in MEASURES if name.startswith(("between", "spec"))),
}


@functools.cache
def made(name: str) -> tuple[xr.Dataset, references.Reference]:
    """A recording with everything in it, and the reference."""
    model = helpers.proved(name)
    recording = helpers.record(
        model, PROMPTS, window=WINDOW, max_new_tokens=13, relative=True, ranks=True
    )
    fed = [row[row >= 0].tolist() for row in recording.token_id.values]
    return recording, references.Reference.of(model, fed, [len(p) for p in PROMPTS], WINDOW)


@functools.cache
def expected(name: str, measure: str, windows: tuple[int, ...]) -> xr.DataArray:
    return references.expected(measure, made(name)[1], windows)


class Change(NamedTuple):
    """What is done to the recording, and to what is expected of it."""

    recording: Callable[[xr.Dataset, pathlib.Path], xr.Dataset]
    result: Callable[[xr.DataArray], xr.DataArray] = lambda values: values
    windows: tuple[int, ...] | None = None  # that are left
    tolerance: float = 2e-5
    single: bool = False  # one sequence, so that there are no pairs


def both(values: xr.DataArray, **labels: object) -> xr.DataArray:
    """Select sequences, and the others with them."""
    if "other" in values.dims and "sequence" in labels:
        labels["other"] = labels["sequence"]
    return values.isel(labels)


def parts_of(recording: xr.Dataset) -> list[xr.Dataset]:
    return [recording.isel(sequence=rows) for rows in ([0, 1], [2], [3])]


def stored(recording: xr.Dataset, folder: pathlib.Path) -> xr.Dataset:
    flocking.save_recording(recording, folder / "r.zarr")
    return flocking.open_recording(folder / "r.zarr")


def chunked(recording: xr.Dataset, folder: pathlib.Path) -> xr.Dataset:
    pytest.importorskip("dask")
    return stored(recording, folder).chunk(sequence=2, neuron=50)


def appended(recording: xr.Dataset, folder: pathlib.Path) -> xr.Dataset:
    for rows in ([0, 1], [2, 3]):
        part = recording.isel(sequence=rows).assign_coords(sequence=[0, 1])
        mode = {"append_dim": "sequence"} if rows[0] else {"zarr_format": 2}
        part.to_zarr(folder / "appended.zarr", **mode)
    return xr.open_zarr(folder / "appended.zarr", chunks=None)


def cast(recording: xr.Dataset, dtype: str) -> xr.Dataset:
    floats = [name for name, v in recording.data_vars.items() if v.dtype.kind == "f"]
    return recording.assign({name: recording[name].astype(dtype) for name in floats})


def renamed(values: xr.DataArray, names: list) -> xr.DataArray:
    other = {"other": names} if "other" in values.dims else {}
    return values.assign_coords(sequence=names, **other)


NAMES = ["d", "b", "a", "c"]
CHANGES = {
    "nothing": Change(lambda r, _: r),
    "transposed": Change(lambda r, _: r.transpose("neuron", "token", "window", "layer", ...)),
    "one layer": Change(lambda r, _: r.sel(layer=1), lambda v: v.sel(layer=1)),
    "one sequence": Change(
        lambda r, _: r.isel(sequence=2), lambda v: v.isel(sequence=2), single=True
    ),
    "one of each": Change(
        lambda r, _: r.sel(sequence=1, layer=0).transpose(),
        lambda v: v.sel(sequence=1, layer=0),
        single=True,
    ),
    "permuted layers": Change(lambda r, _: r.isel(layer=[1, 0]), lambda v: v.isel(layer=[1, 0])),
    "permuted sequences": Change(
        lambda r, _: r.isel(sequence=[2, 0, 3, 1]), lambda v: both(v, sequence=[2, 0, 3, 1])
    ),
    "some windows": Change(lambda r, _: r.isel(window=[1, 2, 6]), windows=(1, 2, 6)),
    "permuted windows": Change(lambda r, _: r.isel(window=[4, 2, 6, 0, 1, 3, 5])),
    "no generation": Change(
        lambda r, _: r.sel(window=r.phase != "generation"), windows=(0, 1, 2, 3, 4)
    ),
    "permuted neurons": Change(lambda r, _: r.isel(neuron=slice(None, None, -1))),
    "permuted tokens": Change(lambda r, _: r.isel(token=slice(None, None, -1))),
    "names": Change(
        lambda r, _: r.assign_coords(sequence=NAMES, file=("sequence", NAMES), run=3),
        lambda v: renamed(v, NAMES),
    ),
    "repeated labels": Change(
        lambda r, _: r.assign_coords(sequence=[0, 1, 0, 1]), lambda v: renamed(v, [0, 1, 0, 1])
    ),
    "xarray's concat": Change(
        lambda r, _: xr.concat(
            [r.isel(sequence=rows).assign_coords(sequence=[0, 1]) for rows in ([0, 1], [2, 3])],
            "sequence",
            data_vars="minimal",
            coords="minimal",
            compat="override",
        ),
        lambda v: renamed(v, [0, 1, 0, 1]),
    ),
    "appended": Change(appended, lambda v: renamed(v, [0, 1, 0, 1])),
    "no labels": Change(lambda r, _: r.drop_vars(["sequence", "layer", "neuron", "token", "text"])),
    "variables": Change(lambda r, _: r.reset_coords()),
    "on disk": Change(stored),
    "chunked": Change(chunked),
    "float64": Change(lambda r, _: cast(r, "float64")),
    "float16": Change(lambda r, _: cast(r, "float16"), tolerance=2e-3),
    "flocking.concat": Change(lambda r, _: flocking.concat(parts_of(r))),
    "concat of single": Change(lambda r, _: flocking.concat(r.isel(sequence=n) for n in range(4))),
}
DIMS = {
    **dict.fromkeys(MEASURES, ("sequence", "layer")),
    **dict.fromkeys(BETWEEN - {"within"}, ("sequence", "other", "layer")),
    "statistic": ("sequence", "layer", "neuron"),
}


def test_the_recording_is_one_with_gaps() -> None:
    """Texts of different lengths with generations: seven windows, some of them empty."""
    recording, _ = made("llama")
    assert recording.phase.values.tolist() == [
        "first", *["prompt"] * 4, *["generation"] * 2
    ]  # fmt: skip
    assert (recording.tokens == 0).any("window").values.tolist() == [True, False, False, True]


# One architecture has all changes; a plain block and a mixture of experts have these.
FEW = ("transposed", "one layer", "permuted sequences", "some windows", "flocking.concat")
CASES = [
    *(("llama", change) for change in CHANGES),
    *((name, change) for name in ("gpt2", "mixtral") for change in FEW),
]


@pytest.mark.parametrize(("name", "change"), CASES)
@pytest.mark.parametrize("measure", MEASURES)
def test_measures(
    name: str, measure: str, change: str, tmp_path: pathlib.Path, recwarn: pytest.WarningsRecorder
) -> None:
    recording, _ = made(name)
    given = CHANGES[change].recording(recording, tmp_path)
    before = given.copy()
    if CHANGES[change].single and measure in BETWEEN:
        with pytest.raises(ValueError, match="expected two sequences or more, got 1"):
            MEASURES[measure](given)
        return
    windows = CHANGES[change].windows or tuple(range(recording.sizes["window"]))
    if measure == "prompt_generation_overlap" and max(windows) == 4:
        with pytest.raises(ValueError, match="no phase 'generation'"):
            MEASURES[measure](given)
        return
    got = MEASURES[measure](given)
    wanted = CHANGES[change].result(expected(name, measure, windows))
    dims = tuple(dim for dim in DIMS[measure] if dim in wanted.dims)
    assert got.dims == dims
    assert got.dtype == np.float64
    for dim in dims:
        if dim in given.coords and dim != "neuron":
            assert got[dim].values.tolist() == wanted[dim].values.tolist()
    if measure in ("prompt_generation_overlap", "within", "between"):
        # One neuron of two that are almost equal may be taken for the other.
        tolerance = {"rtol": 0, "atol": 0.04}
    else:
        tolerance = {"rtol": CHANGES[change].tolerance, "atol": CHANGES[change].tolerance * 5}
        if "different" in measure:
            tolerance = {"rtol": 2e-3, "atol": 1e-3}  # relative is float16
    np.testing.assert_allclose(got.values, wanted.transpose(*dims).values, **tolerance)
    xr.testing.assert_identical(given, before)


@pytest.mark.parametrize(
    ("measure", "dim"),
    [
        *((measure, "layer") for measure in MEASURES),
        *((measure, "sequence") for measure in MEASURES if measure not in BETWEEN),
    ],
)
def test_selecting_before_is_selecting_after(measure: str, dim: str) -> None:
    """With all coordinates, those of the user's own included."""
    recording, _ = made("llama")
    recording = recording.assign_coords(
        file=("sequence", NAMES), depth=("layer", [0.1, 0.9]), run=3
    )
    after = MEASURES[measure](recording).isel({dim: 1})
    xr.testing.assert_allclose(MEASURES[measure](recording.isel({dim: 1})), after, rtol=1e-12)
    assert set(MEASURES[measure](recording.isel({dim: 1})).coords) == set(after.coords)


def test_masked_neurons_give_no_number() -> None:
    recording = helpers.record(helpers.proved("llama"), helpers.random_ids(30, 20), window=5)
    masked = recording.copy()
    for name in ("energy", "mass"):
        masked[name] = recording[name].where(recording.neuron < 80)
    for measure in (
        flocking.consistency,
        flocking.flocking_score,
        flocking.effective_neurons,
        flocking.between_consistency,
    ):
        assert bool(measure(masked).isnull().all())
    assert not bool(flocking.select(flocking.statistic(masked)).any())
