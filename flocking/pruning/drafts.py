"""Speculative decoding: how many of a twin's proposals the full model takes."""

from __future__ import annotations

from torch import Tensor


class Drafts:
    """Counts the tokens that a twin proposes as ``assistant_model``, and those that are taken.

    Attributes
    ----------
    proposed, accepted : int
        Tokens, since the last prompt. The last proposal is in neither: what became of it shows
        only in the text of the next one.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.proposed = self.accepted = 0
        self._last: tuple[int, Tensor] | None = None  # where it begins, and the text with it

    def propose(self, start: int, text: Tensor) -> None:
        """Note a proposal: the tokens of `text`, shape (1, token), from `start` on."""
        self._last = start, text

    def settle(self, text: Tensor) -> None:
        """Count how much of the last proposal is in `text`, which the next one continues."""
        if self._last is not None:
            start, proposal = self._last
            new = proposal[0, start:]
            kept = text[0, start : proposal.shape[1]]
            same = (new[: len(kept)] == kept).long().cumprod(dim=0).sum()
            self.proposed, self.accepted = self.proposed + len(new), self.accepted + int(same)
        self._last = None
