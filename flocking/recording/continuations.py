"""What ``record`` is asked to read, and where in each text the prompt ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import (
    Chats,
    Prompts,
    Text,
    continued,
    continued_inputs,
    conversations,
    tokenize,
    tokenize_chats,
    traits,
    warn,
    with_inputs,
)


class Reading(NamedTuple):
    """Texts with the continuations that the user has given.

    Attributes
    ----------
    whole : Prompts
        All tokens that are read.
    prompts : list of int
        How many of each text's tokens are its prompt: all, where there is no continuation.
    """

    whole: Prompts
    prompts: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.whole.ids]

    @property
    def continued(self) -> list[int]:
        """Numbers of the texts that have a continuation."""
        pairs = zip(self.prompts, self.lengths, strict=True)
        return [number for number, (prompt, length) in enumerate(pairs) if prompt < length]


def check_continuation(prompt_tokens: object, continuation: object, max_new_tokens: int) -> None:
    """Refuse what says twice where the generation comes from; needs no model."""
    given = {
        "max_new_tokens": max_new_tokens or None,
        "prompt_tokens": prompt_tokens,
        "continuation": continuation,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} were given, and each says on its own what follows the prompt: "
            "give one of them."
        )
    if prompt_tokens is not None:
        _counts(prompt_tokens)


def given_texts(
    model: PreTrainedModel,
    text: Text | Chats,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompt_tokens: object = None,
    continuation: Text | None = None,
    max_new_tokens: int = 0,
    max_tokens: int | None = None,
) -> Reading:
    """The tokens of all texts, and where each prompt ends, as the arguments say.

    Raises
    ------
    TypeError, ValueError
        If texts or continuations cannot be read, do not match, or one has no token of its own.
    """
    if isinstance(text, Iterator):
        text = list(text)
    chats = conversations(text)
    if chats is not None:
        reading = Reading(*tokenize_chats(model, chats, tokenizer))
        if prompt_tokens is not None:
            raise ValueError(
                "prompt_tokens was given, and text is a conversation, whose roles say where the "
                "prompt ends: leave it out."
            )
        if reading.continued and (max_new_tokens or continuation is not None):
            name = "max_new_tokens" if max_new_tokens else "continuation"
            raise ValueError(
                f"text {reading.continued[0]} ends in a message of the assistant's, which is its "
                f"continuation already: leave the message out, or {name}."
            )
    else:
        whole = tokenize(model, text, tokenizer)
        reading = Reading(whole, [len(ids) for ids in whole.ids])
    if prompt_tokens is not None:
        reading = _split(reading, _counts(prompt_tokens))
    elif continuation is not None:
        reading = _joined(model, reading, continuation)
    return _cut(reading, max_tokens)


def _split(reading: Reading, counts: list[int]) -> Reading:
    """The same tokens, of which the first `counts` are each text's prompt."""
    lengths = reading.lengths
    if len(counts) == 1:
        counts = counts * len(lengths)
    if len(counts) != len(lengths):
        raise ValueError(
            f"prompt_tokens has {len(counts)} numbers, and text has {len(lengths)} texts: give one "
            "number for all, or one for each."
        )
    for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count >= length:
            raise ValueError(
                f"prompt_tokens={count}, and text {number} has {length} tokens: its prompt must "
                "leave one or more for the continuation."
            )
    return reading._replace(prompts=counts)


def _counts(prompt_tokens: Any) -> list[int]:
    """Numbers of tokens, one for all or one for each text."""
    values = np.asarray(prompt_tokens)
    whole = values.dtype.kind in "iu" and values.ndim <= 1 and values.size > 0
    if not whole or values.min() < 1:
        kind = ValueError if values.dtype.kind in "iuf" else TypeError
        raise kind(
            f"prompt_tokens={prompt_tokens!r}: give a whole number of tokens from 1 up, or a list "
            "of one for each text."
        )
    return [int(value) for value in values.reshape(-1)]


def _joined(model: PreTrainedModel, reading: Reading, continuation: Text) -> Reading:
    """Prompts with their continuations, whose strings get no special tokens."""
    prompts = reading.whole
    try:
        later = tokenize(model, continuation, prompts.tokenizer, special=False)
    except (TypeError, ValueError) as problem:
        kind = TypeError if isinstance(problem, TypeError) else ValueError
        raise kind(f"continuation: {problem}") from problem
    if len(later.ids) != len(prompts.ids):
        raise ValueError(
            f"continuation has {len(later.ids)} texts, and text has {len(prompts.ids)}: give one "
            "for each."
        )
    if isinstance(continuation, Mapping) and later.inputs:
        raise ValueError(
            f"continuation has {' and '.join(later.inputs)}: give its token ids alone; the "
            "prompt's go on."
        )
    ids = [torch.cat(pair) for pair in zip(prompts.ids, later.ids, strict=True)]
    _warn_of_beginnings(prompts, later)
    inputs = continued_inputs(prompts.inputs, [len(each) for each in ids])
    return reading._replace(whole=prompts._replace(ids=ids, inputs=inputs))


def _warn_of_beginnings(prompts: Prompts, later: Prompts) -> None:
    """Warn of a continuation that begins as a text does, with a special token."""
    begin = getattr(prompts.tokenizer, "bos_token_id", None)
    pairs = zip(prompts.ids, later.ids, strict=True)
    for number, (first, second) in enumerate(pairs):
        if begin is not None and int(first[0]) == int(second[0]) == begin and len(second) > 1:
            warn(
                f"the continuation of text {number} begins with the special token "
                f"{prompts.tokenizer.bos_token}, as its prompt does: to go on from the prompt, "
                "tokenize it with add_special_tokens=False, or give it as a string."
            )
            return


def _cut(reading: Reading, tokens: int | None) -> Reading:
    """At most this many tokens of each text, its continuation included."""
    if tokens is None:
        return reading
    for number in reading.continued:
        if reading.prompts[number] >= tokens:
            raise ValueError(
                f"max_tokens={tokens}, and the prompt of text {number} has "
                f"{reading.prompts[number]}: none would be left for its continuation."
            )
    return Reading(reading.whole.cut(tokens), [min(count, tokens) for count in reading.prompts])


# --------------------------------------------------------------------------------------
# Models that go on from a prompt


def refuse_continuing(model: PreTrainedModel, reading: Reading, max_new_tokens: int) -> None:
    """Raise a ValueError if the texts have continuations that say nothing about a generation."""
    if not (max_new_tokens or reading.continued):
        return
    name = type(model).__name__
    remedy = "max_new_tokens" if max_new_tokens else "the continuation"
    if not traits(model).causal or (max_new_tokens and not model.can_generate()):
        raise ValueError(
            f"{name} is not a causal language model, so a continuation cannot be replayed: leave "
            f"out {remedy}, or load its causal class."
        )
    prompts = reading.whole
    continued_inputs(prompts.inputs, reading.lengths)
    if not with_inputs(model, prompts.inputs).causal:
        raise ValueError(
            f"with {' and '.join(prompts.inputs)}, later tokens matter to earlier ones in {name}, "
            f"so a continuation cannot be replayed: leave out {remedy}."
        )


def generated(
    model: PreTrainedModel,
    prompts: Prompts,
    max_new_tokens: int,
    progress: bool,
    arguments: Mapping[str, Any],
    seed: int,
) -> Prompts:
    """The prompts with the continuations that the model writes."""
    ids = continued(
        model,
        prompts.ids,
        max_new_tokens,
        progress,
        prompts.inputs,
        arguments=arguments,
        seed=seed,
        tokenizer=prompts.tokenizer,
    )
    return prompts._replace(ids=ids, inputs=continued_inputs(prompts.inputs, list(map(len, ids))))


def source_of(reading: Reading, max_new_tokens: int, arguments: Mapping[str, Any]) -> str:
    """Where the generation of a recording comes from, in words or as arguments of ``generate``."""
    if max_new_tokens:
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "greedy"
    return "as given" if reading.continued else "none"
