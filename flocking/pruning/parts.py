"""A text in two parts: its beginning in full, and what follows by a model or its twin."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flocking.models import device_of, embeddings_of, forget_lengths, undisturbed
from flocking.pruning.twin import Twin, full_model, read_prompt, refresh_of

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


def beginning(
    model: PreTrainedModel, ids: Tensor, cut: int, inputs: Inputs | None = None
) -> tuple[Tensor, Any]:
    """Logits of the first `cut` tokens, run in full, and their cache; a twin then selects.

    `inputs` are what else is fed for each of `ids`, by name.
    """
    full = full_model(model)

    def run() -> Any:
        return _run(full, ids, slice(0, cut), None, inputs)

    forget_lengths(full)
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
