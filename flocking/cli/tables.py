"""Tables for people and for programs: rows of values, shown at any width and never cut."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from flocking.cli.printing import broken, heading, printable, width_of

Row = Mapping[str, Any]
_GAP = 2  # columns of the terminal between those of a table


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    title : str
        Where there is little room, its words stand below each other.
    show : callable
        What its cell of a row says.
    text : bool
        Text stands on the left and is broken between words where there is little room; numbers
        stand on the right and are whole.
    spare : int
        Left out where there is not room for all: the highest first, and 0 never.
    """

    title: str
    show: Callable[[Row], object]
    text: bool = False
    spare: int = 0


def print_table(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print rows under their titles, on standard output; a terminal's width is kept to.

    Columns in which nothing stands are left out, and so are those to spare where the terminal is
    too narrow, which is said below. In a file or pipe, a row is a line.
    """
    width = width_of(sys.stdout)
    titles, lines, left = laid_out(columns, rows, width)
    for line in titles:
        heading(line)
    for line in lines:
        typer.echo(line)
    if left:
        named = ", ".join(column.title for column in left)
        typer.echo(broken(f"(Not shown, for want of room: {named}.)", width))


def laid_out(
    columns: Sequence[Column], rows: Sequence[Row], width: int | None
) -> tuple[list[str], list[str], list[Column]]:
    """Lines of the titles and of the rows, and the columns that found no room."""
    cells = {column: [printable(column.show(row)) for row in rows] for column in columns}
    shown = [column for column in columns if any(cells[column])]
    left: list[Column] = []
    while True:
        widths = _fitted([(column, cells[column]) for column in shown], width)
        spare = [column for column in shown if column.spare]
        if width is None or _total(widths) <= width or not spare:
            break
        left.insert(0, max(spare, key=lambda column: column.spare))
        shown.remove(left[0])
    parts = {
        one: [_words(text, n) for text in (one.title, *cells[one])]
        for one, n in zip(shown, widths, strict=True)
    }
    widths = [max(cells_of(line) for lines in parts[one] for line in lines) for one in shown]
    first, *rest = (
        _row([parts[one][number] for one in shown], shown, widths)
        for number in range(len(rows) + 1)
    )
    return [line for line in first if line], [line for lines in rest for line in lines], left


def _fitted(columns: list[tuple[Column, list[str]]], width: int | None) -> list[int]:
    """Widths of columns: first titles get narrower, then text, but no word and no number."""
    widths = [max(map(cells_of, (column.title, *cells))) for column, cells in columns]
    least = []
    for column, cells in columns:
        words = [word for cell in cells for word in (cell.split() if column.text else [cell])]
        least.append(max(map(cells_of, (*column.title.split(), *words)), default=0))
    for texts in (False, True):
        for place in sorted(range(len(columns)), key=lambda place: -widths[place]):
            column, cells = columns[place]
            too_much = 0 if width is None else _total(widths) - width
            if too_much > 0 and column.text in (texts, True):
                floor = least[place]
                if not texts:  # titles alone
                    floor = max(floor, *map(cells_of, cells))
                widths[place] = max(floor, widths[place] - too_much)
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * max(0, len(widths) - 1)


def _row(parts: list[list[str]], columns: Sequence[Column], widths: list[int]) -> list[str]:
    """Lines of cells side by side."""
    lines = []
    for number in range(max(map(len, parts), default=0)):
        line = []
        for words, column, width in zip(parts, columns, widths, strict=True):
            text = words[number] if number < len(words) else ""
            room = " " * (width - cells_of(text))
            line.append(text + room if column.text else room + text)
        lines.append((" " * _GAP).join(line).rstrip())
    return lines


def _words(text: str, width: int) -> list[str]:
    """Text in lines of at most `width`, broken between words."""
    lines = [""]
    if cells_of(text) <= width:
        return [text]
    for word in text.split():
        if lines[-1] and cells_of(f"{lines[-1]} {word}") > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def cells_of(text: str) -> int:
    """Columns of a terminal that a text takes: those of East Asia have two for a character."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
