"""Results for programs (``--json``), without notices (``--quiet``), and after an interruption."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner, Result

import flocking
from flocking.artifacts import noting, replacing
from flocking.cli import app, session
from flocking.cli.ending import left_behind

FIGURES = Path(__file__).parents[2] / "figures"
PAGE = (Path(__file__).parents[2] / "docs/command-line.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in it, and texts."""
    folder = tmp_path_factory.mktemp("place")
    helpers.build("llama").save_pretrained(folder / "model")
    helpers.letters("<s> $A").save_pretrained(folder / "model")
    (folder / "t.txt").write_text("birds of a feather")
    (folder / "long.txt").write_text("birds of a feather flock together. " * 100)
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object, code: int = 0) -> dict:
    """What a command prints with --json: nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(result.stdout, parse_constant=refused)
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{arguments[0]}` |"))
    assert keys_of(found) <= set(re.findall(r"`(\w+)`", row))
    return found


def keys_of(found: object) -> set[str]:
    """All keys of a document but for layers' numbers and columns of a table."""
    if isinstance(found, list):
        return set().union(*map(keys_of, found))
    if not isinstance(found, dict):
        return set()
    inner = (value for key, value in found.items() if key != "summary")
    return {key for key in found if not key.isdigit()}.union(*map(keys_of, inner))


def test_record(place: Path) -> None:
    out = place / "r.zarr"
    said = document("record", "t.txt", "-o", out, "--model", "model", "--window", 4)
    recording = flocking.open_recording(out)
    assert said == {"output": str(out), "sizes": dict(recording.sizes), "skipped": []}


def test_inspect() -> None:
    said = document("inspect", "model")
    model, _ = flocking.load("model")
    assert said["parameters"] == model.num_parameters()
    assert said["griffin"] is True
    assert said["why_not"] is None
    assert said["active_parameters"] == flocking.griffin(model).report().active_parameters
    assert [block["module"] for block in said["blocks"]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    block = {"kind": "gated", "hidden": 64, "d_ff": 160, "experts": None}
    assert said["blocks"][1].items() >= block.items()


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "proof": {"passed": True, "error": 1.2345678901e-7, "allowed": 1e-4, "reason": ""},
        "batch": {"passed": False, "error": math.nan, "allowed": math.inf, "reason": "why"},
        "selection": {"passed": None, "error": math.nan, "allowed": 1e-4, "reason": "no twin"},
    }
    table = pd.DataFrame.from_dict(rows, orient="index").astype({"passed": "boolean"})
    monkeypatch.setattr(flocking, "check", lambda *given: table)
    said = document("check", "model", code=1)
    assert said["passed"] is False
    assert said["checks"] == [
        {"check": "proof", "passed": True, "error": 1.2345678901e-7, "allowed": 1e-4, "reason": ""},
        {"check": "batch", "passed": False, "error": None, "allowed": None, "reason": "why"},
        {"check": "selection", "passed": None, "error": None, "allowed": 1e-4, "reason": "no twin"},
    ]
    lines = run("check", "model").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["check", "proof", "batch", "selection"]
    assert "FAILED" in lines[2]
    assert "does not apply" in lines[3]


def test_generate() -> None:
    options = ("--model", "model", "--max-new-tokens", 40)
    said = document("generate", "birds", "--compare", *options)
    assert said["prompt"] == "birds"
    full, twin = said["continuations"]
    assert (full["model"], twin["model"]) == ("full model", "GRIFFIN, density 0.5")
    assert full["new_tokens"] == 40
    shown = run("generate", "birds", "--compare", *options).stdout
    for one in (full, twin):
        assert one["text"].strip()
        assert f"birds{one['text']}".rstrip() in shown
    (alone,) = document("generate", "birds", *options[:2], "--max-new-tokens", 1)["continuations"]
    assert alone["tokens_a_second"] is None


def test_prune(tmp_path: Path) -> None:
    said = document("prune", "model", "--texts", "long.txt", "-o", tmp_path / "half")
    assert said["path"] == str(tmp_path / "half")
    assert said["kept"] == {"0": 80, "1": 80}
    assert said["lost"]["ratio_low"] is None  # of fewer than three texts
    smaller, _ = flocking.load(tmp_path / "half")
    assert said["parameters"] == smaller.num_parameters()


def test_figures(tmp_path: Path) -> None:
    for name in ("scores.json", "drift.json"):
        (tmp_path / name).write_text((FIGURES / name).read_text(encoding="utf-8"))
    said = document("figures", "--redraw", "--only", "scores", "--out", tmp_path)
    picture = str(tmp_path / "scores.png")
    told = {"name": "scores", "why": None, "changed": [], "picture": picture, "problem": None}
    assert said == {"figures": [told]}
    only = ("--only", "drift", "--only", "heatmaps")
    checked = document("figures", "--check", *only, "--out", tmp_path, "--model", "model", code=1)
    drift, heatmaps = checked["figures"]
    assert drift["why"].startswith("stale in ")
    assert heatmaps["why"] == "not there"


def test_evaluate(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    item = {"context": "a", "choices": ["b", "c"], "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(item) + "\n")
    said = document(
        *("evaluate", "--tasks", "piqa", "--data-dir", tmp_path, "--out", tmp_path / "out"),
        *("--model", "model"),
    )
    assert said["out"] == str(tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert [row["variant"] for row in said["summary"]] == table["variant"].tolist()
    assert {*said["summary"][0]} == {*table.columns}
    for row, value in zip(said["summary"], table["estimate"], strict=True):
        assert row["estimate"] == pytest.approx(value, rel=1e-5)


def test_an_error_leaves_standard_output_empty() -> None:
    result = run("inspect", "nowhere/x.gguf", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("flocking: ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32(0.1), 0.10000000149011612),
        (np.float64("nan"), None),
        (np.array([1.5, np.nan]), [1.5, None]),
        (pd.NA, None),
        (np.True_, True),
        (np.int64(3), 3),
        (Path("a"), "a"),
        ({1: (None, "x")}, {"1": [None, "x"]}),
    ],
    ids=repr,
)
def test_values_in_what_json_has(value: object, expected: object) -> None:
    assert session.plain(value) == expected
    assert type(session.plain(value)) is type(expected)


# --------------------------------------------------------------------------------------
# Less, and warnings


@pytest.mark.filterwarnings("default")
def test_quiet_leaves_results_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("t.txt", "--model", "model")
    loud = run("record", *given, "-o", "loud.zarr")
    assert "recording:" in loud.stderr
    assert "Loading weights" in loud.stderr
    assert "open it with" in loud.stdout
    quiet = run("record", *given, "-o", "quiet.zarr", "-q")
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout.splitlines()[0].replace("loud", "quiet") + "\n"
    assert "1 sequence, 2 layers" in quiet.stdout
    again = run("record", *given, "-o", "again.zarr")
    assert "recording:" in again.stderr  # the bars are back
    refused = run("record", "none.txt", "-o", "x.zarr", "-q")
    assert refused.exit_code == 2
    assert "none.txt does not exist" in refused.stderr


def test_warnings_are_sentences() -> None:
    single = typer.Typer()
    before = warnings.formatwarning
    shown = []

    @single.command()
    @session.reporting
    def command() -> None:
        """Warn."""
        shown.append(warnings.formatwarning("mind\x1b this.", UserWarning, "x.py", 3))

    assert CliRunner().invoke(single, []).exit_code == 0
    assert shown == ["flocking: warning: mind\\x1b this.\n"]
    assert warnings.formatwarning is before


# --------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (
            ("record", "t.txt", "-o", "new/x.zarr", "--model", "model"),
            "flocking.cli.recording.stream",
        ),
        (("inspect", "model"), "flocking.feedforwards"),
        (("check", "model"), "flocking.check"),
        (("generate", "birds", "--model", "model"), "flocking.griffin"),
        (("prune", "model", "--texts", "long.txt", "-o", "new/half"), "flocking.export"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--json",), ("-q",)])
def test_an_interruption_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    name: str,
    more: tuple[str, ...],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(name, interrupted)
    before = sorted(place.rglob("*"))
    result = run(*arguments, *more)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "flocking: interrupted: nothing was written."
    assert "Traceback" not in result.stderr
    assert sorted(place.rglob("*")) == before


def test_what_is_complete_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scores.json", "drift.json"):
        (tmp_path / name).write_text((FIGURES / name).read_text(encoding="utf-8"))
    said: list[Callable[[], None]] = []

    def second(*lines: object) -> None:
        said.append(lambda: None)
        if len(said) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("flocking.experiments.reproduce.save", lambda *given: second())
    monkeypatch.setattr("flocking.experiments.reproduce.replacing", _only_numbers)
    only = ("--only", "scores", "--only", "drift")
    result = run("figures", "--redraw", *only, "--out", tmp_path)
    assert result.exit_code == 130
    (line,) = [line for line in result.output.splitlines() if line.startswith("flocking: ")]
    assert line == (
        f"flocking: interrupted: {tmp_path}/scores.json is complete; the same command does the "
        "rest; nothing else was written."
    )


def _only_numbers(*places: Path, **options: object):
    """Without pictures, which this test does not draw."""
    return replacing(*[place for place in places if place.suffix in (".json", ".md")])


def test_what_was_written_is_noted(tmp_path: Path) -> None:
    with noting() as outer:
        with noting() as inner, replacing(tmp_path / "a") as partial:
            partial.write_text("x")
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / "b"):
            raise ZeroDivisionError
    assert outer == inner == [tmp_path / "a"]
    with replacing(tmp_path / "c") as partial:
        partial.write_text("x")
    assert outer == [tmp_path / "a"]


def test_words_of_an_interruption() -> None:
    assert left_behind([], True) == "interrupted: nothing was written."
    one, two = left_behind([Path("a")], False), left_behind([Path("a"), Path("b")], False)
    assert one == "interrupted: a is complete; nothing else was written."
    assert two == "interrupted: a, b are complete; nothing else was written."
