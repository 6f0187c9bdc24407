"""What a smaller model loses on texts, against the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import bounds
from flocking.models import (
    Prompts,
    Text,
    device_of,
    embeddings_of,
    require_model,
    special_tokens_around,
    tokenize,
    undisturbed,
)
from flocking.pruning.halves import piece_length
from flocking.pruning.predictions import compare_predictions
from flocking.pruning.twin import Twin

_RESAMPLES = 2000
_FEWEST = 3  # texts, for an interval


@dataclass(frozen=True)
class Lost:
    """What a smaller model loses on texts that it was not made from.

    Attributes
    ----------
    texts, tokens : int
        How many texts were read, and how many tokens in them were predicted.
    perplexity, pruned_perplexity : float
        Of the model and of the smaller one, over all tokens.
    ratio_low, ratio_high : float
        95% interval of ``pruned_perplexity / perplexity``, from texts drawn anew; NaN with fewer
        than three texts.
    agreement : float
        Share of tokens where both models find the same next token the likeliest.
    divergence : float
        Mean over tokens of ``KL(model || smaller model)``, the Kullback-Leibler divergence between
        their next-token distributions, in nats.
    """

    texts: int
    tokens: int
    perplexity: float
    pruned_perplexity: float
    ratio_low: float
    ratio_high: float
    agreement: float
    divergence: float

    @property
    def ratio(self) -> float:
        """How many times the model's perplexity the smaller one's is."""
        return self.pruned_perplexity / self.perplexity


def measure_lost(
    full: PreTrainedModel,
    pruned: PreTrainedModel,
    texts: Text,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> Lost:
    """Read texts with a model and with a smaller one, and compare what they predict.

    Parameters
    ----------
    full, pruned : transformers.PreTrainedModel
        With the same vocabulary. No twin, which would need a prompt: see
        :func:`flocking.perplexity`.
    texts : str, list of str or list of list of int
        Read one at a time, so that no text depends on the others. Those of more than 512 tokens,
        or than fit the models, are read in pieces of so many, each with the special tokens that
        the tokenizer puts around a text.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    Lost

    Raises
    ------
    TypeError, ValueError
        As :func:`flocking.record`, for texts that are none; if one of the models is a twin, or
        no text has two tokens.
    """
    for model in (full, pruned):
        require_model(model)
        if isinstance(model, Twin):
            raise ValueError("a twin reads prompts: compare it with flocking.perplexity.")
    prompts = tokenize(full, texts, tokenizer)
    around = special_tokens_around(prompts.tokenizer)
    length = min(piece_length(model, around) for model in (full, pruned))
    usable = [number for number, ids in enumerate(prompts.ids) if len(ids) > 1]
    if not usable:
        raise ValueError(
            "no text has two tokens, the second of which could be predicted: give longer ones."
        )
    read = []
    for number in tqdm(usable, desc="comparing", unit="text", disable=not progress):
        sums = np.zeros(len(_Sums._fields))
        for ids, inputs in _pieces(prompts, number, length, around):
            # (The smaller model first: its errors come before a long pass.)
            theirs = _logits(pruned, ids, inputs)
            sums += _compared(_logits(full, ids, inputs), theirs, ids)
        read.append(_Sums(*sums))
    return _summed(read)


def _pieces(
    prompts: Prompts, number: int, length: int, around: tuple[list[int], list[int]]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Token ids of a text and what else is fed, (1, token), in pieces if it is long."""
    ids = prompts.ids[number]
    inputs = {name: rows[number] for name, rows in prompts.inputs.items()}
    before, after = (len(each) for each in around)
    whole = ids.tolist()
    is_opened = whole[:before] == around[0] and whole[len(whole) - after :] == around[1]
    if not is_opened or inputs:  # what is fed besides says nothing of other tokens around
        before = after = 0
    inner = ids[before : len(ids) - after]
    if len(inner) <= length:
        yield ids[None], {name: row[None] for name, row in inputs.items()}
        return
    for start in range(0, len(inner), length):
        part = slice(before + start, before + min(start + length, len(inner)))
        piece = torch.cat([ids[:before], ids[part], ids[len(ids) - after :]])
        if len(piece) > 1:
            yield piece[None], {name: row[part][None] for name, row in inputs.items()}


class _Sums(NamedTuple):
    """Of one text, over its predicted tokens."""

    tokens: float
    surprise: float  # of the model, in nats: minus the log-likelihood
    pruned_surprise: float
    agreeing: float
    divergence: float


def _logits(model: PreTrainedModel, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of all tokens but the last, (token - 1, vocabulary)."""
    device = device_of(embeddings_of(model))
    fed = {name: values.to(device) for name, values in inputs.items()}
    with undisturbed(model, seed=0):
        outputs = model(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            use_cache=False,
            **fed,
        )
    return outputs.logits[0, :-1]


def _compared(full: Tensor, pruned: Tensor, ids: Tensor) -> _Sums:
    """Compare logits of the same tokens, both (token, vocabulary)."""
    following = ids[0, 1:]
    ours, theirs = (compare_predictions(full, logits, following) for logits in (full, pruned))
    return _Sums(
        len(following),
        -float(ours.log_likelihood.sum()),
        -float(theirs.log_likelihood.sum()),
        float(theirs.agrees.sum()),
        float(theirs.divergence.sum()),
    )


def _summed(read: list[_Sums]) -> Lost:
    table = np.array(read, dtype=np.float64)  # (text, what)
    tokens, surprise, pruned_surprise, agreeing, divergence = table.sum(axis=0)
    low, high = _interval(table[:, 2] - table[:, 1], table[:, 0])
    return Lost(
        texts=len(read),
        tokens=int(tokens),
        perplexity=float(np.exp(surprise / tokens)),
        pruned_perplexity=float(np.exp(pruned_surprise / tokens)),
        ratio_low=low,
        ratio_high=high,
        agreement=float(agreeing / tokens),
        divergence=float(divergence / tokens),
    )


def _interval(more: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Interval of the ratio of perplexities, from what texts have more of, in nats, and tokens."""
    n = len(more)
    if n < _FEWEST:
        return float("nan"), float("nan")
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    drawn = (draws @ more) / (draws @ tokens)
    low, high = np.exp(bounds(more.sum() / tokens.sum(), drawn, n))
    return float(low), float(high)
