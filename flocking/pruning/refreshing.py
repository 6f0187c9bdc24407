"""A twin whose full model reads again, every N tokens, what was generated, and selects anew.

The paper selects neurons once, from the prompt (Dong, Chen and Chi 2024, arXiv 2404.01365). As in
Sirius (arXiv 2409.03856), the full model here reads the last tokens in one piece, which also
replaces their keys and values, computed pruned, in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from flocking.models import Bookmark, refuse_unknown
from flocking.pruning.prompt import Read
from flocking.pruning.twin import Twin, is_whole


class RefreshingTwin(Twin):
    """What a twin's class adds to its model's if it refreshes its selection.

    ``generate`` asks for a step's inputs, then calls the model with them. Where a refresh is due,
    the inputs are those of all tokens since the last one, and the full model reads them at once,
    before the call: its outputs are what the call then returns. A call is known to be that one
    by its very tensor of token ids.
    """

    # What the full model gave for inputs that the twin is about to be called with, or None.
    _reread: tuple[Tensor, Any] | None = None
    _ends: _Ends | None = None
    _drafts = False

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A step's inputs. Where a refresh is due, it happens here, outside of what is compiled.

        Sampling and beam search call this for every step, with the whole text and the cache, in
        the present order of the beams.
        """
        state = self._griffin
        self._reread = None
        past: Any = kwargs.get("past_key_values")
        read = None if self._drafts else state.reader.into(past)
        if read is None or read is not state.read or state.refresh is None:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new = int(past.get_seq_length()) + 1 - read.end
        if new < state.refresh:
            read.added = input_ids[:, input_ids.shape[1] - new :]
            state.work.steps += 1
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        full: Any = state.full
        inputs: dict[str, Any] = {}

        def run() -> Any:
            # (Masks of fixed caches depend on the cache, which has been taken back by now.)
            kwargs["next_sequence_length"] = new
            inputs.update(full.prepare_inputs_for_generation(input_ids, *args, **kwargs))
            return full(**inputs, return_dict=True)

        rows = _origins(read, input_ids, state.copies) if state.copies > 1 else None
        outputs = state.reread(run, past, new, self._unended(input_ids, new), rows)
        if state.read is not None:
            state.read.text = input_ids
        self._reread = inputs["input_ids"], _last_of(outputs, new)
        return inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute a step; after a refresh, return what the full model gave."""
        outputs = self._taken(kwargs)
        return super().__call__(*args, **kwargs) if outputs is None else outputs

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The compiled step, which a refresh is not part of."""
        compiled = super().get_compiled_call(*args, **kwargs)

        def call(**inputs: Any) -> Any:
            outputs = self._taken(inputs)
            return compiled(**inputs) if outputs is None else outputs

        return call

    def _taken(self, inputs: dict[str, Any]) -> Any:
        """What the full model gave for just these inputs, once; or None."""
        reread, self._reread = self._reread, None
        return reread[1] if reread is not None and inputs.get("input_ids") is reread[0] else None

    def _unended(self, text: Tensor, new: int) -> Tensor | None:
        """Mask of the last `new` tokens, without those that fill up sequences that have ended."""
        if self._ends is None or self._ends.lengths is None:
            return None
        places = torch.arange(text.shape[1] - new, text.shape[1], device=text.device)
        mask = places < self._ends.lengths[:, None]
        return None if bool(mask.all()) else mask

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        state = self._griffin
        # A draft's tokens are read by the model that checks them.
        self._drafts = bool(generation_config.is_assistant)
        if generation_config.num_beams > 1 and state.selector.scope == "sequence":
            raise ValueError(
                "a beam search cannot refresh a selection for each sequence, since beams go on "
                "from each other: make the twin with scope='shared', or without refresh."
            )
        past: Any = model_kwargs.get("past_key_values")
        if past is not None:
            refuse_unknown(past)
        text = input_ids  # as generate goes on from it
        read = None if self._drafts else state.reader.known(past, len(input_ids))
        if read is not None and read.bookmark is not None:
            added = int(past.get_seq_length()) - read.end
            whole = is_whole(input_ids, generation_config, model_kwargs.get("attention_mask"))
            if added and not whole:
                # What the twin wrote in the turn before is read with the new tokens.
                _refuse_cut(model_kwargs, input_ids.shape[1])
                assert read.added is not None
                input_ids = torch.cat((read.added[:, :added].to(input_ids), input_ids), dim=1)
            back: AbstractContextManager[None] = self._going_back(read, read.bookmark, past)
        else:
            back = nullcontext()
        with back:
            outputs = super()._prefill(
                input_ids, generation_config, model_kwargs, is_first_iteration
            )
        if state.read is not None and not self._drafts:
            state.read.text = text
        return outputs

    @contextmanager
    def _going_back(self, read: Read, bookmark: Bookmark, past: Any) -> Iterator[None]:
        """Take the cache back; if the prompt cannot be read then, it keeps what the twin wrote."""
        reader = self._griffin.reader
        try:
            with bookmark.going_back(past):
                reader.seal(read)
                yield
        except BaseException:
            if reader.into(past) is read:  # nothing of the prompt was read
                reader.seal(read)
            raise

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kwargs["generation_config"].is_assistant:
            self._ends = kwargs["stopping_criteria"] = _Ends(kwargs["stopping_criteria"])
        return super()._sample(input_ids, *args, **kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        self._ends = None  # beams that are written on have not ended
        try:
            return super()._beam_search(*args, **kwargs)
        finally:  # which beams the cache holds in the end is not known here
            if self._griffin.read is not None:
                self._griffin.reader.forget(self._griffin.read)


class _Ends(StoppingCriteriaList):
    """The same criteria, and where they ended each sequence.

    Attributes
    ----------
    lengths : Tensor of int64, shape (sequence,), or None
        Tokens of each sequence when it ended; more than there can be if it has not.
    """

    lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = torch.full_like(done, torch.iinfo(torch.int64).max, dtype=torch.int64)
        here = torch.full_like(self.lengths, input_ids.shape[1])
        self.lengths = torch.where(done, torch.minimum(self.lengths, here), self.lengths)
        return done


def _refuse_cut(inputs: dict[str, Any], new: int) -> None:
    """Refuse inputs of the new tokens alone, where the full model reads earlier ones again."""
    for name in ("position_ids", "token_type_ids"):
        given = inputs.get(name)
        if isinstance(given, Tensor) and given.shape[-1] == new:
            raise ValueError(
                f"{name} is of the new tokens alone, and the full model also reads again what was "
                f"generated before: give the whole conversation and its {name}, or leave {name} "
                "out."
            )


def _last_of(outputs: Any, tokens: int) -> Any:
    """Outputs whose hidden states and attentions are of the last token, as in any other step."""
    for name, dim in (("hidden_states", 1), ("attentions", 2)):
        layers = getattr(outputs, name, None)
        if isinstance(layers, tuple) and all(
            isinstance(x, Tensor) and x.ndim > dim and x.shape[dim] == tokens for x in layers
        ):
            outputs[name] = tuple(x.narrow(dim, tokens - 1, 1) for x in layers)
    return outputs


def _origins(read: Read, text: Tensor, copies: int) -> Tensor:
    """Which sequence that was read each row of `text` continues: one of the same beam search.

    Rows that were the same text then have the same statistic: any of them will do.
    """
    assert read.text is not None
    width = read.text.shape[1]  # 0 where all of the prompt was embeddings
    before = read.text.view(len(text) // copies, copies, width)
    now = text[:, :width].reshape(before.shape)
    same = (now[:, :, None] == before[:, None]).all(dim=-1)  # (prompt, row, row before)
    if not bool(same.any(dim=-1).all()):
        raise RuntimeError("a beam does not continue any beam that was read before.")
    first = torch.arange(len(before), device=text.device)[:, None] * copies
    return (same.int().argmax(dim=-1) + first).flatten()
