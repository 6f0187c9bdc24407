"""The experiment on refreshed selections, compared with the public functions called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import DynamicCache

import flocking
from flocking.experiments.distances import EVERY, EXPERIMENTS, _share

PROMPT, HORIZON = 17, 192


@pytest.fixture(scope="module")
def data(subject: tuple) -> xr.Dataset:
    return EXPERIMENTS["loss_by_distance"](*subject, tokens=241, horizon=HORIZON, progress=False)


@pytest.fixture(scope="module")
def rows(subject: tuple) -> list[list[int]]:
    _, tokenizer, texts = subject
    return [tokenizer(text)["input_ids"][241 - PROMPT - HORIZON : 241] for text in texts]


def losses(model: object, rows: list[list[int]]) -> np.ndarray:
    scored = flocking.perplexity(
        model,
        rows,
        prompt_length=PROMPT,
        continuation_length=HORIZON,
        batch_size=1,
        progress=False,
    )
    return -scored.log_likelihood.values


def test_losses_are_those_of_perplexity(
    subject: tuple, data: xr.Dataset, rows: list[list[int]]
) -> None:
    model = subject[0]
    assert data.prompt_length.values.tolist() == [PROMPT]
    assert data.distance.values.tolist() == [31.5, 95.5, 159.5]
    full = losses(model, rows)
    excess = {}
    for name, refresh in [("GRIFFIN", None), *((f"every {n}", n) for n in EVERY)]:
        own = losses(flocking.griffin(model, refresh=refresh), rows)
        excess[name] = own - full
        got = data.sel(selection=name, prompt_length=PROMPT, interval="estimate")
        assert got.perplexity == pytest.approx(np.exp(own.mean()), rel=1e-4)
        expected = [excess[name][:, part].mean() for part in np.split(np.arange(HORIZON), 3)]
        expected[0] = excess[name][:, 1:64].mean()
        np.testing.assert_allclose(got.relative, np.exp(expected), rtol=1e-4)
        share = excess[name][:, 96:].mean() / excess["GRIFFIN"][:, 96:].mean()
        assert got.remaining == pytest.approx(share, rel=1e-3)
    assert (data.sel(selection="full").relative == 1).all()
    assert (data.sel(selection="full").agreement == 1).all()
    assert (data.sel(selection="full").remaining == 0).all()
    assert "nan" not in data.attrs["caption"]


def test_predictions_are_compared_with_the_full_models(
    subject: tuple, data: xr.Dataset, rows: list[list[int]]
) -> None:
    model = subject[0]
    same, divergence = [], []

    def predictions(logits: Tensor) -> Tensor:
        return logits[0, : HORIZON - 1].double().log_softmax(dim=-1)

    for row in rows:
        ids, cache = torch.tensor([row]), DynamicCache(config=model.config)
        twin = flocking.griffin(model)
        flocking.score(twin, row[:PROMPT], row[PROMPT:])
        with torch.no_grad():
            full = predictions(model(ids).logits[:, PROMPT:])
            model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
            own = predictions(twin(ids[:, PROMPT:], past_key_values=cache).logits)
        same.append((full.argmax(-1) == own.argmax(-1)).double().mean())
        divergence.append((full.exp() * (full - own)).sum(-1).mean())
    got = data.sel(selection="GRIFFIN", prompt_length=PROMPT, interval="estimate")
    weights = [63, 64, 64]  # the first token is left out
    assert np.average(got.agreement, weights=weights) == pytest.approx(np.mean(same), abs=1e-6)
    assert np.average(got.divergence, weights=weights) == pytest.approx(
        np.mean(divergence), rel=1e-3
    )


def test_hindsight_selects_from_the_next_tokens(
    subject: tuple, data: xr.Dataset, rows: list[list[int]]
) -> None:
    """Each 64 tokens on those that the analysis selects from them."""
    model, tokenizer, texts = subject
    ids = [tokenizer(text)["input_ids"][:241] for text in texts]
    whole = flocking.record(model, ids, window=16, progress=False)
    found = []
    for number, row in enumerate(rows):
        spans = [
            flocking.statistic(whole, start=start, stop=start + 64).isel(sequence=number)
            for start in (49, 113, 177)
        ]
        asked: list[int] = []

        def method(
            statistic: Tensor,
            k: int,
            block: flocking.FeedForward,
            generator: object,
            spans: list = spans,
            asked: list = asked,
        ) -> Tensor:
            span = spans[min(asked.count(block.layer), 2)]
            asked.append(block.layer)
            return torch.from_numpy(span.sel(layer=block.layer).values)

        found.append(losses(flocking.griffin(model, method=method, refresh=64), [row])[0])
    got = data.perplexity.sel(selection="hindsight 64", prompt_length=PROMPT, interval="estimate")
    assert got == pytest.approx(np.exp(np.mean(found)), rel=1e-4)


def test_shares_are_of_the_same_texts() -> None:
    """A selection that always has half of the loss has no uncertainty."""
    excess = xr.DataArray(
        [[4.0, 1.0, 3.0], [2.0, 0.5, 1.5], [1.0, 3.0, 0.0]],
        {"selection": ["GRIFFIN", "half", "other"]},
        ("selection", "sequence"),
    )
    shares = _share(excess, "GRIFFIN")
    np.testing.assert_allclose(shares.sel(selection="half"), 0.5)
    estimate, low, high = shares.sel(selection="other").values
    assert estimate == pytest.approx(0.5)
    assert low < estimate < high


def test_refuses_horizons_that_are_too_short(subject: tuple) -> None:
    with pytest.raises(ValueError, match="horizon=100: give 128 tokens or more"):
        EXPERIMENTS["loss_by_distance"](*subject, horizon=100)
