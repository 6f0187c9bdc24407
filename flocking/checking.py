"""What the test suite asks of models, asked of a user's model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import select, statistic
from flocking.feedforward import FeedForward, feedforwards, observe
from flocking.models import (
    device_of,
    embeddings_of,
    forcing,
    forward,
    private_randomness,
    relative_error,
    require_model,
    require_tokenizer,
    tolerance,
    undisturbed,
    vocabulary_of,
)
from flocking.pruning import griffin
from flocking.recording import record
from flocking.texts import passages

_LENGTHS = (24, 17, 9)  # tokens of the texts that are tried


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> pd.DataFrame:
    """Check that recordings and pruned twins of `model` are right.

    The checks are those that the test suite makes on every architecture: the FF blocks compute
    what is recorded of them, watching changes no output, a text in a batch gives what it gives
    alone, a twin keeps the neurons that the analysis selects, and it computes what the full model
    does with all other neurons masked.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is not changed.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        To check on real text; without it, on random tokens.

    Returns
    -------
    pandas.DataFrame
        A row for each check, by its name: ``passed`` (NA where the check does not apply),
        ``error``, the largest relative error, ``allowed``, what rounding explains in the model's
        dtype, and ``reason``, why it failed or does not apply.

    Raises
    ------
    TypeError
        If `model` is not a transformers model, or `tokenizer` no tokenizer.

    Examples
    --------
    >>> table = flocking.check(model, tokenizer)
    >>> table[["passed", "error"]]
                 passed  error
    check
    proof          True  ...
    watching       True  ...
    batch          True  ...
    selection      True  ...
    density 1      True  ...
    density 0.5    True  ...
    >>> bool(table.passed.all())
    True
    """
    model = require_model(model)
    tokenizer = require_tokenizer(tokenizer)
    rows: dict[str, dict[str, object]] = {}
    allowed = math.nan
    texts: list[list[int]] = []
    for name, (attempt, generates) in _CHECKS.items():
        row = rows[name] = {"passed": False, "error": math.nan, "allowed": allowed, "reason": ""}
        try:
            if generates and (problem := _cannot_generate(model)):
                row |= {"passed": None, "reason": problem}
                continue
            texts = texts or _texts(model, tokenizer)
            with undisturbed(model, seed=0):
                error = row["error"] = attempt(model, texts)
            allowed = row["allowed"] = tolerance(feedforwards(model)[0].weight.dtype)
            row["passed"] = bool(error <= allowed)
            if not row["passed"]:
                row["reason"] = "the error is more than rounding explains"
        except Exception as problem:  # a model may fail in any way: that is the result
            row["reason"] = str(problem).strip() or type(problem).__name__
            if name == "proof":  # nothing else can be tried without blocks
                break
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("check")
    return table.astype({"passed": "boolean"})


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Token ids of a few short texts of different lengths."""
    if tokenizer is not None:
        some = passages()[: len(_LENGTHS)]
        return [tokenizer(t)["input_ids"][:n] for t, n in zip(some, _LENGTHS, strict=True)]
    vocabulary = vocabulary_of(model)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocabulary, (n,), generator=generator, device="cpu").tolist()
        for n in _LENGTHS
    ]


def _device(model: PreTrainedModel) -> torch.device:
    return device_of(embeddings_of(model))


def _cannot_generate(model: PreTrainedModel) -> str:
    """Why this model cannot have a twin; empty if it can."""
    try:
        griffin(model)
    except ValueError as problem:
        return str(problem)
    return ""


def _proof(model: PreTrainedModel, texts: list[list[int]]) -> float:
    """The FF blocks compute what is recorded of them."""
    return max(block.error for block in feedforwards(model))


def _watched(model: PreTrainedModel, texts: list[list[int]]) -> float:
    """Outputs are the same before, while and after the model is watched."""
    ids = torch.tensor(texts[:1], device=_device(model))

    def run() -> torch.Tensor:
        return forward(model, ids, torch.ones_like(ids))[0]

    plain = run()
    with observe(model, lambda block, z: None):
        watched = run()
    return max(relative_error(other, plain) for other in (watched, run()))


def _batch(model: PreTrainedModel, texts: list[list[int]]) -> float:
    """A text recorded in a batch gives what it gives alone."""
    together = statistic(record(model, texts, batch_size=len(texts), window=8, progress=False))
    error = 0.0
    for number, text in enumerate(texts):
        alone = statistic(record(model, text, window=8, progress=False)).isel(sequence=0)
        difference = np.abs(together.isel(sequence=number) - alone)
        error = max(error, float(difference.max() / alone.max()))
    return error


def _selection(model: PreTrainedModel, texts: list[list[int]]) -> float:
    """A twin keeps the neurons that the analysis selects: the share for which they differ."""
    ids = torch.tensor(texts[:1], device=_device(model))
    generated = _generate(model, texts[0]).logits[0]
    if relative_error(generated, model(ids).logits[:, -1]) > tolerance(generated.dtype):
        raise ValueError(
            "transformers' generate runs this model differently from a plain forward pass (with "
            "other positions, say), so a twin does not keep the neurons that a recording selects"
        )
    twin = griffin(model)
    _generate(twin, texts[0])
    analysed = statistic(record(model, texts[0], window=None, progress=False)).isel(sequence=0)
    blocks = feedforwards(model)
    together = analysed.copy()  # the runs of a block share one selection
    for place, block in enumerate(blocks):
        runs = [row for row, other in enumerate(blocks) if other.down is block.down]
        together[place] = np.sqrt(np.square(analysed.to_numpy()[runs]).sum(axis=0))
    selected = select(together).to_numpy()
    different = 0
    for place, block in enumerate(blocks):
        mine = np.zeros(block.d_ff, bool)
        mine[twin.selection[block.layer].numpy()] = True
        moved = (mine != selected[place][: block.d_ff]).reshape(block.experts, -1)
        # In a mixture's expert that no token reached, the twin selects by the weights.
        reached = analysed.to_numpy()[place][: block.d_ff].reshape(block.experts, -1).any(axis=1)
        different += int(moved[reached].sum())
    return different / selected.size


def _pruned(density: float) -> Callable[[PreTrainedModel, list[list[int]]], float]:
    """A twin computes what the full model does with all other neurons masked."""

    def attempt(model: PreTrainedModel, texts: list[list[int]]) -> float:
        twin = griffin(model, density)
        got = _generate(twin, texts[0])
        keep = {
            block: torch.zeros(block.d_ff, dtype=block.weight.dtype, device=block.device)
            for block in feedforwards(model)
        }
        for block, mask in keep.items():
            mask[twin.selection[block.layer].to(mask.device)] = 1

        def pruned(block: FeedForward, z: torch.Tensor) -> torch.Tensor | None:
            """Mask single tokens, but not the prompt, which comes in one pass."""
            return z * keep[block] if z.shape[:-1].numel() == 1 else None

        with observe(model, pruned):
            expected = _generate(model, texts[0], forced=got.sequences)
        return relative_error(got.logits, expected.logits)

    return attempt


class _Generated(NamedTuple):
    """Token ids, prompt included, and the logits of each new token."""

    sequences: torch.Tensor
    logits: tuple[torch.Tensor, ...]


def _generate(
    model: PreTrainedModel, text: list[int], forced: torch.Tensor | None = None
) -> _Generated:
    """Generate a few tokens greedily, or those that `forced` has."""
    ids = torch.tensor([text], device=_device(model))
    with private_randomness(model, 0):  # for models that draw random numbers
        output = cast(Any, model).generate(  # PreTrainedModel does not declare it
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            logits_processor=[] if forced is None else [forcing(forced)],
            return_dict_in_generate=True,
            output_logits=True,
        )
    return _Generated(output.sequences, output.logits)


# By name: the check, and whether it needs a model that generates.
_CHECKS: dict[str, tuple[Callable[[PreTrainedModel, list[list[int]]], float], bool]] = {
    "proof": (_proof, False),
    "watching": (_watched, False),
    "batch": (_batch, False),
    "selection": (_selection, True),
    "density 1": (_pruned(1.0), True),
    "density 0.5": (_pruned(0.5), True),
}
