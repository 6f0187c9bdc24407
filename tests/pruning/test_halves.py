"""Texts in two parts: nothing is lost or read twice, nothing that is held out is calibrated on."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import build, letters

from flocking.pruning.halves import LENGTH, MOST, MOST_HELD_OUT, split_texts

# Each of letters that no other has, so that a piece tells which text it is from.
TEXTS = ["abcdefg" * 200, "hijklmn", "opqrstu" * 100, "v"]


def drawn(alphabet: str, length: int) -> str:
    return "".join(np.random.default_rng(0).choice(list(alphabet), length))


def joined(pieces: list[list[int]], text: list[int]) -> list[int]:
    """What pieces have of a text, in their order."""
    return [token for piece in pieces if set(piece) <= set(text) for token in piece]


def test_the_end_of_each_text_is_held_out() -> None:
    tokenizer = letters("$A")
    calibration, texts, held_out = split_texts(build("llama"), TEXTS, tokenizer)
    assert max(map(len, calibration)) == 256  # the model's context
    assert texts == 3
    assert len(held_out) == 2
    for text, held in zip(TEXTS, (280, 0, 140, 0), strict=True):
        ids = tokenizer(text)["input_ids"]
        cut = len(ids) - held
        read = joined(calibration, ids)
        assert read == (ids[:cut] if len(ids) > 1 else [])  # (a single token predicts nothing)
        assert joined(held_out, ids) == ids[cut:]
    # In turn: no text has to wait until another is read through.
    first = [tokenizer.decode(piece)[0] for piece in calibration[:3]]
    assert first == ["a", "h", "o"]


def test_pieces_have_the_special_tokens_of_a_text() -> None:
    calibration, _, held_out = split_texts(build("llama"), TEXTS, letters("<s> $A [B] </s>"))
    assert all(piece[0] == 1 and piece[-2:] == [4, 2] for piece in calibration + held_out)
    assert max(map(len, calibration)) == 256
    assert sum(len(piece) - 3 for piece in calibration + held_out) == sum(map(len, TEXTS)) - 1


def test_no_more_is_taken_than_is_needed() -> None:
    """A long text does not crowd out the others."""
    model = build("llama", max_position_embeddings=4096)
    tokenizer = letters("$A")
    long, short = drawn("abcdefg", 200_000), drawn("hijklmn", 2000)
    calibration, texts, held_out = split_texts(model, [long, short], tokenizer)
    assert texts == 2
    assert sum(map(len, calibration)) == MOST
    assert sum(map(len, held_out)) == MOST_HELD_OUT
    assert max(map(len, calibration)) == LENGTH
    assert (
        joined(calibration, tokenizer(short)["input_ids"]) == tokenizer(short[:1600])["input_ids"]
    )
    assert joined(held_out, tokenizer(short)["input_ids"]) == tokenizer(short[1600:])["input_ids"]
    assert held_out[0] == tokenizer(long[160_000:164_600])["input_ids"]


def test_of_short_texts_every_fifth_is_held_out() -> None:
    tokenizer = letters("$A")
    texts = [chr(97 + n % 26) * 7 for n in range(100)]
    calibration, count, held_out = split_texts(build("llama"), texts, tokenizer)
    assert held_out == [tokenizer(text)["input_ids"] for text in texts[4::5]]
    assert count == len(calibration) == 80


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["a few words"], "the texts have 11 tokens in all: give 256 or more"),
        (["a"] * 300, "too short .300 tokens in 300 texts. to calibrate on one part"),
    ],
)
def test_too_little_text_is_refused(texts: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        split_texts(build("llama"), texts, letters("$A"))
