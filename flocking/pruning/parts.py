"""A text in two parts: its beginning in full, and what follows by a model or its twin."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from flocking.models import batches, device_of, embeddings_of, require_model, undisturbed
from flocking.pruning.twin import Twin, full_model, read_prompt, refresh_of, what_was_read

Inputs = Mapping[str, Tensor]  # (sequence, token, ...), by name


def are_pruned(places: np.ndarray, cut: int, refresh: int | None) -> np.ndarray:
    """Which of a sequence's tokens a twin computes pruned, bool.

    Parameters
    ----------
    places : ndarray of int64
        Places of tokens that are fed, from 0.
    cut : int
        How many are run in full before neurons are selected.
    refresh : int or None
        As of :func:`flocking.griffin`.
    """
    pruned = places >= cut
    return pruned if refresh is None else pruned & ((places - cut + 1) % refresh != 0)


def side_by_side(
    models: Iterable[PreTrainedModel], ids: Tensor, cut: int
) -> Iterator[tuple[PreTrainedModel, Tensor]]:
    """Log-likelihoods of one text under several models, which share one run of its beginning.

    Parameters
    ----------
    models : iterable of transformers.PreTrainedModel
        Twins of one model, and that model itself, but not as the first. They are used one after
        the other: a generator's twins need not be in memory at the same time.
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
    remaining = map(require_model, models)
    first = next(remaining, None)
    if first is None:
        return
    logits, past = beginning(first, ids, cut)
    read = what_was_read(first)
    for model in itertools.chain([first], remaining):
        copied = copy.deepcopy(past)
        if model is not first and isinstance(model, Twin):
            model._griffin.adopt(read, copied)
        yield model, logits, rest(model, ids, cut, copied)


def branches(
    model: PreTrainedModel, sequences: list[Tensor], scored: list[int], cut: int, size: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Likelihoods of several sequences with the same beginning, which is run once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model or a twin.
    sequences : list of Tensor of int64, shape (token,)
        With the same first `cut` tokens.
    scored : list of int
        How many of each sequence's last tokens to score.
    cut : int
        Tokens of the beginning, which is run in full, and from which a twin selects.
    size : int
        How many continue together in one forward pass, padded on the right, if the model allows.
        (One, for a twin that refreshes its selection.)

    Returns
    -------
    list of (Tensor of float32, Tensor of bool), shapes (scored,)
        Log-likelihoods in nats, and which tokens are the likeliest.
    """
    first, past = beginning(model, sequences[0][None, :cut], cut)
    refreshes = isinstance(model, Twin) and model._griffin.refresh is not None
    size, read = (1, what_was_read(model)) if refreshes else (size, None)
    found: list[Any] = [None] * len(sequences)
    for group in batches(full_model(model), list(map(len, sequences)), size):
        rows = pad_sequence([sequences[number] for number in group], batch_first=True)
        copied = copy.deepcopy(past)
        if isinstance(model, Twin) and refreshes:  # each continuation has changed the selection
            model._griffin.adopt(read, copied)
        if len(group) > 1:  # as beams that all come from the first
            beams = torch.zeros(len(group), dtype=torch.int64, device=first.device)
            copied.reorder_cache(beams)
        later = rest(model, rows, cut, copied)
        for row, number in enumerate(group):
            tokens = sequences[number][-scored[number] :].to(first.device)
            logits = torch.cat([first[0], later[row]]) if later.shape[1] else first[0]
            end = len(sequences[number]) - 1
            logits = logits[end - len(tokens) : end].float()
            likelihood = logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
            found[number] = likelihood, logits.argmax(dim=-1) == tokens
    return found


def beginning(
    model: PreTrainedModel, ids: Tensor, cut: int, inputs: Inputs | None = None
) -> tuple[Tensor, Any]:
    """Logits of the first `cut` tokens, run in full, and their cache; a twin then selects.

    `inputs` are what else is fed for each of `ids`, by name.
    """
    full = full_model(model)

    def run() -> Any:
        return _run(full, ids, slice(0, cut), None, inputs)

    with undisturbed(model, seed=0):
        outputs = read_prompt(model, run, len(ids), tokens=cut)
    return outputs.logits, outputs.past_key_values


def rest(
    model: PreTrainedModel, ids: Tensor, cut: int, past: Any, inputs: Inputs | None = None
) -> Tensor:
    """Logits of the tokens from `cut` to the second last; changes the cache `past`.

    A twin with ``refresh`` computes as many tokens as in generation before the full model reads
    them, whose logits replace those of the last one.
    """
    fed = ids.shape[1] - 1  # the last token predicts none of the text
    if cut == fed:
        return torch.zeros(len(ids), 0, 1, device=device_of(embeddings_of(model)))
    every = refresh_of(model) or fed
    logits = []
    with undisturbed(model, seed=0):
        for start in range(cut, fed, every):
            stop = min(start + every, fed)
            reread = isinstance(model, Twin) and refresh_of(model) == stop - start
            if stop - start > reread:
                logits.append(_run(model, ids, slice(start, stop - reread), past, inputs).logits)
            if isinstance(model, Twin):
                model._griffin.work.steps += stop - start - reread
            if isinstance(model, Twin) and reread:
                tokens = slice(start, stop)
                run = functools.partial(_run, model._griffin.full, ids, tokens, past, inputs)
                outputs = model._griffin.reread(run, past, stop - start)
                logits.append(outputs.logits[:, -1:])
    return torch.cat(logits, dim=1)


def _run(
    model: PreTrainedModel, ids: Tensor, tokens: slice, past: Any, inputs: Inputs | None
) -> Any:
    device = device_of(embeddings_of(model))
    ids = ids.to(device)
    return model(
        input_ids=ids[:, tokens],
        attention_mask=torch.ones_like(ids[:, : tokens.stop]),
        past_key_values=past,
        use_cache=True,
        **{name: values[:, tokens].to(device) for name, values in (inputs or {}).items()},
    )


def of_next_tokens(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """Log-likelihoods of the tokens that follow those of `logits`, which begin at `start`."""
    tokens = ids[:, start + 1 : start + 1 + logits.shape[1], None].to(logits.device)
    return logits[:, : tokens.shape[1]].float().log_softmax(dim=-1).gather(-1, tokens)[..., 0]
