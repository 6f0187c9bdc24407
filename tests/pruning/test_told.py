"""What a card says of how neurons were selected, after operations that keep attributes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import build, generate, random_ids, tokens

import flocking

TEXTS = random_ids(30, 20)


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def statistic(model: tf.PreTrainedModel) -> xr.DataArray:
    return flocking.statistic(flocking.record(model, TEXTS, progress=False))


def said(model: tf.PreTrainedModel, kept: object, folder: Path) -> str:
    flocking.export(model, kept, folder)
    text = huggingface_hub.ModelCard.load(folder / "README.md").text
    return next(line for line in text.splitlines() if line.startswith("- Neurons kept by"))


def flipped(kept: xr.DataArray) -> xr.DataArray:
    """With one neuron in place of another."""
    other = kept.copy(deep=True)
    out, into = np.flatnonzero(kept[0])[0], np.flatnonzero(~kept[0])[0]
    other[0, out], other[0, into] = False, True
    return other


CHANGES: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
    "any": lambda s: flocking.select(s, 0.5).any("sequence"),
    "all": lambda s: flocking.select(s, 0.9).all("sequence"),
    "not": lambda s: ~flocking.select(s, 0.5)[0],
    "not of several": lambda s: ~flocking.select(s, densities=[0.25, 0.5])[1, 0],
    "or": lambda s: flocking.select(s, 0.5)[0] | flocking.select(s, 0.25)[1],
    "by hand": lambda s: flipped(flocking.select(s, 0.5)[0]),
    "roll": lambda s: flocking.select(s, 0.5)[0].roll(neuron=3),
    "layers": lambda s: flocking.select(s, 0.5)[0].copy(
        data=flocking.select(s, 0.5)[0].values[::-1]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed(
    name: str, model: tf.PreTrainedModel, statistic: xr.DataArray, tmp_path: Path
) -> None:
    with xr.set_options(keep_attrs=True):
        kept = CHANGES[name](statistic)
    text = said(model, kept, tmp_path / "out")
    assert text.startswith("- Neurons kept by: not known")
    if name != "or":  # xarray drops attributes of two that differ
        words = "the selection was changed after it was made. It was made from: GRIFFIN's statistic"
        assert words in text


def test_taken_out(model: tf.PreTrainedModel, statistic: xr.DataArray, tmp_path: Path) -> None:
    """One of several is what was made, and its density is not that of all."""
    several = flocking.select(statistic, densities=[0.25, 0.5, 0.75])
    for n, kept in enumerate(
        (
            several.sel(density=0.25)[1],
            several.isel(density=[2], sequence=[0]),
            flocking.select(statistic, 0.5)[1],
            flocking.select(statistic, 0.5)[1].isel(layer=[1, 0]),
            flocking.select(statistic, 0.5).transpose("neuron", ...)[:, 0].copy(deep=True),
        )
    ):
        text = said(model, kept, tmp_path / str(n))
        assert "those with the largest" in text
        assert "changed" not in text
        assert "0.75" not in text


def test_somebody_s_own_words(
    model: tf.PreTrainedModel, statistic: xr.DataArray, tmp_path: Path
) -> None:
    kept = (~flocking.select(statistic, 0.5)[0]).assign_attrs(made_from="the smallest")
    assert said(model, kept, tmp_path / "out").startswith("- Neurons kept by: the smallest")


@pytest.mark.parametrize("name", ["minus", "mean", "shuffled"])
def test_statistics_that_were_changed(
    name: str, model: tf.PreTrainedModel, statistic: xr.DataArray, tmp_path: Path
) -> None:
    with xr.set_options(keep_attrs=True):
        if name == "minus":
            other = -statistic[0]
        elif name == "mean":
            other = statistic.mean("sequence")
        else:
            other = statistic[0].copy(data=statistic[0].values[:, ::-1])
    text = said(model, flocking.select(other, 0.5), tmp_path / "out")
    assert "numbers that were computed from another statistic (GRIFFIN's" in text


def test_twins(model: tf.PreTrainedModel, tmp_path: Path) -> None:
    twin = flocking.griffin(model, 0.5)
    generate(twin, tokens(9), n=2)
    kept = twin.selection
    assert "flocking.griffin, method topk" in said(model, kept, tmp_path / "whole")
    assert "griffin, method topk" in said(model, twin.history[0], tmp_path / "history")
    kept[1] = torch.arange(5)
    assert "changed after it was made" in said(model, kept, tmp_path / "other")
    assert "changed after it was made" in said(model, ~twin.history, tmp_path / "not")
