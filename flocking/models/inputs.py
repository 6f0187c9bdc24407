"""What a model is fed beside token ids and their mask: inputs with a value for every token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flocking.models.forms import unreadable
from flocking.models.running import context, first_position
from flocking.models.weights import vocabulary_of

_Following = Callable[[Tensor, int], Tensor]


def _last(values: Tensor, count: int) -> Tensor:
    return values[-1:].expand(count, *values.shape[1:])


def _zeros(values: Tensor, count: int) -> Tensor:
    return values.new_zeros(count, *values.shape[1:])


def _next(values: Tensor, count: int) -> Tensor:
    steps = torch.arange(1, count + 1, device="cpu")
    return values[-1] + steps.reshape(-1, *[1] * (values.ndim - 1))


# Names of inputs whose shape is (sequence, token) or (sequence, token, ...), whatever the model,
# so that they can be padded and cut as token ids are; and what they are for new tokens, as
# transformers' generate has it (None if it knows nothing of them).
PER_TOKEN: dict[str, _Following | None] = {
    "token_type_ids": _last,
    "position_ids": _next,
    "mm_token_type_ids": _zeros,
    "moe_mm_token_type_ids": _zeros,
    "task_type_ids": None,
    "langs": None,
    "bbox": None,
    "global_attention_mask": None,
    "input_shape_ids": None,
    "input_pronunciation_ids": None,
    "xpath_tags_seq": None,
    "xpath_subs_seq": None,
}

# What tokenizers return about their work when they are asked to. No model reads it.
BOOKKEEPING = (
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "num_truncated_tokens",
)


def fed(model: PreTrainedModel, encoding: Mapping[str, Any], *, given: bool) -> dict[str, Any]:
    """Those entries of a tokenizer's output that the model is fed beside ids and mask.

    Bookkeeping is left out. So are token types that are all 0 where the model has no types, and,
    unless they were `given` by the user, other entries that the model does not take.

    Raises
    ------
    ValueError
        For any other entry.
    """
    takes = set(inspect.signature(model.base_model.forward).parameters)
    chosen = {}
    for name, value in encoding.items():
        if name in PER_TOKEN and name in takes:
            chosen[name] = value
        elif name not in BOOKKEEPING and (name in takes or (given and not _empty(name, value))):
            known = " and ".join(sorted(takes & PER_TOKEN.keys())) or "nothing"
            raise ValueError(
                f"text has {name!r}, which cannot be fed to {type(model).__name__}: beside token "
                f"ids and attention_mask, {known} can. Leave it out to read the text without it."
            )
    return chosen


def _empty(name: str, value: Any) -> bool:
    """Whether these are token types that tell no token from another."""
    try:
        values = [torch.as_tensor(row, device="cpu") for row in value]
    except (TypeError, ValueError, RuntimeError):
        return False
    return str(name).endswith("token_type_ids") and not any(bool(row.any()) for row in values)


def rows_of(name: str, value: Any, ids: Sequence[Tensor], bare: bool) -> list[Tensor]:
    """One such input by text: int64 tensors of shape (token, ...), as long as the text's ids.

    Parameters
    ----------
    name : str
        For errors.
    value : array-like
        Of shape (sequence, token, ...), as lists, arrays or tensors; rows may differ in length.
    ids : list of Tensor, shape (token,)
        Each text's token ids, with their padding.
    bare : bool
        Whether `value` lacks the dimension of sequences.
    """
    if problem := unreadable(value):
        raise TypeError(f"{name} is {problem}.")
    rows = _split(value, len(ids[0]), bare) if hasattr(value, "__len__") else []
    if len(rows) != len(ids):
        raise ValueError(f"{name} has {len(rows)} rows, input_ids has {len(ids)}: give as many.")
    found = []
    for number, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
        if problem := unreadable(row):
            raise TypeError(f"{name} of text {number} is {problem}.")
        try:
            tensor = (
                row if isinstance(row, Tensor) else torch.as_tensor(np.array(row), device="cpu")
            )
            whole = not tensor.is_complex() and bool((tensor.isfinite() & (tensor % 1 == 0)).all())
        except (TypeError, ValueError, RuntimeError):
            whole = False
        if not whole:
            raise TypeError(
                f"{name} of text {number} is not an array of whole numbers: give what a tokenizer "
                "returns."
            )
        if tensor.ndim == 0 or len(tensor) != len(tokens):
            count = len(tensor) if tensor.ndim else "a single value"
            raise ValueError(
                f"text {number} has {len(tokens)} token ids and {count} in its {name}: give both "
                "from one call of the tokenizer."
            )
        found.append(tensor.to("cpu", torch.int64))
    return found


def _split(value: Any, tokens: int, bare: bool) -> list[Any]:
    """Rows of texts; one text's may come without a list around it, whether its ids do or not."""
    first = value[0] if len(value) else []
    flat = not isinstance(first, list | tuple) and not getattr(first, "ndim", 0)
    return [value] if flat or (bare and len(value) == tokens) else list(value)


def check_values(model: PreTrainedModel, inputs: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise a ValueError for positions and types that the model does not have."""
    limit = context(model)
    ends: dict[str, int | None] = {
        "position_ids": limit and limit + first_position(model),
        "token_type_ids": getattr(model.config.get_text_config(), "type_vocab_size", None)
        or vocabulary_of(model),
    }
    for name, rows in inputs.items():
        for number, row in enumerate(rows):
            end = ends.get(name)
            low, high = int(row.min()), int(row.max())
            if low < 0 or (end and high >= end):
                reach = f"0 to {end - 1}" if end else "0 up"
                raise ValueError(
                    f"{name} of text {number} has values from {low} to {high}: the model takes "
                    f"those from {reach}."
                )


def starting_again(positions: Tensor) -> int | None:
    """The first token whose position does not follow from the one before; None if all do."""
    breaks = (positions.diff(dim=0) != 1).nonzero()
    return int(breaks[0, 0]) + 1 if len(breaks) else None


def continued_inputs(
    inputs: Mapping[str, Sequence[Tensor]], totals: Sequence[int]
) -> dict[str, list[Tensor]]:
    """The same for texts with their continuations, of `totals` tokens each.

    Raises
    ------
    ValueError
        For an input of which nobody knows how it goes on.
    """
    longer = {}
    for name, rows in inputs.items():
        following = PER_TOKEN[name]
        if following is None:
            raise ValueError(
                f"text has {name!r}, which a continuation would lack: give the text without it, "
                "or without a continuation."
            )
        longer[name] = [
            torch.cat([row, following(row, total - len(row))])
            for row, total in zip(rows, totals, strict=True)
        ]
    return longer
