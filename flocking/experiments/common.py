"""What the experiments share: equal lengths, a control, intervals in words, provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import context, control, special_tokens_around, warn
from flocking.recording import record

WEIGHTS = ["trained", "control"]


def names_of(texts: Sequence[str]) -> list[str]:
    """Names of texts that are to be compared: their own, or their numbers.

    Raises
    ------
    ValueError
        If there are fewer than two, or names repeat.
    """
    if len(texts) < 2:
        raise ValueError(f"expected two texts or more, to compare them, got {len(texts)}.")
    names = [getattr(text, "name", str(number)) for number, text in enumerate(texts)]
    if len(set(names)) < len(names):
        raise ValueError("two texts have the same name: give each text a different one.")
    return names


def same_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    tokens: int,
    window: int,
    *,
    room: int = 0,
    least: int | None = None,
) -> tuple[list[list[int]], list[str]]:
    """Token ids of the texts, cut to one length of a first token and whole windows; their names.

    `room` is for tokens that are generated after them. At least `least` tokens of each are
    needed, by default a first one and two windows.
    """
    ids, names = _read(tokenizer, texts)
    length, why = _one_length(model, ids, names, tokens, window, room, least)
    if length < tokens:
        warn(f"All texts are cut to {length} tokens instead of {tokens}: {why}.")
    return [row[:length] for row in ids], names


def same_excerpts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    tokens: int,
    window: int,
    *,
    most: int,
    least: int,
) -> tuple[list[list[int]], list[str], int]:
    """Excerpts of one length, as many of each text; the texts' names, and how many of each.

    They follow each other in the text, and each begins with the special tokens that open a text.
    Of short texts there are fewer, and if there is only one, it is shorter.
    """
    if (step := (tokens - 1) // window * window) < least - 1:
        raise ValueError(f"tokens={tokens}: give {least} or more for an excerpt.")
    ids, names = _read(tokenizer, texts)
    whole, why = _one_length(model, ids, names, most * (tokens - 1) + 1, window, 0, least)
    step = min(step, whole - 1)
    count = min(most, (whole - 1) // step)
    if count < most or step + 1 < tokens:
        warn(
            f"{count} excerpt{'s' * (count > 1)} of {step + 1} tokens of each text instead of "
            f"{most} of {tokens}: {why}."
        )
    opening, _ = special_tokens_around(tokenizer)
    excerpts = [begun(row, step * n, opening)[: step + 1] for row in ids for n in range(count)]
    return excerpts, names, count


def begun(row: list[int], start: int, opening: list[int]) -> list[int]:
    """A text's tokens from `start` on, of which the first are the special ones that open a text.

    Models were trained on texts that begin with these, and treat a text without them in another
    way. They take the place of tokens, so that there are as many.
    """
    return [*opening, *row[start + len(opening) :]]


def prompts_before(
    row: list[int], end: int, lengths: Iterable[int], opening: list[int]
) -> list[list[int]]:
    """A text from each of these numbers of tokens before `end` on, with its opening tokens.

    What follows `end` is the same in all of them, after prompts of different lengths.
    """
    return [begun(row, end - length, opening) for length in lengths]


def _read(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[list[list[int]], list[str]]:
    """Token ids of whole texts, and their names."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    names = names_of(texts)
    # The length is cut later: a warning about the model's context would be wrong here.
    return [tokenizer(text, verbose=False)["input_ids"] for text in texts], names


def _one_length(
    model: PreTrainedModel,
    ids: list[list[int]],
    names: list[str],
    tokens: int,
    window: int,
    room: int,
    least: int | None,
) -> tuple[int, str]:
    """A first token and whole windows that all texts and the model have; why not `tokens`."""
    limit, shortest = context(model), min(map(len, ids))
    fits = min(tokens, shortest, (limit - room) if limit else tokens)
    length = 1 + (fits - 1) // window * window
    least = least or 1 + 2 * window
    generated = f", {room} of it for what is generated" if room else ""
    if length < least:
        short = int(np.argmin([len(row) for row in ids]))
        raise ValueError(
            f"text {names[short]!r} has {len(ids[short])} tokens and the model's context is "
            f"{limit}{generated}; {tokens} tokens of each were asked for, and {least + room} are "
            "needed."
        )
    if fits == tokens:
        return length, f"they are a first token and whole windows of {window}"
    return length, f"the shortest has {shortest}, and the model's context is {limit}{generated}"


def against_control(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    names: list,
    seed: int,
    progress: bool,
    measure: Callable[[xr.Dataset], xr.Dataset],
    **options: Any,
) -> tuple[xr.Dataset, dict[str, str]]:
    """The same measurement on the model and on its control, one after the other."""
    parts = []
    # Made before the first takes long, since the seed may be refused.
    for weights, subject in zip(WEIGHTS, (model, control(model, seed)), strict=True):
        recording = record(subject, ids, tokenizer=tokenizer, progress=progress, **options)
        if weights == "trained":
            source = source_of(recording)
        parts.append(measure(recording.assign_coords(sequence=names)))
    return xr.concat(parts, dimension("weights", WEIGHTS)), source


def dimension(name: str, labels: Sequence[str | float]) -> xr.DataArray:
    """A new dimension with its labels, for ``xarray.concat``."""
    return xr.DataArray(labels, dims=name, name=name)


def source_of(recording: xr.Dataset) -> dict[str, str]:
    """A recording's attributes about its model and the versions that ran it."""
    wanted = ("revision", "architecture", "dtype", "special_tokens")
    versions = ("flocking_version", "transformers_version", "torch_version")
    name = recording.attrs["model"].rstrip("/").rpartition("/")[2]
    return {"model": name} | {key: recording.attrs[key] for key in (*wanted, *versions)}


def finished(
    data: xr.Dataset,
    source: dict[str, str],
    names: list[str],
    ids: list[list[int]],
    seed: int,
    caption: str,
    **more: object,
) -> xr.Dataset:
    """Add to the numbers where they come from."""
    for value in data.values():
        value.attrs = {
            key: value.attrs[key] for key in ("long_name", "units") if key in value.attrs
        }
    texts = hashlib.sha256(repr(ids).encode()).hexdigest()
    return data.assign_attrs(
        **source,
        texts=list(names),
        token_ids_sha256=texts,
        tokens=len(ids[0]),
        seed=seed,
        caption=caption,
        **more,
    )


def said(values: xr.DataArray, label: str | float | None = None, digits: int = 2) -> str:
    """An estimate with its interval; at a label of the other dimension, if there is one."""
    if label is not None:
        (other,) = set(values.dims) - {"interval"}
        values = values.sel({other: label})
    each = (float(values.sel(interval=name)) for name in ("estimate", "low", "high"))
    return "{} [{}, {}]".format(*(f"{value:,.{digits}f}" for value in each))


def counted(ids: list[list[int]]) -> str:
    """How many texts, and how long."""
    return f"{len(ids)} texts of {len(ids[0])} tokens"
