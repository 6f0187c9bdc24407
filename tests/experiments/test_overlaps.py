"""Overlaps at several densities, compared with selections that are made here from activations."""

from __future__ import annotations

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.experiments.figures import FIGURES
from flocking.experiments.overlaps import DENSITIES, EXPERIMENTS

TOKENS = 129


@pytest.fixture(scope="module")
def data(subject: tuple) -> xr.Dataset:
    return EXPERIMENTS["overlap_by_density"](*subject, tokens=TOKENS, progress=False)


def kept(model: object, ids: list[int], density: float) -> list[list[set[int]]]:
    """By layer, the neurons kept for the first and for the second half of the other tokens."""
    found = []
    for z in helpers.activations(model, ids).values():
        z = z.double().numpy()[1:]
        relative = np.abs(z) / np.linalg.norm(z, axis=1, keepdims=True)
        count = int(density * z.shape[1] + 1e-9)
        halves = np.split(relative, 2)
        found.append([{*np.argsort(-np.linalg.norm(h, axis=0))[:count]} for h in halves])
    return found


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weights", ["trained", "control"])
def test_overlaps_are_those_of_the_selections(
    subject: tuple, data: xr.Dataset, density: float, weights: str
) -> None:
    model, tokenizer, texts = subject
    model = model if weights == "trained" else flocking.control(model)
    ids = [tokenizer(text)["input_ids"][:TOKENS] for text in texts]
    chosen = [kept(model, row, density) for row in ids]
    here = data.sel(weights=weights, density=density, interval="estimate")
    chance = density / (2 - density)
    assert here.chance == pytest.approx(chance)
    for layer in range(2):
        table = np.array([[jaccard(a[layer][0], b[layer][1]) for b in chosen] for a in chosen])
        within = np.diag(table).mean()
        between = table[~np.eye(len(ids), dtype=bool)].mean()
        got = here.sel(layer=layer)
        assert got.within == pytest.approx(within, abs=0.02)  # (near ties)
        assert got.between == pytest.approx(between, abs=0.02)
        assert got.gap == pytest.approx(float(got.within - got.between))
        above = (float(got.between) - chance) / (1 - chance)
        assert got.between_above_chance == pytest.approx(above)
    for name in ("within", "between", "gap", "within_above_chance", "between_above_chance"):
        assert here[f"{name}_mean"] == pytest.approx(float(here[name].mean()))


def test_half_of_the_neurons_is_what_sequence_overlap_has(subject: tuple, data: xr.Dataset) -> None:
    from flocking.experiments.activations import EXPERIMENTS as OTHERS

    one = OTHERS["sequence_overlap"](*subject, tokens=TOKENS, progress=False)
    for name in ("within", "between"):
        got = data[name].sel(density=0.5).transpose(*one[name].dims)
        np.testing.assert_allclose(got, one[name])


def test_the_figure_shows_chance_at_each_density(data: xr.Dataset) -> None:
    figure = FIGURES["overlap_by_density"](data)
    axes = figure.subfigs[0].axes
    for ax in axes[:4]:
        dotted = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
        np.testing.assert_allclose(dotted, data.chance)
        assert len(ax.lines) == 2 * len(DENSITIES)
    lines = {line.get_label(): line.get_ydata() for line in axes[4].lines}
    np.testing.assert_allclose(lines["chance"], data.chance)
    for weights, name in (("trained", "model"), ("control", "random weights")):
        expected = data.between_mean.sel(weights=weights, interval="estimate")
        np.testing.assert_allclose(lines[f"{name}, two texts"], expected)
    plt.close(figure)


def test_refuses_what_is_too_short(subject: tuple) -> None:
    run = EXPERIMENTS["overlap_by_density"]
    with pytest.raises(ValueError, match="text '1' has 3 tokens"):
        run(*subject[:2], ["word " * 300, "a b c"], progress=False)
    with pytest.raises(ValueError, match="expected two texts or more, to compare them, got 1"):
        run(*subject[:2], ["word " * 300], progress=False)
