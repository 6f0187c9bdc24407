"""Texts of tokens on an axis: whitespace that is seen, and nothing that a font lacks."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.font_manager import FontProperties, findfont, get_font

_LONGEST = 16  # characters of a token's text that are shown
_SEEN = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "\\r"}


def printed(texts: Iterable[str], font: FontProperties) -> list[str]:
    r"""Texts as they can be drawn in a font, a line each.

    A space is a dot, the end of a line an arrow. Other characters that do not print, or that the
    font lacks, are escaped as in Python (``\u4e2d``). Long texts are cut.
    """
    families = [FontProperties(family=[family]) for family in font.get_family()]
    maps = [get_font(findfont(family)).get_charmap() for family in families]

    def shown(character: str) -> str:
        character = _SEEN.get(character, character)
        known = any(ord(one) in found for one in character for found in maps)
        if known and character.isprintable():
            return character
        return character.encode("unicode_escape").decode("ascii")

    cut = (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in texts)
    return ["".join(map(shown, text)) for text in cut]


def literal(text: str) -> str:
    """A text in which a dollar sign begins no formula."""
    return text.replace("$", "\\$")


def shown(text: str) -> str:
    """The same as a label in a legend, which leaves out those that begin with ``_``."""
    return ("\u200b" if text.startswith("_") else "") + literal(text)
