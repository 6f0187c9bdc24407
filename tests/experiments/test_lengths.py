"""The grid of losses, compared with the public functions called one by one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import DynamicCache

import flocking
from flocking.experiments.figures import FIGURES
from flocking.experiments.lengths import EXPERIMENTS

TOKENS, SCORED = 209, 64
LENGTHS, HORIZONS = [17, 65], [16, 64]


@pytest.fixture(scope="module")
def data(subject: tuple) -> xr.Dataset:
    run = EXPERIMENTS["loss_by_lengths"]
    return run(*subject, tokens=TOKENS, horizon=100, progress=False)


@pytest.fixture(scope="module")
def ids(subject: tuple) -> list[list[int]]:
    _, tokenizer, texts = subject
    return [tokenizer(text)["input_ids"][:TOKENS] for text in texts]


def others(model: object, ids: list[list[int]], number: int) -> xr.DataArray:
    rest = [row for at, row in enumerate(ids) if at != number]
    return flocking.global_statistic(model, rest, progress=False)


def twin_of(name: str, model: object, ids: list[list[int]], number: int) -> object:
    if name == "full":
        return model
    if name == "GRIFFIN":
        return flocking.griffin(model)
    if name == "random":
        return flocking.griffin(model, method="random", seed=number)
    reference = others(model, ids, number)
    return flocking.griffin(model, method=name, reference=reference)


def losses(subject: tuple, ids: list[list[int]], name: str, length: int) -> np.ndarray:
    """(sequence, distance), by flocking.perplexity."""
    found = []
    for number, row in enumerate(ids):
        scored = flocking.perplexity(
            twin_of(name, subject[0], ids, number),
            [row[TOKENS - SCORED - length :]],
            prompt_length=length,
            continuation_length=SCORED,
            progress=False,
        )
        found.append(-scored.log_likelihood.values[0])
    return np.array(found)


def test_cells_are_means_over_beginnings_of_the_same_tokens(
    subject: tuple, data: xr.Dataset, ids: list[list[int]]
) -> None:
    assert data.prompt_length.values.tolist() == [17, 65]  # 257 do not fit before what is scored
    assert data.horizon.values.tolist() == HORIZONS
    assert data.selection.values.tolist() == [
        *("full", "global-local", "static", "GRIFFIN", "random")
    ]
    here = data.sel(interval="estimate")
    each = {
        (name, length): losses(subject, ids, name, length)
        for name in data.selection.values
        for length in LENGTHS
    }
    excess = {}
    for (name, length), values in each.items():
        for horizon in HORIZONS:
            part = values[:, 1:horizon].mean(axis=1)  # not the first, which is computed in full
            full = each["full", length][:, 1:horizon].mean(axis=1)
            at = {"selection": name, "prompt_length": length, "horizon": horizon}
            assert here.perplexity.sel(at) == pytest.approx(np.exp(part.mean()), rel=1e-4)
            excess[name, length, horizon] = (part - full).mean()
            assert here.relative.sel(at) == pytest.approx(np.exp((part - full).mean()), rel=1e-4)
    for length in LENGTHS:
        for horizon in HORIZONS:
            gap = excess["GRIFFIN", length, horizon] - excess["static", length, horizon]
            got = here.over_static.sel(prompt_length=length, horizon=horizon)
            assert got == pytest.approx(np.exp(gap), rel=1e-4)
    for name in data.selection.values:
        by_prompt = here.by_prompt.sel(selection=name, horizon=64)
        change = excess[name, 65, 64] - excess[name, 17, 64]
        assert by_prompt == pytest.approx(np.exp(change), rel=1e-4)
        by_horizon = here.by_horizon.sel(selection=name, prompt_length=17)
        change = excess[name, 17, 64] - excess[name, 17, 16]
        assert by_horizon == pytest.approx(np.exp(change), rel=1e-4)


def test_intervals_are_of_differences_within_texts(
    subject: tuple, data: xr.Dataset, ids: list[list[int]]
) -> None:
    griffin, static = (losses(subject, ids, name, 65)[:, 1:64] for name in ("GRIFFIN", "static"))
    gaps = xr.DataArray((griffin - static).mean(axis=1), dims="sequence")
    expected = np.exp(flocking.bootstrap(gaps))
    got = data.over_static.sel(prompt_length=65, horizon=64)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_the_full_model_is_itself(data: xr.Dataset) -> None:
    full = data.sel(selection="full")
    for name, value in (("relative", 1), ("agreement", 1), ("divergence", 0)):
        np.testing.assert_allclose(full[name], value, atol=1e-12)
    assert "nan" not in data.attrs["caption"]


@pytest.mark.parametrize("name", ["GRIFFIN", "static"])
def test_predictions_are_compared_with_the_full_models(
    subject: tuple, data: xr.Dataset, ids: list[list[int]], name: str
) -> None:
    model, length = subject[0], 17
    same, divergence = [], []

    def predictions(logits: Tensor) -> Tensor:
        return logits[0, : SCORED - 1].double().log_softmax(dim=-1)

    for number, whole in enumerate(ids):
        row = whole[TOKENS - SCORED - length :]
        rows, cache = torch.tensor([row]), DynamicCache(config=model.config)
        twin = twin_of(name, model, ids, number)
        flocking.score(twin, row[:length], row[length:])
        with torch.no_grad():
            full = predictions(model(rows).logits[:, length:])
            model(rows[:, :length], past_key_values=cache, use_cache=True)
            own = predictions(twin(rows[:, length:], past_key_values=cache).logits)
        same.append((full.argmax(-1) == own.argmax(-1)).double().numpy())
        divergence.append((full.exp() * (full - own)).sum(-1).numpy())
    got = data.sel(selection=name, prompt_length=length, interval="estimate")
    means = {}
    for horizon in HORIZONS:
        here = got.sel(horizon=horizon)
        expected = np.array(same)[:, : horizon - 1].mean()
        assert here.agreement == pytest.approx(expected, abs=1e-6)
        expected = np.array(divergence)[:, : horizon - 1].mean()
        assert here.divergence == pytest.approx(expected, rel=1e-3)
        means[horizon] = expected
    later = got.divergence_by_horizon
    assert later == pytest.approx(means[64] - means[16], abs=1e-5)
    here = data.sel(selection=name, interval="estimate").sel(horizon=64)
    short, long = (float(here.divergence.sel(prompt_length=one)) for one in LENGTHS)
    assert here.divergence_by_prompt == pytest.approx(long - short)


def test_seed_decides_what_is_random(subject: tuple) -> None:
    model, tokenizer, texts = subject
    first, again, other = (
        EXPERIMENTS["loss_by_lengths"](
            model, tokenizer, texts[:2], tokens=65, horizon=16, seed=seed, progress=False
        )
        for seed in (0, 0, 1)
    )
    xr.testing.assert_identical(first, again)
    assert first.horizon.values.tolist() == [16]
    random = [found.perplexity.sel(selection="random") for found in (first, other)]
    assert not np.allclose(*random)
    np.testing.assert_allclose(*(f.perplexity.sel(selection="GRIFFIN") for f in (first, other)))


def test_refuses_what_is_too_short(subject: tuple) -> None:
    run = EXPERIMENTS["loss_by_lengths"]
    with pytest.raises(ValueError, match="horizon=15: give 16 tokens or more"):
        run(*subject, horizon=15)
    with pytest.raises(ValueError, match="text '1' has 3 tokens"):
        run(*subject[:2], ["word " * 300, "a b c"], progress=False)
    with pytest.raises(ValueError, match="expected two texts or more, to compare them, got 1"):
        run(*subject[:2], ["word " * 300], progress=False)


def test_the_figure_has_each_number_in_its_cell(data: xr.Dataset) -> None:
    figure = FIGURES["loss_by_lengths"](data)
    axes = figure.subfigs[0].axes
    here = data.sel(interval="estimate")
    grids = [here.relative.sel(selection=name) for name in ("GRIFFIN", "static", "global-local")]
    forms = ["{:.2f}"] * 3 + ["{:,.0f}", "{:.2f}", "{:.0%}"]
    grids += [here.relative.sel(selection="random"), here.over_static]
    grids += [here.agreement.sel(selection="GRIFFIN")]
    for ax, grid, form in zip(axes, grids, forms, strict=True):
        values = grid.transpose("prompt_length", "horizon").values
        np.testing.assert_allclose(ax.images[0].get_array(), values)
        cells = {text.get_position(): text.get_text() for text in ax.texts}
        assert len(cells) == values.size
        for (row, column), value in np.ndenumerate(values):
            assert cells[column, row] == form.format(value)
    low, high = (data.over_static.sel(interval=name) for name in ("low", "high"))
    apart = ((low > 1) | (high < 1)).transpose("prompt_length", "horizon").values
    for text in axes[4].texts:
        column, row = text.get_position()
        assert (text.get_weight() == "bold") == apart[row, column]
    assert not any(text.get_weight() == "bold" for ax in axes[:4] for text in ax.texts)
    plt.close(figure)
