"""Likelihoods of given text, under a model or under its twin."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import (
    Prompts,
    Text,
    batches,
    continued_inputs,
    device_of,
    embeddings_of,
    refuse_forgetful,
    refuse_long,
    require_model,
    tokenize,
    undisturbed,
    unwrap,
    with_inputs,
)
from flocking.pruning.twin import (
    Twin,
    full_model,
    read_prompt,
    refresh_of,
    serving,
    what_was_read,
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
    elif not isinstance(continuation, Mapping | Tensor) and any(
        isinstance(x, str) for x in continuation
    ):
        raise TypeError("continuation is a list of strings: give one string, or token ids.")
    prompt_ids = prompts.ids[0].tolist()
    later = _one("continuation", model, continuation)
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
        parts = _of_next_tokens(first, ids, 0), _of_next_tokens(later, ids, cut)
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


_Inputs = Mapping[str, Tensor]  # (sequence, token, ...), by name


def _log_likelihoods(
    model: PreTrainedModel, ids: Tensor, cut: int, inputs: _Inputs | None = None
) -> Tensor:
    """Of every token but the first, float32 (sequence, token - 1); `ids` has no padding.

    In two passes, the first over `cut` tokens: a twin's is the full model's, and neurons are
    selected from it. A model alone is run in the same way, so that the two can be compared.
    """
    model = require_model(model)
    with serving(model):
        head, past = beginning(model, ids, cut, inputs)
        later = rest(model, ids, cut, past, inputs)
    return torch.cat([_of_next_tokens(head, ids, 0), _of_next_tokens(later, ids, cut)], dim=1)


def beginning(
    model: PreTrainedModel, ids: Tensor, cut: int, inputs: _Inputs | None = None
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
    model: PreTrainedModel, ids: Tensor, cut: int, past: Any, inputs: _Inputs | None = None
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
    model: PreTrainedModel, ids: Tensor, tokens: slice, past: Any, inputs: _Inputs | None
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


def _of_next_tokens(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """Log-likelihoods of the tokens that follow those of `logits`, which begin at `start`."""
    tokens = ids[:, start + 1 : start + 1 + logits.shape[1], None].to(logits.device)
    return logits[:, : tokens.shape[1]].float().log_softmax(dim=-1).gather(-1, tokens)[..., 0]
