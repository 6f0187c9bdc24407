"""The command `flocking compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import model_outputs as made
import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("pyarrow", reason="items are kept as Parquet")

from flocking.cli import app

PAGE = (Path(__file__).parents[2] / "docs/command-line.md").read_text(encoding="utf-8")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with outputs of two models to run commands in."""
    monkeypatch.chdir(tmp_path)
    made.evaluated(tmp_path / "small", "small-model", 1_000_000)
    made.drawn(tmp_path / "small", "small-model", "scores", "loss_by_method")
    newer = {**made.VERSIONS, "torch": "2.14.0"}
    made.evaluated(tmp_path / "large", "large-model", 9_000_000, versions=newer)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_command(inside: Path) -> None:
    result = run("small", "large", "-o", "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["model", "parameters", "tasks", "figures"]
    assert lines[1].split() == ["small-model", "1,000,000", "3", "scores,", "loss_by_method"]
    assert lines[2].split() == ["large-model", "9,000,000", "3"]
    assert "Outputs differ in torch: 2.13.0 of small-model; 2.14.0 of large-model." in lines
    assert "large-model was not measured on scores, loss_by_method." in lines
    assert "scores_by_size.svg in out" in lines[-2]
    assert lines[-1] == "Next: read out/compared.md, which has all of it."
    assert (inside / "out" / "scores_by_size.png").exists()
    quiet = run("small", "large", "-o", "out", "-q")
    assert quiet.stdout.splitlines() == lines[:-1]


def test_for_programs(inside: Path) -> None:
    result = run("small", "large", "-o", "out", "--density", "0.25", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    row = next(line for line in PAGE.splitlines() if line.startswith("| `compare` |"))
    assert {*said, *said["models"][0]} <= set(re.findall(r"`(\w+)`", row))
    assert said["out"] == "out"
    assert said["files"][0] == "out/compared.csv"
    assert [one["model"] for one in said["models"]] == ["small-model", "large-model"]
    assert said["models"][0]["tasks"] == ["piqa", "wikitext_16", "wikitext_256"]
    assert said["differences"] == [
        "Outputs differ in torch: 2.13.0 of small-model; 2.14.0 of large-model."
    ]
    assert said["missing"] == ["large-model was not measured on scores, loss_by_method."]
    assert said["not_drawn"] == [
        "loss_by_energy is not drawn: no output has loss_by_method.json, at density 0.25."
    ]
    rows = said["summary"]
    assert {row["model"] for row in rows} == {"small-model", "large-model"}
    assert rows[0]["chance"] == 0.5
    assert any(row["chance"] is None for row in rows)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-o out", "Missing argument"),
        ("small large", "Missing option"),
        ("small nowhere -o out", "nowhere does not exist: name a folder that flocking evaluate"),
        ("small file -o out", "file is a file: name a folder that flocking evaluate"),
        ("small empty -o out", "empty holds nothing that is compared"),
        ("small -o file", "--output file is a file: name a folder."),
        ("small --output=", "--output names no file or folder: give it a name."),
        ("small -o file/below", "cannot be written"),
        ("small -o out --density 0", "--density 0: give a density above 0 and at most 1."),
        ("small -o out --density nan", "--density nan: give a density above 0 and at most 1."),
        ("small -o out --density 0.3", "density=0.3: nothing was measured at it: give one of 0.25"),
    ],
)
def test_what_is_refused_is_one_sentence(inside: Path, command: str, message: str) -> None:
    before = sorted(inside.rglob("*"))
    result = run(*command.split())
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1
    assert sorted(inside.rglob("*")) == before


def test_outputs_that_do_not_fit_together(inside: Path) -> None:
    items = made.items_of(1)
    others = items.assign(item=items["item"] + 30)
    made.evaluated(inside / "large", "large-model", 9_000_000, others)
    result = run("small", "large", "-o", "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "flocking: small and large do not have the same items of piqa (30 and 30): evaluate both "
        "with the same --limit and documents, or leave one out.\n"
    )
    (inside / "large" / "items.parquet").write_bytes(b"no")
    result = run("small", "large", "-o", "out", "--json")
    assert result.stdout == ""
    assert result.stderr.startswith("flocking: large/items.parquet cannot be read (")
    assert not (inside / "out").exists()


def test_nothing_but_a_comparison_is_replaced(inside: Path) -> None:
    out = inside / "out"
    out.mkdir()
    (out / "compared.md").write_text("mine")
    result = run("small", "-o", "out")
    assert result.exit_code == 2
    assert "compared.md exists and is not a comparison of flocking: choose another" in result.output
    assert [path.name for path in out.iterdir()] == ["compared.md"]


def test_outputs_are_not_touched(inside: Path) -> None:
    before = {path: path.read_bytes() for path in inside.rglob("*") if path.is_file()}
    assert run("small", "large", "-o", "small").exit_code == 0  # beside the outputs
    assert {path: path.read_bytes() for path in before} == before
    assert run("small", "large", "-o", "small").exit_code == 0
