"""Reading prompts: the full model runs, and the hook adds up the moments of its FF blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from flocking.feedforward import FeedForward, Routed, observe
from flocking.models import Bookmark, Seal, is_even
from flocking.recording import Moments, Windows


@dataclass
class Read:
    """What was read in full, from which neurons are selected.

    Attributes
    ----------
    moments : dict of int to Moments
        By layer.
    tokens : Tensor of int64, shape (sequence,)
        Real tokens in the moments.
    end : int
        Tokens in the cache, padding included, after the last ones were read.
    bookmark : Bookmark or None
        That place in the cache, if the model will read again from there what a twin adds.
    text, added : Tensor of int64, shape (sequence, token), or None
        Token ids, for the same: of the text so far, as far as ``generate`` knows it, and of what
        is in the cache after `end`.
    seal : Seal or None
        On the cache, as a twin left it.
    history : list of (int, list of ndarray)
        Each selection of this text: `end` when it was made, and the kept neurons of every compact
        block, as :func:`flocking.pruning.history.packed` gives them.
    """

    moments: dict[int, Moments]
    tokens: Tensor
    end: int = 0
    bookmark: Bookmark | None = None
    text: Tensor | None = None
    added: Tensor | None = None
    seal: Seal | None = None
    history: list[tuple[int, list[np.ndarray]]] = field(default_factory=list)

    def rows(self, index: Tensor) -> Read:
        """The same of the sequences `index`, int64, which may come several times."""
        moments = {
            layer: replace(
                each,
                energy=each.energy[index.to(each.energy.device)],
                mass=each.mass[index.to(each.mass.device)],
            )
            for layer, each in self.moments.items()
        }
        tokens = self.tokens[index.to(self.tokens.device)]
        return replace(self, moments=moments, tokens=tokens, history=list(self.history))

    def copy(self) -> Read:
        """What is not changed when more is read."""
        return self.rows(torch.arange(len(self.tokens), device="cpu"))

    def goes_on(self, past: Any, sequences: int) -> bool:
        """Whether the cache `past` is as a twin left it, down to the end of what was read.

        It may have been cut behind that, but not be written, reordered or filled anew.
        """
        same = len(self.tokens) == sequences and past.get_seq_length() >= self.end
        return same and self.seal is not None and self.seal.holds(past)


class Reader:
    """Reads prompts with the full model, and remembers what was read into which cache.

    A :class:`Read` begins open, while a twin writes behind the prompt. When the twin has ended, it
    is sealed. A later turn goes on from it only if the cache is still as it was sealed.

    ===================  ======================================  ==============================
    what happens         call                                    the read is then
    ===================  ======================================  ==============================
    a prompt was read    :meth:`read`, :meth:`remember`          open
    generation ended     :meth:`seal`                            sealed
    it was interrupted   :meth:`seal_if_even`                    sealed, or open for good
    another turn begins  :meth:`earlier`, if :meth:`known`       read on from, in a new one
    reading on failed    :meth:`forget`                          gone
    ===================  ======================================  ==============================

    Parameters
    ----------
    full : transformers.PreTrainedModel
    first_run : dict of int to int
        For each layer, the layer of its block's first run; their moments are added up there.
    again : bool
        Whether the model will read again what is added to caches after a prompt.
    """

    def __init__(
        self, full: PreTrainedModel, first_run: dict[int, int], again: bool = False
    ) -> None:
        self.full, self._first_run, self._again = full, first_run, again
        self._by_cache = WeakIdKeyDictionary()

    def earlier(self, past: Any, sequences: int) -> Read | None:
        """What :meth:`known` gives, which is then forgotten here."""
        read = self.known(past, sequences)
        if past is not None:
            self._by_cache.pop(past, None)
        return read

    def remember(self, read: Read, cache: Any) -> None:
        """Keep what was read into this cache (None if the model returned none).

        A later turn goes on from it after :meth:`seal`.
        """
        if cache is not None:
            read.end, read.seal = int(cache.get_seq_length()), None
            if self._again:
                read.bookmark = Bookmark(cache)
            self._by_cache[cache] = read

    def seal(self, read: Read) -> None:
        """Note how the caches are that this was read into, as a twin leaves them."""
        for cache, other in self._by_cache.items():
            if other is read:
                read.seal = Seal(cache)

    def seal_if_even(self, read: Read) -> None:
        """The same where generation was interrupted, unless in the middle of a step."""
        if all(is_even(cache) for cache, other in self._by_cache.items() if other is read):
            self.seal(read)

    def known(self, past: Any, sequences: int) -> Read | None:
        """What was read into the cache `past`, if it is still there."""
        read = self.into(past)
        return read if read is not None and read.goes_on(past, sequences) else None

    def into(self, past: Any) -> Read | None:
        """What was read into the cache `past`, whatever has happened to it since."""
        return None if past is None else self._by_cache.get(past)

    def forget(self, read: Read) -> None:
        """Do not go on from what was read in a later turn."""
        for cache in [cache for cache, other in self._by_cache.items() if other is read]:
            self._by_cache.pop(cache)

    def read(
        self,
        run: Callable[[], Any],
        sequences: int,
        mask: Tensor | None,
        tokens: int | None,
        earlier: Read | None,
    ) -> tuple[Any, Read]:
        """Run a prompt; return what `run` returned, and the moments.

        Parameters
        ----------
        run : callable
            One or more forward passes of the full model, over the prompt's tokens in order.
        sequences : int
            In the batch.
        mask : Tensor, shape (sequence, token), or None
            1 for real tokens; None if all are.
        tokens : int or None
            Of each sequence's prompt, if known.
        earlier : Read or None
            Earlier turns; this prompt is added to their moments, in place.
        """
        moments = {} if earlier is None else earlier.moments
        # The first token of a text is the first window, as in recordings.
        number = window_numbers(sequences, mask, first=earlier is None)
        add = _Adder(moments, self._first_run, sequences, number)
        with torch.no_grad(), observe(self.full, add, routed=True):
            outputs = run()
        fed = next(iter(add.seen.values()))
        if tokens is not None and set(add.seen.values()) != {tokens}:
            raise RuntimeError(
                f"{type(self.full).__name__} was given {tokens} tokens a sequence and computed "
                f"{fed}: it added, dropped or repeated tokens, so no neurons can be selected."
            )
        real = (number(0, fed) >= 0).sum(dim=1)
        if earlier is None:
            return outputs, Read(moments, real)
        return outputs, Read(moments, earlier.tokens + real, history=earlier.history)


class _Adder:
    """Callback of the hook that adds each chunk of z to the moments of its block.

    Attributes
    ----------
    seen : dict of int to int
        Tokens of each sequence so far, by layer.
    """

    def __init__(
        self,
        moments: dict[int, Moments],
        first_run: dict[int, int],
        sequences: int,
        number: Callable[[int, int], Tensor],
    ) -> None:
        self._moments, self._first_run = moments, first_run
        self._sequences, self._number = sequences, number
        self._windows: dict[tuple[int, int], Windows] = {}  # by first token and number of tokens
        self.seen: dict[int, int] = {}

    def __call__(self, block: FeedForward, z: Tensor | Routed) -> None:
        # Some blocks flatten the tokens of all sequences.
        if isinstance(z, Routed):
            z = z.reshape(self._sequences, -1)
        else:
            z = z.reshape(self._sequences, -1, z.shape[-1])
        fed = z.shape[1]
        start = self.seen.get(block.layer, 0)
        self.seen[block.layer] = start + fed
        if (start, fed) not in self._windows:
            self._windows[start, fed] = Windows.of(self._number(start, fed))
        layer = self._first_run[block.layer]
        if layer not in self._moments:
            # Kept for a second turn, which need not be in inference mode if this one is.
            with torch.inference_mode(False):
                zeros = Moments.zeros(self._sequences, 2, block.d_ff, device=block.device)
            self._moments[layer] = zeros
        self._moments[layer].update(z, self._windows[start, fed])


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
        window = torch.ones(sequences, tokens, dtype=torch.int64, device="cpu")
        if first and start == 0:
            window[:, 0] = 0
        return window

    return number
