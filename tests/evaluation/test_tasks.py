"""Definitions of tasks: local documents against the harness's own, errors by file, line, field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from flocking.evaluation import definitions, tasks
from flocking.evaluation.definitions import rouge
from flocking.evaluation.tasks import Articles, find

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

OWN = Path(__file__).parents[1] / "tasks"
REAL = Path(__file__).parents[3] / "shared" / "data"


def requests(name: str, folder: Path, limit: int = 2) -> list[tuple]:
    task = find([name], folder)[name]
    task.set_config(key="num_fewshot", value=task.config.num_fewshot or 0)
    task.set_fewshot_seed(seed=1234)
    with tasks.quiet():
        task.build_all_requests(limit=limit)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", definitions.DEFINITIONS)
def test_every_definition_asks_its_items(name: str) -> None:
    asked = requests(name, OWN)
    assert len({context for context, _ in asked}) >= 2
    document = json.loads((OWN / f"{name}.jsonl").read_text().splitlines()[0])
    field = {"copa": "premise", "boolq": "question", "xsum": "prompt", "coqa": "story"}.get(name)
    shown = document[field or next(iter(document))]
    assert shown.strip(".") in asked[0][0]


@pytest.mark.parametrize(
    ("name", "context", "continuation"),
    [
        # As hellaswag, piqa, ... of lm-eval 0.4.13 write them.
        ("hellaswag", "Baking: A woman pours flour into a bowl. she", " adds eggs and stirs."),
        (
            "piqa",
            "Question: How do I keep bread fresh for a day?\nAnswer:",
            " Wrap it in a cloth and keep it in a box.",
        ),
        (
            "arc_easy",
            "Question: Which of these is a liquid at room temperature?\nAnswer:",
            " iron",
        ),
        # (That the choices have two spaces is the harness's own doing.)
        ("copa", "The candle went out because", "  a draught came through the door."),
        (
            "boolq",
            "The heron is a long-legged bird that lives near water and feeds mostly on fish, which "
            "it spears with its bill.\nQuestion: do herons eat fish?\nAnswer:",
            " no",
        ),
    ],
)
def test_asks_in_the_harnesss_words(name: str, context: str, continuation: str) -> None:
    assert requests(name, OWN)[0] == (context, continuation)


def test_few_shots_are_other_items_always_the_same() -> None:
    (first, _), (second, _) = requests("gsm8k", OWN)
    assert first.count("Question:") == second.count("Question:") == 6
    assert first.count("Ann has 3 apples") == 1
    assert requests("gsm8k", OWN)[0][0] == first


def test_a_summary_begins_on_a_new_line() -> None:
    for name in ("xsum", "cnn_dailymail"):
        (context, _), *_ = requests(name, OWN)
        assert context.endswith(" sentences.\n")


def test_rouge_by_hand() -> None:
    scores = rouge("the cat sat down", "the cat lay down here")
    assert scores["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert scores["rougeL"] == scores["rouge1"]
    assert set(rouge("", "something").values()) == {0.0}


def test_answers_by_hand() -> None:
    paper = {"answers": ["forty birds", "40"]}
    assert definitions._answer(paper, [" Forty."])["f1"] == pytest.approx(2 / 3)
    assert definitions._answer(paper, ["The 40"]) == {"f1": 1, "em": 1}  # without articles
    assert definitions._answer({"answers": ["a"]}, ["The"]) == {
        "f1": 1,
        "em": 1,
    }  # both without a word
    # Each reference is left out once: against the others, 1 and then 0.
    turn = {"answers": ["red", "blue"]}
    assert definitions._turn(turn, ["Blue\nQ: and then?"]) == {"f1": 0.5, "em": 0.5}


def test_documents_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same definitions on what the hub's datasets look like; it is not reached here."""
    hub = {
        "EdinburghNLP/xsum": [
            {"document": f"Article {number}.", "summary": f"Short {number}.", "id": "1"}
            for number in range(3)
        ],
        "abisee/cnn_dailymail": [{"article": "Long.", "highlights": "Short.", "id": "1"}],
        "Xnhyacinth/LongBench": [
            {"context": "We count birds.", "question": "What?", "answers": ["birds"]}
        ],
        "EleutherAI/coqa": [
            {
                "story": "Ada has hens.",
                "questions": {"input_text": ["Who?", "What?"]},
                "answers": {"input_text": ["Ada", "hens"]},
                "additional_answers": {"0": {"input_text": ["Ada", "Hens"]}},
            }
        ],
        "Salesforce/wikitext": [
            {"text": line}
            for line in (" = One = \n", " A bird . \n", " = Two = \n", " A fish . \n")
        ],
    }

    def load_dataset(path: str, *args: object, **kwargs: object) -> object:
        documents = datasets.Dataset.from_list(hub[path])
        if kwargs.get("split"):
            return documents
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), documents))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = find(["xsum", "cnn_dailymail", "qasper", "coqa", "wikitext_16"])
    assert found["wikitext_16"] == Articles(
        [" = One = \n A bird . \n", " = Two = \n A fish . \n"], 16
    )
    asked = {}
    for name in ("xsum", "cnn_dailymail", "qasper", "coqa"):
        with tasks.quiet():
            found[name].set_config(key="num_fewshot", value=found[name].config.num_fewshot or 0)
            found[name].set_fewshot_seed(seed=1)
            found[name].build_all_requests(limit=1)
        asked[name] = found[name].instances[0].args[0]
    assert asked["xsum"].count("###\nArticle: ") == 2
    assert asked["xsum"].endswith("Article 0.\n\nSummarize the above article in 1 sentences.\n")
    assert "in 1 sentences.\nShort " in asked["xsum"]
    assert asked["cnn_dailymail"].startswith("###\nArticle: Long.")
    assert asked["qasper"] == "We count birds.\n\nQuestion: What?\nAnswer:"
    assert asked["coqa"] == "Ada has hens.\n\nQ: Who?\n\nA: Ada\n\nQ: What?\n\nA:"
    (document,) = found["coqa"].validation_docs() or found["coqa"].test_docs()
    assert found["coqa"].process_results(document, ["hens"]) == {"f1": 1.0, "em": 1.0}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"context": "a", "choices": ["b", "c"]}', r"piqa.jsonl, line 2: the field 'label' is m"),
        (
            '{"context": "a", "choices": "b", "label": 0}',
            r"line 2: field 'choices': expected list, got s",
        ),
        (
            '{"context": "a", "choices": ["b", "c"], "label": 2}',
            r"line 2: expected a label from 0 to 1, got 2",
        ),
        ('{"context": "a", "choices": ["b"], "label": 0}', r"line 2: expected 2 choices, got 1"),
        (
            '{"context": "a", "choices": ["b", ""], "label": 0}',
            r"line 2: expected choices that are t",
        ),
        (
            '{"context": "a", "choices": ["b", 3], "label": 0}',
            r"line 2: expected choices that are t",
        ),
        ('{"context": ', r"line 2: not JSON"),
        ("[1]", r"line 2: expected a JSON object"),
    ],
)
def test_says_where_a_file_is_odd(tmp_path: Path, content: str, match: str) -> None:
    good = '{"context": "a", "choices": ["b", "c"], "label": 0}'
    (tmp_path / "piqa.jsonl").write_text(f"{good}\n{content}\n")
    with pytest.raises(ValueError, match=match):
        find(["piqa"], tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "boolq",
            '{"passage": "a", "question": "b", "label": 7}',
            "expected a label from 0 to 1, got 7",
        ),
        (
            "qasper",
            '{"article": "a", "question": "b", "answers": []}',
            "expected one or more texts in answers",
        ),
        (
            "coqa",
            '{"story": "a", "questions": [], "answers": []}',
            "expected one or more texts in questions",
        ),
        (
            "coqa",
            '{"story": "a", "questions": ["b"], "answers": ["c", "d"]}',
            "expected an answer to each of 1 questions, got 2",
        ),
        (
            "copa",
            '{"premise": "a.", "question": "why", "choices": ["b", "c"], "label": 0}',
            "expected cause or effect as the question, got 'why'",
        ),
    ],
)
def test_says_which_value_is_odd(tmp_path: Path, name: str, content: str, match: str) -> None:
    (tmp_path / f"{name}.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, line 1: {match}"):
        find([name], tmp_path)


def test_ends_of_lines_within_a_text_do_not_end_items(tmp_path: Path) -> None:
    item = {"article": "One\u2028two\u0085three.", "summary": "Four."}
    line = json.dumps(item, ensure_ascii=False)
    (tmp_path / "cnn_dailymail.jsonl").write_text(f"\ufeff{line}\r\n{line}\n", encoding="utf-8")
    assert [context for context, _ in requests("cnn_dailymail", tmp_path)] == [
        f"###\nArticle: {item['article']}\n\nSummarize the above article in 3 sentences.\n"
    ] * 2


def test_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this folder does not exist"):
        find(["piqa"], tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"one file piqa\.jsonl or piqa_\*\.jsonl, got none"):
        find(["piqa"], tmp_path)
    for name in ("piqa.jsonl", "piqa_2.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"got piqa\.jsonl, piqa_2\.jsonl"):
        find(["piqa"], tmp_path)
    (tmp_path / "piqa_2.jsonl").unlink()
    with pytest.raises(ValueError, match=r"piqa\.jsonl is empty"):
        find(["piqa"], tmp_path)
    with pytest.raises(ValueError, match=r"no task 'pica': near ones are piqa, in local files"):
        find(["pica"], tmp_path)
    (tmp_path / "wikitext.txt").write_text("no title\n")
    with pytest.raises(ValueError, match=r"wikitext\.txt has no article: a line such as"):
        find(["wikitext"], tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(
        ValueError, match=r"gsm8k shows 5 other items before each: expected at least 6 items, got 1"
    ):
        find(["gsm8k"], tmp_path)


def test_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("xsum", "piqa", "wikitext"):
        with pytest.raises(ValueError, match=rf"of {name} from the hub \(Couldn't reach the Hub"):
            find([name])
    with pytest.raises(ValueError, match=r"there is no task 'hellaswagg': near ones are hellas"):
        find(["hellaswagg"])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"there is no {REAL}")
@pytest.mark.parametrize(
    "name", ["hellaswag", "piqa", "arc_easy", "copa", "boolq", "xsum", "cnn_dailymail"]
)
def test_real_documents(name: str) -> None:
    asked = requests(name, REAL, limit=20)
    assert len({context for context, _ in asked}) == 20


@pytest.mark.skipif(not REAL.is_dir(), reason=f"there is no {REAL}")
def test_real_articles() -> None:
    found = find(["wikitext"], REAL)
    assert [task.prompt_length for task in found.values()] == [16, 64, 256, 1024]
    assert len(found["wikitext_16"].texts) == 62
    assert found["wikitext_16"].texts[0].startswith(" = Robert Boulter = ")


def test_documents_that_are_on_no_hub_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    local = replace(definitions.DEFINITIONS["qasper"], hub={})
    monkeypatch.setitem(definitions.DEFINITIONS, "mine", local)
    with pytest.raises(ValueError, match="mine has no documents on a hub: give --data-dir"):
        find(["mine"])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"x": ' + "[" * 100_000 + "]" * 100_000, "too many brackets within brackets"),
        ('"label": ' + "9" * 5000, "not JSON"),
        ('"label": ' + "9" * 30, "a whole number is too large"),
        ('"label": -9223372036854775809', "a whole number is too large"),
        ('"label": 1e999', "expected int, got float"),
        ('"choices": [1e999, "b"]', "inf is not a number to compute with"),
        ('"choices": ["a", NaN]', "nan is not a number to compute with"),
        ('"choices": ' + "[" * 200 + "]" * 200, "nested more than 20 deep"),
        ('"choices": [{"a": {"b": "\\ud800"}}]', "a character is incomplete"),
        ('"context": "half \\ud83d"', "a character is incomplete"),
    ],
)
def test_odd_numbers_and_nesting_are_named(tmp_path: Path, field: str, message: str) -> None:
    good = '"context": "c", "choices": ["a", "b"], "label": 0'
    path = tmp_path / "piqa.jsonl"
    path.write_text(f"{{{good}}}\n{{{good}, {field}}}\n")
    with pytest.raises(ValueError, match=r"piqa\.jsonl, line 2") as caught:
        find(["piqa"], tmp_path)
    assert message in str(caught.value)


def test_items_of_two_forms_are_named(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    with pytest.raises(ValueError, match=r"items\.jsonl: the items do not have one form"):
        tasks._table([{"a": 1}, {"a": {"b": [None]}}], path)
