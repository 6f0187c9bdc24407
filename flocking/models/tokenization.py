"""Token ids without padding, of text in any of the forms that ``record`` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models.checkpoints import read_tokenizer, said_of
from flocking.models.memo import PerModel
from flocking.models.weights import vocabulary_of

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
        The special tokens that the tokenizer added to each text.
    """

    ids: list[Tensor]
    texts: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    special: str


def tokenize(
    model: PreTrainedModel, text: Text, tokenizer: PreTrainedTokenizerBase | None = None
) -> Prompts:
    """Token ids of `text` in any of its forms, without padding.

    Raises
    ------
    TypeError
        If `text` has none of the known forms.
    ValueError
        If a text is empty, its ids do not fit the model, or no tokenizer can be found.
    """
    items, masks = _items(text)
    if all(isinstance(item, str) for item in items):
        return _of_strings(model, items, masks, tokenizer)
    ids = _unpadded(_sequences(items), masks, vocabulary_of(model))
    tokenizer = tokenizer or _tokenizer_for_labels(model)
    texts = [str(tokenizer.decode(each)) if tokenizer else "" for each in ids]
    return Prompts(ids, texts, tokenizer, "as given")


def _items(text: Any) -> tuple[Any, Any]:
    """Strings or token ids in a list (or tensor, or array), and the attention mask, if any."""
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
    items: Any = text if hasattr(text, "ndim") else list(text)
    if len(items) == 0:
        raise ValueError("text is empty: give at least one text or sequence of token ids.")
    return items, masks


def _of_strings(
    model: PreTrainedModel,
    texts: list[str],
    masks: Any,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Prompts:
    for number, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {number} is empty: give a text of at least one token.")
    tokenizer = tokenizer or _tokenizer_of(model)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    prompts = _unpadded(ids, masks, vocabulary_of(model))
    return Prompts(prompts, [str(text) for text in texts], tokenizer, _special(tokenizer))


def _tokenizer_for_labels(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's folder or hub repository, if there is one."""
    if not getattr(model, "name_or_path", None):
        return None
    try:
        return _tokenizer_of(model)
    except ValueError:
        return None


def _special(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that `tokenizer` adds to a text."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])) or "none"


def _unpadded(ids: list[Any], masks: Any, vocabulary: int) -> list[Tensor]:
    masks = [None] * len(ids) if masks is None else _sequences(masks)
    if len(masks) != len(ids):
        raise ValueError(
            f"attention_mask has {len(masks)} rows, input_ids has {len(ids)}: give as many."
        )
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
            raise ValueError(f"text {number} has no tokens but padding: give one or more.")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
            raise ValueError(
                f"text {number} has token ids from {int(prompt.min())} to {int(prompt.max())}, but "
                f"the model's vocabulary ends at {vocabulary - 1}: use the model's own tokenizer."
            )
        prompts.append(prompt)
    return prompts


def _sequences(ids: Any) -> list[Any]:
    """Token ids as a list of sequences; one sequence may be given without a list around it."""
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
    """The tokenizer in the model's folder or hub repository, read once."""
    if not model.name_or_path:
        raise ValueError(
            "No tokenizer was found with the model (it has no name): pass tokenizer=, or give "
            "token ids."
        )
    try:
        revision = getattr(model.config, "_commit_hash", None) or "main"
        return read_tokenizer(model.name_or_path, revision=revision, **said_of(model))
    except (OSError, ValueError, TypeError) as problem:
        raise ValueError(
            "No tokenizer was found with the model: pass tokenizer=, or give token ids. "
            f"({problem})"
        ) from problem
