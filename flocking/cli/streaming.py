"""Printing text while it is generated, and timing it."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class Clock(TextStreamer):
    """Prints the text as it comes, unless it is silent, and notes the time of each new token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, silent: bool = False, **options: object
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, **options)
        self.silent = silent
        self.text = ""
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Print, and note the time."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep the text, and print it."""
        self.text += text
        if not self.silent:
            super().on_finalized_text(text, stream_end)

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first new one, which the pass over the prompt gives."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])
