"""What is in memory while a corpus in chunks is measured does not grow with its texts."""

from __future__ import annotations

import functools
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr

import flocking

dask = pytest.importorskip("dask")
array = pytest.importorskip("dask.array")

CHUNK, LAYERS, WINDOW, D_FF = 25, 2, 8, 1024
NUMBERS = np.concatenate([[0], 1 + np.arange(4 * WINDOW) // WINDOW])
FEW, MANY = 100, 500


class Source:
    """Chunks of a variable, made when they are asked for; counts the bytes of those alive."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def variable(self, sequences: int, rest: tuple[int, ...], dtype: str = "float32") -> Any:
        base = np.random.default_rng(0).gamma(0.5, size=(CHUNK, 1, *rest)).astype(dtype)

        def made(block_info: Any = None) -> np.ndarray:
            data = base.copy()
            self.alive += data.nbytes
            self.most = max(self.most, self.alive)
            weakref.finalize(data, self.forget, data.nbytes)
            return data

        chunks = ((CHUNK,) * (sequences // CHUNK), (1,) * LAYERS, *((n,) for n in rest))
        return array.map_blocks(made, chunks=chunks, dtype=dtype, meta=np.empty((0,), dtype))

    def forget(self, size: int) -> None:
        self.alive -= size


def corpus(sequences: int, source: Source) -> xr.Dataset:
    """A recording of so many texts, none of which is made yet."""
    windows, tokens = NUMBERS.max() + 1, len(NUMBERS)
    moments = ("sequence", "layer", "window", "neuron")
    by_token = ("sequence", "layer", "token")

    def of_texts(values: np.ndarray) -> Any:
        whole = array.broadcast_to(array.from_array(values), (sequences, *values.shape))
        return whole.rechunk((CHUNK, *values.shape))

    large = {
        name: (moments, source.variable(sequences, (windows, D_FF)))
        for name in ("energy", "mass", "rank")
    }
    return xr.Dataset(
        {
            **large,
            "norm": (by_token, source.variable(sequences, (tokens,)) + 1),
            "l1": (by_token, source.variable(sequences, (tokens,)) + 1),
            "relative": ((*by_token, "neuron"), source.variable(sequences, (tokens, D_FF), "f2")),
            "tokens": (("sequence", "window"), of_texts(np.bincount(NUMBERS))),
        },
        {
            "sequence": np.arange(sequences),
            "layer": np.arange(LAYERS),
            "window": np.arange(windows),
            "phase": ("window", ["first"] + ["prompt"] * (windows - 1)),
            "start": ("window", np.r_[0, 1 + WINDOW * np.arange(windows - 1)]),
            "neuron": np.arange(D_FF),
            "d_ff": ("layer", np.full(LAYERS, D_FF)),
            "token_window": (("sequence", "token"), of_texts(NUMBERS)),
            "token_id": (("sequence", "token"), of_texts(NUMBERS * 3)),
        },
    )


def kept(recording: xr.Dataset) -> xr.DataArray:
    return flocking.select(flocking.statistic(recording, stop=9), 0.5)


def later(recording: xr.Dataset) -> xr.DataArray:
    return flocking.statistic(recording, start=9)


def scores(recording: xr.Dataset) -> xr.Dataset:
    running = flocking.RunningScores()
    running.update(recording)
    return running.result()


def static(recording: xr.Dataset) -> xr.DataArray:
    running = flocking.RunningStatistic()
    running.update(recording)
    return running.result()


MEASURES: dict[str, Callable[[xr.Dataset], Any]] = {
    "flocking_score": flocking.flocking_score,
    "different_tokens": functools.partial(flocking.consistency, different_tokens=True),
    "rank_consistency": flocking.rank_consistency,
    "effective_neurons": flocking.effective_neurons,
    "statistic": lambda r: flocking.statistic(r, by="length").mean("sequence"),
    "statistic_of_others": lambda r: flocking.statistic_of_others(flocking.statistic(r)).mean(
        "sequence"
    ),
    "select": lambda r: kept(r).mean("sequence"),
    "jaccard": lambda r: flocking.jaccard(kept(r), flocking.select(later(r), 0.5)),
    "captured_energy": lambda r: flocking.captured_energy(kept(r), later(r), of="oracle"),
    "drift": lambda r: flocking.drift(r).mean("sequence"),
    "between_consistency": functools.partial(flocking.between_consistency, pairs=60),
    "between_different": functools.partial(
        flocking.between_consistency, pairs=20, different_tokens=True
    ),
    "specificity": functools.partial(flocking.specificity, pairs=60),
    "between_sequence_overlap": functools.partial(flocking.between_sequence_overlap, pairs=60),
    "bootstrap": lambda r: flocking.bootstrap(flocking.flocking_score(r), resamples=50),
    "bootstrap of neurons": lambda r: flocking.bootstrap(flocking.statistic(r), resamples=20),
    "RunningScores": scores,
    "RunningStatistic": static,
}


def peak(measure: str, sequences: int) -> tuple[int, int, int]:
    """Most bytes of chunks alive, most bytes at all, and the bytes of one variable."""
    source = Source()
    recording = corpus(sequences, source)
    tracemalloc.start()
    try:
        with dask.config.set(scheduler="threads", num_workers=2):
            MEASURES[measure](recording).compute()
        return source.most, tracemalloc.get_traced_memory()[1], recording["mass"].nbytes
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def warm() -> None:
    """What is imported and made once."""
    peak("drift", CHUNK)
    peak("bootstrap", CHUNK)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("measure", MEASURES)
def test_memory_does_not_grow_with_texts(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flocking.analysis.couples.ROOM", 2**21)
    monkeypatch.setattr("flocking.analysis.uncertainty.ROOM", 2**17)
    few, many = peak(measure, FEW), peak(measure, MANY)
    grown = many[2] - few[2]  # of one variable
    assert many[0] < few[0] + 0.1 * grown
    assert many[1] < few[1] + 0.25 * grown
