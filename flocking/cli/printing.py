"""Printing what users named, so that it shows as text and does nothing to the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

# Joiners, without which some scripts' words and emoji are other ones.
_HARMLESS = "\u200c\u200d"
_UNPRINTABLE = ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp")
# Of click, or of the copy of it that newer versions of typer bring.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
_LONGEST = 2000  # characters of an error


def printable(text: object) -> str:
    r"""Text with control characters, and others that are not shown, as escapes such as ``\x1b``.

    Terminals take some of these as commands; others turn the order of what is shown around.
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _UNPRINTABLE and character not in _HARMLESS
        else character
        for character in str(text)
    )


class PrintableErrors(TyperGroup):
    """Commands whose complaints about their options show what was given as text."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """As click does."""
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """As click does."""
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except USAGE_ERROR as problem:
        problem.message = printable(problem.message)  # type: ignore[attr-defined]
        raise


def say(line: object) -> None:
    """Print lines on standard output."""
    typer.echo("\n".join(map(printable, str(line).split("\n"))))


def complain(problem: object) -> None:
    """Print an error on standard error, as one line."""
    words = " ".join(map(printable, filter(None, (x.strip() for x in str(problem).split("\n")))))
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST]} ... ({len(words)} characters)"
    typer.echo(f"flocking: {words}", err=True)


def add_row(table: Table, *cells: object) -> None:
    """Add a row to a table, with cells as plain text."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def wide_console() -> Console:
    """A console to print tables on, wide enough for them in a file or pipe."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    return console
