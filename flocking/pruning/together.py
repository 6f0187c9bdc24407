"""Several models, a model and its twins, over one text: they share one run of its beginning."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from flocking.models import batches, forget_lengths, require_model
from flocking.pruning.parts import beginning, of_next_tokens, rest
from flocking.pruning.prompt import Read
from flocking.pruning.twin import Twin, full_model, refresh_of, serving, what_was_read


def side_by_side(
    models: Iterable[PreTrainedModel], ids: Tensor, cut: int
) -> Iterator[tuple[PreTrainedModel, Tensor]]:
    """Log-likelihoods of one text under several models, which share one run of its beginning.

    Parameters
    ----------
    models : iterable of transformers.PreTrainedModel
        Twins of one model, and that model itself. They are used one after the other: a generator's
        twins need not be in memory at the same time.
    ids : Tensor of int64, shape (sequence, token)
        Without padding.
    cut : int
        Tokens of the beginning, which is run in full, and from which twins select.

    Yields
    ------
    transformers.PreTrainedModel, Tensor of float32, shape (sequence, token - 1)
        Each model, a twin with its selection, and the log-likelihoods of every token but the
        first, in nats.
    """
    for model, first, later in _continued_by(models, ids, cut):
        parts = of_next_tokens(first, ids, 0), of_next_tokens(later, ids, cut)
        yield model, torch.cat(parts, dim=1)


def logits_side_by_side(
    models: Iterable[PreTrainedModel], ids: Tensor, cut: int
) -> Iterator[tuple[PreTrainedModel, Tensor]]:
    """Logits that predict the tokens from `cut` on; parameters are those of :func:`side_by_side`.

    Yields
    ------
    transformers.PreTrainedModel, Tensor, shape (sequence, token - cut, vocabulary)
        Each model and its logits, the first of which are the beginning's last.
    """
    for model, first, later in _continued_by(models, ids, cut):
        own = [later] if later.shape[1] else []
        yield model, torch.cat([first[:, -1:], *own], dim=1)


def _continued_by(
    models: Iterable[PreTrainedModel], ids: Tensor, cut: int
) -> Iterator[tuple[PreTrainedModel, Tensor, Tensor]]:
    """Each model, the logits of the beginning, and the model's own of what follows."""
    everyone, leader = _led(models)
    if leader is None:
        return
    logits, past = beginning(leader, ids, cut)
    read, held = what_was_read(leader), _held(leader)
    for model in everyone:
        copied = copy.deepcopy(past)
        if model is not leader or _held(model) is not held:  # (between models, anything may run)
            _go_on_from(model, read, copied)
        yield model, logits, rest(model, ids, cut, copied)


def _led(
    models: Iterable[PreTrainedModel],
) -> tuple[Iterator[PreTrainedModel], PreTrainedModel | None]:
    """The models, and the one that reads the beginning for all: a twin, unless there is none.

    (A twin notes what neurons are selected from.) It is the first or the second.
    """
    remaining = map(require_model, models)
    first = list(itertools.islice(remaining, 1))
    if first and not isinstance(first[0], Twin):
        first += itertools.islice(remaining, 1)
    return itertools.chain(first, remaining), first[-1] if first else None


def _held(model: PreTrainedModel) -> Read | None:
    """What a twin's selection was made from, the very object; None for other models."""
    return model._griffin.read if isinstance(model, Twin) else None


def _go_on_from(model: PreTrainedModel, read: Read | None, cache: Any) -> None:
    """Let a twin select from what was read into a cache; nothing for other models."""
    if isinstance(model, Twin):
        model.warn_of_changes()
        model._griffin.adopt(read, cache)


def branches(
    models: Iterable[PreTrainedModel],
    sequences: list[Tensor],
    scored: list[int],
    cut: int,
    size: int = 1,
) -> Iterator[tuple[PreTrainedModel, list[tuple[Tensor, Tensor]]]]:
    """Likelihoods of several sequences with the same beginning, which is run once for all models.

    Parameters
    ----------
    models : iterable of transformers.PreTrainedModel
        As of :func:`side_by_side`.
    sequences : list of Tensor of int64, shape (token,)
        With the same first `cut` tokens.
    scored : list of int
        How many of each sequence's last tokens to score.
    cut : int
        Tokens of the beginning, which is run in full, and from which twins select.
    size : int
        How many continue together in one forward pass, padded on the right, if the model allows.
        (One, for a twin that refreshes its selection within the longest.)

    Yields
    ------
    transformers.PreTrainedModel, list of (Tensor of float32, Tensor of bool), shapes (scored,)
        Each model, and of each sequence the log-likelihoods in nats, and which tokens are the
        likeliest.
    """
    everyone, leader = _led(models)
    if leader is None:
        return
    first, past = beginning(leader, sequences[0][None, :cut], cut)
    read, held = what_was_read(leader), _held(leader)
    longest = max(map(len, sequences)) - 1 - cut  # tokens that are fed after the beginning
    for model in everyone:
        every = refresh_of(model)
        refreshes = every is not None and longest >= every
        if (model is not leader or _held(model) is not held) and not refreshes:
            _go_on_from(model, read, copy.deepcopy(past))
        found: list[Any] = [None] * len(sequences)
        together = 1 if refreshes else size
        for group in batches(full_model(model), list(map(len, sequences)), together):
            rows = pad_sequence([sequences[number] for number in group], batch_first=True)
            copied = copy.deepcopy(past)
            if refreshes:  # each continuation has changed the selection
                _go_on_from(model, read, copied)
            if len(group) > 1:  # as beams that all come from the first
                beams = torch.zeros(len(group), dtype=torch.int64, device=first.device)
                copied.reorder_cache(beams)
            later = rest(model, rows, cut, copied)
            for row, number in enumerate(group):
                # (Of the beginning's, as many as can be among those that are scored.)
                start = max(0, cut - scored[number])
                logits = first[0, start:]
                logits = torch.cat([logits, later[row]]) if later.shape[1] else logits
                found[number] = _of_last(logits, sequences[number][start:], scored[number])
        yield model, found


def _of_last(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of a sequence's last tokens, and which are the likeliest."""
    end = len(tokens) - 1
    tokens = tokens[-count:].to(logits.device)
    logits = logits[end - count : end].float()
    likelihood = logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    return likelihood, logits.argmax(dim=-1) == tokens


class SharedPrompts:
    """Prompts of a batch that the full model has read, but for their last tokens, once for all.

    Each model then generates from a copy of the cache: its prompt is a second turn of one token,
    which the full model reads as well, so that twins select from all of it.

    Parameters
    ----------
    models : sequence of transformers.PreTrainedModel
        Twins of one model, and that model itself.
    ids, mask : Tensor of int64, shape (sequence, token)
        As ``generate`` takes them, padded on the left.
    """

    def __init__(self, models: Sequence[PreTrainedModel], ids: Tensor, mask: Tensor) -> None:
        _, leader = _led(models)
        self._past = self._read = None
        before = mask[:, :-1]
        shared = len(models) > 1 and bool((before.sum(dim=1) > 0).all())
        if shared and isinstance(leader, Twin):
            forget_lengths(leader._griffin.full)
            outputs = leader.generate(
                input_ids=ids[:, :-1],
                attention_mask=before,
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,  # nothing is padded, but generate would say that it has none
                return_dict_in_generate=True,
            )
            self._past, self._read = outputs.past_key_values, what_was_read(leader)

    def cache_for(self, model: PreTrainedModel) -> dict[str, Any]:
        """Arguments of ``generate`` with which a model goes on from what was read.

        Empty if nothing was: for a single model, or prompts of one token.
        """
        for each in {model, full_model(model)}:
            forget_lengths(each)
        if self._past is None:
            return {}
        copied = copy.deepcopy(self._past)
        with serving(model):  # at whose end a twin knows the cache as its own
            _go_on_from(model, self._read, copied)
        return {"past_key_values": copied}
