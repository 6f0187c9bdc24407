"""Texts in two parts: one that a selection is made from, one that it is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import context, special_tokens_around

HELD_OUT = 5  # a fifth: of each text's tokens, the last ones, or of all texts that are short
SHORTEST = 10  # tokens of a text that is divided
LENGTH = 512  # tokens of a piece that is read at once
MOST = 20_000  # tokens that a selection is made from: more change it little
MOST_HELD_OUT = 5_000  # tokens that it is judged by
FEWEST = 256  # tokens of all texts together


class Halves(NamedTuple):
    """Token ids of texts, in two parts.

    Attributes
    ----------
    calibration : list of list of int
        Pieces of texts, of 512 tokens or the model's context at most.
    texts : int
        How many texts they are pieces of.
    held_out : list of list of int
        The other part, one for each text that has one.
    """

    calibration: list[list[int]]
    texts: int
    held_out: list[list[int]]


def split_texts(
    model: PreTrainedModel, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Halves:
    """Divide texts into pieces to calibrate on and parts to hold out.

    The last fifth of each text's tokens is held out; of texts with fewer than ten tokens, every
    fifth text. Pieces and parts have the special tokens that the tokenizer puts around a text. Of
    both, no more is taken than is needed, from all texts in turn: the first 512 tokens of each,
    then the second ones, and so on, until there are 20,000 and 5,000.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    texts : sequence of str
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    ValueError
        If the texts have fewer than 256 tokens together, or are so short that one of the parts
        has no two tokens in a row.
    """
    around = special_tokens_around(tokenizer)
    length = piece_length(model, around)
    calibration, held_out = [], []
    total = short = 0
    for text in texts:
        # (The length is cut here: the tokenizer's warning about it would be wrong.)
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        total += len(ids)
        rest = len(ids) // HELD_OUT
        if len(ids) < SHORTEST:
            short += 1
            rest = 0 if short % HELD_OUT else len(ids)
        cut = len(ids) - rest
        calibration.append(pieces(ids[:cut], length))
        held_out.append(pieces(ids[cut:], length))
    if total < FEWEST:
        raise ValueError(
            f"the texts have {total} tokens in all: give {FEWEST} or more, so that a part can be "
            "held out."
        )
    chosen = list(_in_turn(calibration, MOST))
    parts: dict[int, list[int]] = {}
    for number, piece in _in_turn(held_out, MOST_HELD_OUT):
        parts.setdefault(number, []).extend(piece)
    if not chosen or not parts:
        raise ValueError(
            f"the texts are too short ({total} tokens in {len(texts)} texts) to calibrate on one "
            f"part and hold out another: give texts of {SHORTEST} tokens or more."
        )
    before, after = around
    return Halves(
        [[*before, *piece, *after] for _, piece in chosen],
        len({number for number, _ in chosen}),
        [[*before, *ids, *after] for _, ids in sorted(parts.items())],
    )


def piece_length(model: PreTrainedModel, around: tuple[list[int], list[int]]) -> int:
    """Tokens of a piece of a text, without the special tokens around it."""
    return max(2, min(LENGTH, context(model) or LENGTH) - sum(map(len, around)))


def pieces(ids: list[int], length: int) -> list[list[int]]:
    """Tokens in pieces of a length, the last of which may be shorter."""
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def _in_turn(texts: list[list[list[int]]], most: int) -> Iterator[tuple[int, list[int]]]:
    """The first piece of each text, then the second ones, until they have so many tokens.

    With the number of the text. A single token predicts nothing, and is left out.
    """
    room = most
    for turn in range(max(map(len, texts), default=0)):
        for number, parts in enumerate(texts):
            piece = parts[turn][:room] if turn < len(parts) else []
            if len(piece) > 1:
                yield number, piece
                room -= len(piece)
