"""The command `flocking evaluate`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import flocking.models
from flocking.artifacts import replacing
from flocking.cli import app
from flocking.evaluation import runner, sources
from flocking.evaluation.plan import Plan

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"


def test_command(shallow: tuple, tmp_path: Path) -> None:
    arguments = ["evaluate", "--tasks", "piqa,boolq", "--methods", "topk,magnitude@0.75"]
    arguments += ["--protocol", "boolq=last-token", "--limit", "2,boolq=1"]
    arguments += ["--model", shallow[0].name_or_path]
    arguments += ["--data-dir", str(TASKS), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert items.groupby("task")["item"].nunique().to_dict() == {"piqa": 2, "boolq": 1}
    assert set(items["protocol"]) == {"context", "last-token"}
    assert "| boolq, last-token, acc | 1 |" in (tmp_path / "tables.md").read_text()
    _check_source(sources.read(tmp_path / "source.json"), shallow[0])
    again = CliRunner().invoke(app, arguments)
    assert "6 of 6 cells are there already." in again.output
    _check_source(sources.read(tmp_path / "source.json"), shallow[0])  # also if nothing is asked
    for path in (tmp_path / "cells").iterdir():
        content = json.loads(gzip.decompress(path.read_bytes()))
        content["key"]["code"] = "0123456789abcdef"
        path.write_bytes(gzip.compress(json.dumps(content).encode()))
    again = CliRunner().invoke(app, [*arguments, "--keep-older"])
    assert "6 of 6 cells are there already, 6 of them of older code." in again.output
    assert "† Computed by older code" in (tmp_path / "tables.md").read_text()


def _check_source(source: sources.Source, model: tf.PreTrainedModel) -> None:
    """What the evaluation of `test_command` says of itself, against the model and the plan."""
    assert source.parameters == model.num_parameters()
    projections = {id(p): p.numel() for name, p in model.named_parameters() if ".mlp." in name}
    assert source.ff_parameters == sum(projections.values())
    assert (source.layers, set(source.d_ff)) == (4, {1536})
    assert source.identity == flocking.models.identity(model.name_or_path)
    assert source.versions["torch"] == torch.__version__
    settings = {"": "context", "boolq": "last-token"}, {"": 2, "boolq": 1}
    plan = Plan(["piqa", "boolq"], protocol=settings[0], limit=settings[1], data_dir=TASKS)
    expected = {
        asked.name: sources.Asked(asked.protocol, asked.limit, asked.digest(), asked.limit)
        for asked in plan.questions()
    }
    assert source.tasks == expected


@pytest.mark.parametrize("finished", [0, 1, 5])
def test_command_interrupted(
    finished: int, shallow: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        for number in range(finished):
            with replacing(tmp_path / "cells" / f"{number}.json") as partial:
                partial.write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", interrupted)
    arguments = ["evaluate", "--tasks", "piqa", "--data-dir", str(TASKS), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    (line,) = [line for line in result.output.splitlines() if line.startswith("flocking: ")]
    rest = "complete; the same command does the rest; nothing else was written."
    said = {0: "nothing was written.", 1: f"0.json is {rest}", 5: f"2.json and 2 more are {rest}"}
    assert line.startswith("flocking: interrupted: ")
    assert line.endswith(said[finished])
    assert len([*tmp_path.glob("cells/*")]) == finished


def test_command_refuses_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> tuple:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flocking.cli.commands.load", load)
    out = tmp_path / "out"

    def said(*arguments: str) -> str:
        common = ["evaluate", "--tasks", "piqa", "--data-dir", str(TASKS), "--out", str(out)]
        result = CliRunner().invoke(app, [*common, *arguments])
        assert result.exit_code == 2, result.output
        return result.output

    assert "there is no method 'best'" in said("--methods", "best")
    assert "there is no task 'nope'" in said("--tasks", "piqa,nope")
    assert "boolq has a limit or protocol and is not one" in said("--limit", "2,boolq=1")
    assert "calibration: nowhere.txt does not exist" in said(
        "--calibration", "nowhere.txt", "--methods", "static"
    )
    assert "nowhere: this folder does not exist" in said("--data-dir", "nowhere")
    assert "--limit: 'few' is not a number" in said("--limit", "few")
    assert "--limit 1,2: give one for all" in said("--limit", "1,2")
    assert "--densities: 'half' is not a number" in said("--densities", "half")
    assert "--batch-size 0" in said("--batch-size", "0")
    assert "densities [2.0]: give a density" in said("--densities", "2")
    assert "densities [nan]: give a density" in said("--densities", "nan")
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    assert "file is a file: name a folder" in said("--out", str(tmp_path / "file"))
    assert "cannot be written" in said("--out", str(tmp_path / "file" / "below"))
    out.mkdir()
    (out / "cells").write_text("mine")
    assert "cells/any.json cannot be written" in said()
    (out / "cells").unlink()
    (out / "summary.csv").write_text("mine")
    assert "summary.csv exists and is not a report of flocking" in said()
    assert (out / "summary.csv").read_text() == "mine"
    (out / "summary.csv").unlink()
    (out / "cells").mkdir()
    pictures = ("quality_by_method.png", "quality_by_density.svg")
    for name in ("tables.md", "items.parquet", "source.json", *pictures):
        (out / name).write_text("mine")
        assert f"{name} exists and is not a report of flocking" in said()
        (out / name).unlink()
