"""Text, in any of the forms that ``record`` takes, to token ids without padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flocking.models.memo import PerModel
from flocking.models.weights import embeddings_of

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


class Prompts(NamedTuple):
    """Tokenized texts.

    Attributes
    ----------
    ids : list of Tensor of int64, shape (token,)
        Token ids of each text, on the CPU.
    texts : list of str
        The texts; decoded where ids were given (empty without a tokenizer).
    tokenizer : transformers.PreTrainedTokenizerBase or None
    special : str
        Which special tokens the tokenizer added, for the record.
    """

    ids: list[Tensor]
    texts: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    special: str


def tokenize(
    model: PreTrainedModel, text: Text, tokenizer: PreTrainedTokenizerBase | None = None
) -> Prompts:
    """Token ids of `text`, whichever form it has; padding is dropped.

    Raises
    ------
    TypeError
        If `text` is none of the known forms.
    ValueError
        If a text is empty, its ids do not fit the model, or no tokenizer can be found.
    """
    masks = None
    if isinstance(text, Mapping):
        if "input_ids" not in text:
            raise ValueError("text is a dict without 'input_ids': give what a tokenizer returns.")
        masks = text.get("attention_mask")
        text = text["input_ids"]
    if isinstance(text, str):
        text = [text]
    if not isinstance(text, Iterable) or isinstance(text, bytes) or getattr(text, "ndim", 1) == 0:
        raise TypeError(
            f"text is of type {type(text).__name__}: give a string, a list of strings, token ids, "
            "or what a tokenizer returns."
        )
    if not hasattr(text, "ndim"):
        text = list(text)
    if len(text) == 0:
        raise ValueError("text is empty: give at least one text or sequence of token ids.")

    strings = all(isinstance(item, str) for item in text)
    if strings:
        if empty := [number for number, item in enumerate(text) if not item]:
            raise ValueError(f"text {empty[0]} is empty: give one of a token or more.")
        tokenizer = tokenizer or _tokenizer_of(model)
        ids = [tokenizer(item)["input_ids"] for item in text]
        special = _special(tokenizer)
    else:
        ids, special = _sequences(text), "as given"
    prompts = _unpadded(ids, masks, embeddings_of(model).weight.shape[0])
    if strings:
        return Prompts(prompts, [str(item) for item in text], tokenizer, special)
    if tokenizer is None and getattr(model, "name_or_path", ""):
        try:
            tokenizer = _tokenizer_of(model)
        except ValueError:  # only needed for the labels
            tokenizer = None
    texts = [tokenizer.decode(prompt) if tokenizer else "" for prompt in prompts]
    return Prompts(prompts, texts, tokenizer, special)


def _special(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that `tokenizer` adds to a text."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])) or "none"


def _unpadded(ids: list[Any], masks: Any, vocabulary: int) -> list[Tensor]:
    masks = [None] * len(ids) if masks is None else _sequences(masks)
    if len(masks) != len(ids):
        raise ValueError(f"attention_mask has {len(masks)} rows for {len(ids)} of input_ids.")
    prompts = []
    for number, (sequence, mask) in enumerate(zip(ids, masks, strict=True)):
        prompt = _integers(sequence, number)
        if mask is not None:
            real = torch.as_tensor(mask).flatten().cpu().bool()
            if len(real) != len(prompt):
                raise ValueError(
                    f"text {number} has {len(prompt)} token ids and {len(real)} in its "
                    "attention_mask: give both from one call of the tokenizer."
                )
            places = real.nonzero()[:, 0]
            if len(places) and len(places) != places[-1] - places[0] + 1:
                raise ValueError(
                    f"text {number} has gaps in its attention_mask: only padding before and after "
                    "a text can be dropped."
                )
            prompt = prompt[real]
        if len(prompt) == 0:
            raise ValueError(f"text {number} has no tokens beside padding: give one or more.")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
            raise ValueError(
                f"text {number} has token ids from {int(prompt.min())} to {int(prompt.max())}, but "
                f"the model's vocabulary ends at {vocabulary - 1}: use the model's own tokenizer."
            )
        prompts.append(prompt)
    return prompts


def _sequences(ids: Any) -> list[Any]:
    """Token ids as a list of sequences, where one sequence may come bare."""
    bare = ids.ndim == 1 if hasattr(ids, "ndim") else isinstance(ids[0], int | np.integer)
    return [ids] if bare else list(ids)


def _integers(values: Any, number: int) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TypeError(
            f"text {number} is neither a string nor a sequence of token ids (and the two cannot "
            "be mixed)."
        ) from problem
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.ndim != 1 or not (whole or len(tensor) == 0):
        raise TypeError(
            f"text {number} is not a flat sequence of whole-number token ids (it has dtype "
            f"{tensor.dtype} and {tensor.ndim} dimensions)."
        )
    return tensor.to("cpu", torch.int64)


@PerModel
def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, read once."""
    try:
        revision = getattr(model.config, "_commit_hash", None) or "main"
        return AutoTokenizer.from_pretrained(model.name_or_path, revision=revision)
    except Exception as problem:  # transformers raises many kinds
        raise ValueError(
            f"No tokenizer was found beside the model ({model.name_or_path or 'no name'}): "
            "pass tokenizer=, or give token ids."
        ) from problem
