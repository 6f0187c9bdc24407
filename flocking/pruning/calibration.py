"""The static statistic of a model: which neurons matter over many texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import STATIC, energy_per_token, in_turn, in_words, made_of, named
from flocking.models import (
    Text,
    context,
    opening_token,
    require_model,
    require_tokenizer,
    require_writer,
    sampled,
    tokenize,
)
from flocking.recording import check_numbers, record, whole_number
from flocking.texts import TextFiles, expanded, passages, why_no_file

if TYPE_CHECKING:
    from flocking.analysis import Batch

_SEQUENCES, _TOKENS = 32, 256  # that are drawn from a model

_ROOM = 2**26  # bytes of texts that wait for those before them, to be added in order


def global_statistic(
    model: PreTrainedModel,
    texts: Text | Iterable[Any] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    sequences: int | None = None,
    tokens: int | None = None,
    temperature: float | None = None,
    prompt: str | Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> xr.DataArray:
    """A statistic over many texts: the root of the mean over texts of energy per token.

    The methods "static" and "global-local" of :func:`flocking.griffin` need it. Without `texts`,
    the model writes them itself, as GLASS (arXiv 2508.14302) has it for "global-local": from the
    token that opens a text (BOS) or from `prompt`, token by token from its own distribution.
    What it wrote is then read as texts are.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    texts : str, list of str, list of list of int, or an iterable of such, optional
        A calibration set; other texts than those that are then evaluated. By default the model
        writes `sequences` texts. They are read batch by batch, and no more than a batch is held:
        a generator, or a column of a dataset, may have any number of them.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    max_tokens : int or None
        Read at most this many tokens of each of `texts`, the first ones.
    sequences : int, optional
        How many texts the model writes; 32 by default.
    tokens : int, optional
        How many tokens of each it writes, after BOS or `prompt`, which count as well; by default
        256, or as many as fit the model's context. The model goes on after a token that ends a
        text, so that all are as long.
    temperature : float, optional
        What logits are divided by before tokens are drawn; 1 by default, which is the model's
        own distribution.
    prompt : str or list of int, optional
        What each text begins with, for a model without BOS; BOS by default.
    seed : int
        Of what is drawn, and of what is random in the model. The global generators are left
        alone.
    batch_size : int
        Texts in one forward pass. Of what has no length, such as a generator, 1,024 texts at a time
        are sorted by length into batches. What is written does not depend on it, but for rounding,
        which may change a token and with it what follows.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.DataArray, float64, (layer, neuron)
        Unitless; every text counts the same, whatever its length. Attribute ``made_from`` says
        how many texts and tokens, with a digest of these.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    TypeError, ValueError
        As :func:`flocking.record` raises them, with the number of the text; for `sequences`,
        `tokens`, `temperature` or `prompt` together with `texts`, or `max_tokens` without; for a
        model that is no causal language model or has no BOS, if it is to write.

    Examples
    --------
    >>> texts = [text[:500] for text in flocking.passages()]
    >>> reference = flocking.global_statistic(
    ...     model, texts, tokenizer=tokenizer, progress=False
    ... )
    >>> reference.dims, reference.shape
    (('layer', 'neuron'), (2, 64))
    >>> pruned = flocking.griffin(model, method="static", reference=reference)

    Without texts, from what the model writes itself:

    >>> reference = flocking.global_statistic(
    ...     model, prompt=[1], sequences=4, tokens=16, seed=1, progress=False
    ... )
    >>> pruned = flocking.griffin(model, method="global-local", reference=reference)
    """
    drawing = {
        "sequences": sequences,
        "tokens": tokens,
        "temperature": temperature,
        "prompt": prompt,
    }
    if written := texts is None:
        if max_tokens is not None:
            raise ValueError(
                f"max_tokens={max_tokens} cuts texts, and none are given: say with tokens how "
                "many the model writes of each."
            )
        texts = _written(
            model,
            tokenizer,
            _SEQUENCES if sequences is None else sequences,
            tokens,
            1.0 if temperature is None else temperature,
            prompt,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    elif given := [name for name, value in drawing.items() if value is not None]:
        raise ValueError(
            f"{' and '.join(given)}: of texts that the model writes itself, and texts are given: "
            "leave out one or the other."
        )
    mean, told = _mean_in_order(
        in_turn(
            model,
            texts,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            window=None,
        )
    )
    by_whom = " that the model wrote itself" if written else ""
    values = named(mean**0.5, "statistic", "statistic over a calibration set")
    return made_of(values, f"{STATIC} {told}{by_whom}")


def _mean_in_order(batches: Iterable[Batch]) -> tuple[xr.DataArray, str]:
    """Mean over texts of energy per token, and what they are in words.

    Texts are added one by one in the order they were given in, so that the sum does not depend on
    batches; if too many wait for one before them, they are added as they are.
    """
    total: xr.DataArray | None = None
    waiting: dict[int, np.ndarray] = {}
    ids: dict[int, bytes] = {}
    digest, texts, hashed, tokens = hashlib.sha256(), 0, 0, 0
    for batch in batches:
        values = energy_per_token(batch.recording)
        if total is None:
            total = xr.zeros_like(values.isel(sequence=0, drop=True))
            total = total.drop_vars([n for n, c in total.coords.items() if not c.dims])
        for number, row, own in zip(batch.numbers, values.values, batch.ids, strict=True):
            waiting[number] = row
            ids[number] = own.numpy().astype("<i8").tobytes() + b"\n"
            tokens += len(own)
        full = len(waiting) * total.nbytes > _ROOM
        while waiting and (texts in waiting or full):
            total.values += waiting.pop(texts if texts in waiting else min(waiting))
            texts += 1
        while hashed in ids:
            digest.update(ids.pop(hashed))
            hashed += 1
    assert total is not None  # in_turn refuses nothing
    for number in sorted(waiting):
        total.values += waiting.pop(number)
        texts += 1
    told = f"{in_words(texts, tokens)} (SHA-256 of their ids {digest.hexdigest()[:16]})"
    return total / texts, told


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int,
    tokens: int | None,
    temperature: float,
    prompt: str | Sequence[int] | None,
    *,
    seed: int,
    batch_size: int,
    progress: bool,
) -> list[list[int]]:
    """Token ids of texts that the model writes; all that is refused comes before the first."""
    whole_number("sequences", sequences, 1)
    whole_number("tokens", 1 if tokens is None else tokens, 1)
    check_numbers(batch_size=batch_size, seed=seed)
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and 0 < temperature < math.inf):
        raise ValueError(
            f"temperature={temperature!r}: give a number above 0 (1 for the model's own "
            "distribution): without drawing, all texts would be the same."
        )
    model = require_model(model)
    ids = _prompt_of(model, tokenizer, prompt)
    record(model, [ids], window=None, seed=seed, progress=False)  # refuses what it always does
    require_writer(model)
    limit = context(model)
    room = limit - len(ids) if limit else None
    if room is not None and room < (tokens or 1):
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {tokens or 1} new ones do not fit the model's "
            f"context of {limit}: give fewer."
        )
    written = sampled(
        model,
        torch.tensor(ids, device="cpu"),
        sequences,
        tokens or min(_TOKENS, room or _TOKENS),
        temperature=float(temperature),
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return [row.tolist() for row in written]


def _prompt_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Sequence[int] | None,
) -> list[int]:
    """Token ids that each text begins with."""
    if prompt is None:
        bos = opening_token(model, require_tokenizer(tokenizer))
        if bos is None:
            raise ValueError(
                f"{type(model).__name__} names no token that opens a text (bos_token_id): give "
                "prompt, a word or token ids that its texts begin with, or give texts."
            )
        return [bos]
    ids = tokenize(model, prompt, tokenizer).ids
    if len(ids) != 1:
        raise ValueError(f"prompt has {len(ids)} texts: give one, which each text begins with.")
    return ids[0].tolist()


def calibration_texts(source: str | Path | Sequence[str] | None = None) -> list[str]:
    """Texts to make a static statistic from.

    Parameters
    ----------
    source : path or list of str, optional
        A text file in UTF-8, a file of JSON lines (whose texts are in ``text``) or a folder of
        such, of which empty texts are left out; or the texts themselves; by default the packaged
        passages.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If there is no such file, there is no text in it, or it is not text.
    """
    if source is None:
        return list(passages())
    if not isinstance(source, str | Path):
        texts = list(source)
    else:
        path = expanded(Path(source))
        why = why_no_file(path)
        if why and why != "is a folder":
            raise ValueError(f"calibration: {path} {why}: give a text file or a folder.")
        texts = [text for text in TextFiles([str(path.absolute())]) if text.strip()]
    if not any(texts):
        raise ValueError(f"calibration: there is no text in {source}: give some text files.")
    return texts
