"""Densities that differ by layer: in order, or by the labels of what names its layers."""

from __future__ import annotations

import functools

import helpers
import pandas as pd
import pytest
import xarray as xr

import flocking
from flocking.analysis import kept_count


@functools.cache
def recording() -> xr.Dataset:
    return helpers.record(
        helpers.proved("llama"), helpers.random_ids(33, 33, 33, seed=4), window=8, max_new_tokens=9
    )


def statistics() -> tuple[xr.DataArray, xr.DataArray]:
    return tuple(flocking.statistic(recording(), phase=p) for p in ("prompt", "generation"))


def by_layer(values: list[float], layers: list[int]) -> xr.DataArray:
    return xr.DataArray(values, {"layer": layers}, ("layer",))


@pytest.mark.parametrize(
    "density",
    [
        [0.25, 0.5],
        xr.DataArray([0.25, 0.5], dims="layer"),
        by_layer([0.5, 0.25], [1, 0]),
        pd.Series([0.5, 0.25], [1, 0]),
        {1: 0.5, 0: 0.25},
    ],
    ids=lambda density: type(density).__name__,
)
def test_densities_that_name_their_layers(density: object) -> None:
    prompt, generation = statistics()
    kept = flocking.select(prompt, density)
    assert kept.sum("neuron").data.tolist() == [[40, 80]] * 3
    turned = flocking.select(prompt.isel(layer=[1, 0]), by_layer([0.25, 0.5], [0, 1]))
    xr.testing.assert_equal(turned.sel(layer=[0, 1]), kept)
    xr.testing.assert_equal(
        flocking.prompt_generation_overlap(recording(), density),
        flocking.jaccard(kept, flocking.select(generation, density)),
    )
    assert flocking.drift(recording(), density).density.data.tolist() == [0.25, 0.5]
    twin = flocking.griffin(helpers.proved("llama"), density)
    assert [compact.k for compact in twin._griffin.compacts] == [40, 80]


@pytest.mark.parametrize(
    ("density", "problem", "message"),
    [
        (
            by_layer([0.5, 0.25], [1, 2]),
            ValueError,
            "for layers 1, 2, and the layers here",
        ),
        (by_layer([0.5, 0.25], [1, 1]), ValueError, "for layers 1, 1"),
        ({3: 0.5, 4: 0.25}, ValueError, "for layers 3, 4"),
        (pd.Series([0.5, 0.25], ["a", "b"]), ValueError, "for layers a, b"),
        (xr.DataArray([0.5, 0.25], dims="sequence"), ValueError, r"dimensions \(sequence\)"),
        ({0.5, 0.25}, TypeError, "give a number, or one for each of 2 layers"),
    ],
)
def test_densities_of_other_layers(density: object, problem: type, message: str) -> None:
    model = helpers.proved("llama")
    for entry in (
        lambda: flocking.select(statistics()[0], density),
        lambda: flocking.prompt_generation_overlap(recording(), density),
        lambda: flocking.between_sequence_overlap(recording(), density),
        lambda: flocking.drift(recording(), density),
        lambda: flocking.griffin(model, density),
    ):
        with pytest.raises(problem, match=message):
            entry()


@pytest.mark.parametrize("d_ff", [3, 7, 1536, 8960])
def test_the_advice_of_a_density_that_keeps_nothing_keeps_one(d_ff: int) -> None:
    with pytest.raises(ValueError, match="keeps none") as caught:
        kept_count(1e-9, d_ff)
    advised = float(str(caught.value).split("give ")[1].split(" or more")[0])
    assert kept_count(advised, d_ff) == 1
