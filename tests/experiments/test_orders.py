"""Order, words and model: what is permuted and drawn, and that scores are the metrics'."""

from __future__ import annotations

from collections import Counter

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.experiments import orders


@pytest.fixture(scope="module")
def data(subject: tuple) -> xr.Dataset:
    return orders.token_order(*subject, tokens=65, seed=3, progress=False)


def ids_of(subject: tuple) -> list[list[int]]:
    return [subject[1](text)["input_ids"][:65] for text in subject[2]]


def test_what_is_permuted_and_drawn(subject: tuple) -> None:
    model, tokenizer, _ = subject
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    texts = ids_of(subject)
    for text in texts:
        text[10], text[20] = special
    found = orders.readings(model, tokenizer, texts, 3)
    assert found["in order"] == texts
    for text, mixed, drawn in zip(*found.values(), strict=True):
        assert Counter(mixed) == Counter(text)
        assert mixed != text
        assert len(drawn) == len(text)
        for row in (mixed, drawn):
            assert [row[at] for at in (0, 10, 20)] == [text[at] for at in (0, 10, 20)]
        assert not set(drawn[1:]) & set(tokenizer.all_special_ids) - set(special)
        assert np.mean(np.array(drawn) == np.array(text)) < 0.2
    assert found == orders.readings(model, tokenizer, texts, 3)
    assert found["permuted"] != orders.readings(model, tokenizer, texts, 4)["permuted"]
    # A text's are its own, whatever stands beside it.
    assert found["drawn"][0] == orders.readings(model, tokenizer, texts[:1], 3)["drawn"][0]


def test_drawn_tokens_are_of_the_whole_vocabulary(subject: tuple) -> None:
    """Uniform: quarters of the vocabulary are as frequent, within five standard errors."""
    model, tokenizer, _ = subject
    (row,) = orders.readings(model, tokenizer, [[500] * 20_001], 0)["drawn"]
    shares = np.histogram(row[1:], bins=4, range=(0, len(tokenizer)))[0] / 20_000
    np.testing.assert_allclose(shares, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 20_000))


def test_no_token_that_the_model_does_not_know(subject: tuple) -> None:
    small = helpers.build("llama", vocab_size=600)
    (row,) = orders.readings(small, subject[1], [[500] * 2000], 0)["drawn"]
    assert max(row) < 600
    assert min(row[1:]) >= 17  # the special tokens are the first


def test_scores_are_the_metrics_means(subject: tuple, data: xr.Dataset) -> None:
    model, tokenizer, _ = subject
    readings = orders.readings(model, tokenizer, ids_of(subject), 3)
    by_order: dict[tuple[str, str], xr.Dataset] = {}
    for weights, subject_ in (("trained", model), ("control", flocking.control(model, 3))):
        for order, rows in readings.items():
            recording = flocking.record(
                subject_, rows, window=None, ranks=True, progress=False, tokenizer=tokenizer
            )
            by_order[weights, order] = recording
            for name in ("flocking_score", "rank_consistency"):
                expected = getattr(flocking, name)(recording)
                got = data.sel(weights=weights, order=order, interval="estimate")
                np.testing.assert_allclose(got[name], expected.mean("sequence"), rtol=1e-4)
                np.testing.assert_allclose(got[f"{name}_mean"], expected.mean(), rtol=1e-4)
        score = {order: flocking.flocking_score(by_order[weights, order]) for order in readings}
        for step, (one, other) in {
            "order": ("in order", "permuted"),
            "words": ("permuted", "drawn"),
        }.items():
            paired = flocking.bootstrap(score[one] - score[other])
            got = data.flocking_score_change.sel(weights=weights, step=step)
            np.testing.assert_allclose(got, paired, rtol=1e-3, atol=1e-6)
        kept = {
            order: flocking.select(flocking.statistic(by_order[weights, order], start=1))
            for order in readings
        }
        got = data.overlap.sel(weights=weights, interval="estimate")
        for order in ("permuted", "drawn"):
            expected = flocking.jaccard(kept["in order"], kept[order]).mean("sequence")
            np.testing.assert_allclose(got.sel(compared=order), expected, rtol=1e-6)
        own = kept["in order"].values
        pairs = [
            (own[a] & own[b]).sum(-1) / (own[a] | own[b]).sum(-1)
            for a in range(4)
            for b in range(4)
            if a != b
        ]
        np.testing.assert_allclose(got.sel(compared="another text"), np.mean(pairs, axis=0))
        # Its interval is of draws of texts, each of which is in several pairs.
        own = kept["in order"].assign_coords(sequence=range(4)).reset_coords(drop=True)
        of_pairs = flocking.bootstrap(flocking.jaccard(own, own.rename(sequence="other")))
        another = data.overlap.sel(weights=weights, compared="another text")
        np.testing.assert_allclose(another, of_pairs)


def test_its_numbers_can_be_written(data: xr.Dataset) -> None:
    """All labels are texts or numbers, as a figure's file has them."""
    for name, variable in data.variables.items():
        assert variable.dtype.kind in "fiU", name


def test_differences_add_up(data: xr.Dataset) -> None:
    here = data.sel(interval="estimate")
    score = here.flocking_score_mean
    change = here.flocking_score_change_mean
    total = change.sum("step") + score.sel(order="drawn")
    np.testing.assert_allclose(total, score.sel(order="in order"))
    over = score.sel(weights="trained") - score.sel(weights="control")
    np.testing.assert_allclose(here.over_control_mean, over)
    words = change.sel(weights="trained", step="words") / score.sel(
        weights="trained", order="in order"
    )
    told = f"the choice of words {'adds' if words > 0 else 'takes away'} {abs(words.item()):.0%} ("
    assert told in data.attrs["caption"]
