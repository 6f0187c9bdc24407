"""Definitions of tasks: how their documents look in a file, and what a model is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from lm_eval.tasks.mlqa.utils import exact_match_score, f1_score
from rouge_score.rouge_scorer import RougeScorer


@dataclass(frozen=True)
class Definition:
    """How documents of a task look in a local file, and what a model is asked about them.

    Attributes
    ----------
    fields : dict of str to type
        Fields of each line's JSON object.
    document : callable
        Turns such an object into the document that the definition expects.
    of_harness : str
        The file in the harness that defines the task; empty if `own` does.
    own : dict
        The definition, in the harness's terms.
    hub : dict
        Where the documents are on a hub, and what `own` needs to read them from there.
    local : dict
        What else changes for documents from a file.
    authors : dict
        What else changes where it is asked as GRIFFIN's authors do, with an example before each
        item; empty if their program does not ask it.
    """

    fields: dict[str, type]
    document: Callable[[dict], dict] = dict
    of_harness: str = ""
    own: dict = field(default_factory=dict)
    hub: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)
    authors: dict = field(default_factory=dict)


def _one_of(choices: list, label: int) -> int:
    if not choices or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("expected choices that are texts and not empty")
    if not 0 <= label < len(choices):
        raise ValueError(f"expected a label from 0 to {len(choices) - 1}, got {label}")
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
        raise ValueError(f"expected cause or effect as the question, got {row['question']!r}")
    return {
        "premise": row["premise"],
        "question": row["question"],
        "choice1": one,
        "choice2": other,
        "label": label,
    }


def _two(choices: list) -> list:
    if len(choices) != 2:
        raise ValueError(f"expected 2 choices, got {len(choices)}")
    return choices


def _boolq(row: dict) -> dict:
    return {**row, "label": _one_of(["no", "yes"], int(row["label"]))}


def _qasper(row: dict) -> dict:
    return {**row, "answers": _texts("answers", row["answers"])}


def _texts(name: str, values: list) -> list[str]:
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"expected one or more texts in {name}")
    return values


def _coqa(row: dict) -> dict:
    questions, answers = (len(_texts(name, row[name])) for name in ("questions", "answers"))
    if questions != answers:
        raise ValueError(f"expected an answer to each of {questions} questions, got {answers}")
    return {
        "story": row["story"],
        "questions": row["questions"],
        "said": row["answers"][:-1],
        "answers": row["answers"][-1:],
    }


def _coqa_of_hub(doc: dict) -> dict:
    """The last question of a conversation, with all answers that people gave to it."""
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
    """The best score over the references, as in SQuAD (Rajpurkar et al. 2016, section 6.1)."""
    return _best(results[0], doc["answers"])


def _turn(doc: dict, results: list[str]) -> dict[str, float]:
    """Scores as in CoQA (Reddy, Chen and Manning 2019, section 6.1).

    The mean over all ways to leave one reference out, since people are scored against the others'.
    """
    answer, all_of_them = results[0].strip().split("\n")[0], doc["answers"]
    left = [
        [other for m, other in enumerate(all_of_them) if m != n] for n in range(len(all_of_them))
    ]
    left = left if len(all_of_them) > 1 else [all_of_them]
    each = [_best(answer, some) for some in left]
    return {name: sum(best[name] for best in each) / len(each) for name in ("f1", "em")}


def _best(answer: str, references: list[str]) -> dict[str, float]:
    em = max(float(exact_match_score(answer, reference, "en")) for reference in references)
    f1 = max(float(f1_score(answer, reference, "en")) for reference in references)
    # Two answers without a word are the same, but their F1 is 0.
    return {"f1": max(em, f1), "em": em}


def _measured(*names: str) -> list[dict]:
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


_SUMMARY = {
    "output_type": "generate_until",
    "process_results": _summary,
    "doc_to_target": "{{summary}}",
    "metric_list": _measured("rouge1", "rouge2", "rougeL"),
}
THEIR_FIELDS = {"article": str, "summary_gt": str}  # of the files of GRIFFIN's authors


def their_document(row: dict) -> dict:
    """A line of those files: a prompt with its example, and a summary."""
    return {"prompt": row["article"], "summary": row["summary_gt"]}


# 128 new tokens, whatever they are: the text is cut afterwards (see flocking.evaluation.authors).
_AUTHORS = {"generation_kwargs": {"until": ["###"], "max_gen_toks": 128}}
_ANSWER = {
    "output_type": "generate_until",
    "doc_to_target": "{{answers[0]}}",
    "metric_list": _measured("f1", "em"),
}
_CHOICES = {"context": str, "choices": list, "label": int}

DEFINITIONS: dict[str, Definition] = {
    "hellaswag": Definition(
        _CHOICES,
        _hellaswag,
        "hellaswag/hellaswag.yaml",
        # A function, since the harness takes a text of digits for the number of a choice.
        local={"process_docs": None, "doc_to_text": lambda doc: doc["query"]},
    ),
    "piqa": Definition(_CHOICES, _piqa, "piqa/piqa.yaml"),
    "copa": Definition(
        {"premise": str, "question": str, "choices": list, "label": int},
        _copa,
        "super_glue/copa/default.yaml",
    ),
    "arc_easy": Definition(
        {"question": str, "choices": list, "label": int}, _arc, "arc/arc_easy.yaml"
    ),
    "arc_challenge": Definition(
        {"question": str, "choices": list, "label": int}, _arc, "arc/arc_challenge.yaml"
    ),
    "boolq": Definition(
        {"passage": str, "question": str, "label": int}, _boolq, "super_glue/boolq/default.yaml"
    ),
    # As in the harness; its own definition fails with newer versions of transformers.
    "coqa": Definition(
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
    "gsm8k": Definition({"question": str, "answer": str}, of_harness="gsm8k/gsm8k.yaml"),
    # Summaries are asked for in the words of the prompts that GRIFFIN's authors made for XSum.
    "xsum": Definition(
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
        authors=_AUTHORS,  # (an example is in each prompt, or shown before it)
    ),
    "cnn_dailymail": Definition(
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
            "validation_split": "validation",
        },
        authors=_AUTHORS | {"num_fewshot": 1},
    ),
    # In the words of SCROLLS; its task in the harness scores all answers together.
    "qasper": Definition(
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
