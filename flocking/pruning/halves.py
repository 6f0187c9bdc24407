"""Texts in two parts: one that a selection is made from, one that it is judged by."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import context

HELD_OUT = 0.2  # of each text's tokens, the last ones
LENGTH = 512  # tokens of a piece that is read at once
MOST = 20_000  # tokens that a selection is made from: more change it little
MOST_HELD_OUT = 5_000  # tokens that it is judged by
FEWEST = 256  # tokens of all texts together


def split_texts(
    model: PreTrainedModel, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """Cut texts into pieces to calibrate on and pieces to hold out.

    The last fifth of each text's tokens is held out, as far as it has two tokens. Both parts are
    cut into pieces of 512 tokens, or of the model's context, each with the special tokens that
    the tokenizer puts around a text. Of both, no more is taken than is needed, from all texts in
    turn: the first pieces of each, then the second ones, and so on.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    texts : sequence of str
    tokenizer : transformers.PreTrainedTokenizerBase

    Returns
    -------
    calibration, held_out : list of list of int
        Token ids of the pieces, 20,000 and 5,000 in all at most.

    Raises
    ------
    ValueError
        If the texts have fewer than 256 tokens together.
    """
    before, after = _around(tokenizer)
    limit = context(model) or LENGTH
    length = max(2, min(LENGTH, limit) - len(before) - len(after))
    calibration, held_out, total = [], [], 0
    for text in texts:
        # (The length is cut here: the tokenizer's warning about it would be wrong.)
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        total += len(ids)
        rest = int(HELD_OUT * len(ids))
        rest = rest if rest > 1 else 0
        cut = len(ids) - rest
        calibration.append(_pieces(ids[:cut], length))
        held_out.append(_pieces(ids[cut:], length))
    if total < FEWEST:
        raise ValueError(
            f"the texts have {total} tokens in all: give {FEWEST} or more, so that a part can be "
            "held out."
        )
    return tuple(  # type: ignore[return-value] # of two
        [[*before, *piece, *after] for piece in _in_turn(parts, most)]
        for parts, most in ((calibration, MOST), (held_out, MOST_HELD_OUT))
    )


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def _in_turn(texts: list[list[list[int]]], most: int) -> list[list[int]]:
    """The first piece of each text, then the second ones, until they have so many tokens."""
    found, room = [], most
    for turn in range(max(map(len, texts), default=0)):
        for pieces in texts:
            piece = pieces[turn][:room] if turn < len(pieces) else []
            if len(piece) > 1:
                found.append(piece)
                room -= len(piece)
    return found
