"""What was read of a prompt, and in which window each of its tokens lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flocking.recording import Moments


@dataclass
class Read:
    """What was read in full: what experts are chosen from.

    Attributes
    ----------
    moments : dict of int to Moments
        By layer.
    tokens : Tensor of int64, shape (sequence,)
        Real tokens in the moments.
    end : int
        Tokens in the cache, padding included, when the last prompt had been read.
    """

    moments: dict[int, Moments]
    tokens: Tensor
    end: int = 0

    def goes_on(self, past: Any, sequences: int) -> bool:
        """Whether the cache `past` still holds what was read, for as many sequences."""
        return len(self.tokens) == sequences and past.get_seq_length() >= self.end


def window_numbers(
    sequences: int, mask: Tensor | None, first: bool
) -> Callable[[int, int], Tensor]:
    """Windows (0 the first real token, 1 the others, -1 padding) of tokens start to start + n."""
    if mask is not None:
        real = mask.cpu() != 0
        everything = torch.where(real, 1, -1)
        if first:
            everything[(real.cumsum(dim=1) == 1) & real] = 0

    def number(start: int, tokens: int) -> Tensor:
        if mask is not None:
            return everything[:, start : start + tokens]
        window = torch.ones(sequences, tokens, dtype=torch.int64)
        if first and start == 0:
            window[:, 0] = 0
        return window

    return number
