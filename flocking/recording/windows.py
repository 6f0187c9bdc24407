"""Windows, the spans of tokens that a recording sums over, and which token lies in which."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flocking.recording.dataset import FIRST, GENERATION, PROMPT

if TYPE_CHECKING:
    from flocking.recording.kernels import Pieces

# Tokens that a CPU sums at a time, so that intermediate results stay in its cache.
_SLICE = 256


def window_counts(prompts: list[int], totals: list[int], window: int | None) -> tuple[int, int]:
    """Numbers of windows: of the longest prompt (without its first token) and generation."""
    step = window or max(totals)
    new = max(total - prompt for prompt, total in zip(prompts, totals, strict=True))
    return -(-(max(prompts) - 1) // step), -(-new // step)


class Layout(NamedTuple):
    """The windows, which are the same for all sequences: first token, prompt, generation."""

    phase: list[str]
    start: list[int]
    window: Tensor  # int64 (sequence, token): each token's window, -1 for padding

    @classmethod
    def of(cls, prompts: list[int], totals: list[int], window: int | None) -> Layout:
        """From the number of tokens in each prompt, and in each prompt with its generation."""
        step = window or max(totals)
        rest, new = window_counts(prompts, totals, window)
        phase = [FIRST] + [PROMPT] * rest + [GENERATION] * new
        start = [0] + [1 + step * k for k in range(rest)] + [step * k for k in range(new)]
        token = torch.arange(max(totals), device="cpu")[None]
        prompt = torch.tensor(prompts, device="cpu")[:, None]
        total = torch.tensor(totals, device="cpu")[:, None]
        number = torch.where(
            token < prompt, 1 + (token - 1) // step, 1 + rest + (token - prompt) // step
        )
        number = torch.where(token == 0, 0, number)
        return cls(phase, start, torch.where(token < total, number, -1))


@dataclass(frozen=True)
class Windows:
    """Which token of a chunk lies in which window, as the matrix that sums them.

    Attributes
    ----------
    weights : Tensor of float32, shape (sequence, windows here, token)
        1 where the token lies in the window, else 0; padding lies in none.
    first : int
        Number of the first of these windows.
    padding : Tensor of bool, shape (sequence, token), or None
        Where tokens are not real; None if all are.
    spans : list of (slice, slice)
        Pieces of the chunk, and for each the windows that its tokens lie in.
    pieces : flocking.recording.kernels.Pieces, or None
        The same for the CUDA kernels, if they are used.
    """

    weights: Tensor
    first: int
    padding: Tensor | None
    spans: list[tuple[slice, slice]]
    pieces: Pieces | None = None
    _sent: dict[torch.device, Windows] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, window: Tensor) -> Windows:
        """From each token's window, int64 of shape (sequence, token), -1 for padding."""
        _, everything = _span(window, slice(None), 0)
        numbers = torch.arange(everything.start, everything.stop, device="cpu")
        step = max(1, _SLICE // window.shape[0])
        pieces = (slice(start, start + step) for start in range(0, window.shape[1], step))
        padding = window < 0
        return cls(
            (window[:, None, :] == numbers[None, :, None]).to(torch.float32),
            everything.start,
            padding if bool(padding.any()) else None,
            [_span(window, piece, everything.start) for piece in pieces],
        )

    def to(self, device: torch.device) -> Windows:
        """The same for activations on `device`, in one piece unless that is the CPU.

        All layers share what is sent there, so that only the first has to wait for it.
        """
        kernels = kernels_for(device.type)
        if self.pieces is not None or (device.type == "cpu" and kernels is None):
            return self
        if device not in self._sent:
            padding = None if self.padding is None else self.padding.to(device)
            last = self.first + self.weights.shape[1]
            spans = [(slice(None), slice(self.first, last))]
            pieces = None
            if kernels is not None:
                if self.weights.shape[1]:
                    numbers = self.first + self.weights.argmax(dim=1)
                else:  # nothing but padding
                    numbers = torch.full(self.weights.shape[::2], -1, device="cpu")
                if self.padding is not None:
                    numbers = numbers.masked_fill(self.padding, -1)
                pieces = kernels.Pieces.of(numbers, device)
            self._sent[device] = Windows(
                self.weights.to(device), self.first, padding, spans, pieces
            )
        return self._sent[device]


@functools.cache
def kernels_for(device: str) -> ModuleType | None:
    """The module ``kernels``, if this kind of device can use it and Triton is installed."""
    if device != "cuda":
        return None
    try:
        from flocking.recording import kernels
    except ImportError:  # it comes with torch's CUDA builds, but not with all
        return None
    return kernels


def _span(window: Tensor, tokens: slice, first: int) -> tuple[slice, slice]:
    """These tokens, and the windows from the lowest to the highest that they lie in."""
    real = window[:, tokens][window[:, tokens] >= 0]
    if not real.numel():
        return tokens, slice(first, first)
    return tokens, slice(int(real.min()), int(real.max()) + 1)
