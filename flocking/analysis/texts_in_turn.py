"""Texts of a model in turn, recorded in batches that are let go: corpora that fit no memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import (
    Text,
    batches,
    conversations,
    is_lasting,
    refuse_long,
    require_model,
    tokenize,
    tokenize_chats,
    with_inputs,
)
from flocking.recording import check_numbers, record

BLOCK = 1024  # texts of an iterator that are sorted by length together; their ids are held


class Batch(NamedTuple):
    """Some texts.

    Attributes
    ----------
    numbers : list of int
        Which texts, counted from 0 in the order that they were given in.
    recording : xarray.Dataset
    ids : list of Tensor of int64, shape (token,)
    """

    numbers: list[int]
    recording: xr.Dataset
    ids: list[Tensor]


def in_turn(
    model: PreTrainedModel,
    texts: Text | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
    **options: Any,
) -> Iterator[Batch]:
    """Record texts batch by batch, those of similar length together, as `record` reads them.

    What can be gone through again is sorted as a whole, so that its batches are those of one
    recording; anything else, such as a generator, `BLOCK` texts at a time.

    Raises
    ------
    TypeError, ValueError
        As :func:`flocking.record` raises them, with the number of the text.
    """
    check_numbers(max_tokens=max_tokens, batch_size=batch_size, seed=seed)
    model = require_model(model)
    done = 0
    known = is_lasting(texts)
    with tqdm(desc="recording", unit="token", disable=not progress) as bar:
        for block in [texts] if known else _blocks(texts):
            try:
                given, ids, ways = _read(model, block, tokenizer, max_tokens)
            except (TypeError, ValueError) as error:
                if not done:
                    raise
                told = f"of the texts from number {done} on, {error}"
                raise type(error)(told) from None
            lengths = [len(row) for row in ids]
            if known:
                bar.reset(sum(lengths))
            for rows in batches(model, lengths, batch_size, ways):
                numbers = [done + row for row in rows]
                try:
                    recording = record(
                        model,
                        _part(given, rows),
                        tokenizer=tokenizer,
                        max_tokens=max_tokens,
                        batch_size=batch_size,
                        seed=seed,
                        progress=False,
                        **options,
                    )
                except Exception as error:
                    error.add_note(f"while {_listed(numbers)} read")
                    raise
                yield Batch(numbers, recording, [ids[row] for row in rows])
                bar.update(sum(lengths[row] for row in rows))
            done += len(ids)
    if not done:
        raise ValueError("texts is empty: give at least one text or sequence of token ids.")


def _blocks(texts: Any) -> Iterator[Any]:
    """Some texts at a time, of what has no length."""
    if not isinstance(texts, Iterable) or hasattr(texts, "read"):
        yield texts  # which is refused
        return
    items, read = iter(texts), 0
    while True:
        block: list[Any] = []
        try:
            for item in itertools.islice(items, BLOCK):
                block.append(item)
        except Exception as error:
            error.add_note(f"while text {read + len(block)} was taken from the iterable")
            raise
        if block and isinstance(block[0], int | np.integer):
            block += items  # one sequence of ids
        if not block:
            return
        read += len(block)
        yield block


def _read(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None,
) -> tuple[Any, list[Tensor], Any]:
    """What to give `record` in parts, each text's tokens, and how the model may read them."""
    chats = conversations(texts)
    if chats is not None:
        prompts, _ = tokenize_chats(model, chats, tokenizer)
    else:
        prompts = tokenize(model, texts, tokenizer)
    prompts = prompts.cut(max_tokens)
    refuse_long(model, prompts.ids, 0, "max_tokens")
    ways = with_inputs(model, prompts.inputs) if prompts.inputs else None
    if chats is not None:
        return list(chats), prompts.ids, ways
    given = {"input_ids": prompts.ids, **prompts.inputs}
    given["attention_mask"] = [torch.ones_like(row) for row in prompts.ids]
    return given, prompts.ids, ways


def _listed(numbers: list[int]) -> str:
    several = len(numbers) > 1
    listed = ", ".join(map(str, sorted(numbers)))
    return f"texts {listed} were" if several else f"text {listed} was"


def _part(given: Any, rows: list[int]) -> Any:
    if isinstance(given, list):
        return [given[row] for row in rows]
    return {name: [values[row] for row in rows] for name, values in given.items()}
