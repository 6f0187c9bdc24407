"""Tables and help at terminals of 60 to 200 columns, and in pipes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import helpers
import pytest
from typer.testing import CliRunner

from flocking.cli import app, printing, tables
from flocking.cli.tables import Column, laid_out

COLUMNS = [
    Column("layer", lambda row: row["layer"]),
    Column("module", lambda row: row["module"], text=True, spare=1),
    Column("relative error of all", lambda row: row["error"]),
    Column("why", lambda row: row["why"], text=True),
    Column("nothing", lambda row: ""),
]
ROWS = [
    {"layer": 3, "module": "model.layers.3.mlp", "error": "0.123±.004", "why": ""},
    {"layer": 1000, "module": "x", "error": "1", "why": "nobody has seen 1,000 of these before"},
]


def test_in_a_pipe_a_row_is_a_line() -> None:
    titles, lines, left = laid_out(COLUMNS, ROWS, None)
    assert titles == ["layer  module              relative error of all  why"]
    assert lines == [
        "    3  model.layers.3.mlp             0.123±.004",
        " 1000  x                                       1  nobody has seen 1,000 of these before",
    ]
    assert not left


@pytest.mark.parametrize("width", range(24, 90))
def test_no_word_and_no_number_is_broken(width: int) -> None:
    titles, lines, left = laid_out(COLUMNS, ROWS, width)
    assert all(len(line) <= width for line in [*titles, *lines]) or width < 28
    words = {word for line in [*titles, *lines] for word in line.split()}
    shown = [column for column in COLUMNS if column not in left]
    expected = {
        word
        for column in shown[: None if "why" in words else 0]
        for row in ROWS
        for word in str(column.show(row)).split()
    }
    assert expected <= words
    assert {"3", "1000", "0.123±.004", "1,000", "nobody"} <= words
    assert ("model.layers.3.mlp" in words) == (not left)
    assert [column.title for column in left] in ([], ["module"])


def test_characters_of_east_asia_take_two_columns() -> None:
    columns = [Column("name", lambda row: row[0], text=True), Column("n", lambda row: row[1])]
    _, lines, _ = laid_out(columns, [("文章", 1), ("abcd", 2)], 60)
    assert lines == ["文章  1", "abcd  2"]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize(
    "command",
    ["record", "demo", "figures", "heatmap", "inspect", "check", "generate", "prune", "evaluate"],
)
def test_help_is_whole_at_any_width(command: str, width: int) -> None:
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=width)
    assert result.exit_code == 0
    assert all(len(line) <= width for line in result.output.splitlines())
    assert "…" not in result.output
    every = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
    names = set(re.findall(r"--[a-z-]+[a-z]", every))
    assert {"--help", "--quiet", "--json"} < names
    assert names == set(re.findall(r"--[a-z-]+[a-z]", result.output))
    # The example can be pasted as it is.
    example = result.output.partition("Example: ")[2]
    assert " ".join(example.replace("\\\n", " ").split()).startswith(f"flocking {command}")
    assert all(line.endswith("\\") for line in example.strip().splitlines()[:-1])


def test_alone_it_shows_its_help() -> None:
    result = CliRunner().invoke(app, [], terminal_width=60)
    assert result.exit_code == 0
    listed = " ".join(result.stdout.partition("Commands:")[2].split())
    assert "record Record texts, one sequence each, into a Zarr store." in listed
    assert "..." not in listed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    helpers.build("llama").save_pretrained(folder)
    helpers.letters("<s> $A").save_pretrained(folder)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX's")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_is_kept_to(
    no_color: bool, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tables, "width_of", lambda stream: 40)
    monkeypatch.setattr(printing, "width_of", lambda stream: 40)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    printing.heading("title")
    tables.print_table(COLUMNS, ROWS)
    printing.say("  a sentence of more than forty characters, which is broken")
    shown = capsys.readouterr().out
    assert ("\x1b[1m" in shown) != no_color
    assert ("\x1b" in shown) != no_color
    assert "(Not shown, for want of room: module.)" in shown
    assert "  a sentence of more than forty\n  characters, which is broken\n" in shown


def test_what_is_printed_in_a_pipe(model: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(model)], env={"COLUMNS": "30"})
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert all(line == line.rstrip() for line in lines)
    assert lines[0].split("  ")[0] == "check"


@pytest.mark.parametrize(("number", "said"), [(0, "0 texts"), (1, "1 text"), (2000, "2,000 texts")])
def test_counted(number: int, said: str) -> None:
    assert printing.counted(number, "text") == said
