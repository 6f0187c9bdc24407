"""Everything public of a recording in chunks: as in memory, lazily, and for tasks of any shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.analysis import chunks, couples, uncertainty

pytest.importorskip("dask")

PROMPTS = helpers.random_ids(49, 33, 65, 57, 41, seed=4)


@functools.cache
def made(name: str) -> xr.Dataset:
    model = helpers.proved(name)
    options = {"window": 8, "max_new_tokens": 13, "relative": True, "ranks": True}
    return helpers.record(model, PROMPTS, **options)


def kept(recording: xr.Dataset) -> xr.DataArray:
    return flocking.select(flocking.statistic(recording, phase="prompt"), 0.5)


def later(recording: xr.Dataset) -> xr.DataArray:
    return flocking.statistic(recording, phase="generation")


# Functions whose result is as lazy as what they are given.
LAZY: dict[str, Callable[[xr.Dataset], Any]] = {
    "consistency": flocking.consistency,
    "different_tokens": functools.partial(flocking.consistency, different_tokens=True),
    "chance_consistency": flocking.chance_consistency,
    "flocking_score": flocking.flocking_score,
    "rank_consistency": flocking.rank_consistency,
    "effective_neurons": flocking.effective_neurons,
    "statistic": flocking.statistic,
    "statistic of lengths": functools.partial(flocking.statistic, phase="prompt", by="length"),
    "statistic of windows": functools.partial(flocking.statistic, phase="prompt", by="window"),
    "statistic of a range": functools.partial(flocking.statistic, phase="prompt", start=1, stop=17),
    "statistic_of_others": lambda r: flocking.statistic_of_others(flocking.statistic(r)),
    "select": kept,
    "select of windows": lambda r: flocking.select(flocking.statistic(r, by="window"), 0.3),
    "select by layer": lambda r: flocking.select(flocking.statistic(r), [0.25, 0.5]),
    "select at densities": lambda r: flocking.select(flocking.statistic(r), densities=[0.25, 0.5]),
    "select of others": lambda r: flocking.select(
        flocking.statistic_of_others(flocking.statistic(r)), 0.5
    ),
    "jaccard": lambda r: flocking.jaccard(kept(r), flocking.select(later(r), 0.5)),
    "captured_energy": lambda r: flocking.captured_energy(kept(r), later(r)),
    "captured of the oracle": lambda r: flocking.captured_energy(kept(r), later(r), of="oracle"),
    "prompt_generation_overlap": flocking.prompt_generation_overlap,
    "prompt_generation_overlap at densities": functools.partial(
        flocking.prompt_generation_overlap, densities=[0.25, 0.5]
    ),
    "drift": functools.partial(flocking.drift, density=[0.25, 0.5], prompt_lengths=[9, 25]),
    "drift of all": lambda r: flocking.drift(r).captured_energy,
}
# Those that compare sequences: computed when they are called.
EAGER: dict[str, Callable[[xr.Dataset], Any]] = {
    "between_consistency": flocking.between_consistency,
    "between_different": functools.partial(flocking.between_consistency, different_tokens=True),
    "between_consistency of pairs": functools.partial(
        flocking.between_consistency, pairs=4, seed=2
    ),
    "specificity": flocking.specificity,
    "specificity_different": functools.partial(flocking.specificity, different_tokens=True),
    "specificity of pairs": functools.partial(flocking.specificity, pairs="all"),
    "between_sequence_overlap": flocking.between_sequence_overlap,
    "between_sequence_overlap of pairs": functools.partial(
        flocking.between_sequence_overlap, pairs=4, seed=2
    ),
    "bootstrap": lambda r: flocking.bootstrap(flocking.flocking_score(r), resamples=50),
    "bootstrap of pairs": lambda r: flocking.bootstrap(
        flocking.between_consistency(r, pairs=7), resamples=50
    ),
    "bootstrap of neurons": lambda r: flocking.bootstrap(flocking.statistic(r), resamples=50),
}
MEASURES = LAZY | EAGER
CHUNKS: dict[str, dict[str, Any]] = {
    "one": {},
    "by sequence": {"sequence": 1},
    "by layer": {"layer": 1},
    "by window": {"window": 1},
    "sequence and layer": {"sequence": 2, "layer": 1},
    "ragged": {
        "sequence": (1, 3, 1),
        "window": (2, 5, 4),
        "neuron": (50, 110),
        "token": (30, 47),
    },
}


def laid_out(recording: xr.Dataset, layout: str) -> xr.Dataset:
    return recording.chunk(CHUNKS[layout])


def assert_equal(got: Any, wanted: Any) -> None:
    """Values to 1e-12, everything else exactly, but for what says whether it was changed."""
    if isinstance(wanted, xr.Dataset):
        assert list(got) == list(wanted)
        for name in wanted:
            assert_equal(got[name], wanted[name])
        return
    assert got.dims == wanted.dims
    assert got.dtype == wanted.dtype
    assert got.name == wanted.name
    assert {*got.coords} == {*wanted.coords}
    for name in wanted.coords:
        xr.testing.assert_equal(
            got[name].drop_vars(got[name].coords), wanted[name].drop_vars(wanted[name].coords)
        )
    without = [
        {k: v for k, v in each.attrs.items() if k != "made_from_marks"} for each in (got, wanted)
    ]
    assert without[0] == without[1]
    if wanted.dtype == bool:
        np.testing.assert_array_equal(got.values, wanted.values)
    else:
        np.testing.assert_allclose(got.values, wanted.values, rtol=1e-12, atol=1e-15)


@functools.cache
def wanted(name: str, measure: str) -> Any:
    return MEASURES[measure](made(name))


@pytest.mark.parametrize("layout", CHUNKS)
@pytest.mark.parametrize("measure", MEASURES)
def test_chunked_is_as_in_memory(measure: str, layout: str) -> None:
    given = laid_out(made("llama"), layout)
    before = given.copy()
    got = MEASURES[measure](given)
    for part in got.data_vars.values() if isinstance(got, xr.Dataset) else [got]:
        assert (part.chunks is not None) == (measure in LAZY)
    assert_equal(got, wanted("llama", measure))
    xr.testing.assert_identical(given, before)


@pytest.mark.parametrize("measure", MEASURES)
def test_chunked_mixture(measure: str) -> None:
    given = laid_out(made("mixtral"), "sequence and layer")
    assert_equal(MEASURES[measure](given), wanted("mixtral", measure))


# --------------------------------------------------------------------------------------
# Stores, texts and labels


def test_chunked_store_leaves_large_variables_unread(tmp_path: Path) -> None:
    """At the call, what says something about tokens is read, and nothing with neurons."""
    flocking.save_recording(made("llama"), tmp_path / "r.zarr")
    corpus = flocking.open_recording(tmp_path / "r.zarr").chunk(sequence=2)

    def unreadable(*_: object) -> None:
        raise AssertionError("a variable with neurons was read")

    def fails(variable: xr.Variable) -> xr.Variable:
        return variable.copy(data=variable.data.map_blocks(unreadable, dtype=variable.dtype))

    large = [name for name in corpus.data_vars if "neuron" in corpus[name].dims]
    broken = corpus.assign({name: fails(corpus.variables[name]) for name in large})
    for name, measure in LAZY.items():
        if "others" in name or name == "chance_consistency":  # which read them once, and never
            continue
        got = measure(broken)
        with pytest.raises(AssertionError, match="with neurons was read"):
            got.compute()
    assert_equal(flocking.chance_consistency(broken), wanted("llama", "chance_consistency"))


def test_chunked_texts_and_labels_of_the_users_own() -> None:
    recording = made("llama").assign_coords(file=("sequence", [*"abcde"]), run=3)
    got = flocking.flocking_score(recording.chunk(sequence=2))
    assert_equal(got, flocking.flocking_score(recording))
    assert got.file.values.tolist() == [*"abcde"]
    for change in (
        lambda r: r.isel(layer=1),
        lambda r: r.isel(sequence=2),
        lambda r: r.isel(sequence=[3, 0]),
        lambda r: r.transpose("neuron", "token", "window", "layer", ...),
        lambda r: r.isel(window=[0, 3, 2, 1]),
        lambda r: r.drop_vars(["sequence", "layer", "neuron", "token", "text"]),
        lambda r: r.reset_coords(),
    ):
        for measure in (flocking.consistency, flocking.effective_neurons, flocking.statistic):
            assert_equal(measure(change(recording.chunk(sequence=2))), measure(change(recording)))


def test_chunked_refusals_and_warnings_come_at_the_call() -> None:
    recording = made("llama")
    chunked = recording.chunk(sequence=2)
    with pytest.raises(ValueError, match="no variable 'rank'"):
        flocking.rank_consistency(chunked.drop_vars("rank"))
    with pytest.raises(ValueError, match="tokens do not fit the windows"):
        flocking.consistency(chunked.isel(token=slice(20)))
    with pytest.raises(ValueError, match="'norm' has no value at some tokens"):
        flocking.consistency(chunked.assign(norm=chunked.norm.where(chunked.sequence < 3)))
    with pytest.raises(ValueError, match="part of the neurons cannot be measured"):
        flocking.effective_neurons(chunked.isel(neuron=slice(20)))
    with pytest.raises(ValueError, match=r"density=1.5: give the fraction"):
        flocking.select(flocking.statistic(chunked), 1.5)
    with pytest.raises(TypeError, match="expected a recording"):
        flocking.consistency(chunked.mass.drop_vars("phase").to_dataset())
    short = helpers.record(helpers.proved("llama"), [[5, 6], PROMPTS[0]]).chunk(sequence=1)
    with pytest.warns(UserWarning, match="1 of 2 sequences have fewer than two tokens"):
        got = flocking.consistency(short)
    assert got.isnull().values.tolist() == [[True, True], [False, False]]


def test_chunked_sums_run_on() -> None:
    for kind in (flocking.RunningStatistic, flocking.RunningScores):
        wanted, got = kind(), kind()
        wanted.update(made("llama"))
        got.update(laid_out(made("llama"), "sequence and layer"))
        xr.testing.assert_allclose(got.result(), wanted.result(), rtol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of few texts
def test_chunked_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: tuple
) -> None:
    page = Path(__file__).parents[2] / "docs/corpora.md"
    text = page.read_text(encoding="utf-8").partition("## Analysis\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    model = helpers.proved("llama")
    recording = helpers.record(model, PROMPTS, window=8)
    flocking.save_recording(recording, "corpus.zarr")
    tiny = helpers.build("llama", vocab_size=len(embedded[1]))
    monkeypatch.setattr(flocking, "load", lambda: (tiny, embedded[1]))
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["between"].dims == ("pair", "layer")
    assert names["interval"].dims == ("interval", "layer")
    assert names["score"].chunks is not None
    assert names["total"].texts == 2


@pytest.mark.parametrize("measure", MEASURES)
def test_chunked_in_the_smallest_pieces(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many texts at a time as have to be, wherever some are taken at a time."""
    expected = wanted("llama", measure)
    monkeypatch.setattr(chunks, "BLOCK", 1)
    monkeypatch.setattr(couples, "ROOM", 1)
    monkeypatch.setattr(uncertainty, "ROOM", 64)
    assert_equal(MEASURES[measure](laid_out(made("llama"), "sequence and layer")), expected)
