"""Greedy decoding in fixed shapes: a step that is compiled once and reused for every prompt.

``generate`` does work around the model for each token, launches each of its operations, and gives
every call a new cache, for which what was compiled may have to be compiled again. Here a step
reads and writes buffers that never move: it is compiled once, on CUDA devices replayed as a
graph, and nothing is asked of the device in between.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from flocking.models import (
    attention,
    device_of,
    embeddings_of,
    exclusive,
    refuse_forgetful,
    relative_error,
    require_model,
    tolerance,
    trial,
    trial_copy,
    unreadable,
    vocabulary_of,
)
from flocking.pruning.decodable import (
    check_arguments,
    check_whole,
    faster_attention,
    refuse_hooks,
    special_tokens,
)
from flocking.pruning.graphs import CompiledStep
from flocking.pruning.twin import Twin, full_model, read_prompt, refresh_of, serving

_OTHER_STATES = "it keeps something else than each token's keys and values"
_LOOK_EVERY = 16  # tokens between two looks at whether all sequences have ended


class Decoder:
    """Greedy decoding of a model or a twin, compiled, in shapes that do not depend on the prompt.

    Gives the tokens that ``model.generate(..., do_sample=False)`` gives, up to rounding. Of the
    model's generation config only the tokens that end a text and the padding token count (no
    penalties, no sampling). The first call compiles, which takes seconds to minutes; later ones,
    with prompts of any length, do not. On CUDA devices a step is then one graph, replayed.

    With a twin, each prompt is read by the full model, and neurons are selected from it, as in
    ``generate``; the step is compiled for the twin's compact projections, which do not move in
    memory. A twin's ``refresh`` happens between steps, on the same cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only model, or a twin that :func:`flocking.griffin` made of it, with all
        parameters on one device. It is not changed.
    max_length : int
        Most tokens of a prompt and its continuation together. The cache has room for this number
        from the start (also where the model has sliding windows, which are masked, not cut), and
        each step reads all of it: make it no larger than needed.
    batch_size : int
        Sequences that are decoded together.

    Raises
    ------
    ValueError
        If the model cannot be decoded like this (found by a trial on random tokens), lies on
        several devices, has hooks, or has a context of less than `max_length`.

    Examples
    --------
    >>> decoder = flocking.Decoder(flocking.griffin(model), max_length=64)
    >>> prompt = tokenizer("Birds of a feather", return_tensors="pt")
    >>> sequences = decoder.generate(**prompt, max_new_tokens=8)
    >>> sequences.shape[1] - prompt["input_ids"].shape[1]
    8
    """

    def __init__(self, model: PreTrainedModel, max_length: int, *, batch_size: int = 1) -> None:
        model = require_model(model)
        check_arguments(model, max_length, batch_size)
        refuse_hooks(model)
        self._model, self._full = model, full_model(model)
        refuse_forgetful(self._full)
        self.max_length, self.batch_size = int(max_length), int(batch_size)
        self._device, self._dtype = device_of(embeddings_of(model)), model.dtype
        self._busy = threading.Lock()
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._cache: Cache | None = None
        self._left = 0  # steps that the last prompt leaves room for
        self._prompt = self._since = 0  # tokens of the last prompt; steps since a refresh
        self._read_last: Any = None  # what the twin's selection was made from
        with torch.inference_mode(False):  # they outlive any mode that this is called in
            shape = (self.batch_size, 1)
            self._ids, self._position = self._zeros(*shape), self._zeros(*shape)  # of the next step
            self._done = self._zeros(*shape, dtype=torch.bool)
            self._mask, self._text = (
                self._zeros(self.batch_size, self.max_length) for _ in range(2)
            )
            self._length = self._zeros(1)  # tokens of the text that are written
            self._ends, self._pad = self._zeros(0), self._zeros(1)
        implementation = self._proved(faster_attention(model, self._device))
        self._compiled = CompiledStep(self._step, model, self._device, implementation)

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 20
    ) -> Tensor:
        """The prompts and what follows them.

        Parameters
        ----------
        input_ids : Tensor of int64, shape (sequence, token)
            With `batch_size` sequences.
        attention_mask : Tensor, shape (sequence, token), optional
            1 for real tokens, 0 for padding, which must be on the left; all real if None.
        max_new_tokens : int
            Of each sequence; fewer if all end before.

        Returns
        -------
        Tensor of int64, shape (sequence, token)
            On the model's device. Sequences that ended are filled up as ``generate`` does.

        Raises
        ------
        ValueError
            If there are other numbers of sequences or more tokens than this decoder is made for,
            or padding that is not on the left.
        RuntimeError
            If the model does not compile in one piece.
        """
        with serving(self._model), self._in_one_thread():
            self.read(input_ids, attention_mask, max_new_tokens=max_new_tokens)
            for number in range(1, max_new_tokens):
                if number % _LOOK_EVERY == 0 and bool(self._done.all()):
                    break
                self.step()
            return self._written(input_ids.shape[1])

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 1
    ) -> None:
        """Run the prompts on the full model and take a first token; a twin then selects neurons.

        This is how :meth:`generate` begins, with the same parameters; each :meth:`step` then
        adds a token, up to `max_length` in all.
        """
        ids, mask = self._checked(input_ids, attention_mask, max_new_tokens)
        refuse_hooks(self._model)
        self._refuse_converted()
        self._left = 0  # until this prompt is read
        prompt = ids.shape[1]
        self._set_special_tokens()
        self._text.copy_(self._pad.expand_as(self._text))
        self._text[:, :prompt] = ids
        self._length.fill_(prompt)
        self._done.zero_()
        with exclusive(self._full):
            outputs = read_prompt(
                self._model,
                lambda: self._prefill(self._full, ids, mask),
                len(ids),
                mask,
                tokens=prompt,
            )
        self._compiled.follow_parameters()
        self._take(outputs.logits[:, -1])
        self._left = self.max_length - prompt - 1
        self._prompt, self._since = prompt, 0
        self._note_selection()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> None:
        """Compute and take one more token of each sequence.

        Raises
        ------
        RuntimeError
            If no prompt was read, or there is no room for more tokens after it; or if the model
            does not compile in one piece.
        """
        if self._left < 1:
            raise RuntimeError(
                "there is no room for another token, or a step was interrupted: read a prompt "
                f"first, which with its continuation has at most {self.max_length} tokens."
            )
        if isinstance(self._model, Twin):
            self._model._griffin.refuse_other_thread()
            if self._model._griffin.read is not self._read_last:
                raise RuntimeError(
                    "the twin was given another prompt since, elsewhere: read the prompt again, "
                    "or make a twin for each decoder."
                )
        # (A step that stops midway has written into the cache: there is none after it.)
        left, self._left = self._left - 1, 0
        self._since += 1
        if self._since == refresh_of(self._model) and not bool(self._done.all()):
            self._refresh()
        else:
            self._compiled()
            if isinstance(self._model, Twin):
                self._model._griffin.work.steps += 1
        self._left = left

    @contextmanager
    def _in_one_thread(self) -> Iterator[None]:
        """Refuse a second thread, which would write into the same text and cache."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "this decoder is generating in another thread: make a decoder for each thread."
            )
        try:
            yield
        finally:
            self._busy.release()

    def _refuse_converted(self) -> None:
        """Refuse a model that is elsewhere, or in another dtype, than the cache was made for."""
        now = device_of(embeddings_of(self._model)), self._model.dtype
        before = self._device, self._dtype
        if now != before and not isinstance(self._model, Twin):  # (a twin says so itself)
            first, then = (
                f"{str(dtype).removeprefix('torch.')} on {device}"
                for device, dtype in (before, now)
            )
            raise RuntimeError(
                f"the model was in {first} when this decoder was made, and is in {then} now: make "
                "another decoder."
            )

    def _note_selection(self) -> None:
        self._read_last = self._model._griffin.read if isinstance(self._model, Twin) else None

    def _refresh(self) -> None:
        """Let the full model read the tokens since the last time, and give the next one."""
        new, state = self._since, cast(Twin, self._model)._griffin
        order = torch.arange(new, device=self._device)
        places = self._length - new + order  # in the text
        ended = (self._text[..., None] == self._ends).any(dim=-1).int()
        ended[:, : self._prompt] = 0
        counts = (ended.cumsum(dim=1) == ended)[:, places]  # not behind a token that ends a text
        more: dict[str, Any] = {}
        if self._takes_positions:
            more["position_ids"] = self._position + 1 - new + order
        if "logits_to_keep" in inspect.signature(self._full.forward).parameters:
            more["logits_to_keep"] = 1
        outputs = state.reread(
            lambda: self._full(
                input_ids=self._text[:, places],
                attention_mask=self._mask,
                past_key_values=self._cache,
                use_cache=True,
                **more,
            ),
            self._cache,
            new,
            None if bool(counts.all()) else counts,
        )
        self._take(outputs.logits[:, -1])
        self._position.add_(1)
        self._since = 0
        self._note_selection()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _set_special_tokens(self) -> None:
        """From the generation config as it is now, into the memory that steps read."""
        ends, pad = special_tokens(self._model)
        if len(self._ends) != len(ends):
            self._ends = self._zeros(len(ends))
            self._compiled.forget_graph()  # it reads the memory before
        self._ends.copy_(torch.tensor(ends, dtype=torch.int64, device="cpu"))
        self._pad.fill_(pad)

    def _checked(
        self, ids: Tensor, mask: Tensor | None, max_new_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """The prompts and their mask on the model's device, or an error."""
        for name, values in (("input_ids", ids), ("attention_mask", mask)):
            if problem := unreadable(values):
                raise TypeError(f"{name} is {problem}.")
        whole = isinstance(ids, Tensor) and not (
            ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
        )
        if not whole:
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(
                f"input_ids is {kind}: give token ids as a tensor, as a tokenizer gives them with "
                "return_tensors='pt'."
            )
        if ids.ndim != 2 or len(ids) != self.batch_size or ids.shape[1] == 0:
            raise ValueError(
                f"expected input_ids of shape ({self.batch_size}, tokens), the first its "
                f"batch_size, got {tuple(ids.shape)}."
            )
        check_whole("max_new_tokens", max_new_tokens)
        if max_new_tokens < 1 or ids.shape[1] + max_new_tokens > self.max_length:
            raise ValueError(
                f"this decoder has room for {self.max_length} tokens in all, got a prompt of "
                f"{ids.shape[1]} and {max_new_tokens} new ones: give at least one new token, or "
                "make a decoder with a larger max_length."
            )
        ids = ids.long()
        lowest, highest, last = int(ids.min()), int(ids.max()), vocabulary_of(self._full) - 1
        if not 0 <= lowest <= highest <= last:
            raise ValueError(
                f"input_ids has token ids from {lowest} to {highest}, but the model's vocabulary "
                f"ends at {last}: use the model's own tokenizer."
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.is_complex()):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"attention_mask is {kind}: give a tensor of zeros and ones.")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if mask.shape != ids.shape or not bool((mask.diff(dim=1) >= 0).all() & mask[:, -1].all()):
            raise ValueError(
                "attention_mask must have the shape of input_ids, and zeros on the left only: pad "
                "with tokenizer.padding_side = 'left'."
            )
        return ids.to(self._device), mask.to(self._device)

    def _read(self, full: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Any:
        """Run the prompts on a full model as ``generate`` would."""
        more: dict[str, Any] = {}
        if self._takes_positions:
            more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        if "logits_to_keep" in inspect.signature(full.forward).parameters:
            more["logits_to_keep"] = 1
        return full(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
        )

    def _prefill(self, full: PreTrainedModel, ids: Tensor, mask: Tensor) -> Any:
        """Run the prompts, and copy their keys and values into the fixed cache."""
        outputs = self._read(full, ids, mask, DynamicCache())
        past = getattr(outputs, "past_key_values", None)
        layers = getattr(past, "layers", None) or [None]
        if any(
            type(layer) is not DynamicLayer or layer.get_seq_length() != ids.shape[1]
            for layer in layers
        ):
            raise ValueError(_OTHER_STATES)
        if self._cache is None:
            self._cache = Cache(layers=[StaticLayer(self.max_length) for _ in layers])
        else:
            self._cache.reset()
        for fixed, layer in zip(self._cache.layers, layers, strict=True):
            cast(StaticLayer, fixed).update(layer.keys, layer.values)
        if refresh_of(self._model) is not None:
            outputs.past_key_values = self._cache  # which is taken back
        self._mask.fill_(1)
        self._mask[:, : ids.shape[1]] = mask
        self._position.copy_(mask.sum(dim=1, keepdim=True))
        return outputs

    def _logits(self, model: PreTrainedModel) -> Tensor:
        """One step's, shape (sequence, vocabulary), over the fixed cache."""
        more = {"position_ids": self._position} if self._takes_positions else {}
        return model(
            input_ids=self._ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **more,
        ).logits[:, -1]

    def _step(self) -> None:
        self._take(self._logits(self._model))
        self._position.add_(1)

    def _take(self, logits: Tensor) -> None:
        """Write the likeliest token of each sequence as its next, all in place."""
        token = torch.where(self._done, self._pad, logits.argmax(dim=-1, keepdim=True))
        self._done.logical_or_((token[..., None] == self._ends).any(dim=-1))
        self._text.index_copy_(1, self._length, token)
        self._length.add_(1)
        self._ids.copy_(token)

    def _written(self, prompt: int) -> Tensor:
        """The text so far, to where the last sequence ended."""
        end = int(self._length)
        if bool(self._done.all()):
            new = self._text[:, prompt:end, None]
            ended = (new == self._ends).any(dim=-1).int()
            end = prompt + 1 + int(ended.argmax(dim=1).max())
        return self._text[:, :end].clone()

    # ----------------------------------------------------------------------------------
    # The trial

    def _proved(self, preferred: str | None) -> str | None:
        """The attention implementation to decode with: the preferred one, or the model's own.

        Raises a ValueError if steps give what the model gives with neither.
        """
        if preferred is not None and self._why_not(preferred) is None:
            return preferred
        if (problem := self._why_not(None)) is not None:
            why = str(problem).strip().partition("\n")[0]
            raise ValueError(
                f"{type(self._model).__name__} cannot be decoded in fixed shapes ({why}): use "
                "generate."
            ) from problem
        return None

    def _why_not(self, implementation: str | None) -> Exception | None:
        """The error that shows that steps with this attention cannot be used; None if they can.

        Models that expect other caches raise errors of any kind.
        """
        try:
            self._prove(implementation)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            return problem
        return None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prove(self, implementation: str | None) -> None:
        """Raise an error unless steps over the fixed cache give what the model's own cache gives.

        On random tokens. If the model's own cache forgets, there are enough of them to see it
        (the fixed cache forgets nothing, but the attention's mask hides the same tokens).
        """
        full = trial_copy(self._full)
        own = DynamicCache(config=full.config.get_text_config(decoder=True))
        if not {type(layer) for layer in own.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ValueError(_OTHER_STATES)
        ids, mask = self._trial_tokens(own)
        total = ids.shape[1]
        prompt = max(1, total - 2)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        with trial(full):
            self._read(full, ids[:, :prompt], mask[:, :prompt], own)
            self._prefill(full, ids[:, :prompt], mask[:, :prompt])
            for place in range(prompt, total):
                here = slice(place, place + 1)
                more = {"position_ids": positions[:, here]} if self._takes_positions else {}
                expected = full(
                    input_ids=ids[:, here],
                    attention_mask=mask[:, : place + 1],
                    past_key_values=own,
                    use_cache=True,
                    **more,
                ).logits[:, -1]
                self._ids.copy_(ids[:, here])
                with attention(full, implementation):
                    error = relative_error(self._logits(full), expected)
                self._position.add_(1)
                if not error <= tolerance(expected.dtype):
                    raise ValueError(f"it gives something else there, relative error {error:.1g}")

    def _trial_tokens(self, own: DynamicCache) -> tuple[Tensor, Tensor]:
        """Random tokens and their mask, longer than the shortest window of the model's cache."""
        windows = [getattr(layer, "sliding_window", None) for layer in own.layers]
        window = min(filter(None, windows), default=self.max_length)
        total = 16 if window >= self.max_length else max(16, window + 4)
        total = min(total, self.max_length)
        vocabulary = vocabulary_of(self._full)
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, total)
        ids = torch.randint(vocabulary, shape, generator=generator, device="cpu").to(self._device)
        mask = torch.ones_like(ids)
        if self.batch_size > 1:
            mask[0, : max(1, total - 2) // 4] = 0
        return ids, mask
