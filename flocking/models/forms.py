"""What may be given as text and as a tokenizer; the rest is refused with what to give instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]

_TEMPLATE = (
    "apply the model's chat template first, and give "
    "tokenizer.apply_chat_template(messages, return_dict=True)"
)
_KINDS = "give a string, a list of strings, token ids, or what a tokenizer returns"


class Given(NamedTuple):
    """Texts, in one of two forms.

    Attributes
    ----------
    texts : list of str, or None
    rows : list
        Token ids of each text, in any form, with their padding; empty if there are `texts`.
    bare : bool
        Whether there was one sequence of ids, without the dimension of sequences.
    encoding : dict
        What else a tokenizer returned.
    """

    texts: list[str] | None
    rows: list[Any]
    bare: bool
    encoding: dict[str, Any]


def given(text: Any) -> Given:
    """What was given as text, in one of two forms.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If it is empty, or a dict without token ids.
    """
    encoding: dict[str, Any] = {}
    if is_encoding := isinstance(text, Mapping):
        if "input_ids" not in text:
            raise ValueError(_about_dict(text))
        encoding = {k: v for k, v in text.items() if k != "input_ids" and v is not None}
        text = text["input_ids"]
    if isinstance(text, str):
        text = [text]
    refuse_container(text)
    items = _listed(text)
    if len(items) == 0:
        raise ValueError("text is empty: give at least one text or sequence of token ids.")
    if all(isinstance(item, str) for item in items):
        if is_encoding:
            raise TypeError("text is a dict whose 'input_ids' are strings: give the strings alone.")
        # (As values: an enumeration's member has another name.)
        return Given([str.__str__(item) for item in items], [], False, {})
    return Given(None, *_sequences(items), encoding)


def _sequences(items: Any) -> tuple[list[Any], bool]:
    """Token ids of each text, and whether there was one sequence without a list around it."""
    if not isinstance(items, list):
        return ([items], True) if items.ndim == 1 else (list(items), False)
    if not isinstance(items[0], list | tuple) and any(item is np.ma.masked for item in items):
        raise TypeError(f"text is {_MASKED}.")
    bare = isinstance(items[0], int | np.integer)
    # (A string is odd among ids only; among strings, the other is.)
    for number, item in sorted(enumerate(items), key=lambda pair: isinstance(pair[1], str)):
        if problem := _about_item(item, bare):
            raise TypeError(f"text {number} is {problem}.")
    return ([items], True) if bare else ([_listed(item) for item in items], False)


def _listed(values: Any) -> Any:
    """A list, or an array or tensor of numbers with one dimension or more."""
    if isinstance(values, Tensor):
        return values
    if hasattr(values, "__array__"):  # numpy's, and columns of tables
        array = np.asarray(values)
        return array if array.dtype.kind in "biufc" else array.tolist()
    return list(values)


# --------------------------------------------------------------------------------------
# What is not text, each as the rest of a sentence


def is_lasting(values: Any) -> bool:
    """Whether values can be gone through again, and are the same then.

    Those that can be asked for by their number are. A length says nothing: a progress bar has one,
    which is around a generator, and so has a loader that draws another order each time.
    """
    return isinstance(values, Sized) and hasattr(values, "__getitem__")


def held(text: Any) -> Any:
    """Texts that may not be gone through again as a list, and all else as it is."""
    return text if is_lasting(text) or _about_container(text) else list(text)


def refuse_container(text: Any) -> None:
    """Raise a TypeError for what is no collection of texts, such as a table."""
    if problem := _about_container(text) or unreadable(text):
        raise TypeError(f"text is {problem}.")


def _about_container(text: Any) -> str:
    """Why this is no collection of texts; empty if it is one."""
    kind = f"of type {type(text).__name__}"
    if problem := _about_bytes_and_paths(text):
        return problem
    names = getattr(text, "column_names", getattr(text, "columns", _ABSENT))
    if names is not _ABSENT:
        some = next(iter(names), "text") if isinstance(names, Iterable) else "text"
        return f"a table ({kind}): give one of its columns, such as dataset[{str(some)!r}]"
    if hasattr(text, "read"):
        return f"an open file ({kind}): give its text, file.read()"
    if isinstance(text, Set):
        return f"{kind}, without an order: give a list"
    if not isinstance(text, Iterable) or isinstance(text, type) or getattr(text, "ndim", 1) == 0:
        return f"{kind}: {_KINDS}"
    return ""


_ABSENT = object()


def _about_bytes_and_paths(value: Any) -> str:
    kind = f"of type {type(value).__name__}"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{kind}: decode it first, such as with .decode('utf-8')"
    if isinstance(value, PurePath):
        return f"{kind}: give what is in the file, path.read_text(encoding='utf-8')"
    return ""


def _about_item(item: Any, bare: bool) -> str:
    """Why this one of several is no sequence of token ids; empty if it is one."""
    if problem := _about_bytes_and_paths(item) or unreadable(item):
        return problem
    if isinstance(item, Mapping):
        if _is_message(item):
            return f"a chat message: {_TEMPLATE}"
        if "input_ids" in item:
            return "a tokenizer's output: tokenize all texts at once, tokenizer(texts)"
        names = ", ".join(map(str, item))
        return (
            f"a dict (of {names}): give a list of its texts, such as "
            f"[row[{_likely(item)!r}] for row in rows]"
        )
    if isinstance(item, list | tuple) and item:
        if all(isinstance(message, Mapping) and _is_message(message) for message in item):
            return f"a conversation, a list of chat messages: {_TEMPLATE}"
        if all(isinstance(part, str) for part in item):
            return "a list of strings: give one string for each text"
    if not bare and (isinstance(item, str | int | float) or not isinstance(item, Iterable)):
        return (
            f"{_shown(item)}, neither a string among strings nor a sequence of token ids (and the "
            "two cannot be mixed)"
        )
    return ""


def _shown(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_message(item: Mapping[str, Any]) -> bool:
    return "role" in item or {"from", "value"} <= item.keys()


def _about_dict(text: Mapping[str, Any]) -> str:
    """What to give instead of a dict without token ids."""
    if _is_message(text):
        return f"text is a chat message: {_TEMPLATE}."
    columns = ", ".join(map(str, text)) or "nothing"
    return (
        f"text is a dict without 'input_ids' (it has {columns}): give what a tokenizer returns, or "
        f"a column of texts alone, such as data[{_likely(text)!r}]."
    )


def _likely(row: Mapping[str, Any]) -> str:
    """The name under which a dict most likely has its text or its conversation."""
    names = list(map(str, row))
    usual = [name for name in ("text", "texts", "content", "messages") if name in names]
    return (usual or names or ["text"])[0]


_MASKED = "a masked array, whose mask would be lost: give its values, and attention_mask"


def unreadable(values: Any) -> str:
    """Why a tensor or array has no plain values to read, as the rest of a sentence; or nothing."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        return _MASKED
    if isinstance(values, np.ndarray) and values.dtype.kind in "mMV":
        return f"an array of dtype {values.dtype}: give whole numbers"
    if not isinstance(values, Tensor):
        return ""
    if isinstance(values, torch.masked.MaskedTensor):
        return _MASKED
    if values.is_nested:
        return "a nested tensor: give a list of tensors, its .unbind()"
    if values.layout != torch.strided:
        return f"a sparse tensor ({values.layout}): give its .to_dense()"
    if values.is_quantized:
        return f"a quantised tensor ({values.dtype}): give whole numbers, such as int64"
    if values.is_meta:
        return "a tensor on the meta device, without values: make it on the CPU"
    return ""


def whole_numbers(values: Any, number: int) -> Tensor:
    """Token ids of text `number` as int64 (token,) on the CPU; a TypeError if they are not."""
    try:
        # (A copy: torch warns of arrays that cannot be written to, such as those of tables.)
        plain = np.array(values) if isinstance(values, np.ndarray) else values
        tensor = torch.as_tensor(plain, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
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


def require_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or that of a processor; None for None.

    Raises
    ------
    TypeError
        If it is something else.
    """
    inner: Any = tokenizer
    if isinstance(tokenizer, ProcessorMixin):
        inner = getattr(tokenizer, "tokenizer", None) or tokenizer
    if inner is None:
        return None
    no_instance = isinstance(inner, type | nn.Module)
    if no_instance or not callable(inner) or not hasattr(inner, "decode"):
        kind = repr(inner) if isinstance(inner, str | type) else f"a {type(inner).__name__}"
        name = inner if isinstance(inner, str) else "..."
        raise TypeError(
            f"tokenizer is {kind}: give a transformers tokenizer, such as "
            f"AutoTokenizer.from_pretrained({name!r}), or leave it out for the one in the model's "
            "folder."
        )
    return inner
