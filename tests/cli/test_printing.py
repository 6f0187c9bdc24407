"""Names in errors and tables are shown, and do nothing to the terminal."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flocking.cli import app, main, printing, tables
from flocking.cli.options import one_sentence

RED = "\x1b[31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{RED}red", "\\x1b[31mred"),
        ("a\x07\b\x9b2J\r\n\t\x7f", "a\\x07\\x08\\x9b2J\\r\\n\\t\\x7f"),
        ("\u202eexe.txt\u2066\u2028", "\\u202eexe.txt\\u2066\\u2028"),
        (b"\xff.txt".decode("utf-8", "surrogateescape"), "\\udcff.txt"),
        ("Zoë 文章 🐦\u200d⬛ [b]", "Zoë 文章 🐦\u200d⬛ [b]"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printing.printable(text) == shown


def test_tables_take_cells_as_they_are() -> None:
    column = tables.Column("x", lambda row: row["x"], text=True)
    _, lines, _ = tables.laid_out([column], [{"x": f"{RED}[red]a[/b]"}], 80)
    assert lines == ["\\x1b[31m[red]a[/b]"]


@pytest.mark.parametrize(
    "command",
    [
        ["record", f"{RED}.txt", "-o", "x.zarr"],
        ["record", "a.txt", "-o", f"a.txt/{RED}\n"],
        ["figures", "--only", f"{RED}\n"],
        ["generate", "x", "--method", RED],
        ["generate", "x", "--dtype", RED],
        ["inspect", f"/{RED}"],
        ["evaluate", "--tasks", RED, "--out", "out"],
    ],
)
def test_errors_show_names_as_text(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Birds")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "\x1b" not in result.output
    assert "\\x1b[31m" in result.output or "x1b" in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        [RED],
        [f"--{RED}"],
        ["record", f"--{RED}"],
    ],
)
def test_errors_of_options_show_them_as_text(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert RED not in result.output
    assert "x1b[31m" in result.output
    assert result.output.startswith("flocking: ")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("recrod", "recrod"),
        ("record a.txt", "--output"),
        ("record -o x.zarr", "FILE"),
        ("record a.txt -o x.zarr --windw 3", "--windw"),
        ("record a.txt -o x.zarr --window half", "--window"),
        ("prune --density half -o x", "--density"),
        ("generate a b", "extra arguments (b)"),
        ("generate a --method", "--method"),
        ("inspect --json=3", "--json"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(command: str, said: str) -> None:
    result = CliRunner().invoke(app, command.split(), prog_name="flocking")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("flocking: ")
    assert said in result.stderr
    assert result.stderr.endswith(" --help).\n")
    assert "(see flocking " in result.stderr
    assert result.stderr.count("\n") == 1


def test_long_errors_are_cut(capsys: pytest.CaptureFixture) -> None:
    printing.complain("x" * 5000 + "\n" + "y")
    assert capsys.readouterr().err.endswith("x ... (5002 characters)\n")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted_commands_end_with_the_shells_code(number: int, code: int) -> None:
    cleaned = []

    @one_sentence
    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    single = typer.Typer()
    single.command()(command)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    given = signal.signal(number, usual)  # a shell's background ignores some
    try:
        assert CliRunner().invoke(single, []).exit_code == code
        assert cleaned
        assert signal.getsignal(number) == usual
        if number == signal.SIGHUP:  # as under nohup
            signal.signal(number, signal.SIG_IGN)
            assert CliRunner().invoke(single, []).exit_code == 0
    finally:
        signal.signal(number, given)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_second_signal_does_not_disturb_what_the_first_began() -> None:
    cleaned = []

    @one_sentence
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    single = typer.Typer()
    single.command()(command)
    given = [
        (number, signal.signal(number, usual))
        for number, usual in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
        )
    ]
    try:
        result = CliRunner().invoke(single, [])
    finally:
        for number, handler in given:
            signal.signal(number, handler)
    assert cleaned
    assert result.exit_code == 130
    assert result.output == "flocking: interrupted: nothing was written.\n"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(130)])
def test_an_interruption_outside_of_a_command_is_one_line_too(
    end: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted() -> None:
        raise end

    monkeypatch.setattr("flocking.cli.registered.app", interrupted)
    monkeypatch.setattr("flocking.cli.ending.told", [])
    given = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGINT, given)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "flocking: interrupted: nothing was written.\n"


def test_whoever_reads_the_output_may_stop() -> None:
    @one_sentence
    def command() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    single = typer.Typer()
    single.command()(command)
    result = CliRunner().invoke(single, [])
    assert result.exit_code == 1
    assert result.output == ""
