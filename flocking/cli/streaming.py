"""Printing text while it is generated, and timing it."""

from __future__ import annotations

import time

import torch
import typer
from transformers import PreTrainedTokenizerBase, TextStreamer


class Clock(TextStreamer):
    """Prints a prompt and its continuation as it comes, and notes the time of each new token.

    Without a prompt, nothing is printed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt = prompt
        self.text = ""
        self.times: list[float] = []
        self._is_open = False

    def put(self, value: torch.Tensor) -> None:
        """Print, and note the time."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        elif self.prompt is not None:  # not before, since what is asked may be refused
            typer.echo(self.prompt, nl=False)
            self._is_open = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep the text, and print it."""
        self.text += text
        if self.prompt is not None:
            super().on_finalized_text(text, stream_end)

    def break_off(self) -> None:
        """End the line that was begun, so that an error is printed below it."""
        if self._is_open:
            typer.echo()

    def measured(self) -> dict[str, str | int | float | None]:
        """The continuation, how many tokens it has, and how many came in a second.

        The first new one does not count for speed, since the pass over the prompt gives it.
        """
        speed = None
        if len(self.times) > 1:
            speed = (len(self.times) - 1) / (self.times[-1] - self.times[0])
        return {"text": self.text, "new_tokens": len(self.times), "tokens_a_second": speed}
