"""Asking a model a block of items: what comes out, item by item, and what chance would give."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from transformers import PreTrainedModel

from flocking.evaluation.articles import article_losses
from flocking.evaluation.authors import summaries
from flocking.evaluation.blocks import Block
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.tasks import Articles, quiet

Row = dict[str, Any]
Asked = list[list[Row]]  # of each model
_NUMBERS = (bool, int, float, np.number, np.bool_)


def ask(lm: GriffinLM, block: Block, models: Sequence[PreTrainedModel], texts: int = 1) -> Asked:
    """Scores of a block's items under several models, which share the runs of their prompts.

    Parameters
    ----------
    lm : GriffinLM
        Which has the tokenizer and the full model.
    block : Block
    models : sequence of transformers.PreTrainedModel
        The full model or twins of it. Of articles, the full model is run in any case.
    texts : int
        How many prompts are run together because they share a selection.

    Returns
    -------
    list of list of dict
        Of each model, a dict for each item and metric.
    """
    if isinstance(block.question.task, Articles):
        return _articles(lm, block, block.question.task, models)
    if block.question.authors and block.question.generates:
        return summaries(lm, block, models)
    lm.protocol = block.question.of_likelihoods
    found = []
    with lm.together(models):
        for model in models:
            lm.answer_with(model)
            # What the first is asked is computed for all: it alone has something to show.
            silent = model is not models[0]
            found.append(_answers(lm, block, block.question.task, texts, silent))
    return found


def _articles(
    lm: GriffinLM, block: Block, articles: Articles, models: Sequence[PreTrainedModel]
) -> Asked:
    everyone = [lm.full, *(model for model in models if model is not lm.full)]
    by_model: dict[int, list[Row]] = {id(model): [] for model in models}
    for item, row in zip(block.items, block.rows, strict=True):
        for model, found in article_losses(everyone, row, articles.prompt_length):
            by_model.get(id(model), []).extend(
                {
                    "item": item,
                    "chance": np.nan,
                    "prompt_tokens": articles.prompt_length,
                    "left_out": 0,
                    **values,
                }
                for values in found
            )
    return [by_model[id(model)] for model in models]


def _answers(lm: GriffinLM, block: Block, task: Task, texts: int, silent: bool) -> list[Row]:
    """Scores of a task's items, by the harness's own definitions."""
    lm.answered.clear()
    requests = _answered(lm, block.requests, texts, silent)
    totals = {"prompt": "max", "left_out": "max", "scored": "sum", "pruned": "sum"}
    taken = pd.DataFrame(lm.answered).groupby("item").agg(totals)
    return [
        {
            "metric": metric,
            "item": item,
            "value": value,
            "chance": chance,
            "prompt_tokens": taken.loc[item].prompt,
            "left_out": taken.loc[item].left_out,
            "scored": taken.loc[item].scored,
            "pruned": taken.loc[item].pruned,
        }
        for item, metric, value, chance in _scored(task, block, requests)
    ]


def _answered(
    lm: GriffinLM, requests: Sequence[Instance], texts: int, silent: bool
) -> list[Instance]:
    """The requests with a model's answers, filtered as the task has it."""
    answered = [copy.copy(one) for one in requests]
    for one in answered:
        one.resps, one.filtered_resps = [], {}
    by_type: dict[str, list[Instance]] = defaultdict(list)
    for one in answered:
        by_type[one.request_type] += [one] * (one.repeats or 1)
    with quiet():
        for kind, group in by_type.items():
            for together in _batches(lm, group, texts):
                answers = getattr(lm, kind)(together, disable_tqdm=silent)
                for one, answer in zip(together, answers, strict=True):
                    one.resps.append(answer)
    return answered


def _batches(lm: GriffinLM, group: list[Instance], texts: int) -> Iterator[list[Instance]]:
    """All at once, but where texts share a selection: those are as they follow each other."""
    if texts == 1:
        yield group
        return
    before, lm.batch_size_per_gpu = lm.batch_size_per_gpu, texts
    try:
        for start in range(0, len(group), texts):
            yield group[start : start + texts]
    finally:
        lm.batch_size_per_gpu = before


def _scored(
    task: Task, block: Block, requests: list[Instance]
) -> Iterator[tuple[int, str, float, float]]:
    """Item, metric, value and chance, of all metrics that are means over items."""
    part = copy.copy(task)
    part._instances = requests
    part.apply_filters()
    by_item = defaultdict(list)
    for one in sorted(requests, key=lambda one: one.idx):
        by_item[one.doc_id].append(one)
    found = []
    for how in requests[0].filtered_resps:
        for item, document, following in zip(
            block.items, block.documents, block.documents[1:], strict=False
        ):
            answers = [one.filtered_resps[how] for one in by_item[item]]
            chances = _chances(task, document, following, answers)
            # (To the harness the likeliest of answers is the first one if it is not a number.)
            unknown = any(_is_nan(answer) for answer in answers)
            for metric, value in task.process_results(document, list(answers)).items():
                if isinstance(value, _NUMBERS):
                    score = np.nan if unknown else float(value)
                    found.append((item, how, metric, score, chances.get(metric, np.nan)))
    # (Some tasks say only with their first results how their metrics are put together.)
    known = task.aggregation()
    for item, how, metric, value, chance in found:
        if known.get(metric, mean) is mean:  # as the harness does with what it does not know
            yield item, metric if how == "none" else f"{metric},{how}", value, chance


def _is_nan(answer: Any) -> bool:
    """Whether a likelihood, alone or with whether it is the highest, is not a number."""
    first = answer[0] if isinstance(answer, tuple) else answer
    return isinstance(first, float) and np.isnan(first)


def left_out(task: Task) -> list[str]:
    """Metrics of a task that are no means over items."""
    return sorted(metric for metric, how in task.aggregation().items() if how is not mean)


def _chances(task: Task, document: Any, following: Any, answers: list[Any]) -> dict[str, float]:
    """What an item's metrics would be by chance; `following` is the document after it."""
    if task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results):
        gold = task.doc_to_target(document)
        right = len(gold) if isinstance(gold, list) else 1
        chance = right / len(task.doc_to_choice(document))
        return {metric: chance for metric in task.aggregation() if metric.startswith("acc")}
    if task.OUTPUT_TYPE == "generate_until" and following is not document:
        # The answer to this item, scored as if it were one to the next.
        found = task.process_results(following, list(answers))
        return {metric: float(x) for metric, x in found.items() if isinstance(x, _NUMBERS)}
    return {}
