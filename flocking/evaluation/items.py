"""Asking a model the items of a task: what comes out, item by item, and what chance would give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lm_eval
import numpy as np
import pandas as pd
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.tasks import CONTINUATION_LENGTHS, PROMPT_LENGTHS, Articles, quiet
from flocking.pruning import perplexity


def ask(
    lm: GriffinLM, name: str, task: Task, limit: int | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Scores of a task's items, by the harness's own evaluation.

    Parameters
    ----------
    lm : GriffinLM
    name : str
        The task's.
    task : lm_eval.api.task.Task
    limit : int, optional
        How many items, the first ones.
    say : callable
        Takes a line for metrics that are left out, and one for prompts that are too long.

    Returns
    -------
    list of dict
        One for each item and metric.

    Raises
    ------
    ValueError
        If no metric is a mean over items.
    """
    lm.answered.clear()
    with quiet():
        samples = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),  # there is none to look for
        )["samples"][task.config.task]
    totals = {"prompt": "max", "left_out": "max", "scored": "sum", "pruned": "sum"}
    taken = pd.DataFrame(lm.answered).groupby("item").agg(totals)
    averaged = {metric for metric, how in task.aggregation().items() if how is mean}
    by_filter = defaultdict(list)
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    rows, odd = [], set()
    for how, group in by_filter.items():
        for sample, later in zip(group, [*group[1:], group[0]], strict=True):
            took = taken.loc[sample["doc_id"]]
            chances = _chances(task, sample, later)
            for metric in sample["metrics"]:
                value = sample[metric]
                if metric not in averaged or not isinstance(value, bool | int | float | np.number):
                    odd.add(metric)
                    continue
                rows.append(
                    {
                        "metric": metric if how == "none" else f"{metric},{how}",
                        "item": sample["doc_id"],
                        "value": float(value),
                        "chance": chances.get(metric, np.nan),
                        "prompt_tokens": took.prompt,
                        "left_out": took.left_out,
                        "scored": took.scored,
                        "pruned": took.pruned,
                    }
                )
    if not rows:
        raise ValueError(
            f"{name} has no metric that is a mean over items ({', '.join(sorted(odd))}), so that "
            "methods cannot be compared item by item: run it with flocking lm-eval."
        )
    if odd:
        say(f"{name}: left out {', '.join(sorted(odd))}, which are not means over items.")
    if cut := int((taken["left_out"] > 0).sum()):
        say(f"{name}: {cut} of {len(taken)} items are too long, and lost their beginning.")
    return rows


def _chances(task: Task, sample: dict[str, Any], later: dict[str, Any]) -> dict[str, float]:
    """What a sample's metrics would be by chance; `later` is the next sample."""
    if task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results):
        gold = task.doc_to_target(sample["doc"])
        right = len(gold) if isinstance(gold, list) else 1
        chance = right / len(task.doc_to_choice(sample["doc"]))
        return {metric: chance for metric in sample["metrics"] if metric.startswith("acc")}
    if task.OUTPUT_TYPE == "generate_until" and later is not sample:
        # The answer to this item, scored as if it were one to the next.
        found = task.process_results(later["doc"], sample["filtered_resps"])
        return {m: float(x) for m, x in found.items() if isinstance(x, int | float | np.number)}
    return {}


def long_articles(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int | None
) -> list[tuple[int, list[int]]]:
    """The articles that are scored: their numbers in `texts`, and as many tokens as are read."""
    needed = max(PROMPT_LENGTHS) + max(CONTINUATION_LENGTHS)
    # (The length is cut here: a warning about it would be wrong.)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return [(number, row[:needed]) for number, row in enumerate(ids) if len(row) >= needed][:limit]


def article_losses(lm: GriffinLM, articles: Articles, limit: int | None) -> list[dict[str, Any]]:
    """Losses of the same tokens of each article, whatever the prompt before them.

    Parameters
    ----------
    lm : GriffinLM
    articles : Articles
        Those that are too short for the longest prompt are left out.
    limit : int, optional
        How many articles, the first ones.

    Returns
    -------
    list of dict
        One for each article and number of predicted tokens, with the mean loss in nats a token.

    Raises
    ------
    ValueError
        If no article is long enough, or the model's context is too short.
    """
    length, most = articles.prompt_length, max(PROMPT_LENGTHS)
    farthest = max(CONTINUATION_LENGTHS)
    if lm.max_length < length + farthest:
        raise ValueError(
            f"wikitext_{length} needs {length + farthest} tokens, and the model's context has "
            f"{lm.max_length}: ask for shorter prompts, such as wikitext_{PROMPT_LENGTHS[0]}."
        )
    # A token that opens every text, where the tokenizer has one, counts as one of the prompt.
    tokenizer = lm.tokenizer
    opening = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    ids = [row for _, row in long_articles(tokenizer, articles.texts, limit)]
    if not ids:
        raise ValueError(f"wikitext: no article has {most + farthest} tokens: give longer ones.")
    losses = -perplexity(
        lm.model,
        [[*opening, *row[most - length + len(opening) :]] for row in ids],
        prompt_length=length,
        continuation_length=farthest,
        tokenizer=tokenizer,
        batch_size=1,
        progress=False,
    ).log_likelihood
    return [
        {
            "metric": f"loss_{horizon}",
            "item": item,
            "value": float(losses[item, :horizon].mean()),
            "chance": np.nan,
            "prompt_tokens": length,
            "left_out": 0,
            "scored": horizon,
            "pruned": 0 if lm.method == "full" else horizon - 1,
        }
        for horizon in CONTINUATION_LENGTHS
        for item in range(len(ids))
    ]
