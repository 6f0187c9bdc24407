"""What a smaller model loses: against sums written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import build, letters, random_ids
from scipy.special import log_softmax, rel_entr

import flocking
from flocking.pruning.lost import measure_lost


def by_hand(
    full: tf.PreTrainedModel, pruned: tf.PreTrainedModel, texts: list[list[int]]
) -> dict[str, float]:
    """Token by token in float64."""
    rows = []
    for ids in texts:
        with torch.no_grad():
            p, q = (
                model(torch.tensor([ids])).logits[0].double().numpy() for model in (full, pruned)
            )
        for place, token in enumerate(ids[1:]):
            ours, theirs = log_softmax(p[place]), log_softmax(q[place])
            divergence = rel_entr(np.exp(ours), np.exp(theirs)).sum()
            rows.append(
                (-ours[token], -theirs[token], ours.argmax() == theirs.argmax(), divergence)
            )
    means = np.mean(np.array(rows, dtype=float), axis=0)
    return {
        "perplexity": math.exp(means[0]),
        "pruned_perplexity": math.exp(means[1]),
        "agreement": means[2],
        "divergence": means[3],
    }


def other(name: str) -> tf.PreTrainedModel:
    """The model with other weights, close to the first one's."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_against_sums_by_hand(name: str) -> None:
    full, pruned = build(name), other(name)
    texts = [random_ids(length, seed=seed)[0] for seed, length in enumerate((200, 9, 2, 30))]
    found = measure_lost(full, pruned, texts, progress=False)
    assert (found.texts, found.tokens) == (4, 199 + 8 + 1 + 29)
    for what, value in by_hand(full, pruned, texts).items():
        assert getattr(found, what) == pytest.approx(value, rel=1e-4), what
    assert found.ratio == pytest.approx(found.pruned_perplexity / found.perplexity)
    assert found.ratio_low < found.ratio < found.ratio_high


def test_a_model_loses_nothing_against_itself() -> None:
    model = build("llama")
    found = measure_lost(model, model, random_ids(20, 20, 20), progress=False)
    assert found.perplexity == found.pruned_perplexity
    assert (found.ratio_low, found.ratio_high, found.agreement) == (1, 1, 1)
    assert found.divergence == pytest.approx(0, abs=1e-7)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    """Texts whose surprise differs by a normal draw with mean 0.5."""
    from flocking.pruning.lost import _interval

    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        tokens = generator.integers(50, 60, size=8).astype(float)
        more = tokens * generator.normal(0.5, 0.2, size=8)
        low, high = _interval(more, tokens)
        hits += low <= math.exp(0.5) <= high
    assert 0.9 <= hits / 200 <= 0.99


def test_few_texts_have_no_interval() -> None:
    found = measure_lost(build("llama"), other("llama"), [*random_ids(40, 9), [5]], progress=False)
    assert (found.texts, found.tokens) == (2, 39 + 8)  # a single token predicts nothing
    assert math.isnan(found.ratio_low)


def test_long_texts_are_read_in_pieces_and_are_one_text_each() -> None:
    """The interval is over texts, whose pieces are not independent of each other."""
    full, pruned = build("llama"), other("llama")  # of a context of 256 tokens
    texts = random_ids(600, 300, 20)
    found = measure_lost(full, pruned, texts, progress=False)
    pieces = [text[start : start + 256] for text in texts for start in range(0, len(text), 256)]
    assert (found.texts, found.tokens) == (3, 920 - len(pieces))
    for what, value in by_hand(full, pruned, pieces).items():
        assert getattr(found, what) == pytest.approx(value, rel=1e-4), what
    assert found.ratio_low < found.ratio < found.ratio_high
    assert math.isnan(measure_lost(full, pruned, texts[:1], progress=False).ratio_low)


def test_each_piece_has_the_special_tokens_of_a_text() -> None:
    full, pruned = build("llama"), other("llama")
    tokenizer = letters("<s> $A </s>")
    found = measure_lost(full, pruned, "abcdefg" * 50, tokenizer=tokenizer, progress=False)
    inner = tokenizer("abcdefg" * 50)["input_ids"][1:-1]
    pieces = [[1, *inner[start : start + 254], 2] for start in range(0, 350, 254)]
    assert found.tokens == sum(map(len, pieces)) - len(pieces)
    for what, value in by_hand(full, pruned, pieces).items():
        assert getattr(found, what) == pytest.approx(value, rel=1e-4), what


def test_what_cannot_be_compared_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="no text has two tokens"):
        measure_lost(model, model, [[3]], progress=False)
    with pytest.raises(ValueError, match="a twin reads prompts"):
        measure_lost(model, flocking.griffin(model), [[3, 4]], progress=False)
