"""Losses of articles: the same tokens of each, after prompts of several lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.evaluation.tasks import CONTINUATION_LENGTHS, Articles
from flocking.models import special_tokens_around
from flocking.pruning import (
    are_pruned,
    compare_predictions,
    full_model,
    logits_side_by_side,
    refresh_of,
    refuse_unscorable,
)


def long_articles(
    tokenizer: PreTrainedTokenizerBase, articles: Articles, limit: int | None
) -> list[tuple[int, list[int]]]:
    """The articles that are scored: their numbers, and as many tokens as are read of each.

    Those that are too short for the longest prompt are left out.
    """
    needed = articles.longest + max(CONTINUATION_LENGTHS)
    # (The length is cut here: a warning about it would be wrong.)
    found: list[tuple[int, list[int]]] = []
    for number, text in enumerate(articles.texts):
        if len(found) == limit:
            break
        row = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(row) >= needed:
            found.append((number, row[:needed]))
    return found


def article_rows(
    name: str,
    articles: Articles,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    max_length: int,
) -> list[list[int]]:
    """Token ids of each scored article: those of its prompt, then those that are predicted.

    Parameters
    ----------
    name : str
        The task's, for messages.
    articles : Articles
    tokenizer : transformers.PreTrainedTokenizerBase
    limit : int, optional
        How many articles, the first ones.
    max_length : int
        The model's context.

    Raises
    ------
    ValueError
        If no article is long enough, or the model's context is too short.
    """
    length, farthest = articles.prompt_length, max(CONTINUATION_LENGTHS)
    family = name.rpartition("_")[0]
    if max_length < length + farthest:
        raise ValueError(
            f"{name} needs {length + farthest} tokens, and the model's context has "
            f"{max_length}: ask for shorter prompts, such as {family}_{articles.shortest}."
        )
    # Tokens that open every text, where the tokenizer has some, count as ones of the prompt.
    opening, _ = special_tokens_around(tokenizer)
    rows = [row for _, row in long_articles(tokenizer, articles, limit)]
    if not rows:
        needed = articles.longest + farthest
        raise ValueError(f"{family}: no article has {needed} tokens: give longer ones.")
    return [[*opening, *row[articles.longest - length + len(opening) :]] for row in rows]


def article_losses(
    models: Sequence[PreTrainedModel], row: Sequence[int], prompt_length: int
) -> Iterator[tuple[PreTrainedModel, list[dict[str, Any]]]]:
    """What each model makes of one article, from the same run of its prompt.

    Parameters
    ----------
    models : sequence of transformers.PreTrainedModel
        The full model first, then its twins.
    row : list of int
        As of :func:`article_rows`.
    prompt_length : int
        How many of them are the prompt.

    Yields
    ------
    transformers.PreTrainedModel, list of dict
        Each model and its numbers, by ``metric``, over the first 64 and 256 predicted tokens:
        ``loss``, the mean loss in nats a token; ``divergence``, the mean Kullback-Leibler
        divergence from the full model's predictions in nats; ``agreement``, the share of tokens
        whose likeliest prediction is the full model's.
    """
    refuse_unscorable(models[0], [torch.tensor(row[:-1], device="cpu")])
    ids = torch.tensor([row], device="cpu")
    places = np.arange(prompt_length - 1, len(row) - 1)  # that the predictions are made at
    whole = None
    for model, logits in logits_side_by_side(models, ids, prompt_length):
        whole = logits[0] if whole is None else whole
        found = compare_predictions(whole, logits[0], ids[0, prompt_length:])
        pruned = are_pruned(places, prompt_length, refresh_of(model))
        is_full = full_model(model) is model
        yield (
            model,
            [
                {
                    "metric": f"{name}_{horizon}",
                    "value": float(values[:horizon].mean()),
                    "scored": horizon,
                    "pruned": 0 if is_full else int(pruned[:horizon].sum()),
                }
                for name, values in (
                    ("loss", -found.log_likelihood),
                    ("divergence", found.divergence),
                    ("agreement", found.agrees),
                )
                for horizon in CONTINUATION_LENGTHS
            ],
        )
