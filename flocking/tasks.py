"""What models are asked: the lm-evaluation-harness's tasks, from a hub or from local files.

A task of the harness is asked as the harness defines it, wherever its documents come from. What
it has no definition of, or none that scores item by item, is defined here: summaries of XSum and
CNN/DailyMail, questions about papers (QASPER), and how well articles of WikiText are foretold.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.mlqa.utils import exact_match_score, f1_score
from rouge_score.rouge_scorer import RougeScorer

from flocking.texts import read_text

PROMPT_LENGTHS = (16, 64, 256, 1024)
CONTINUATION_LENGTHS = (64, 256)
_WIKITEXT = {f"wikitext_{length}": length for length in PROMPT_LENGTHS}


@dataclass(frozen=True)
class Articles:
    """Texts whose last tokens are foretold from the tokens before them.

    Attributes
    ----------
    texts : list of str
    prompt_length : int
        Tokens that stand before those that are foretold, which are the same for every length.
    """

    texts: list[str]
    prompt_length: int


@dataclass(frozen=True)
class _Definition:
    """How documents of a task look in a local file, and what is asked of them.

    Attributes
    ----------
    fields : dict of str to type
        Of each line's JSON object.
    document : callable
        From such an object to the document that the definition is about.
    of_harness : str
        The file in the harness that defines the task, or nothing if `own` does.
    own : dict
        The definition, in the harness's terms.
    hub : dict
        Where the documents are on a hub, and how they are asked there; of `own` only.
    local : dict
        What else changes for documents from a file.
    """

    fields: dict[str, type]
    document: Callable[[dict], dict] = dict
    of_harness: str = ""
    own: dict = field(default_factory=dict)
    hub: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)


def _one_of(choices: list, label: int) -> int:
    if not choices or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("choices should be texts, none of them empty")
    if not 0 <= label < len(choices):
        raise ValueError(f"label {label} is none of {len(choices)} choices")
    return label


def _hellaswag(row: dict) -> dict:
    gold = _one_of(row["choices"], row["label"])
    return {
        "query": row["context"],
        "choices": row["choices"],
        "gold": gold,
        "label": gold,
    }


def _piqa(row: dict) -> dict:
    label = _one_of(row["choices"], row["label"])
    one, other = _two(row["choices"])
    return {"goal": row["context"], "sol1": one, "sol2": other, "label": label}


def _arc(row: dict) -> dict:
    letters = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[_one_of(row["choices"], row["label"])],
    }


def _copa(row: dict) -> dict:
    label = _one_of(row["choices"], row["label"])
    one, other = _two(row["choices"])
    if row["question"] not in ("cause", "effect"):
        raise ValueError(f"question is {row['question']!r}, neither cause nor effect")
    return {
        "premise": row["premise"],
        "question": row["question"],
        "choice1": one,
        "choice2": other,
        "label": label,
    }


def _two(choices: list) -> list:
    if len(choices) != 2:
        raise ValueError(f"there are {len(choices)} choices where two are due")
    return choices


def _boolq(row: dict) -> dict:
    return {**row, "label": _one_of(["no", "yes"], int(row["label"]))}


def _qasper(row: dict) -> dict:
    return {**row, "answers": _texts("answers", row["answers"])}


def _texts(name: str, values: list) -> list[str]:
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} should be texts, one or more")
    return values


def _coqa(row: dict) -> dict:
    if len(_texts("questions", row["questions"])) != len(_texts("answers", row["answers"])):
        raise ValueError("as many answers as questions are due")
    return {
        "story": row["story"],
        "questions": row["questions"],
        "said": row["answers"][:-1],
        "answers": row["answers"][-1:],
    }


def _coqa_of_hub(doc: dict) -> dict:
    """The last question of a conversation, with all that people answered to it."""
    own = doc["answers"]["input_text"]
    others = [each["input_text"][-1] for each in (doc["additional_answers"] or {}).values()]
    return _coqa(
        {"story": doc["story"], "questions": doc["questions"]["input_text"], "answers": own}
    ) | {"answers": list({answer.lower(): answer for answer in [own[-1], *others]}.values())}


def _conversation(doc: dict) -> str:
    turns = [f"Q: {q}\n\nA: {a}\n\n" for q, a in zip(doc["questions"], doc["said"], strict=False)]
    return f"{doc['story']}\n\n{''.join(turns)}Q: {doc['questions'][-1]}\n\nA:"


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming (Lin 2004), by rouge-score."""
    scores = _rouge().score(reference, prediction)
    return {name: float(score.fmeasure) for name, score in scores.items()}


@functools.cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _asked(article: str, sentences: int) -> str:
    return f"###\nArticle: {article}\n\nSummarize the above article in {sentences} sentences.\n"


def _summary(doc: dict, results: list[str]) -> dict[str, float]:
    return rouge(results[0], doc["summary"])


def _answer(doc: dict, results: list[str]) -> dict[str, float]:
    """The best over the references, as in SQuAD (Rajpurkar et al. 2016, section 6.1)."""
    return _best(results[0], doc["answers"])


def _turn(doc: dict, results: list[str]) -> dict[str, float]:
    """As CoQA has it (Reddy, Chen and Manning 2019, section 6.1).

    The mean over what is left of the references without one, since people are scored so.
    """
    answer, due = results[0].strip().split("\n")[0], doc["answers"]
    left = [due[:n] + due[n + 1 :] for n in range(len(due))] if len(due) > 1 else [due]
    each = [_best(answer, some) for some in left]
    return {name: sum(best[name] for best in each) / len(each) for name in ("f1", "em")}


def _best(answer: str, references: list[str]) -> dict[str, float]:
    em = max(float(exact_match_score(answer, due, "en")) for due in references)
    # (Two answers without a word are the same, which this F1 does not see.)
    return {"f1": max(em, *(float(f1_score(answer, due, "en")) for due in references)), "em": em}


def _measured(*names: str) -> list[dict]:
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


_SUMMARY = {
    "output_type": "generate_until",
    "process_results": _summary,
    "doc_to_target": "{{summary}}",
    "metric_list": _measured("rouge1", "rouge2", "rougeL"),
}
_ANSWER = {
    "output_type": "generate_until",
    "doc_to_target": "{{answers[0]}}",
    "metric_list": _measured("f1", "em"),
}
_CHOICES = {"context": str, "choices": list, "label": int}

DEFINITIONS: dict[str, _Definition] = {
    "hellaswag": _Definition(
        _CHOICES,
        _hellaswag,
        "hellaswag/hellaswag.yaml",
        # (A function, since the harness takes a text of digits for the number of a choice.)
        local={"process_docs": None, "doc_to_text": lambda doc: doc["query"]},
    ),
    "piqa": _Definition(_CHOICES, _piqa, "piqa/piqa.yaml"),
    "copa": _Definition(
        {"premise": str, "question": str, "choices": list, "label": int},
        _copa,
        "super_glue/copa/default.yaml",
    ),
    "arc_easy": _Definition(
        {"question": str, "choices": list, "label": int}, _arc, "arc/arc_easy.yaml"
    ),
    "arc_challenge": _Definition(
        {"question": str, "choices": list, "label": int}, _arc, "arc/arc_challenge.yaml"
    ),
    "boolq": _Definition(
        {"passage": str, "question": str, "label": int}, _boolq, "super_glue/boolq/default.yaml"
    ),
    # As in the harness, whose own needs what newer versions of transformers do not have.
    "coqa": _Definition(
        {"story": str, "questions": list, "answers": list},
        _coqa,
        own={
            **_ANSWER,
            "doc_to_text": _conversation,
            "process_results": _turn,
            "generation_kwargs": {"until": ["\nQ:"], "max_gen_toks": 256, "do_sample": False},
        },
        hub={
            "dataset_path": "EleutherAI/coqa",
            "test_split": "validation",
            "process_docs": lambda docs: docs.map(_coqa_of_hub),
        },
    ),
    "gsm8k": _Definition({"question": str, "answer": str}, of_harness="gsm8k/gsm8k.yaml"),
    # Summaries are asked for in the words of the prompts that GRIFFIN's authors made for XSum.
    "xsum": _Definition(
        {"prompt": str, "reference": str},
        lambda row: {"prompt": row["prompt"], "summary": row["reference"]},
        own={
            **_SUMMARY,
            "doc_to_text": lambda doc: doc["prompt"].rstrip() + "\n",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n", "###"], "max_gen_toks": 64, "do_sample": False},
        },
        hub={
            "dataset_path": "EdinburghNLP/xsum",
            "training_split": "train",
            "test_split": "test",
            "fewshot_split": "train",
            "num_fewshot": 1,
            "doc_to_text": lambda doc: _asked(doc["document"], 1),
        },
    ),
    "cnn_dailymail": _Definition(
        {"article": str, "summary": str},
        own={
            **_SUMMARY,
            "doc_to_text": lambda doc: _asked(doc["article"], 3),
            "target_delimiter": "",
            "generation_kwargs": {"until": ["###"], "max_gen_toks": 128, "do_sample": False},
        },
        hub={
            "dataset_path": "abisee/cnn_dailymail",
            "dataset_name": "3.0.0",
            "test_split": "test",
            "process_docs": lambda docs: docs.rename_column("highlights", "summary"),
        },
    ),
    # As SCROLLS puts it, whose own task in the harness scores all answers together.
    "qasper": _Definition(
        {"article": str, "question": str, "answers": list},
        _qasper,
        own={
            **_ANSWER,
            "doc_to_text": "{{article}}\n\nQuestion: {{question}}\nAnswer:",
            "process_results": _answer,
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 128, "do_sample": False},
        },
        hub={
            "dataset_path": "Xnhyacinth/LongBench",
            "dataset_name": "qasper",
            "test_split": "test",
            "process_docs": lambda docs: docs.rename_column("context", "article"),
        },
    ),
}


def find(names: Iterable[str], data_dir: Path | None = None) -> dict[str, Task | Articles]:
    """Tasks by their names, ready to be asked.

    Parameters
    ----------
    names : iterable of str
        Of ``DEFINITIONS``; ``wikitext``, which stands for ``wikitext_16`` to ``wikitext_1024``,
        by the tokens of the prompt; without `data_dir` also any task, group or tag of the
        harness's.
    data_dir : Path, optional
        Folder of JSON lines in UTF-8, a file a task, such as ``piqa.jsonl`` or
        ``piqa_valid.jsonl``; WikiText is plain text. By default, documents come from the hub.

    Returns
    -------
    dict of str to lm_eval.api.task.Task or Articles

    Raises
    ------
    ValueError
        For an unknown name, if there is no hub and no file, or if a line of a file is not as due.
    """
    found: dict[str, Task | Articles] = {}
    for name in names:
        if name == "wikitext" or name in _WIKITEXT:
            wanted = _WIKITEXT if name == "wikitext" else {name: _WIKITEXT[name]}
            texts = _articles(data_dir)
            found |= {key: Articles(texts, length) for key, length in wanted.items()}
        elif data_dir is not None:
            found[name] = _local(name, data_dir)
        else:
            found |= _of_hub(name)
    return found


def _of_hub(name: str) -> Mapping[str, Task]:
    definition = DEFINITIONS.get(name)
    with quiet():
        if definition is None and name not in _manager().all_tasks:
            raise ValueError(_unknown(name, [*DEFINITIONS, "wikitext", *_manager().all_tasks]))
        try:
            if definition is not None and definition.own:
                config = {"task": name, **definition.own, **definition.hub}
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
        f"the documents of {name} cannot be had ({why}): connect to the hub, or give --data-dir, "
        "a folder with them as JSON lines."
    )


def _local(name: str, data_dir: Path) -> Task:
    if name not in DEFINITIONS:
        raise ValueError(f"{_unknown(name, [*DEFINITIONS, 'wikitext'])[:-1]}, in local files.")
    definition = DEFINITIONS[name]
    documents = read(_file(data_dir, name, "jsonl"), definition)
    if definition.of_harness:
        folder = Path(lm_eval.tasks.__file__).parent
        config = load_yaml(folder / definition.of_harness, resolve_func=True)
    else:
        config = definition.own
    shots = config.get("num_fewshot") or 0
    if len(documents) <= shots:
        raise ValueError(
            f"{name} shows {shots} other items before each: {len(documents)} are too few."
        )
    everything = datasets.Dataset.from_list(documents)
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


def read(path: Path, definition: _Definition) -> list[dict]:
    """Documents of a file of JSON lines; a ValueError names file, line and field of what is odd."""
    documents = []
    # (Not by splitlines, to which characters within a text may be ends of lines.)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{where}: this is no JSON ({problem}).") from problem
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is due, such as {{...}}.")
        for name, kind in definition.fields.items():
            if name not in row:
                due = ", ".join(definition.fields)
                raise ValueError(f"{where}: the field {name!r} is missing (due are {due}).")
            if not isinstance(row[name], kind):
                got = type(row[name]).__name__
                raise ValueError(f"{where}: the field {name!r} is {got}, {kind.__name__} is due.")
        try:
            documents.append(definition.document({key: row[key] for key in definition.fields}))
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}.") from problem
    if not documents:
        raise ValueError(f"{path} is empty: give an item a line.")
    return documents


def _file(data_dir: Path, name: str, suffix: str) -> Path:
    if not data_dir.is_dir():
        raise ValueError(f"--data-dir {data_dir}: there is no such folder.")
    named = re.compile(rf"{name}([^a-zA-Z].*)?\.{suffix}")
    there = [path for path in sorted(data_dir.iterdir()) if named.fullmatch(path.name)]
    if len(there) != 1:
        names = ", ".join(path.name for path in there) or "none"
        raise ValueError(
            f"{data_dir} should have one file {name}.{suffix} or {name}_*.{suffix}: found {names}."
        )
    return there[0]


def _articles(data_dir: Path | None) -> list[str]:
    """WikiText's articles: a line with one equals sign on either side opens each."""
    if data_dir is not None:
        path = _file(data_dir, "wikitext", "txt")
        text = read_text(path)
    else:
        try:
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        except (OSError, RuntimeError) as problem:
            raise ValueError(_unreachable("wikitext", problem)) from problem
        text = "".join(rows["text"])
    starts = [match.start() for match in re.finditer(r"^ ?= [^=\n]+ = *$", text, re.MULTILINE)]
    if not starts:
        raise ValueError(f"{path} has no article: a line such as ' = Title = ' opens each.")
    return [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's remarks on what is meant here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
