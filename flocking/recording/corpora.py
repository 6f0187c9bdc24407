"""Texts by the thousand: any iterable, in blocks that do not depend on who reads them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from flocking.models import is_lasting, refuse_container
from flocking.recording.arguments import whole_number
from flocking.recording.continuations import Wanted

_END = object()


class Block(NamedTuple):
    """Texts that follow each other.

    Attributes
    ----------
    start : int
        Number of the first one.
    texts : list
    wanted : Wanted
        What is wanted after each of them.
    digests : numpy.ndarray of uint64, shape (text,)
        By which each text is known again, with its continuation.
    """

    start: int
    texts: list[Any]
    wanted: Wanted
    digests: np.ndarray

    @property
    def rows(self) -> slice:
        """Their numbers."""
        return slice(self.start, self.start + len(self.texts))

    def only(self, places: list[int]) -> Block:
        """Some of the texts; `start` stays."""

        def some(values: Any) -> Any:
            return [values[place] for place in places] if isinstance(values, list) else values

        wanted = self.wanted._replace(
            prompt_tokens=some(self.wanted.prompt_tokens),
            continuation=some(self.wanted.continuation),
        )
        return Block(self.start, some(self.texts), wanted, self.digests[places])


class Corpus:
    """An iterable of texts, with what is wanted after each.

    Parameters
    ----------
    text : iterable, or one text
        Of strings, sequences of token ids, or conversations.
    wanted : Wanted
        ``prompt_tokens`` and ``continuation`` may be iterables, of one for each text.
    num_texts : int, optional
        How many there are, where `text` does not know it.

    Attributes
    ----------
    number : int or None
        How many there are; None if that is not known.
    is_lasting : bool
        Whether the texts can be gone through more than once.

    Raises
    ------
    TypeError
        If `text` is no collection of texts.
    ValueError
        If it is empty, or has another length than `num_texts` or `continuation`.
    """

    def __init__(self, text: Any, wanted: Wanted, num_texts: int | None = None) -> None:
        if isinstance(text, Mapping):
            raise TypeError(
                "text is a dict, and with out= texts are read one by one: give a list of texts, or "
                "the dict's input_ids without padding."
            )
        if not isinstance(text, str):
            refuse_container(text)
        if isinstance(wanted.continuation, Mapping):
            raise TypeError(
                "continuation is a dict, and with out= texts are read one by one: give a list of "
                "continuations, or the dict's input_ids without padding."
            )
        if num_texts is not None:
            whole_number("num_texts", num_texts, 1)
            num_texts = int(num_texts)  # (numpy's cannot be written into a store)
        self._texts, found = _several(text)
        self.wanted = wanted
        counts = {n: _length(values) for n, values in self._aside.items()}
        if "continuation" in counts:
            several, counts["continuation"] = _several(wanted.continuation)
            self.wanted = wanted._replace(continuation=several)
        self.is_lasting = all(map(is_lasting, (self._texts, *self._aside.values())))
        self.number = num_texts if found is None else found
        if num_texts not in (None, self.number):
            raise ValueError(
                f"num_texts={num_texts}, and text has {self.number} texts: leave num_texts out."
            )
        for name, count in counts.items():
            if count is not None and self.number not in (None, count):
                raise ValueError(
                    f"{name} has {count} entries, and text has {self.number} texts: give one for "
                    "each."
                )

    @property
    def _aside(self) -> dict[str, Any]:
        """Iterables that have one value for each text, by the argument's name."""
        wanted = self.wanted
        found = {"prompt_tokens": wanted.prompt_tokens, "continuation": wanted.continuation}
        return {
            name: values
            for name, values in found.items()
            if isinstance(values, Iterable) and not _is_scalar(values)
        }

    def peek(self, count: int = 1) -> Block:
        """The first texts, which :meth:`blocks` gives nevertheless.

        Raises
        ------
        ValueError
            If there is none.
        """
        self._texts = _rewound(self._texts)
        aside: dict[str, Any] = {n: _rewound(values) for n, values in self._aside.items()}
        self.wanted = self.wanted._replace(**aside)
        first = list(itertools.islice(self._items(), count))
        for values in (self._texts, *aside.values()):
            if isinstance(values, _Rewound):
                values.again()
        if not first:
            raise ValueError("text is empty: give at least one text or sequence of token ids.")
        firsts: dict[str, Any] = {name: [each[name] for each in first] for name in aside}
        wanted = self.wanted._replace(**firsts)
        texts = [each["text"] for each in first]
        digests = [_digest(*each.values()) for each in first]
        return Block(0, texts, wanted, np.array(digests, np.uint64))

    def blocks(self, size: int) -> Iterator[Block]:
        """The texts in their order, `size` at a time.

        Raises
        ------
        ValueError
            If there are none, or not as many as were said or as there are continuations.
        """
        start = 0
        for items in _in_pieces(self._items(), size):
            texts = [item["text"] for item in items]
            columns: dict[str, Any] = {name: [each[name] for each in items] for name in self._aside}
            wanted = self.wanted._replace(**columns)
            digests = [_digest(*item.values()) for item in items]
            yield Block(start, texts, wanted, np.array(digests, np.uint64))
            start += len(items)
        if not start:
            raise ValueError("text is empty: give at least one text or sequence of token ids.")
        if self.number not in (None, start):
            raise ValueError(
                f"text has {start} texts, and {self.number} were expected, from its length or "
                "num_texts: correct it."
            )

    def _items(self) -> Iterator[dict[str, Any]]:
        """Each text, with its own arguments by name."""
        aside = self._aside
        columns = zip(itertools.count(), *map(_then_end, (self._texts, *aside.values())))
        for number, text, *more in columns:
            names = [name for name, value in zip(aside, more, strict=True) if value is _END]
            if text is _END and len(names) == len(aside):
                return
            if self.number is not None and number == self.number and not names:
                raise ValueError(
                    f"text has more texts than the {self.number} that were expected, from its "
                    "length or num_texts: correct it."
                )
            if text is _END or names:
                short, long = ("text", next(iter(aside))) if text is _END else (names[0], "text")
                raise ValueError(
                    f"{short} has {number} entries, and {long} has more: give one for each text."
                )
            yield {"text": text, **dict(zip(aside, more, strict=True))}


class _Rewound:
    """An iterator whose first values come twice."""

    def __init__(self, values: Iterator[Any]) -> None:
        self._values = values
        self._first: list[Any] = []
        self._again = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        value = next(self._values)
        if not self._again:
            self._first.append(value)
        return value

    def again(self) -> None:
        """Give what was given so far once more."""
        self._values, self._first = itertools.chain(self._first, self._values), []
        self._again = True


def _rewound(values: Iterable[Any]) -> Iterable[Any]:
    return _Rewound(values) if isinstance(values, Iterator) else values


def _several(text: Any) -> tuple[Iterable[Any], int | None]:
    """Texts or continuations, of one or several, and how many there are, if that is known.

    What may not be gone through again is an iterator afterwards, which nothing was taken from.
    """
    if isinstance(text, str):
        return [text], 1
    number = _length(text)
    if is_lasting(text):
        first = next(iter(text), _END)
    else:
        text = iter(text)
        first = next(text, _END)
        text = itertools.chain([] if first is _END else [first], text)
    if _is_token(first) or (isinstance(first, Mapping) and "role" in first):
        return [list(text)], 1  # one text, or one conversation
    return text, number


def _length(values: Any) -> int | None:
    """How many values there are; None if they do not know it."""
    try:
        return len(values)
    except TypeError:  # also of a progress bar around what has none
        return None


def _is_scalar(values: Any) -> bool:
    """Whether this is an array or tensor of one number, without a dimension."""
    return getattr(values, "ndim", None) == 0


def _is_token(item: Any) -> bool:
    return isinstance(item, int | np.integer) or (isinstance(item, Tensor) and item.ndim == 0)


def _then_end(values: Iterable[Any]) -> Iterator[Any]:
    return itertools.chain(values, itertools.repeat(_END))


def _in_pieces(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while piece := list(itertools.islice(items, size)):
        yield piece


def _digest(*values: Any) -> int:
    """64 bits by which a text is known again, with what belongs to it."""
    digest = hashlib.sha256()
    for value in values:
        content = _content(value)
        digest.update(f"{len(content)} ".encode() + content)
    return int.from_bytes(digest.digest()[:8], "big")


def _content(value: Any) -> bytes:
    if isinstance(value, str):
        return b"text " + value.encode(errors="surrogatepass")
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return json.dumps(value, sort_keys=True, default=repr).encode()
