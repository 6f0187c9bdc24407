"""Figures draw the data they are given: the tests read the artists, not pixels."""

from __future__ import annotations

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest

import flocking
from flocking.drawing import heatmap


@pytest.fixture
def relative(llama):
    texts = helpers.random_ids(30, 12)
    recording = flocking.record(llama, texts, relative=[1], progress=False)
    return recording.relative.sel(relative_layer=1)


def test_heatmap_shows_tokens_by_neurons(relative) -> None:
    figure, axes = plt.subplots(1, 2)
    data = relative.sel(sequence=0).isel(neuron=slice(10, 40), token=slice(1, None))
    ax = heatmap(data, axes[0])
    assert ax is axes[0]
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), data.values.astype(np.float32))
    assert image.get_extent() == [9.5, 39.5, 29.5, 0.5]  # neuron and token numbers, first on top
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("neuron", "token (position in the text)")
    assert image.norm.vmin == 0
    assert image.norm.vmax == pytest.approx(np.percentile(data.values.astype(np.float32), 99))
    assert "relative activation" in figure.axes[-1].get_ylabel()
    plt.close(figure)


def test_heatmap_leaves_padding_out(relative) -> None:
    figure, ax = plt.subplots()
    heatmap(relative.sel(sequence=1), ax, colorbar=False)
    assert ax.images[0].get_array().shape == (12, 160)
    assert len(figure.axes) == 1
    plt.close(figure)


def test_heatmap_wants_one_sequence_and_layer(relative) -> None:
    with pytest.raises(ValueError, match="select one sequence and one layer"):
        heatmap(relative)
