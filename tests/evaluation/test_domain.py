"""Static from the task's own documents: those beyond the scored ones, and never these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

import flocking

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import datasets
from lm_eval.api.task import ConfigurableTask

from flocking.cli import app
from flocking.evaluation import domain, harness
from flocking.evaluation.plan import Plan
from flocking.evaluation.tasks import Articles, find
from flocking.evaluation.variants import Twinned

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

PASSAGE = "Terns nest on the gravel of a low island, and leave it when the gulls arrive. "
OTHER = "A kiln is fired slowly, for clay that still holds water cracks as it heats. "


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path.parent


def piqa(folder: Path, count: int = 5) -> Path:
    rows = [
        {
            "context": f"Goal {n}: mend a chair leg",
            "choices": [f"glue {n}", f"paint {n}"],
            "label": 0,
        }
        for n in range(count)
    ]
    return lines(folder / "piqa.jsonl", rows)


def boolq(folder: Path) -> Path:
    about = [PASSAGE, OTHER, PASSAGE, f" {OTHER} ", "Bread rises while the yeast has sugar left. "]
    rows = [
        {"passage": passage, "question": f"is number {n} so", "label": 1}
        for n, passage in enumerate(about)
    ]
    return lines(folder / "boolq.jsonl", rows)


def of(name: str, folder: Path, limit: int | None, tokenizer: object, **more: int) -> list[str]:
    (task,) = find([name], folder).values()
    rows = domain.documents(name, task, limit, tokenizer, more.get("longest", 10**6))
    return [tokenizer.decode(row) for row in rows]


def test_are_those_beyond_the_scored_ones(shallow: tuple, tmp_path: Path) -> None:
    texts = of("piqa", piqa(tmp_path), 2, shallow[1])
    assert texts == [f"Question: Goal {n}: mend a chair leg\nAnswer:" for n in (4, 3, 2)]
    cut = of("piqa", tmp_path, 4, shallow[1], longest=3)
    assert cut == [shallow[1].decode(shallow[1](texts[0])["input_ids"][:3])]


def test_are_the_same_when_more_are_scored(
    shallow: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what was computed with fewer items still counts."""
    monkeypatch.setattr(domain, "MOST_TOKENS", 20)
    piqa(tmp_path)
    few, more = (of("piqa", tmp_path, limit, shallow[1]) for limit in (1, 3))
    assert few == more
    assert len(few) == 2
    articles = Articles(flocking.passages(), 16)
    few, more = (
        domain.documents("wikitext_16", articles, limit, shallow[1], 10**6) for limit in (1, 5)
    )
    assert few == more


def test_another_question_about_a_scored_passage_is_left_out(
    shallow: tuple, tmp_path: Path
) -> None:
    texts = of("boolq", boolq(tmp_path), 2, shallow[1])
    assert len(texts) == 1
    assert texts[0].startswith("Bread rises")
    one = of("boolq", tmp_path, 1, shallow[1])
    assert len(one) == 3
    assert not any(PASSAGE.strip() in text for text in one)


def test_no_more_tokens_than_wanted(
    shallow: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domain, "MOST_TOKENS", 20)
    (task,) = find(["piqa"], piqa(tmp_path)).values()
    rows = domain.documents("piqa", task, 1, shallow[1], 10**6)
    assert sum(map(len, rows)) == 20
    assert len(rows) == 2


def test_scored_articles_are_left_out(shallow: tuple) -> None:
    tokenizer = shallow[1]
    long = [" ".join(flocking.passages()[n : n + 2]) for n in (0, 2, 4)]
    texts = ["short one", long[0], long[1], long[0] + "\n", long[2]]
    found = domain.documents("wikitext_16", Articles(texts, 16), 2, tokenizer, 10**6)
    expected = [tokenizer(text, verbose=False)["input_ids"] for text in (texts[4], texts[0])]
    assert found == expected
    with pytest.raises(ValueError, match="needs documents of wikitext_16 beyond those"):
        domain.documents("wikitext_16", Articles(long, 16), None, tokenizer, 10**6)


def test_documents_of_other_splits_come_first(shallow: tuple) -> None:
    splits = {
        "train": [{"q": "from training"}, {"q": PASSAGE}],
        "validation": [{"q": "from validation"}],
        "test": [{"q": PASSAGE}, {"q": "from the test"}],
    }
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    config = {
        "task": "made_up",
        "custom_dataset": lambda **metadata: tables,
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "x",
    }
    task = ConfigurableTask(config=config)
    rows = domain.documents("made_up", task, 1, shallow[1], 10**6)
    texts = [shallow[1].decode(row) for row in rows]
    assert texts == ["from training", "from validation", "from the test"]


def test_is_static_from_these_documents(
    shallow: tuple, evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each task its own, and what is scored is never read for the statistic."""
    boolq(piqa(tmp_path))
    read: list[list[int]] = []
    given: list[xr.DataArray] = []
    plain, twin_of = harness.global_statistic, Twinned.of

    def spy(model: object, ids: list[list[int]], **options: object) -> object:
        read.extend(ids)
        return plain(model, ids, **options)

    def made(self: Twinned, model: object, reference: xr.DataArray, seed: int) -> object:
        given.append(reference)
        return twin_of(self, model, reference, seed)

    monkeypatch.setattr(harness, "global_statistic", spy)
    monkeypatch.setattr(Twinned, "of", made)
    options = {"data_dir": tmp_path, "limit": 2, "protocol": "last-token", "densities": [0.25]}
    found = evaluate(["piqa", "boolq"], methods=["static-domain"], **options)
    texts = [shallow[1].decode(row) for row in read]
    assert len(texts) == 4  # three of piqa's, one of boolq's
    scored = ["Goal 0", "Goal 1", PASSAGE.strip(), OTHER.strip()]
    assert not [text for text in texts for part in scored if part in text]
    for name, reference in zip(("piqa", "boolq"), given, strict=True):
        (task,) = find([name], tmp_path).values()
        own = domain.documents(name, task, 2, shallow[1], 10**6)
        expected = flocking.global_statistic(shallow[0], own, progress=False)
        xr.testing.assert_allclose(reference, expected, rtol=1e-4)
        got = found[(found["task"] == name) & (found["method"] == "static-domain")]
        assert set(got["density"]) == {0.25}


def test_each_cell_has_its_own_statistic(
    evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes before it: other tasks, other methods, and static from the plan's texts."""
    boolq(piqa(tmp_path))
    read: list[int] = []
    plain = harness.GriffinLM.reference_of

    def spy(self: harness.GriffinLM, texts: list) -> object:
        read.append(len(texts))
        return plain(self, texts)

    monkeypatch.setattr(harness.GriffinLM, "reference_of", spy)
    evaluate(
        ["piqa", "boolq"],
        methods=["static", "static-domain", "topk", "static@0.25"],
        calibration=[PASSAGE, OTHER],
        data_dir=tmp_path,
        limit=2,
    )
    assert read == [2, 3, 1]  # the plan's, once, and those of each task


def test_refuses_where_all_are_scored(tmp_path: Path) -> None:
    folder = boolq(piqa(tmp_path))
    for limit in (None, 5, {"piqa": 2, "boolq": 4}):  # boolq's fifth is there, the others' are not
        plan = Plan(["piqa", "boolq"], ["static-domain"], data_dir=folder, limit=limit)
        if isinstance(limit, dict):
            assert len(plan.questions()) == 2
            continue
        with pytest.raises(ValueError, match="static-domain needs documents of piqa beyond those"):
            plan.questions()
    Plan(["piqa"], ["static"], data_dir=folder).questions()


def test_the_command_refuses_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    monkeypatch.setattr(flocking, "load", lambda *args, **kwargs: pytest.fail("it is loaded"))
    arguments = ["evaluate", "--tasks", "piqa", "--methods", "static-domain", "--data-dir"]
    result = CliRunner().invoke(
        app, [*arguments, str(piqa(tmp_path)), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 2
    assert "needs documents of piqa beyond those that are scored" in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()
