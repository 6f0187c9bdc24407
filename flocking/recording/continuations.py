"""What ``record`` is asked to read, and where in each text the prompt ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import (
    Prompts,
    Text,
    check_generation,
    continued,
    continued_inputs,
    conversations,
    held,
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


class Wanted(NamedTuple):
    """What the user wants after the prompts: arguments of ``record``.

    Attributes
    ----------
    prompt_tokens : int or sequence of int, optional
    continuation : text in any form, optional
    max_new_tokens : int
    arguments : dict
        Of ``generate``, by name.
    """

    prompt_tokens: Any
    continuation: Any
    max_new_tokens: int
    arguments: Mapping[str, Any] = MappingProxyType({})

    def check(self) -> None:
        """Refuse what needs no model to be wrong, such as two sources of a continuation."""
        given = {
            "max_new_tokens": self.max_new_tokens or None,
            "prompt_tokens": self.prompt_tokens,
            "continuation": self.continuation,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} were given, and each says on its own what follows the "
                "prompt: give one of them."
            )
        if self.prompt_tokens is not None:
            _counts(self.prompt_tokens)
        check_generation(self.arguments, self.max_new_tokens)

    def source(self, continued: bool) -> str:
        """Where the generation comes from, in words or as arguments of ``generate``.

        `continued` says whether any text comes with one.
        """
        if self.max_new_tokens:
            said = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
            return re.sub(" at 0x[0-9a-f]+", "", said) or "greedy"  # (where objects lie in memory)
        return "as given" if continued else "none"


def given_texts(
    model: PreTrainedModel,
    text: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: Wanted,
    max_tokens: int | None = None,
) -> Reading:
    """The tokens of all texts, and where each prompt ends, as the arguments say.

    Raises
    ------
    TypeError, ValueError
        If texts or continuations cannot be read, do not match, or a prompt leaves nothing after it.
    """
    text = held(text)
    chats = conversations(text)
    if chats is not None:
        reading = Reading(*tokenize_chats(model, chats, tokenizer))
        _refuse_twice(reading, wanted)
    else:
        whole = tokenize(model, text, tokenizer)
        reading = Reading(whole, [len(ids) for ids in whole.ids])
    if wanted.prompt_tokens is not None:
        reading = _split(reading, _counts(wanted.prompt_tokens))
    elif wanted.continuation is not None:
        reading = _joined(model, reading, wanted.continuation)
    reading = _cut(reading, max_tokens)
    if chats is None and (wanted.continuation is not None or wanted.max_new_tokens):
        _warn_of_ends(reading)
    return reading


def _refuse_twice(chats: Reading, wanted: Wanted) -> None:
    """Refuse arguments that say what a conversation's roles say already."""
    if wanted.prompt_tokens is not None:
        raise ValueError(
            "prompt_tokens was given, and text is a conversation, whose roles say where the "
            "prompt ends: leave it out."
        )
    if chats.continued and (wanted.max_new_tokens or wanted.continuation is not None):
        name = "max_new_tokens" if wanted.max_new_tokens else "continuation"
        raise ValueError(
            f"text {chats.continued[0]} ends in a message of the assistant's, which is its "
            f"continuation already: leave the message out, or {name}."
        )


def _split(reading: Reading, counts: int | list[int]) -> Reading:
    """The same tokens, of which the first `counts` are each text's prompt."""
    lengths = reading.lengths
    if isinstance(counts, int):
        counts = [counts] * len(lengths)
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


def _counts(prompt_tokens: Any) -> int | list[int]:
    """A number of tokens for all texts, or one for each."""
    try:
        values = np.asarray(prompt_tokens)
    except (TypeError, ValueError, RuntimeError):  # lists of different lengths; devices
        values = np.asarray("nothing whole")
    if values.dtype.kind not in "iu" or values.ndim > 1 or not values.size or values.min() < 1:
        raise ValueError(
            f"prompt_tokens={prompt_tokens!r}: give a whole number of tokens from 1 up, or a list "
            "of one for each text."
        )
    return int(values) if values.ndim == 0 else [int(value) for value in values]


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
    tokenizer: Any = prompts.tokenizer
    begin = getattr(tokenizer, "bos_token_id", None)
    for number, (first, second) in enumerate(zip(prompts.ids, later.ids, strict=True)):
        if begin is not None and int(first[0]) == int(second[0]) == begin and len(second) > 1:
            warn(
                f"the continuation of text {number} begins with the special token "
                f"{tokenizer.bos_token}, as its prompt does: to go on from the prompt, tokenize it "
                "with add_special_tokens=False, or give it as a string."
            )
            return


def _warn_of_ends(reading: Reading) -> None:
    """Warn of a prompt that has ended already, with a special token that its tokenizer added."""
    tokenizer: Any = reading.whole.tokenizer
    end = getattr(tokenizer, "eos_token_id", None)
    for number, (ids, count) in enumerate(zip(reading.whole.ids, reading.prompts, strict=True)):
        if end is not None and count > 1 and int(ids[count - 1]) == end:
            warn(
                f"the prompt of text {number} ends with the special token {tokenizer.eos_token}, "
                "as the end of a text does, and goes on after it: to go on from the text itself, "
                "give tokenizer(text, add_special_tokens=False), or token ids without it."
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
    inputs = reading.whole.inputs
    if max_new_tokens:
        continued_inputs(inputs, reading.lengths)
    if not with_inputs(model, inputs).causal:
        raise ValueError(
            f"with {' and '.join(inputs)}, later tokens matter to earlier ones in {name}, "
            f"so a continuation cannot be replayed: leave out {remedy}."
        )


def generated(
    model: PreTrainedModel,
    prompts: Prompts,
    wanted: Wanted,
    seed: int,
    progress: bool,
    earlier: list[int] | None = None,
) -> Prompts:
    """The prompts with the continuations that the model writes, if any are wanted.

    Where tokens are drawn, others are drawn each time that a prompt comes again; `earlier` are the
    times that each has come before these.
    """
    if not wanted.max_new_tokens:
        return prompts
    ids = continued(
        model,
        prompts.ids,
        wanted.max_new_tokens,
        progress,
        prompts.inputs,
        arguments=wanted.arguments,
        seed=seed,
        earlier=earlier,
        tokenizer=prompts.tokenizer,
    )
    return prompts._replace(ids=ids, inputs=continued_inputs(prompts.inputs, list(map(len, ids))))
