"""Evaluations: against the harness, and against a direct computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers
import pandas as pd
import pytest

import flocking

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from flocking.evaluation import blocks, runner  # noqa: E402
from flocking.evaluation.definitions import DEFINITIONS, rouge  # noqa: E402
from flocking.evaluation.harness import GriffinLM  # noqa: E402
from flocking.evaluation.items import ask  # noqa: E402
from flocking.evaluation.plan import Plan, Question  # noqa: E402
from flocking.evaluation.tasks import find, quiet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"
CHOICES = ["hellaswag", "piqa", "copa", "arc_easy", "arc_challenge", "boolq"]
TEXT = "Starlings turn together, each following the few that are nearest. " * 3


@pytest.fixture(scope="module")
def items(embedded: tuple, evaluate: Callable) -> pd.DataFrame:
    """The full model and two variants on likelihoods and generated text."""
    return evaluate(
        ["piqa", "boolq", "xsum"],
        subject=embedded,  # a few layers do not write a word of any summary
        methods=["topk", "static@0.75"],
        protocol={"boolq": "last-token"},
        calibration=[TEXT],
        batch_size=2,
    )


@pytest.fixture(scope="module")
def stock(shallow: tuple) -> dict[str, dict[int, dict]]:
    """What the harness's own model of transformers models gives on the same items, by task."""
    model, tokenizer = shallow
    with quiet():
        samples = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(find(CHOICES, TASKS).values()),
            bootstrap_iters=0,
            log_samples=True,
        )["samples"]
    return {name: {sample["doc_id"]: sample for sample in samples[name]} for name in CHOICES}


@pytest.mark.parametrize("protocol", ["context", "last-token"])
def test_at_density_1_all_is_as_in_the_harness(
    stock: dict[str, dict[int, dict]], evaluate: Callable, protocol: str
) -> None:
    found = evaluate(CHOICES, methods=["topk@1"], protocol=protocol, batch_size=4)
    for name, expected in stock.items():
        for row in found[found["task"] == name].itertuples():
            assert row.value == float(expected[row.item][row.metric]), (row.method, name, row.item)


def test_what_was_pruned(items: pd.DataFrame) -> None:
    rows = items.set_index(["task", "method"])
    assert (rows.loc[("boolq", "topk"), ["scored", "pruned"]] == 2).all(axis=None)
    assert (rows.loc[("boolq", "full"), "pruned"] == 0).all()
    piqa = rows.loc[("piqa", "topk")]
    assert (piqa["pruned"] == piqa["scored"] - 2).all()  # all but the first of either choice
    assert (rows.loc["xsum", ["scored", "pruned", "left_out"]] == 0).all(axis=None)


def test_chances(items: pd.DataFrame, embedded: tuple) -> None:
    chance = items.groupby("task")["chance"].first()
    assert chance["piqa"] == chance["boolq"] == 0.5
    # Of a summary: its score as one of the next article.
    model, tokenizer = embedded
    rows = items[(items["task"] == "xsum") & (items["method"] == "full")]
    assert (rows["value"] > 0).any()
    documents = [json.loads(x) for x in (TASKS / "xsum.jsonl").read_text().splitlines()]
    for number, document in enumerate(documents):
        ids = tokenizer(document["prompt"] + "\n", return_tensors="pt")
        length = ids.input_ids.shape[1]
        new = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, length:]
        text = tokenizer.decode(new, skip_special_tokens=True)
        text = text.partition("\n")[0].partition("###")[0]
        other = documents[(number + 1) % 2]["reference"]
        own = rows[rows["item"] == number].set_index("metric")
        assert dict(own["value"]) == pytest.approx(rouge(text, document["reference"]))
        assert dict(own["chance"]) == pytest.approx(rouge(text, other))
        assert (own["prompt_tokens"] == length).all()


def test_batches_and_repetition_change_nothing(
    items: pd.DataFrame, embedded: tuple, evaluate: Callable
) -> None:
    again = evaluate(
        ["piqa", "boolq", "xsum"],
        subject=embedded,  # a few layers do not write a word of any summary
        methods=["topk", "static@0.75"],
        protocol={"boolq": "last-token"},
        calibration=[TEXT],
    )
    pd.testing.assert_frame_equal(again, items)


def test_last_token_is_a_direct_computation(
    shallow: tuple, evaluate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BoolQ: neurons are selected from all tokens but the last one that is fed, which is pruned."""
    model, tokenizer = shallow
    answers: dict[tuple[bool, int, str], float] = {}
    plain = GriffinLM.loglikelihood

    def noted(self: GriffinLM, requests: list, **options: bool) -> list[tuple[float, bool]]:
        given = plain(self, requests, **options)
        for one, (likelihood, _) in zip(requests, given, strict=True):
            answers[self.model is model, one.doc_id, one.args[1]] = likelihood
        return given

    monkeypatch.setattr(GriffinLM, "loglikelihood", noted)
    found = evaluate(["boolq"], methods=["topk"], protocol="last-token")
    twin = flocking.griffin(model)
    for row, line in enumerate((TASKS / "boolq.jsonl").read_text().splitlines()):
        item = json.loads(line)
        prompt = f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:"
        for subject in (model, twin):
            no, yes = (
                float(
                    flocking.score(
                        subject, prompt, x, tokenizer=tokenizer, protocol="last-token"
                    ).sum()
                )
                for x in (" no", " yes")
            )
            said = (answers[subject is model, row, x] for x in (" no", " yes"))
            assert tuple(said) == pytest.approx((no, yes), rel=1e-5)
        value = found[(found["method"] == "topk") & (found["item"] == row)]["value"].item()
        assert value == ((yes > no) == item["label"])


def test_an_item_without_a_prompt_is_named(shallow: tuple, tmp_path: Path) -> None:
    item = {"passage": "", "question": "", "label": True}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(item) + "\n")
    (task,) = find(["boolq"], tmp_path).values()
    task.set_config(key="doc_to_text", value=lambda doc: "")
    lm = GriffinLM(shallow[0], tokenizer=shallow[1], method="full")
    (block,) = blocks.blocks_of(lm, Question("boolq", task, "last-token", 1), 8)
    with pytest.raises(ValueError, match=r"boolq, item 0: protocol='last-token' needs a token"):
        ask(lm, block, [lm.full])


def test_what_cannot_be_asked_is_said_before_it_starts(shallow: tuple, tmp_path: Path) -> None:
    item = {"passage": "", "question": "", "label": True}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(item) + "\n")
    plan = Plan(["boolq"], methods=["topk"], protocol="last-token", data_dir=tmp_path)
    (question,) = plan.questions()
    question.task.set_config(key="doc_to_text", value=lambda doc: "a")
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"boolq, item 0: protocol='last-token' needs a token"):
        runner.evaluate(*shallow, plan, say=lines.append)
    assert not lines


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output_type": "loglikelihood_rolling"}, "xsum asks for the likelihood of a whole text"),
        ({"generation_kwargs": {"do_sample": True}}, "xsum draws its answers at random, so that"),
        (
            {"metric_list": [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}]},
            r"xsum has no metric that is a mean over items \(bleu\), so that methods cannot",
        ),
    ],
)
def test_refuses_tasks_that_cannot_be_compared(
    change: dict, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = DEFINITIONS["xsum"]
    changed = replace(before, own=before.own | change)
    monkeypatch.setitem(DEFINITIONS, "xsum", changed)
    with pytest.raises(ValueError, match=match):
        Plan(["xsum"], data_dir=TASKS).questions()


def test_says_what_is_too_long(shallow: tuple, tmp_path: Path) -> None:
    tokenizer = shallow[1]
    model = helpers.build("llama", vocab_size=len(tokenizer))
    lines: list[str] = []
    item = {"passage": "The bird sings. " * 400, "question": "does it sing", "label": True}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(item) + "\n")
    plan = Plan(["boolq"], methods=[], data_dir=tmp_path)
    found = runner.evaluate(model, tokenizer, plan, say=lines.append)
    assert lines[-1] == "boolq: 1 of 1 items are too long, and lost their beginning."
    assert found["left_out"].item() > 0
    assert found["prompt_tokens"].item() == model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"methods": ["best"]}, "there is no method 'best': choose from full, topk"),
        ({"methods": ["topk@2"]}, "'topk@2': give a density"),
        ({"methods": ["topk@half"]}, "'topk@half': give a density"),
        ({"protocol": "last"}, "protocol='last'"),
        ({"limit": 0}, "limit=0"),
        ({"limit": {"hella": 2}}, "hella has a limit or protocol and is not one of the tasks"),
        (
            {"calibration": "nowhere.txt", "methods": ["static"]},
            r"calibration: nowhere.txt does not exist",
        ),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refuses(evaluate: Callable, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate(["piqa"], **options)
