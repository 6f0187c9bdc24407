"""What the experiments share: equal lengths, a control, intervals in words, provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import context, control, warn
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
    """Token ids of the texts, cut to one length of a first token and whole windows; their names."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    names = names_of(texts)
    # The length is cut below: a warning about the model's context would be wrong here.
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    limit = context(model)
    fits = min(tokens, min(map(len, ids)), (limit - room) if limit else tokens)
    length = 1 + (fits - 1) // window * window
    least = least or 1 + 2 * window
    if length < least:
        short = int(np.argmin([len(row) for row in ids]))
        raise ValueError(
            f"text {names[short]!r} has {len(ids[short])} tokens and the model's context is "
            f"{limit}; {tokens} tokens of each were asked for, and {least + room} are needed."
        )
    if length < tokens:
        warn(
            f"All texts are cut to {length} tokens instead of {tokens}: the shortest has "
            f"{min(map(len, ids))}, and the model's context is {limit}.",
        )
    return [row[:length] for row in ids], names


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
