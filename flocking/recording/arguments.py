"""Arguments of ``record``, and what is refused about them before there is a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flocking.recording.continuations import Wanted


class Options(NamedTuple):
    """Arguments of :func:`flocking.record` that say what is kept, and how it is read."""

    wanted: Wanted
    window: int | None = 64
    layers: Iterable[int] | None = None
    max_tokens: int | None = None
    relative: bool | Iterable[int] = False
    ranks: bool = False
    batch_size: int = 8
    seed: int = 0

    def checked(self) -> Options:
        """The same, with lists in the place of iterators and arrays, and Python's own numbers.

        Raises
        ------
        ValueError
            For numbers that :func:`flocking.record` does not take, and for two sources of a
            continuation.
        TypeError
            For `ranks` that are no bool.
        """
        check_numbers(
            self.window, self.wanted.max_new_tokens, self.max_tokens, self.batch_size, self.seed
        )
        self.wanted.check()
        return Options(
            self.wanted._replace(max_new_tokens=int(self.wanted.max_new_tokens)),
            None if self.window is None else int(self.window),
            _listed(self.layers),
            None if self.max_tokens is None else int(self.max_tokens),
            _listed(self.relative),
            require_bool("ranks", self.ranks),
            int(self.batch_size),
            int(self.seed),
        )


def _listed(numbers: Any) -> Any:
    """Layer numbers that can be read several times; an array's are whole numbers of Python."""
    if hasattr(numbers, "__array__"):  # also a tensor, and what numpy calls true
        return (numbers if hasattr(numbers, "tolist") else np.asarray(numbers)).tolist()
    return list(numbers) if isinstance(numbers, Iterator) else numbers


def check_numbers(
    window: object = None,
    max_new_tokens: object = 0,
    max_tokens: object = None,
    batch_size: object = 8,
    seed: object = 0,
) -> None:
    """Refuse numbers that :func:`record` does not take; needs no model."""
    whole_number("window", 1 if window is None else window, 1)
    whole_number("max_tokens", 1 if max_tokens is None else max_tokens, 1)
    whole_number("batch_size", batch_size, 1)
    whole_number("max_new_tokens", max_new_tokens, 0)
    whole_number("seed", seed, 0)


def whole_number(name: str, value: object, lowest: int) -> None:
    """Raise a ValueError unless an argument is a whole number from `lowest` up, of 64 bits."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if lowest <= value < 2**63:
            return
        if value > 0:
            raise ValueError(f"{name}={value!r}: give a number below 2 ** 63.")
    raise ValueError(f"{name}={value!r}: give a whole number from {lowest} up.")


def require_bool(argument: str, value: object) -> bool:
    """A plain yes or no, since any text (``"no"``) would count as a yes.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{argument}={value!r}: give True or False.")
    return bool(value)
