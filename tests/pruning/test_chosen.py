"""Selections in the forms that users have them become masks, or one clear error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import GREEDY, as_masks, generate, proved, random_ids, record, tokens

import flocking
from flocking.pruning.chosen import Wide, layers_of, made_from, masks_of
from flocking.pruning.exported import Exported
from flocking.pruning.lost import Lost

LAYERS = [Wide(0, 6), Wide(1, 4)]
KEPT = np.array([[1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 0]], bool)


def array(kept: np.ndarray = KEPT, **coords: object) -> xr.DataArray:
    """A selection as flocking.select makes it."""
    named = {"layer": np.arange(len(kept)), "neuron": np.arange(kept.shape[1])}
    named |= {"d_ff": ("layer", [6, 4])} | coords
    return xr.DataArray(kept, named, ("layer", "neuron"), "selection")


def assert_kept(masks: dict[int, np.ndarray]) -> None:
    assert list(masks) == [0, 1]
    assert masks[0].tolist() == KEPT[0].tolist()
    assert masks[1].tolist() == KEPT[1, :4].tolist()
    assert all(mask.dtype == bool for mask in masks.values())


GOOD = {
    "as selected": array(),
    "transposed": array().T,
    "neurons shuffled": array().isel(neuron=[3, 1, 5, 0, 2, 4]),
    "layers shuffled": array().isel(layer=[1, 0]),
    "one sequence": array().expand_dims(sequence=["a"]),
    "one of several positions": array().expand_dims(position=[12]),
    "without labels": xr.DataArray(KEPT, dims=("layer", "neuron")),
    "indices": {0: torch.tensor([0, 2, 5]), 1: torch.tensor([1, 2])},
    "indices of one sequence": {0: torch.tensor([[0, 2, 5]]), 1: torch.tensor([[1, 2]])},
    "indices in any order": {1: [2, 1], 0: np.array([5, 0, 2])},
    "masks": {0: torch.from_numpy(KEPT[0]), 1: KEPT[1, :4]},
}


@pytest.mark.parametrize("form", GOOD)
def test_forms(form: str) -> None:
    assert_kept(masks_of(GOOD[form], LAYERS))


BAD = {
    "statistic": (array().astype(float), TypeError, "a statistic: give flocking.select"),
    "statistics in a dict": ({0: np.ones(6), 1: np.ones(4)}, TypeError, "layer 0.*a statistic"),
    "objects": (array().astype(object), TypeError, "dtype object .*reindex"),
    "numbers of a mask": (array().astype(int), TypeError, "dtype int64: give a bool array"),
    "a recording": (array().to_dataset(), TypeError, "a recording: give the selection of a twin"),
    "numpy": (KEPT, TypeError, "a ndarray: give the selection"),
    "nothing": (None, TypeError, "a NoneType"),
    "two sequences": (
        array().expand_dims(sequence=[0]).isel(sequence=[0, 0]),
        ValueError,
        "2 sequences.*global_statistic.*isel",
    ),
    "two sequences of indices": (
        {0: torch.tensor([[0], [1]]), 1: torch.tensor([[0], [1]])},
        ValueError,
        "2 sequences.*global_statistic",
    ),
    "two densities": (
        array().expand_dims(density=[0.5]).isel(density=[0, 0]),
        ValueError,
        r"2 selections along 'density'.*isel\(density=0\)",
    ),
    "no sequence": (
        array().expand_dims(sequence=[0]).isel(sequence=[]),
        ValueError,
        "0 sequences|empty along 'sequence'",
    ),
    "a layer of another model": (array(layer=[0, 7]), ValueError, "the model has not .7; "),
    "a layer twice": (array(layer=[0, 0]), ValueError, "a layer twice"),
    "one layer": (array().isel(layer=[1]), ValueError, "lacks layers of the model .0"),
    "one layer, of a scalar label": (array().isel(layer=1), ValueError, "lacks layers"),
    "one layer of indices": ({0: [1]}, ValueError, "lacks layers of the model .1"),
    "one layer more": ({0: [1], 1: [1], 2: [1]}, ValueError, "the model has not .2; "),
    "unnamed layers": (
        xr.DataArray(KEPT[:1], dims=("layer", "neuron")), ValueError, "has 1 layers, the model 2",
    ),
    "a part of the neurons": (array().isel(neuron=[0, 1, 2]), ValueError, "neuron"),
    "other widths": (
        array(KEPT[:, :5], d_ff=("layer", [5, 4])), ValueError, "over 5 neurons.*up to 6",
    ),
    "other widths of a narrow layer": (
        array(d_ff=("layer", [6, 5])), ValueError, "d_ff=5 of layer 1.*has 4",
    ),
    "beyond a narrow layer": (array(~KEPT), ValueError, "layer 1 beyond its 4"),
    "nothing kept": (array(KEPT & [[True], [False]]), ValueError, "no neuron of layer 1.*NaN"),
    "nothing kept of indices": ({0: [1], 1: []}, ValueError, "no neuron of layer 1"),
    "a neuron too far": ({0: [6], 1: [1]}, ValueError, "from 6 to 6.*from 0 to 5"),
    "a negative one": ({0: [-1, 2], 1: [1]}, ValueError, "from -1 to 2"),
    "a neuron twice": ({0: [2, 2], 1: [1]}, ValueError, "layer 0 has a neuron twice"),
    "a mask of another width": ({0: KEPT[0], 1: KEPT[1]}, ValueError, "mask of 6.*layer has 4"),
    "cubes": ({0: np.ones((1, 1, 2), int), 1: [1]}, ValueError, "3 dimensions"),
    "words": ({0: "all", 1: [1]}, TypeError, "layer 0"),
    "no neurons": (xr.DataArray([True, True], dims="layer"), ValueError, "dimensions layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    selection, kind, text = BAD[case]
    with pytest.raises(kind, match=text) as caught:
        masks_of(selection, LAYERS)
    assert str(caught.value).endswith(".") or str(caught.value).endswith(")")


def test_a_model_is_told_what_to_give(llama: tf.PreTrainedModel) -> None:
    for model in (llama, flocking.griffin(llama)):
        with pytest.raises(TypeError, match=r"is a model: give .* \(twin\.selection\)"):
            masks_of(model, LAYERS)


def test_experts_have_one_width() -> None:
    layers = [Wide(0, 6, 2)]
    kept = xr.DataArray([[1, 0, 1, 0, 1, 1]], {"layer": [0]}, ("layer", "neuron")).astype(bool)
    assert masks_of(kept, layers)[0].sum() == 4
    with pytest.raises(ValueError, match="1 to 2 neurons of the experts of layer 0"):
        masks_of(kept & [True, True, False, True, True, True], layers)


def test_runs_of_a_block_keep_the_same() -> None:
    layers = [Wide(0, 4), Wide(1, 4, first=0)]
    assert masks_of({0: [1, 2], 1: [2, 1]}, layers)[1].tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="0 and 1 are runs of one block"):
        masks_of({0: [1, 2], 1: [0, 1]}, layers)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_flocking_selects(name: str) -> None:
    """A twin's selection and that of the analysis, as they come."""
    model = proved(name)
    layers = layers_of(flocking.feedforwards(model))
    twin = flocking.griffin(model)
    generate(twin, tokens(12), n=2, **GREEDY)
    got = masks_of(twin.selection, layers)
    expected = as_masks(twin, model)
    assert all((got[layer] == mask).all() for layer, mask in enumerate(expected))
    recording = record(model, random_ids(12, 20))
    kept = flocking.select(flocking.statistic(recording))
    with pytest.raises(ValueError, match="2 sequences"):
        masks_of(kept, layers)
    got = masks_of(kept.isel(sequence=[1]), layers)
    assert all((got[layer] == kept[1, layer].values).all() for layer in got)


def test_says_how_it_was_made() -> None:
    masks = {0: np.array([True, False])}
    assert made_from(array().assign_attrs(made_from="a coin"), masks) == "a coin"
    assert made_from(array(), masks) == made_from({0: [1]}, masks) == ""


def test_export_in_words() -> None:
    lost = Lost(3, 900, 10.0, 15.0, 1.4, 1.6, 0.75, 0.25)
    done = Exported("here", 60, 100, 2400, 4000, {0: 30, 1: 20}, {0: 30, 1: 30}, lost)
    assert done.zeros == 10
    words = repr(done)
    for part in (
        "60 of 100 (60.0%)", "2.4 kB of 4 kB", "20 to 30 in 2 layers",
        "30 in each of 2 layers: 10 are zeros (16.7%)", "15, was 10 (1.5 times", "75.0%",
    ):  # fmt: skip
        assert part in words
        assert part in done._repr_html_()


def test_what_looks_like_a_selection_is_named() -> None:
    layers = [Wide(0, 6), Wide(1, 6)]
    with pytest.raises(TypeError, match=r"by strings \('0', '1'\): give their whole numbers"):
        masks_of({"0": [1], "1": [2]}, layers)
    ones = np.array([1, 0, 1, 1, 0, 0])
    for mask in (ones, torch.tensor(ones), ones.astype(np.uint8), ones[:5], ones * 0):
        with pytest.raises(TypeError, match=r"layer 0 is a mask of the numbers 0 and 1.*bool"):
            masks_of({0: mask, 1: [2]}, layers)
    assert masks_of({0: [0, 1], 1: [1]}, layers)[0].sum() == 2
    kept = xr.DataArray(np.ones((2, 6), bool), {"layer": [0, 1]}, ("layer", "neuron"))
    for other, dims in (
        (kept.rename(neuron="n"), "layer, n"),
        (kept.drop_vars("layer").rename(layer="block"), "block, neuron"),
        (kept.rename(neuron="n").expand_dims("sequence"), "sequence, layer, n"),
    ):
        with pytest.raises(ValueError, match=f"has dimensions {dims}: give one over layer and n"):
            masks_of(other, layers)
