"""Printing what users named, so that it shows as text and does nothing to the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from typing import TextIO

import typer

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


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream writes to; None for a file or pipe."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def say(lines: object) -> None:
    """Print lines on standard output; in a terminal they break between words."""
    for line in str(lines).split("\n"):
        typer.echo(broken(printable(line), width_of(sys.stdout)))


def heading(line: str) -> None:
    """Print a line on standard output, bold in a terminal."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    typer.echo(line if plain else typer.style(line, bold=True))


def broken(line: str, width: int | None) -> str:
    """A line, broken between words where it is wider than `width`."""
    if width is None or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def complain(problem: object) -> None:
    """Print an error on standard error, as one line; a terminal's are broken between words."""
    words = " ".join(map(printable, filter(None, (x.strip() for x in str(problem).split("\n")))))
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST]} ... ({len(words)} characters)"
    typer.echo(broken(f"flocking: {words}", width_of(sys.stderr)), err=True)


def counted(number: int, thing: str) -> str:
    """A number of things in words, such as ``1 text`` or ``2,000 texts``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
