"""Small tables for people, as text and as HTML, in the words of what is shown.

The HTML has no colours and loads nothing: it takes a notebook's own, light or dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows, right: Sequence[int] = ()) -> str:
    """Rows as lines of text, with columns of one width.

    Parameters
    ----------
    rows : list of list of str
        All of one length.
    right : list of int
        Columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(rows: Rows, caption: str = "", *, head: Sequence[str] = ()) -> str:
    """Rows as a table: the first cell of each is its name. All texts are escaped.

    Parameters
    ----------
    rows : list of list of str
    caption : str
        Stands above the table.
    head : list of str
        Names of the columns, if they have any.
    """
    left, line = "style='text-align:left'", "style='text-align:left;white-space:nowrap'"
    above = f"<caption {line}><b>{html.escape(caption)}</b></caption>" if caption else ""
    named = "".join(f"<th {left} scope='col'>{html.escape(name)}</th>" for name in head)
    if named:
        named = f"<thead><tr>{named}</tr></thead>"
    body = []
    for first, *others in rows:
        cells = "".join(f"<td {left}>{html.escape(cell)}</td>" for cell in others)
        body.append(f"<tr><th {left} scope='row'>{html.escape(first)}</th>{cells}</tr>")
    # (Pages without a doctype would draw the texts of tables in black, also on black.)
    return f"<table style='color:inherit'>{above}{named}<tbody>{''.join(body)}</tbody></table>"
