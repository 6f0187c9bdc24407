"""Likelihoods of continuations after contexts, under several models at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flocking.pruning import Protocol, are_pruned, branches, cut_of, full_model, refresh_of

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # what was said, context, later


class Asked(NamedTuple):
    """A continuation whose likelihood is asked for.

    Attributes
    ----------
    tokens : list of int
        Of the context and the continuation, as far as they fit.
    scored : int
        How many of them, the last ones, are the continuation.
    cut : int
        How many of them, the first ones, are run in full.
    left_out : int
        Tokens of the context's beginning that do not fit.
    """

    tokens: list[int]
    scored: int
    cut: int
    left_out: int

    def pruned(self, model: PreTrainedModel) -> int:
        """How many of the scored tokens a model computes with kept neurons alone."""
        if full_model(model) is model:
            return 0
        fed = len(self.tokens) - 1
        places = np.arange(fed - self.scored, fed)
        return int(are_pruned(places, self.cut, refresh_of(model)).sum())


def asked_of(
    requests: Sequence[Request],
    max_length: int,
    protocol: Protocol,
    named: Callable[[int], str] = lambda number: "",
) -> list[Asked]:
    """What requests ask for, as it is run.

    Parameters
    ----------
    requests : sequence of (object, list of int, list of int)
        As the harness makes them: the last two are the tokens of a context and its continuation.
    max_length : int
        How many tokens are fed at most; the last one of a continuation is not.
    protocol : {"context", "last-token"}
        As in :func:`flocking.score`.
    named : callable
        The name of a request, by its number, that errors begin with.

    Raises
    ------
    ValueError
        For a continuation without a token, or that leaves no room for a context.
    """
    longest = max_length + 1
    asked = []
    for number, (_, context, later) in enumerate(requests):
        tokens = (context + later)[-longest:]
        try:
            if not 0 < len(later) < len(tokens):
                raise ValueError(
                    f"a continuation of {len(later)} tokens cannot be scored: give one token or "
                    f"more, and fewer than the {longest} that fit."
                )
            cut = cut_of(protocol, len(tokens) - len(later), len(tokens))
        except ValueError as problem:
            raise ValueError(f"{named(number)}{problem}") from problem
        left_out = len(context) + len(later) - len(tokens)
        asked.append(Asked(tokens, len(later), cut, left_out))
    return asked


def heads(asked: Sequence[Asked]) -> list[list[int]]:
    """The numbers of those that have the same beginning, the longest beginning first."""

    def head(number: int) -> list[int]:
        return asked[number].tokens[: asked[number].cut]

    # (The longest first, so that what does not fit fails at once.)
    order = sorted(range(len(asked)), key=lambda n: (-asked[n].cut, head(n)))
    return [list(group) for _, group in groupby(order, key=head)]


def likelihoods(
    models: Sequence[PreTrainedModel], asked: Sequence[Asked], batch_size: int, silent: bool = False
) -> list[list[tuple[float, bool]]]:
    """Of each model, the log-likelihood of each continuation, and whether it is the likeliest.

    Each beginning is run once, for all models and all continuations that it has.

    Parameters
    ----------
    models : sequence of transformers.PreTrainedModel
        The full model and twins of it.
    asked : sequence of Asked
    batch_size : int
        How many continuations of one beginning are run together.
    silent : bool
        Show no progress.
    """
    answers: list[dict[int, tuple[float, bool]]] = [{} for _ in models]
    with tqdm(total=len(asked), desc="likelihoods", disable=silent) as bar:
        for numbers in heads(asked):
            found = branches(
                models,
                [torch.tensor(asked[number].tokens, device="cpu") for number in numbers],
                [asked[number].scored for number in numbers],
                asked[numbers[0]].cut,
                batch_size,
            )
            for own, (_, likely) in zip(answers, found, strict=True):
                for number, (values, greedy) in zip(numbers, likely, strict=True):
                    own[number] = float(values.double().sum()), bool(greedy.all())
            bar.update(len(numbers))
    return [[own[number] for number in range(len(asked))] for own in answers]
