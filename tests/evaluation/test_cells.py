"""Cells that are kept: an evaluation continues where it was, and knows what is out of date."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import helpers
import pandas as pd
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from transformers import AutoTokenizer

from flocking.artifacts import checksum
from flocking.evaluation import blocks, items, runner, twins
from flocking.evaluation.blocks import Block
from flocking.evaluation.cells import Cells, cells_of, digest_of_another
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.plan import Plan
from flocking.evaluation.variants import FULL

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"


def test_goes_on_where_it_was(
    evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"methods": ["random"], "limit": {"piqa": 2}, "cells": Cells(tmp_path, "one")}
    ran: list[str] = []

    def interrupted(lm: object, block: Block, *args: object) -> object:
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(block.name)
        return items.ask(lm, block, *args)

    monkeypatch.setattr(runner, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(["piqa", "boolq"], **options)
    assert ran == ["piqa, items 0 to 1"]
    kept = [path.name.rpartition("-")[0] for path in tmp_path.iterdir()]
    assert kept == ["piqa-00000-00001"]
    monkeypatch.setattr(runner, "ask", items.ask)
    lines: list[str] = []
    first = evaluate(["piqa", "boolq"], **options, say=lines.append)
    assert lines[0] == "2 of 4 cells are there already."
    assert lines[1].startswith("2 cells are to be computed, in about ")
    assert re.fullmatch(r"\[4/4\] boolq, items 0 to 1: \d+ s; done", lines[2])
    assert lines[3].startswith("full on boolq: acc ")
    lines.clear()
    pd.testing.assert_frame_equal(evaluate(["piqa", "boolq"], **options, say=lines.append), first)
    assert lines == ["4 of 4 cells are there already."]
    # What numbers depend on makes other cells of them.
    for changed in ({"cells": Cells(tmp_path, "two")}, {"seed": 1}):
        lines.clear()
        evaluate(["piqa", "boolq"], **{**options, **changed}, say=lines.append)
        assert "4 of 4" not in lines[0]
        lines.clear()  # and destroys none
        evaluate(["piqa", "boolq"], **options, say=lines.append)
        assert lines == ["4 of 4 cells are there already."]


def test_more_methods_and_items_compute_only_what_is_missing(
    quick: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method more: that method. Items more: those in new blocks, and the block that grew."""
    asked: list[tuple[str, int]] = []

    def noted(lm: object, block: Block, models: list, *args: object) -> object:
        asked.append((block.name, len(models)))
        return items.ask(lm, block, models, *args)

    monkeypatch.setattr(runner, "ask", noted)
    monkeypatch.setattr(blocks, "_ITEMS", 2)
    cells = Cells(tmp_path, "one")
    quick(["hellaswag"], methods=["topk"], limit=2, cells=cells)
    quick(["hellaswag"], methods=["topk", "magnitude"], limit=2, cells=cells)
    found = quick(["hellaswag"], methods=["topk", "magnitude"], limit=3, cells=cells)
    first, second = "hellaswag, items 0 to 1", "hellaswag, items 2 to 2"
    assert asked == [(first, 2), (first, 1), (second, 3)]
    expected = quick(["hellaswag"], methods=["topk", "magnitude"], limit=3)
    pd.testing.assert_frame_equal(found, expected)


def test_blocks_change_nothing(quick: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the groups of variants whose twins are in memory together."""
    options = {"methods": ["topk", "random", "static"], "calibration": ["The sun rose. " * 9]}
    tasks = ["piqa", "boolq", "xsum"]
    expected = quick(tasks, **options)
    for name in ("_ITEMS", "_ITEMS_WRITTEN"):
        monkeypatch.setattr(blocks, name, 1)
    monkeypatch.setattr(twins, "_SHARE_OF_MEMORY", 0)
    found = quick(tasks, **options)
    keys = ["task", "method", "metric", "item"]
    found, expected = (table.sort_values(keys, ignore_index=True) for table in (found, expected))
    pd.testing.assert_frame_equal(found, expected)


@pytest.fixture
def quick(shallow: tuple) -> Callable[..., pd.DataFrame]:
    """Evaluate a tiny model: for what does not depend on the answers."""
    tokenizer = shallow[1]
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
    (broken,) = tmp_path.iterdir()
    written = broken.read_bytes()
    plain = gzip.decompress(written).decode()
    assert '"value": [1.0' in plain or '"value": [0.0' in plain
    other = gzip.compress(b'{"key": "", "cells": {"task": [1]}}')
    for content, why in (
        (b"mine", "cannot be read .*, and is set aside as piqa-.*.json.gz.set-aside"),
        (b"", "cannot be read"),
        (written[:-9], "cannot be read"),
        (gzip.compress(plain[:-9].encode()), "cannot be read"),
        (other, "is not a block of an evaluation"),
        (
            gzip.compress(plain.replace('"value": [', '"value": [9').encode()),
            "was changed after it was written",
        ),
    ):
        broken.write_bytes(content)
        lines.clear()
        again = quick(["piqa"], **options, say=lines.append)
        pd.testing.assert_frame_equal(again, first)
        assert re.search(f"{broken}.*{why}", lines[0]), lines[0]
        assert lines[1].startswith("2 cells are to be computed")
        assert lines[2].startswith("[2/2] piqa, items 0 to 0")
    aside = {path.read_bytes() for path in tmp_path.glob("*.set-aside*")}
    assert {b"mine", b"", written[:-9], other} < aside
    assert broken.read_bytes() != written  # (it was computed at another time)
    assert gzip.decompress(broken.read_bytes())[:200] == plain[:200].encode()


def test_two_runs_read_each_others_cells(
    quick: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first computes a cell, another run finishes the one that comes after it."""
    options = {"methods": [], "limit": 1}
    cells, ran = Cells(tmp_path, "one"), []

    def other(lm: object, block: Block, *args: object) -> object:
        ran.append(block.question.name)
        if ran == ["piqa"]:
            quick(["boolq"], cells=cells, **options)
        return items.ask(lm, block, *args)

    monkeypatch.setattr(runner, "ask", other)
    lines: list[str] = []
    found = quick(["piqa", "boolq"], cells=cells, **options, say=lines.append)
    assert ran == ["piqa", "boolq"]  # each once
    assert lines[-1] == "boolq, items 0 to 0: another run has finished it meanwhile."
    assert set(found["task"]) == {"piqa", "boolq"}
    monkeypatch.setattr(runner, "ask", items.ask)
    pd.testing.assert_frame_equal(quick(["piqa", "boolq"], **options), found)


def test_another_tokenizer_makes_another_cell(shallow: tuple, tmp_path: Path) -> None:
    model, tokenizer = shallow
    plan = Plan(["piqa"], methods=[], limit=1, data_dir=TASKS)

    def key(other: object) -> str:
        lm = GriffinLM(model, tokenizer=other, method="full")
        first = blocks.blocks_of(lm, plan.questions()[0], 1)
        known = "one", digest_of_another(model, other)
        ((cell,),) = cells_of(lm, first, {FULL: ()}, *known)
        return cell.key.inputs

    def again(name: str, *added: str) -> object:
        another = AutoTokenizer.from_pretrained(tmp_path / "other")
        another.name_or_path = name
        another.add_tokens(list(added))
        return another

    tokenizer.save_pretrained(tmp_path / "other")
    same = [again("other"), again(tokenizer.name_or_path)]
    changed = [again("other", "<new>"), again(tokenizer.name_or_path, "<new>")]
    assert {key(one) for one in same} == {key(tokenizer)}
    assert digest_of_another(model, tokenizer) is None
    (unlike,) = {key(one) for one in changed}  # whatever it is called
    assert unlike != key(tokenizer)
    changed[0]("a text", truncation=True, max_length=2)  # notes of a call do not count
    assert key(changed[0]) == unlike


def altered(folder: Path, inputs: str = "", **parts: object) -> None:
    """Give all cells in a folder other keys, and their files other names."""
    for path in list(folder.iterdir()):
        content = json.loads(gzip.decompress(path.read_bytes()))
        content["key"] |= parts
        for cell in content["cells"]:
            cell["inputs"] = inputs or cell["inputs"]
        content["checksum"] = checksum({"cells": content["cells"]})
        path.unlink()
        stem = path.name.rpartition("-")[0]
        (folder / f"{stem}-01234567.json.gz").write_bytes(
            gzip.compress(json.dumps(content).encode())
        )


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
    assert [line[:5] for line in lines if line.startswith("[")] == ["[4/4]"]
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
    if "versions" in parts:
        told = lines.pop(0)
        assert told.startswith("1 cells were computed with other versions and are computed again; ")
        assert "torch 1 -> 2" in told
    assert lines[0].startswith("1 cells are to be computed")
    assert lines[1].startswith("[1/1] piqa, items 0 to 0")
