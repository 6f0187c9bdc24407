"""A static selection from a task's own documents: those beyond the ones that are scored.

It is the baseline that a selection from the prompt has to beat: it knows the kind of text, and
nothing of the item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from lm_eval.api.task import Task
from transformers import PreTrainedTokenizerBase

from flocking.evaluation.articles import long_articles
from flocking.evaluation.tasks import Articles
from flocking.evaluation.variants import OF_DOMAIN

MOST_TOKENS = 20_000  # read for one statistic, about as many as the packaged passages have
# Characters from which on a text in a document is taken to be its own. Documents that share one
# with a scored document are left out: another question about the same passage, say.
_TELLING = 40


def documents(
    name: str,
    task: Task | Articles,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    encode: Callable[[str], list[int]] | None = None,
) -> list[list[int]]:
    """Token ids of a task's documents beyond those scored, each as the question about it.

    Parameters
    ----------
    name : str
        The task's.
    task : lm_eval.api.task.Task or Articles
    limit : int, optional
        How many items are scored, the first ones.
    tokenizer : transformers.PreTrainedTokenizerBase
    longest : int
        Read at most this many tokens of each.
    encode : callable, optional
        Gives the token ids of a text, as prompts begin; by default as the tokenizer has it.

    Returns
    -------
    list of list of int
        Until they have ``MOST_TOKENS`` together: those of other splits, then the last of the split
        that is scored, from its end, so that they are the same when more items are scored.

    Raises
    ------
    ValueError
        If there are none.
    """
    if isinstance(task, Articles):
        texts = _articles(task, limit, tokenizer)
    else:
        texts = _beyond(task, limit)
    found: list[list[int]] = []
    room = MOST_TOKENS
    for text in texts:
        # (The length is cut here: a warning about it would be wrong.)
        ids = tokenizer(text, verbose=False)["input_ids"] if encode is None else encode(text)
        ids = list(ids)[: min(longest, room)]
        if ids:
            found.append(ids)
            room -= len(ids)
        if room <= 0:
            break
    if not found:
        raise ValueError(_none_left(name))
    return found


def refuse_none_left(name: str, task: Task | Articles, limit: int | None) -> None:
    """Raise a ValueError if a task has no document beyond those scored, as far as it can be known.

    Which articles are long enough to be scored, only their tokens say: :func:`documents` does.
    """
    if not isinstance(task, Articles) and next(_beyond(task, limit), None) is None:
        raise ValueError(_none_left(name))


def _none_left(name: str) -> str:
    return (
        f"{', '.join(OF_DOMAIN)} needs documents of {name} beyond those that are scored, and "
        "there are none that share no text with those: give a smaller --limit, more documents, or "
        "static with --calibration."
    )


def _articles(
    task: Articles, limit: int | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    scored = {number for number, _ in long_articles(tokenizer, task, limit)}
    seen = {task.texts[number].strip() for number in scored}
    for number, text in reversed(list(enumerate(task.texts))):
        if number not in scored and text.strip() not in seen:
            yield text


def _beyond(task: Task, limit: int | None) -> Iterator[str]:
    """What the model is shown of documents that are not scored and share no text with those."""
    scored = list(task.eval_docs)[:limit]
    seen = {text for document in scored for text in _texts_in(document)}
    shown_before = {_shown(task, document) for document in scored}
    for document in _candidates(task, len(scored)):
        text = _shown(task, document)
        if text.strip() and text not in shown_before and seen.isdisjoint(_texts_in(document)):
            yield text


def _candidates(task: Task, scored: int) -> Iterable[Any]:
    """Documents of other splits, then the others that are scored without a limit."""
    splits = []
    if task.has_training_docs():
        splits.append(task.training_docs())
    if task.has_test_docs() and task.has_validation_docs():  # the former are scored
        splits.append(task.validation_docs())
    return chain(*splits, reversed(list(task.eval_docs)[scored:]))


def _shown(task: Task, document: Any) -> str:
    """The question as the task asks it; where that is no text, its choices."""
    asked = task.doc_to_text(document)
    if isinstance(asked, str):
        return asked
    return "\n".join(map(str, task.doc_to_choice(document)))


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of some length in a document, however deep."""
    if isinstance(value, str):
        if len(value.strip()) >= _TELLING:
            yield value.strip()
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts_in(part)
