"""Arguments of ``record``, and what is refused about them before there is a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from flocking.recording.continuations import Wanted

_Numbers = TypeVar("_Numbers")


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
        """The same, with lists in the place of iterators, which can be read once.

        Raises
        ------
        ValueError
            For numbers that :func:`flocking.record` does not take, and for two sources of a
            continuation.
        """
        check_numbers(
            self.window, self.wanted.max_new_tokens, self.max_tokens, self.batch_size, self.seed
        )
        self.wanted.check()
        return self._replace(layers=_listed(self.layers), relative=_listed(self.relative))


def _listed(numbers: _Numbers) -> _Numbers | list[int]:
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
