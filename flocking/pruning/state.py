"""The selection of a twin: made from each prompt, copied into its projections, and guarded."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flocking.models import Original
from flocking.pruning.compact import Compact, refuse
from flocking.pruning.drafts import Drafts
from flocking.pruning.history import packed
from flocking.pruning.prompt import Read, Reader
from flocking.pruning.selector import Selected, Selector
from flocking.pruning.stopwatch import Stopwatch


@dataclass
class Work:
    """How often weights were read since the last prompt.

    Attributes
    ----------
    steps, refreshes : int
        Steps of the twin, and passes of the full model over what the twin had written. (Steps
        are counted where there can be both.)
    """

    steps: int = 0
    refreshes: int = 0


class State:
    """What a twin holds in addition to its modules: its full model and its selection.

    Attributes
    ----------
    full : transformers.PreTrainedModel
        The full model, which reads the prompts.
    read : Read or None
        What the selection was made from; None without a selection.
    copies : int
        How often each sequence is in the batch, as in a beam search.
    unreached : list of Tensor of int64, shape ()
        Experts of mixtures that no token of the prompt was routed to.
    watch : Stopwatch or None
        Over the last selection and copy.
    refresh : int or None
        After how many new tokens the full model reads them again.
    work : Work
        What the twin and the full model did since the last prompt.
    hooks : set of int
        Ids of the hooks that the twin has from the original.
    origin : Original or None
        What the twin and the full model follow.
    made_from : str
        How neurons are selected, in words.
    """

    def __init__(
        self,
        full: PreTrainedModel,
        compacts: list[Compact],
        selector: Selector,
        refresh: int | None = None,
    ) -> None:
        self.full, self.compacts, self.selector = full, compacts, selector
        self.refresh = refresh
        first_run = {layer: c.block.layer for c in compacts for layer in c.layers}
        self.reader = Reader(full, first_run, again=refresh is not None)
        self.drafts, self.work = Drafts(), Work()
        self.read: Read | None = None
        self.copies = 1
        self.unreached: list[Tensor] = []
        self.watch: Stopwatch | None = None
        self.hooks: set[int] = set()
        self.modules: dict[str, weakref.ref[nn.Module]] = {}  # of the twin, as it was made
        self.origin: Original | None = None
        self.made_from = ""
        self._requests = threading.RLock()  # held while one is served
        self._is_serving = False
        self._thread: int | None = None  # that made the selection

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve one request; refuse others in the meantime.

        Raises
        ------
        RuntimeError
            In a second thread, or inside of another request.
        """
        with self._locked():
            if self._is_serving:
                raise RuntimeError(
                    "this twin is busy with another prompt, inside of whose generation it was "
                    "called: make another twin for this one."
                )
            self._is_serving = True
            try:
                yield
            except BaseException:  # such as a streamer's, which ends a text between two steps
                if self.read is not None:
                    self.reader.seal_if_even(self.read)
                raise
            else:
                if self.read is not None:
                    self.reader.seal(self.read)
            finally:
                self._is_serving = False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._requests.acquire(blocking=False):
            raise RuntimeError(
                "this twin is busy in another thread, with the neurons of another prompt: wait "
                "until that has ended, or make a twin for each thread."
            )
        try:
            yield
        finally:
            self._requests.release()

    def refuse_other_thread(self) -> None:
        """Raise a RuntimeError if another thread has made the selection."""
        if self._thread != threading.get_ident():
            raise RuntimeError(
                "this twin's neurons were selected in another thread, from a prompt that it was "
                "given there: go on in that thread, or make a twin for each."
            )

    def prefill(
        self,
        run: Callable[[], Any],
        sequences: int,
        mask: Tensor | None = None,
        past: Any = None,
        *,
        tokens: int | None = None,
        copies: int = 1,
    ) -> Any:
        """Read a prompt with the full model, select neurons from it and copy their weights.

        Whatever fails on the way, the twin then has no selection.

        Parameters
        ----------
        run : callable
            One or more forward passes of ``full``, over the prompt's tokens in order.
        sequences : int
            In the batch.
        mask : Tensor, shape (sequence, token), or None
            1 for real tokens; None if all are.
        past : Cache or None
            The cache that the prompt continues.
        tokens : int, optional
            Of each sequence's prompt, if known.
        copies : int
            How often each sequence is in the batch.
        """
        with self._locked():
            self.copies = copies
            self.forget()
            self._follow()
            earlier = self.reader.earlier(past, sequences)
            if earlier is None:
                self.drafts.reset()
            self.work = Work()
            outputs, read = self.reader.read(run, sequences, mask, tokens, earlier)
            self._go_on_from(read, getattr(outputs, "past_key_values", None))
            return outputs

    def reread(
        self,
        run: Callable[[], Any],
        past: Any,
        tokens: int,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Any:
        """Take the cache back to where the full model left it, read on from there, select anew.

        Parameters
        ----------
        run : callable
            One forward pass of ``full`` over the tokens since.
        past : Cache
            The cache, which the twin has added tokens to; or a copy.
        tokens : int
            Of each sequence, that are read.
        mask : Tensor, shape (sequence, token), or None
            1 for those that count; None if all do.
        rows : Tensor of int64, shape (sequence,), or None
            Which of the sequences before each one continues; None if they were not reordered.
        """
        with self._locked():
            read = self.read
            if read is None or read.bookmark is None:
                refuse()
            self.forget()
            self.reader.forget(read)  # until all of this has succeeded
            read.bookmark.go_back(past, rows)
            if rows is not None:
                read = read.rows(rows)
            outputs, read = self.reader.read(run, len(read.tokens), mask, tokens, read)
            self._go_on_from(read, past)
            self.work.refreshes += 1
            return outputs

    def _go_on_from(self, read: Read, cache: Any) -> None:
        """Select from what was read, and remember that it is in this cache."""
        try:
            self.choose(read)
            self.reader.remember(read, cache)
            kept = packed(self.compacts)
        except BaseException:  # a cache that cannot be taken back, or memory that ran out
            self.forget()
            self.reader.forget(read)
            raise
        read.history.append((read.end or int(read.tokens.max()), kept))

    def expect(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a forward pass without a selection, or of another number of sequences."""
        if self.read is None:
            refuse()
        if not torch.compiler.is_compiling():  # (Decoder asks before each of its steps)
            self.refuse_other_thread()
        inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch = next((len(x) for x in inputs if isinstance(x, Tensor)), None)
        held = len(self.read.tokens)
        if self.selector.scope == "sequence" and batch is not None and held not in (1, batch):
            raise RuntimeError(
                f"this twin holds selections for {held} sequences, and was given {batch}: call "
                "its generate, which selects neurons from the prompts."
            )

    def adopt(self, read: Read | None, cache: Any) -> None:
        """Select from what was read into a cache, also by another twin of the same model."""
        if read is None:
            refuse()
        with self._locked():
            self.copies = 1
            self.forget()
            self._follow()
            self.drafts.reset()
            self.work = Work()
            self._go_on_from(replace(read.copy(), history=[]), cache)

    def _follow(self) -> None:
        """Bring changes of the original to the twin and the full model, or refuse them."""
        if self.origin is not None:
            self.origin.follow()

    def forget(self) -> None:
        """Drop the selection: nothing runs until the next one is made."""
        self.read = None
        for compact in self.compacts:
            compact.empty()

    @torch.inference_mode(False)
    @torch.no_grad()
    def choose(self, read: Read) -> None:
        """Select neurons and copy their weights into the compact projections.

        The device is asked once, at the end, whether all is well: until then work is only
        queued on it.
        """
        watch = Stopwatch(self.compacts[0].block.device)
        watch.lap()
        selected = self.selector.select(read)
        watch.lap()
        for compact, kept in zip(self.compacts, selected.kept, strict=True):
            compact.fill(kept)
        watch.lap()
        self.watch, self.unreached = watch, selected.unreached
        self._check(selected)
        self.read, self._thread = read, threading.get_ident()

    def _check(self, selected: Selected) -> None:
        """Drop the selection and raise a ValueError if it was made from what is not a number."""
        flags = (*selected.finite, *selected.numbers)
        well = torch.stack([flag.to(flags[0].device) for flag in flags])
        for compact, is_finite, is_number in zip(
            self.compacts, *well.view(2, -1).tolist(), strict=True
        ):
            if is_finite and is_number:
                continue
            self.forget()
            layer = compact.block.layer
            raise ValueError(
                f"method returned NaN in layer {layer}: give each neuron a number."
                if is_finite
                else f"activations of layer {layer} are not finite: no neurons can be selected."
            )
