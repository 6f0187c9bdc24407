"""Likelihoods of given text, under a model or under its twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import (
    Prompts,
    Text,
    continued_inputs,
    refuse_forgetful,
    refuse_long,
    require_model,
    tokenize,
    unwrap,
    with_inputs,
)
from flocking.pruning.parts import Inputs, are_pruned, beginning, of_next_tokens, rest
from flocking.pruning.twin import (
    Twin,
    full_model,
    refresh_of,
    serving,
)
from flocking.recording import whole_number
from flocking.texts import check_string

Protocol = Literal["context", "last-token"]


def score(
    model: PreTrainedModel,
    prompt: str | Sequence[int] | Mapping[str, Any],
    continuation: str | Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    protocol: Protocol = "context",
) -> xr.DataArray:
    """Log-likelihood of each token of `continuation` after `prompt`.

    A twin selects neurons from the prompt, as in generation, and computes the continuation with
    those.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model, or a twin that :func:`flocking.griffin` made of it.
    prompt, continuation : str or list of int
        Text or token ids. Both are tokenised separately, the prompt with the tokenizer's special
        tokens and the continuation without. The prompt may also be a tokenizer's output: what
        the model takes for every token, such as ``token_type_ids``, goes on in the continuation
        as in generation.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    protocol : {"context", "last-token"}
        Which positions are pruned. "context": the prompt is run in full, and all tokens of the
        continuation are computed pruned, except for the first, whose logits are the prompt's last
        ones. "last-token": of the tokens that are fed, only the last one is computed pruned, with
        neurons selected from all before it. This changes the likelihood of the continuation's
        last token only, as in the classification tasks of Dong, Chen and Chi (2024, arXiv
        2404.01365, section 5.1).

    Returns
    -------
    xarray.DataArray, float64, (token,)
        In nats. Coordinates ``token_id``, and ``pruned``: which were computed pruned.

    Raises
    ------
    ValueError
        If prompt or continuation has no token, both together do not fit the model's context, or
        the protocol is unknown or leaves no token to select neurons from, or the model cannot
        go on from a cache.
    TypeError
        If prompt or continuation is neither text nor token ids, or `tokenizer` is no tokenizer.

    Examples
    --------
    >>> pruned = flocking.griffin(model, density=0.5)
    >>> likelihood = flocking.score(
    ...     pruned, "Birds of a feather", " flock together", tokenizer=tokenizer
    ... )
    >>> likelihood.dims
    ('token',)
    >>> likelihood.pruned.values.tolist()
    [False, True...]
    >>> float(likelihood.sum())
    -...
    """
    require_model(model)
    if protocol not in ("context", "last-token"):
        raise ValueError(f"protocol={protocol!r}: give 'context' or 'last-token'.")
    prompts = _one("prompt", model, prompt, tokenizer)
    if isinstance(continuation, str):
        if prompts.tokenizer is None:
            raise ValueError("continuation is text: give tokenizer as well, or token ids.")
        check_string(continuation, "continuation")
        continuation = prompts.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    elif isinstance(continuation, list | tuple) and any(isinstance(x, str) for x in continuation):
        raise TypeError("continuation is a list of strings: give one string, or token ids.")
    prompt_ids = prompts.ids[0].tolist()
    later = _one("continuation", model, continuation, prompts.tokenizer)
    if later.inputs:
        raise ValueError(
            f"continuation has {' and '.join(later.inputs)}: give its token ids alone; the "
            "prompt's go on."
        )
    later_ids = later.ids[0].tolist()
    # All is fed but the last token; `cut` of it in full, under a twin.
    fed = len(prompt_ids) + len(later_ids) - 1
    inputs = continued_inputs(prompts.inputs, [fed + 1])
    refuse_unscorable(model, [torch.tensor(prompt_ids + later_ids[:-1], device="cpu")], inputs)
    cut = cut_of(protocol, len(prompt_ids), fed + 1)
    values = _log_likelihoods(
        model,
        torch.tensor([prompt_ids + later_ids], device="cpu"),
        cut,
        {name: torch.stack(rows) for name, rows in inputs.items()},
    )
    first = len(prompt_ids) - 1
    pruned = are_pruned(np.arange(first, fed), cut, refresh_of(model))
    return xr.DataArray(
        values[0, first:].double().cpu().numpy(),
        {
            "token_id": ("token", later_ids),
            "pruned": ("token", pruned & isinstance(unwrap(model), Twin)),
        },
        ("token",),
        "log_likelihood",
        {"long_name": "log-likelihood", "units": "nat"},
    )


def perplexity(
    model: PreTrainedModel,
    texts: Text,
    *,
    prompt_length: int,
    continuation_length: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity of the tokens that follow the first `prompt_length` of each text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model, or a twin that :func:`flocking.griffin` made of it.
    texts : str, list of str or list of list of int
        Each of at least ``prompt_length + continuation_length`` tokens; the rest is left out.
    prompt_length, continuation_length : int
        In tokens.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    batch_size : int
        Texts in one forward pass. Under a twin with ``scope="shared"`` these texts share one
        selection, so the result depends on it: give 1 for a selection by each text.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        ``log_likelihood`` (sequence, distance), float64, in nats, by distance in tokens from the
        prompt's end (the first is the full model's, also under a twin), and ``perplexity``
        (sequence), ``exp(-mean(log_likelihood))``.

    Raises
    ------
    ValueError
        If a text is too short, a length is below 1, or the lengths do not fit the model's context.
    TypeError
        If `texts` has none of the forms that :func:`flocking.record` takes, or `tokenizer` is none.

    Examples
    --------
    >>> measured = flocking.perplexity(
    ...     flocking.griffin(model),
    ...     flocking.passages()[:2],
    ...     prompt_length=32,
    ...     continuation_length=16,
    ...     tokenizer=tokenizer,
    ...     batch_size=1,
    ...     progress=False,
    ... )
    >>> dict(measured.sizes)
    {'sequence': 2, 'distance': 16}
    >>> measured.perplexity.values
    array([..., ...])
    """
    require_model(model)
    whole_number("prompt_length", prompt_length, 1)
    whole_number("continuation_length", continuation_length, 1)
    whole_number("batch_size", batch_size, 1)
    prompts = tokenize(model, texts, tokenizer)
    length = prompt_length + continuation_length
    for number, row in enumerate(prompts.ids):
        if len(row) < length:
            raise ValueError(f"expected {length} tokens or more, got {len(row)} in text {number}.")
    prompts = prompts.cut(length)
    refuse_unscorable(model, [row[:-1] for row in prompts.ids], prompts.inputs)
    ids = torch.stack(prompts.ids)
    inputs = {name: torch.stack(rows) for name, rows in prompts.inputs.items()}
    values = []
    with tqdm(total=len(ids), desc="scoring", unit="text", disable=not progress) as bar:
        for start in range(0, len(ids), batch_size):
            rows = slice(start, start + batch_size)
            here = {name: each[rows] for name, each in inputs.items()}
            likelihood = _log_likelihoods(model, ids[rows], prompt_length, here)
            values.append(likelihood[:, prompt_length - 1 :])
            bar.update(len(likelihood))
    return _perplexity_of(torch.cat([part.double().cpu() for part in values]).numpy())


def _perplexity_of(likelihood: np.ndarray) -> xr.Dataset:
    """What :func:`perplexity` returns, from log-likelihoods (sequence, distance)."""
    return xr.Dataset(
        {
            "log_likelihood": (
                ("sequence", "distance"),
                likelihood,
                {"long_name": "log-likelihood", "units": "nat"},
            ),
            "perplexity": ("sequence", np.exp(-likelihood.mean(axis=1)), {"units": "1"}),
        },
        {
            "sequence": np.arange(len(likelihood)),
            "distance": ("distance", np.arange(likelihood.shape[1]), {"units": "tokens"}),
        },
    )


def _one(
    name: str,
    model: PreTrainedModel,
    text: Text,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prompts:
    """Tokens of one sequence; errors say which argument it was."""
    try:
        prompts = tokenize(model, text, tokenizer)
    except (TypeError, ValueError) as problem:
        kind = TypeError if isinstance(problem, TypeError) else ValueError
        raise kind(f"{name}: {problem}") from problem
    if len(prompts.ids) != 1:
        raise ValueError(f"{name} has {len(prompts.ids)} sequences: score one at a time.")
    return prompts


def cut_of(protocol: Protocol, prompt: int, length: int) -> int:
    """How many of a sequence's tokens are run in full; raises a ValueError if that is none.

    Parameters
    ----------
    protocol : {"context", "last-token"}
    prompt, length : int
        Tokens of the prompt, and of the sequence, of which all but the last are fed.
    """
    cut = prompt if protocol == "context" else length - 2
    if cut < 1:
        raise ValueError(
            f"protocol={protocol!r} needs a token before the last one that is fed, to select "
            "neurons from: give a prompt of two tokens or more."
        )
    return cut


def refuse_unscorable(
    model: PreTrainedModel,
    fed: list[Tensor],
    inputs: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Raise a ValueError for a text that does not fit, or a model that cannot go on."""
    model = require_model(model)
    refuse_long(model, fed)
    refuse_forgetful(full_model(model), pieces=True)
    if inputs and not with_inputs(full_model(model), inputs).causal:
        raise ValueError(
            f"with {' and '.join(inputs)}, later tokens matter to earlier ones in "
            f"{type(model).__name__}: give token ids alone."
        )


def _log_likelihoods(
    model: PreTrainedModel, ids: Tensor, cut: int, inputs: Inputs | None = None
) -> Tensor:
    """Of every token but the first, float32 (sequence, token - 1); `ids` has no padding.

    In two passes, the first over `cut` tokens: a twin's is the full model's, and neurons are
    selected from it. A model alone is run in the same way, so that the two can be compared.
    """
    model = require_model(model)
    with serving(model):
        head, past = beginning(model, ids, cut, inputs)
        later = rest(model, ids, cut, past, inputs)
    return torch.cat([of_next_tokens(head, ids, 0), of_next_tokens(later, ids, cut)], dim=1)
