"""What counts as a score of an item, and which tasks are refused since they have none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from helpers import letters

import flocking

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
import datasets
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from flocking.evaluation import harness, plan
from flocking.evaluation.tasks import Articles  # noqa: F401 # registers what tasks need


class _Late(ConfigurableTask):
    """A task that says with its first results how a metric is put together, as humaneval."""

    def process_results(self, doc: dict, results: list[str]) -> dict[str, object]:
        self._aggregation_list["pass@1"] = mean
        return {"pass@1": np.bool_(len(results[0]) > 3), "corpus": [results], "words": "some"}

    def aggregation(self) -> dict[str, object]:
        return {"declared": mean, "corpus": max, **self._aggregation_list}


class _Without(_Late):
    def process_results(self, doc: dict, results: list[str]) -> dict[str, object]:
        return {"corpus": [results], "words": "some"}


def made(kind: type[ConfigurableTask]) -> ConfigurableTask:
    rows = [{"q": f"Item {number} of ten"} for number in range(10)]
    task = kind(
        config={
            "task": "made_up",
            "custom_dataset": lambda **metadata: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\\n"], "max_gen_toks": 3, "do_sample": False},
            "doc_to_text": "{{q}}",
            "doc_to_target": "x",
        }
    )
    task._aggregation_list = {}
    return task


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, evaluate: Callable) -> Callable[..., pd.DataFrame]:
    """Evaluate a task of this kind."""

    def run(kind: type[ConfigurableTask], **settings: object) -> pd.DataFrame:
        task = made(kind)
        monkeypatch.setattr(plan, "find", lambda names, *more: dict.fromkeys(names, task))
        return evaluate(["made_up"], **settings)

    return run


def test_metrics_that_a_task_knows_late_are_of_all_variants(ask: Callable) -> None:
    items = ask(_Late, methods=["topk"], limit=9)
    assert items["metric"].unique().tolist() == ["pass@1"]
    assert items.groupby("method")["item"].nunique().to_dict() == {"full": 9, "topk": 9}
    assert set(items["value"]) <= {0.0, 1.0}


def test_tasks_without_a_score_of_their_items_are_refused(ask: Callable) -> None:
    with pytest.raises(ValueError, match="made_up has no metric that is a number for each item"):
        ask(_Without, limit=2)


def test_tasks_that_run_what_a_model_writes_are_refused(
    ask: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Late, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(ValueError, match="made_up runs code that the model writes"):
        ask(_Late, limit=2)


def test_a_long_text_is_calibrated_on_to_its_end(shallow: tuple) -> None:
    model, tokenizer = shallow
    lm = harness.GriffinLM(model, method="full", tokenizer=tokenizer, max_length=100)
    text = flocking.passages()[0][:2000]
    ids = tokenizer(text)["input_ids"]
    rows = lm.tokens_of([text, "a short one", ids])
    assert [token for row in rows[:-2] for token in row] == ids
    assert {len(row) for row in rows[:-3]} == {100}
    assert rows[-2] == tokenizer("a short one")["input_ids"]
    assert rows[-1] == ids[:100]


@pytest.mark.parametrize("opens", [None, True, False])
def test_calibration_texts_begin_as_prompts_do(opens: bool | None, shallow: tuple) -> None:
    tokenizer = letters("<s> $A")
    model = shallow[0]
    lm = harness.GriffinLM(
        model, method="full", tokenizer=tokenizer, max_length=50, add_bos_token=opens
    )
    for row in lm.tokens_of(["ab" * 10, "ab" * 100]):
        assert (row[0] == tokenizer.bos_token_id) == (opens is not False)
        assert tokenizer.bos_token_id not in row[1:]
    (short,) = lm.tokens_of(["ab" * 10])
    assert short == lm.tok_encode("ab" * 10)  # as the harness begins a prompt


def test_the_users_model_and_tokenizer_stay_as_they_were(
    shallow: tuple, evaluate: Callable
) -> None:
    model, _ = shallow
    tokenizer = letters("<s> $A")
    tokenizer.pad_token = None
    model.train()
    try:
        before = str(tokenizer), tokenizer.pad_token_id
        evaluate(["piqa"], subject=(model, tokenizer), methods=["full"], limit=1)
        assert (str(tokenizer), tokenizer.pad_token_id) == before
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_uneven_groups_are_said(evaluate: Callable) -> None:
    said: list[str] = []
    evaluate(["xsum"], methods=["shared-4"], say=said.append)
    assert "xsum: the last group of shared-4 has 2 of 4 prompts." in said
