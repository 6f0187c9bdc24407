"""Blocks of a task's items, which are asked together and kept together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from flocking.evaluation.articles import article_rows
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.plan import Question, definition_of, digest_of
from flocking.evaluation.tasks import Articles, quiet

_FEWSHOT_SEED = 1234  # the harness's own
# Items in a block: minutes of work, which is what an interruption loses.
_ITEMS = 40
_ITEMS_WRITTEN = 8  # where the model writes, or reads articles


@dataclass(frozen=True, eq=False)
class Block:
    """Some items of a task, one after the other.

    Attributes
    ----------
    question : Question
    items : range
        Their numbers in the task.
    requests : list of Instance
        The harness's, of all of these items; empty for articles.
    documents : list of dict
        Of these items, and of the one after them, whose answer gives a chance level.
    rows : list of list of int
        Token ids of each article; empty for other tasks.
    """

    question: Question
    items: range
    requests: Sequence[Instance] = ()
    documents: Sequence[Any] = field(default=(), repr=False)
    rows: Sequence[list[int]] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.question.name}, items {self.items.start} to {self.items.stop - 1}"

    def digest(self) -> str:
        """SHA-256 of what is asked, and of all that answers are scored by."""
        asked: list[Any]
        task = self.question.task
        if isinstance(task, Articles):
            asked = [list(self.rows), task.prompt_length]
        else:
            told = [[one.request_type, one.doc_id, one.idx, one.args] for one in self.requests]
            asked = [definition_of(task), told, list(self.documents)]
        # (The two protocols of the authors differ in what is written alone.)
        question = self.question
        protocol = question.protocol if question.generates else question.of_likelihoods
        return digest_of([asked, protocol, question.authors])


def block_size(question: Question, texts: int) -> int:
    """How many items a block has, if as many texts as this share a selection."""
    written = question.generates or isinstance(question.task, Articles)
    return texts * max(1, (_ITEMS_WRITTEN if written else _ITEMS) // texts)


def blocks_of(lm: GriffinLM, question: Question, size: int) -> list[Block]:
    """All items of a task, in blocks of this size.

    Raises
    ------
    ValueError
        As :func:`flocking.evaluation.articles.article_rows`.
    """
    task = question.task
    if isinstance(task, Articles):
        rows = article_rows(question.name, task, lm.tokenizer, question.limit, lm.max_length)
        return [
            Block(question, items, rows=[rows[item] for item in items])
            for items in _ranges(len(rows), size)
        ]
    requests = _requests(task, question.limit)
    documents = list(task.eval_docs)
    count = 1 + max(one.doc_id for one in requests)
    return [
        Block(
            question,
            items,
            [one for one in requests if one.doc_id in items],
            [documents[item % len(documents)] for item in (*items, items.stop)],
        )
        for items in _ranges(count, size)
    ]


def _ranges(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _requests(task: Task, limit: int | None) -> list[Instance]:
    """What the harness asks, with the examples that it shows before each item."""
    with quiet():
        task.set_fewshot_seed(_FEWSHOT_SEED)
        task.build_all_requests(limit=limit)
    return list(task.instances)
