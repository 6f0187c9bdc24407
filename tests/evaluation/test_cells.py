"""Cells that are kept: an evaluation continues where it was, and knows what is out of date."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import helpers
import pandas as pd
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from transformers import AutoTokenizer

from flocking.evaluation import runner
from flocking.evaluation.cells import Cell, Cells
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.plan import FULL, Plan

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"


def test_goes_on_where_it_was(
    evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"methods": ["random"], "limit": {"piqa": 2}, "cells": Cells(tmp_path, "one")}
    ran: list[str] = []
    run = Cell.run

    def interrupted(cell: Cell, *args: object) -> pd.DataFrame:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(f"{cell.variant} {cell.question.name}")
        return run(cell, *args)

    monkeypatch.setattr(Cell, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(["piqa", "boolq"], **options)
    assert ran == ["full piqa", "full boolq"]
    kept = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert kept == ["boolq-full", "piqa-full"]
    monkeypatch.setattr(Cell, "run", run)
    lines: list[str] = []
    first = evaluate(["piqa", "boolq"], **options, say=lines.append)
    assert lines[0] == "2 of 4 cells are there already."
    assert lines[-1].startswith("[4/4] random@0.5 on boolq: acc ")
    lines.clear()
    pd.testing.assert_frame_equal(evaluate(["piqa", "boolq"], **options, say=lines.append), first)
    assert lines == ["4 of 4 cells are there already."]
    # What numbers depend on makes other cells of them; the full model draws nothing from a seed.
    for changed in ({"cells": Cells(tmp_path, "two")}, {"seed": 1}, {"limit": {"piqa": 1}}):
        lines.clear()
        evaluate(["piqa", "boolq"], **{**options, **changed}, say=lines.append)
        assert "4 of 4" not in lines[0]
        lines.clear()  # and destroys none
        evaluate(["piqa", "boolq"], **options, say=lines.append)
        assert lines == ["4 of 4 cells are there already."]


@pytest.fixture
def quick(embedded: tuple) -> Callable[..., pd.DataFrame]:
    """Evaluate a tiny model: for what does not depend on the answers."""
    tokenizer = embedded[1]
    model = helpers.build("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)

    def run(tasks: list[str], *, say=lambda line: None, cells=None, **settings) -> pd.DataFrame:
        plan = Plan(tasks, data_dir=TASKS, **settings)
        return runner.evaluate(model, tokenizer, plan, cells=cells, say=say)

    return run


def test_a_broken_cell_is_named_and_computed_again(quick: Callable, tmp_path: Path) -> None:
    """And blocks none of the others, whichever way it is broken."""
    lines: list[str] = []
    options = {"methods": ["random"], "limit": 1, "cells": Cells(tmp_path, "one")}
    first = quick(["piqa"], **options)
    (broken,) = tmp_path.glob("piqa-full-*")
    written = broken.read_text()
    assert '"value": [1.0' in written or '"value": [0.0' in written
    for text, why in (
        ("mine", "cannot be read .*, and is set aside as piqa-full-.*.json.set-aside"),
        ("", "cannot be read"),
        (written[:-9], "cannot be read"),
        ('{"key": "", "rows": {"task": [1]}}', "is not a cell of an evaluation"),
        (written.replace('"value": [', '"value": [9'), "was changed after it was written"),
    ):
        broken.write_text(text)
        lines.clear()
        again = quick(["piqa"], **options, say=lines.append)
        pd.testing.assert_frame_equal(again, first)
        assert re.search(f"{broken}.*{why}", lines[0]), lines[0]
        assert lines[1] == "1 of 2 cells are there already."
        assert lines[2].startswith("[2/2] full on piqa")
    aside = sorted(path.read_text() for path in tmp_path.glob("*.set-aside*"))
    assert aside == sorted(["mine", "", written[:-9], '{"key": "", "rows": {"task": [1]}}'])
    # As an earlier version wrote it, without a checksum.
    content = json.loads(written)
    del content["checksum"]
    broken.write_text(json.dumps(content))
    lines.clear()
    quick(["piqa"], **options, say=lines.append)
    assert lines == ["2 of 2 cells are there already."]


def test_two_runs_read_each_others_cells(
    quick: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first computes a cell, another run finishes the one that comes after it."""
    options = {"methods": [], "limit": 1}
    cells = Cells(tmp_path, "one")
    run, ran = Cell.run, []

    def other(cell: Cell, *args: object) -> pd.DataFrame:
        ran.append(cell.question.name)
        if ran == ["piqa"]:
            quick(["boolq"], cells=cells, **options)
        return run(cell, *args)

    monkeypatch.setattr(Cell, "run", other)
    lines: list[str] = []
    found = quick(["piqa", "boolq"], cells=cells, **options, say=lines.append)
    assert ran == ["piqa", "boolq"]  # each once
    assert lines[-1] == "[2/2] full on boolq: another run has finished it meanwhile."
    assert set(found["task"]) == {"piqa", "boolq"}
    monkeypatch.setattr(Cell, "run", run)
    pd.testing.assert_frame_equal(quick(["piqa", "boolq"], **options), found)


def test_another_tokenizer_makes_another_cell(embedded: tuple, tmp_path: Path) -> None:
    model, tokenizer = embedded
    plan = Plan(["piqa"], methods=[], limit=1, data_dir=TASKS)

    def key(other: object) -> str:
        lm = GriffinLM(model, tokenizer=other, method="full")
        return Cell.of(lm, plan.questions()[0], FULL, Cells(tmp_path, "one")).key.inputs

    keys = [key(tokenizer)]
    for added in (None, "<new>"):
        tokenizer.save_pretrained(tmp_path / "other")
        another = AutoTokenizer.from_pretrained(tmp_path / "other")
        another.add_tokens([added] if added else [])
        keys.append(key(another))
        another("a text", truncation=True, max_length=2)  # notes of a call do not count
        assert key(another) == keys[-1]
    assert len(set(keys)) == 3


def altered(folder: Path, **parts: object) -> None:
    """Give all cells in a folder other keys, or parts of keys, and other names."""
    for path in list(folder.iterdir()):
        content = json.loads(path.read_text())
        content["key"] = parts.get("key") or content["key"] | parts
        path.unlink()
        stem = path.name.rpartition("-")[0]
        (folder / f"{stem}-01234567.json").write_text(json.dumps(content))


def test_cells_of_older_code_are_kept_when_told(evaluate: Callable, tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"methods": ["random"], "limit": 2, "say": lines.append}
    cells, keeping = Cells(tmp_path, "one"), Cells(tmp_path, "one", keep_older=True)
    first = evaluate(["piqa"], cells=cells, **options)
    assert (first["older"] == "").all()
    altered(tmp_path, code="0123456789abcdef")

    lines.clear()
    kept = evaluate(["piqa", "boolq"], cells=keeping, **options)
    assert lines[0] == "2 of 4 cells are there already, 2 of them of older code."
    assert len([line for line in lines if line.startswith("[")]) == 2
    older = kept.groupby("task")["older"].unique()
    assert older["boolq"].tolist() == [""]
    assert [code.partition(", run 20")[0] for code in older["piqa"]] == ["01234567"]
    mine = kept[kept["task"] == "piqa"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine.drop(columns="older"), first.drop(columns="older"))

    lines.clear()
    again = evaluate(["piqa"], cells=cells, **options)
    assert lines[0].startswith("2 cells differ in the code part of their key alone")
    assert "--keep-older (keep_older=True) accepts them" in lines[0]
    pd.testing.assert_frame_equal(again, first)
    lines.clear()  # today's code comes before older code
    assert (evaluate(["piqa"], cells=keeping, **options)["older"] == "").all()
    assert lines == ["2 of 2 cells are there already."]


@pytest.mark.parametrize(
    "parts", [{"inputs": "0"}, {"versions": {"torch": "1"}}, {"code": "0", "inputs": "0"}]
)
def test_other_cells_are_never_kept(evaluate: Callable, tmp_path: Path, parts: dict) -> None:
    options = {"methods": [], "limit": 1, "cells": Cells(tmp_path, "one", keep_older=True)}
    evaluate(["piqa"], **options)
    altered(tmp_path, **parts)
    lines: list[str] = []
    evaluate(["piqa"], **options, say=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("[1/1] full on piqa")


def test_a_cell_with_a_key_of_one_part_is_stale(evaluate: Callable, tmp_path: Path) -> None:
    options = {"methods": [], "limit": 1, "cells": Cells(tmp_path, "one", keep_older=True)}
    evaluate(["piqa"], **options)
    altered(tmp_path, key="0123456789abcdef")
    lines: list[str] = []
    evaluate(["piqa"], **options, say=lines.append)
    assert lines[0].startswith("1 cells have a key that is not in three parts")
    assert lines[1].startswith("[1/1] full on piqa")
