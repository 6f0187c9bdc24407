"""Summaries as GRIFFIN's authors ask for them, so that numbers can be held against theirs.

This is what the program does that Dong, Chen and Chi published with their paper (2024, arXiv
2404.01365). An example stands before each article. The model writes 128 tokens, sampled at
temperature 0.3 from the whole vocabulary, or with "authors-greedy" the likeliest ones. Prompts have
no opening token but those of Gemma; those that leave no room for 128 tokens are skipped; batches
have one prompt. What is written is cut at ``###``, and where there is none, loses its last
character. It is scored by the package ``rouge``. Neurons are selected from all tokens of the
prompt, the first among them.

Three things differ. They set the seed once, and here it is set before each item, so that a run that
was interrupted gives what it would have given. A text without words, at which their program
ends, has a score of 0. And XSum's prompts are theirs in their file alone (``data_dir``): there one
example, worded in another way, stands before all articles, and from a hub one is drawn for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from flocking.evaluation.blocks import Block
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.protocols import END, NEW_TOKENS, SAMPLING, SEED, rouge_scorer
from flocking.models import private_randomness
from flocking.pruning import SharedPrompts

METRICS = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}


def check_room(lm: GriffinLM, blocks: Sequence[Block]) -> int:
    """How many items are skipped since they leave no room for a summary.

    Raises
    ------
    ValueError
        If they all do, or one has no prompt.
    """
    lengths = [len(_tokens(lm, one.args[0])) for block in blocks for one in block.requests]
    name = blocks[0].question.name
    if 0 in lengths:
        raise ValueError(
            f"{name}, item {lengths.index(0)}: the prompt has no token that neurons could be "
            "selected from: leave the item out."
        )
    skipped = sum(not _fits(lm, length) for length in lengths)
    if skipped == len(lengths):
        raise ValueError(
            f"{name}: the model's context of {lm.max_length} tokens has no room "
            f"for a prompt, the shortest of which has {min(lengths)}, and {NEW_TOKENS} new tokens: "
            "take a model with a longer context."
        )
    return skipped


def summaries(
    lm: GriffinLM, block: Block, models: Sequence[PreTrainedModel]
) -> list[list[dict[str, Any]]]:
    """Scores of a block's summaries, of each model."""
    rows: list[list[dict[str, Any]]] = [[] for _ in models]
    greedy = block.question.protocol == "authors-greedy"
    for item, request in zip(block.items, block.requests, strict=True):
        ids = _tokens(lm, request.args[0])
        if not _fits(lm, len(ids)):
            continue
        at = block.items.index(item)
        document, following = block.documents[at : at + 2]
        for own, text in zip(rows, _written(lm, models, ids, greedy), strict=True):
            found = _scores(text, document["summary"])
            by_chance = _scores(text, following["summary"])
            if following is document:  # there is one alone
                by_chance = dict.fromkeys(METRICS, float("nan"))
            own += [
                {
                    "metric": metric,
                    "item": item,
                    "value": found[metric],
                    "chance": by_chance[metric],
                    "prompt_tokens": len(ids),
                    "left_out": 0,
                    "scored": 0,
                    "pruned": 0,
                }
                for metric in METRICS
            ]
    return rows


def opens(model: PreTrainedModel) -> bool:
    """Whether prompts begin with the tokenizer's opening token."""
    return str(model.config.model_type).startswith("gemma")


def _tokens(lm: GriffinLM, prompt: str) -> list[int]:
    ids = lm.tokenizer(prompt, add_special_tokens=opens(lm.full), verbose=False)["input_ids"]
    return list(ids)


def _fits(lm: GriffinLM, length: int) -> bool:
    return length <= lm.max_length - NEW_TOKENS


def _written(
    lm: GriffinLM, models: Sequence[PreTrainedModel], ids: list[int], greedy: bool
) -> Iterator[str]:
    """What each model writes after a prompt."""
    prompt = torch.tensor([ids], device=lm.device)
    mask = torch.ones_like(prompt)
    how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, **SAMPLING}
    shared = SharedPrompts(models, prompt, mask)
    for model in models:
        options = shared.cache_for(model)
        with private_randomness(model, SEED):
            sequences = model.generate(  # type: ignore[operator] # typed apart from models
                input_ids=prompt,
                attention_mask=mask,
                max_length=len(ids) + NEW_TOKENS,
                pad_token_id=lm.tokenizer.pad_token_id,
                **how,
                **options,
            )
        text = lm.tokenizer.decode(sequences[0, len(ids) :])
        yield text[: text.find(END)]  # (which is -1 where there is none)


def _scores(text: str, reference: str) -> dict[str, float]:
    """F-measures by the package ``rouge``; 0 of a text without words, which it refuses."""
    try:
        scores = rouge_scorer().get_scores(text, reference)[0]
    except ValueError:
        return dict.fromkeys(METRICS, 0.0)
    return {metric: float(scores[name]["f"]) for metric, name in METRICS.items()}
