"""Texts of a model in turn, recorded in batches that are let go: corpora that fit no memory."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import (
    Text,
    Traits,
    batches,
    conversations,
    is_lasting,
    refuse_long,
    require_model,
    tokenize,
    tokenize_chats,
    with_inputs,
)
from flocking.recording import check_numbers, record, refuse_mixture, renamed

BLOCK = 1024  # texts of an iterator that are sorted by length together
SURVEYED = 256  # texts that are encoded at a time, to count their tokens


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
    done, special = 0, ""
    known = is_lasting(texts)
    with tqdm(desc="recording", unit="token", disable=not progress) as bar:
        for block in [texts] if known else _blocks(texts):
            read, lengths, ways, special = _surveyed(
                model, block, tokenizer, max_tokens, done, special
            )
            if known:
                bar.reset(sum(lengths))
            for rows in batches(model, lengths, batch_size, ways):
                numbers = [done + row for row in rows]
                part = read(rows)
                try:
                    recording = record(
                        model,
                        part.given,
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
                recording.attrs["special_tokens"] = special  # (ids were given in their place)
                yield Batch(numbers, recording, part.ids)
                bar.update(sum(lengths[row] for row in rows))
            done += len(lengths)
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


class _Encoded(NamedTuple):
    """Tokens of some texts, in a form that `record` takes, and of which form the texts were."""

    given: Any
    ids: list[Tensor]
    inputs: Mapping[str, list[Tensor]]
    special: str

    def part(self, rows: list[int]) -> _Encoded:
        """Some of them."""
        if isinstance(self.given, list):
            given: Any = [self.given[row] for row in rows]
        else:
            given = {name: [values[row] for row in rows] for name, values in self.given.items()}
        return self._replace(given=given, ids=[self.ids[row] for row in rows])


class _Survey(NamedTuple):
    """How long texts are, how the model may read them, and what encodes some of them."""

    read: Callable[[list[int]], _Encoded]
    lengths: list[int]
    ways: Traits | None
    special: str


def _surveyed(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None,
    done: int,
    before: str,
) -> _Survey:
    """Texts from number `done` on, encoded some at a time, and again when it is their turn.

    Of what is one text or is encoded already, all is encoded at once.
    """
    entries = _entries(texts)
    if entries is None:
        whole = _encoded(model, texts, tokenizer, max_tokens)
        ways = with_inputs(model, whole.inputs) if whole.inputs else None
        return _Survey(whole.part, [len(row) for row in whole.ids], ways, whole.special)

    def read(rows: list[int]) -> _Encoded:
        with renamed([f"text {done + row}" for row in rows]):
            return _encoded(model, [entries[row] for row in rows], tokenizer, max_tokens)

    def read_quietly(rows: list[int]) -> _Encoded:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it was said when they were counted
            return read(rows)

    lengths: list[int] = []
    kinds: dict[str, Tensor] = {}  # values of the inputs, each once
    for start in range(0, len(entries), SURVEYED):
        piece = read([*range(start, min(start + SURVEYED, len(entries)))])
        refuse_mixture(before, piece.special, done + start)
        before = piece.special
        lengths += [len(row) for row in piece.ids]
        for name, values in piece.inputs.items():
            found = torch.cat([*([kinds[name]] if name in kinds else []), *values])
            kinds[name] = found.unique(dim=0)
    inputs = {name: [values] for name, values in kinds.items()}
    return _Survey(read_quietly, lengths, with_inputs(model, inputs) if inputs else None, before)


def _entries(texts: Any) -> Any:
    """Texts that can be asked for by their number; None for one text, and for what is encoded."""
    if isinstance(texts, str | bytes | Mapping | Tensor):
        return None
    if hasattr(texts, "__array__"):  # numpy's, and columns of tables
        array = np.asarray(texts)
        texts = array.tolist() if array.dtype.kind in "OUT" and array.ndim == 1 else None
    if texts is None or not is_lasting(texts) or not len(texts):
        return None
    first = texts[0]
    is_one = getattr(first, "ndim", 1) == 0 or isinstance(first, int | Mapping)
    return None if is_one else texts


def _encoded(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None,
) -> _Encoded:
    """Each text's tokens, and what to give `record`."""
    chats = conversations(texts)
    if chats is not None:
        prompts, _ = tokenize_chats(model, chats, tokenizer)
    else:
        prompts = tokenize(model, texts, tokenizer)
    prompts = prompts.cut(max_tokens)
    refuse_long(model, prompts.ids, 0, "max_tokens")
    given: Any = {"input_ids": prompts.ids, **prompts.inputs}
    given["attention_mask"] = [torch.ones_like(row) for row in prompts.ids]
    if chats is not None:
        given = list(chats)
    return _Encoded(given, prompts.ids, prompts.inputs, prompts.special)


def _listed(numbers: list[int]) -> str:
    several = len(numbers) > 1
    listed = ", ".join(map(str, sorted(numbers)))
    return f"texts {listed} were" if several else f"text {listed} was"
