"""What models are asked: the lm-evaluation-harness's tasks, from a hub or from local files.

A task of the harness is asked as the harness defines it, wherever its documents come from. Tasks
that it does not define, or not so that items are scored one by one, are defined here: summaries of
XSum and CNN/DailyMail, questions about papers (QASPER), and the losses of articles of WikiText.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from flocking.evaluation.definitions import (
    DEFINITIONS,
    THEIR_FIELDS,
    Definition,
    their_document,
)
from flocking.texts import read_text, why_no_file

PROMPT_LENGTHS = (16, 64, 256, 1024)
CONTINUATION_LENGTHS = (64, 256)
_DEEPEST = 20  # lists and objects within each other, in a field of a document
# News articles are shorter than those of WikiText.
_ARTICLES = {"wikitext": PROMPT_LENGTHS, "news": (16, 64, 256)}
_OF_LENGTH = {
    f"{name}_{length}": (name, length) for name, lengths in _ARTICLES.items() for length in lengths
}
ARTICLE_TASKS = (*_ARTICLES, *_OF_LENGTH)


@dataclass(frozen=True)
class Articles:
    """Texts whose last tokens are predicted from the tokens before them.

    Attributes
    ----------
    texts : list of str
    prompt_length : int
        Tokens before those that are predicted, which are the same for every prompt length.
    lengths : tuple of int
        All prompt lengths that the same tokens are predicted after, ascending.
    """

    texts: list[str]
    prompt_length: int
    lengths: tuple[int, ...] = PROMPT_LENGTHS

    @property
    def longest(self) -> int:
        """The longest of the prompt lengths."""
        return self.lengths[-1]

    @property
    def shortest(self) -> int:
        """The shortest of the prompt lengths."""
        return self.lengths[0]


def find(
    names: Iterable[str], data_dir: Path | None = None, authors: bool = False
) -> dict[str, Task | Articles]:
    """Find tasks by their names, with their documents.

    Parameters
    ----------
    names : iterable of str
        Of ``DEFINITIONS``; ``wikitext``, which stands for ``wikitext_16`` to ``wikitext_1024``,
        by the tokens of the prompt, and ``news``, for ``news_16`` to ``news_256``, of the articles
        of CNN/DailyMail; without `data_dir` also any task, group or tag of the harness's.
    data_dir : Path, optional
        Folder of JSON lines in UTF-8, a file a task, such as ``piqa.jsonl`` or
        ``piqa_valid.jsonl``; WikiText is plain text, and news are those of
        ``cnn_dailymail.jsonl``. By default, documents come from the hub.
    authors : bool
        As GRIFFIN's authors ask: summaries after an example, and likelihoods.

    Returns
    -------
    dict of str to lm_eval.api.task.Task or Articles

    Raises
    ------
    ValueError
        For an unknown name, if there is no hub and no file, if a line of a file is not as
        expected, or for a task that GRIFFIN's authors do not ask.
    """
    found: dict[str, Task | Articles] = {}
    for name in names:
        if name in ARTICLE_TASKS:
            kind = _OF_LENGTH[name][0] if name in _OF_LENGTH else name
            texts, lengths = _texts_of(kind, data_dir), _ARTICLES[kind]
            found |= {
                key: Articles(texts, length, lengths)
                for key, (family, length) in _OF_LENGTH.items()
                if name in (key, family)
            }
        elif data_dir is not None:
            found[name] = _local(name, data_dir, authors)
        else:
            found |= _of_hub(name, authors)
    if authors:
        for name, task in found.items():
            _refuse_not_theirs(name, task)
    return found


def _refuse_not_theirs(name: str, task: Task | Articles) -> None:
    """Refuse what GRIFFIN's authors do not ask."""
    theirs = not isinstance(task, Articles) and task.OUTPUT_TYPE == "multiple_choice"
    if not theirs and not (name in DEFINITIONS and DEFINITIONS[name].authors):
        names = ", ".join(key for key, each in DEFINITIONS.items() if each.authors)
        raise ValueError(
            f"the authors' protocol does not say how {name} is asked: it is for {names}, and for "
            "tasks with choices."
        )


def _of_hub(name: str, authors: bool) -> Mapping[str, Task]:
    definition = DEFINITIONS.get(name)
    if definition is not None and definition.own and not definition.hub:
        raise ValueError(f"{name} has no documents on a hub: give --data-dir, a folder with them.")
    with quiet():
        if definition is None and name not in _manager().all_tasks:
            raise ValueError(_unknown(name, [*DEFINITIONS, *ARTICLE_TASKS, *_manager().all_tasks]))
        try:
            if definition is not None and definition.own:
                config = {"task": name, **definition.own, **definition.hub}
                if authors and definition.authors:
                    split = (
                        "validation" if "validation_split" in config else config["fewshot_split"]
                    )
                    config |= definition.authors | {"fewshot_split": split}
                return {name: ConfigurableTask(config=config)}
            return _manager().load([name])["tasks"]
        except (OSError, ImportError, RuntimeError) as problem:
            raise ValueError(_unreachable(name, problem)) from problem


@functools.cache
def _manager() -> TaskManager:
    return TaskManager()  # seconds: it looks through all of the harness's files


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5) or list(DEFINITIONS)
    return f"there is no task {name!r}: near ones are {', '.join(dict.fromkeys(near))}."


def _unreachable(name: str, problem: Exception) -> str:
    (why, *_) = str(problem).splitlines() or [type(problem).__name__]
    return (
        f"cannot read the documents of {name} from the hub ({why}): connect to it, or give "
        "--data-dir, a folder with them as JSON lines."
    )


def _local(name: str, data_dir: Path, authors: bool = False) -> Task:
    if name not in DEFINITIONS:
        raise ValueError(f"{_unknown(name, [*DEFINITIONS, *ARTICLE_TASKS])[:-1]}, in local files.")
    definition = DEFINITIONS[name]
    path = _file(data_dir, name, "jsonl")
    documents = read(path, definition, authors)
    if definition.of_harness:
        folder = Path(lm_eval.tasks.__file__).parent
        config = load_yaml(folder / definition.of_harness, resolve_func=True)
    else:
        config = definition.own
    if authors:
        config = config | definition.authors
        written = ["prompt" in document for document in documents]
        if any(written) and not all(written):
            raise ValueError(
                f"{path}: item {written.index(not written[0])} has another form than the first "
                "one: give all prompts, as the authors do, or all texts to make them of."
            )
        if all(written):  # with its example
            config |= {"doc_to_text": lambda doc: doc["prompt"], "num_fewshot": 0}
    shots = config.get("num_fewshot") or 0
    if len(documents) <= shots:
        raise ValueError(
            f"{name} shows {shots} other items before each: expected at least {shots + 1} items, "
            f"got {len(documents)}."
        )
    everything = _table(documents, path)
    config = {
        **{key: value for key, value in config.items() if key not in ("tag", "group")},
        "task": name,
        "custom_dataset": lambda **metadata: {"test": everything},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "test" if shots else None,
        **definition.local,
    }
    with quiet():
        return ConfigurableTask(config=config)


def _table(documents: list[dict], path: Path) -> datasets.Dataset:
    """Documents as the harness takes them; all of a field need to be of one form."""
    try:
        return datasets.Dataset.from_list(documents)
    except (ValueError, TypeError, OverflowError, NotImplementedError) as problem:  # pyarrow's
        (why, *_) = str(problem).splitlines() or [type(problem).__name__]
        raise ValueError(f"{path}: the items do not have one form ({why}).") from problem


def read(path: Path, definition: Definition, authors: bool = False) -> list[dict]:
    """Documents of a file of JSON lines; errors name the file, line and field.

    With `authors`, the file may also be one that GRIFFIN's authors made, of whole prompts.
    """
    documents = []
    # (Not by splitlines, to which characters within a text may be ends of lines.)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        theirs = authors and bool(definition.authors) and "summary_gt" in row
        fields = THEIR_FIELDS if theirs else definition.fields
        for name, kind in fields.items():
            if name not in row:
                expected = ", ".join(fields)
                raise ValueError(f"{where}: the field {name!r} is missing (expected {expected}).")
            if not isinstance(row[name], kind):
                got = type(row[name]).__name__
                raise ValueError(f"{where}: field {name!r}: expected {kind.__name__}, got {got}.")
            if why := _unusable(row[name], _DEEPEST):
                raise ValueError(f"{where}: field {name!r}: {why}.")
        try:
            own = {key: row[key] for key in fields}
            documents.append(their_document(own) if theirs else definition.document(own))
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}.") from problem
    if not documents:
        raise ValueError(f"{path} is empty: write one item on each line.")
    return documents


def _parsed(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError(f"{where}: there are too many brackets within brackets.") from None
    except ValueError as problem:  # not only JSON's own: also for numbers of thousands of digits
        raise ValueError(f"{where}: not JSON ({problem}).") from problem
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, such as {{...}}.")
    return row


def _unusable(value: object, deepest: int) -> str | None:
    """Why a value cannot be kept in a table of documents; None if it can."""
    if isinstance(value, str):
        # Half of a pair, as JSON may write it, is no character.
        lone = any("\ud800" <= character <= "\udfff" for character in value)
        return "a character is incomplete (a lone surrogate)" if lone else None
    if isinstance(value, int):
        return None if abs(value) < 2**63 else "a whole number is too large (64 bits)"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is not a number to compute with"
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list):
        return None
    if value and not deepest:
        return f"it is nested more than {_DEEPEST} deep"
    return next(filter(None, (_unusable(part, deepest - 1) for part in value)), None)


def _file(data_dir: Path, name: str, suffix: str) -> Path:
    if not os.path.isdir(data_dir):
        why = why_no_file(data_dir) or "is a file"
        raise ValueError(f"--data-dir {data_dir}: this folder {why}.")
    named = re.compile(rf"{name}([^a-zA-Z].*)?\.{suffix}")
    there = [path for path in sorted(data_dir.iterdir()) if named.fullmatch(path.name)]
    if len(there) != 1:
        names = ", ".join(path.name for path in there) or "none"
        raise ValueError(
            f"{data_dir}: expected one file {name}.{suffix} or {name}_*.{suffix}, got {names}."
        )
    return there[0]


def _texts_of(kind: str, data_dir: Path | None) -> list[str]:
    """The articles of "wikitext" or of "news"."""
    if kind == "wikitext":
        return _wikitext(data_dir)
    name = "cnn_dailymail"
    task = _of_hub(name, False)[name] if data_dir is None else _local(name, data_dir)
    return [document["article"] for document in task.eval_docs]


def _wikitext(data_dir: Path | None) -> list[str]:
    """WikiText's articles: a line with one equals sign on either side opens each."""
    if data_dir is not None:
        path = _file(data_dir, "wikitext", "txt")
        where, text = str(path), read_text(path)
    else:
        try:
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        except (OSError, RuntimeError) as problem:
            raise ValueError(_unreachable("wikitext", problem)) from problem
        where, text = "WikiText on the hub", "".join(rows["text"])
    starts = [match.start() for match in re.finditer(r"^ ?= [^=\n]+ = *$", text, re.MULTILINE)]
    if not starts:
        raise ValueError(f"{where} has no article: a line such as ' = Title = ' opens each.")
    return [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness's warnings about what is intended here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
