"""The packaged passages, texts of clearly different kinds, and reading of text files."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


class Passage(str):
    """A text with a name and a description; otherwise a plain ``str``.

    Attributes
    ----------
    name : str
        Short name, such as ``"fiction"``.
    description : str
        What the text is, in one line.

    Examples
    --------
    >>> passage = flocking.passages()[0]
    >>> isinstance(passage, str)
    True
    >>> passage.name, passage.description
    ('code', 'Python program: ...')
    """

    name: str
    description: str


def passages() -> list[Passage]:
    """Twelve texts of different kinds, in alphabetical order of their names.

    They were written for this project. Each is between 1,750 and 2,100 tokens long for the
    embedded model: dialogue, essay, exposition, fiction, German prose, instructions, legal prose,
    letters, a log, mathematics, source code and reportage.

    Returns
    -------
    list of Passage

    Examples
    --------
    >>> [passage.name for passage in flocking.passages()]
    ['code', 'dialogue', 'essay', ...]
    >>> flocking.record(model, flocking.passages()[:2], progress=False).sizes["sequence"]
    2
    """
    found = []
    folder = files("flocking") / "data" / "passages"
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        description, _, text = path.read_text(encoding="utf-8").partition("\n\n")
        passage = Passage(text)
        passage.name, passage.description = path.name.removesuffix(".txt"), description
        found.append(passage)
    return found


def decoded(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark; a ValueError names `where` if it fails."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{where} is not text in UTF-8 (byte {problem.start}): convert it first."
        ) from problem


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with any line endings; a ValueError names it if it is not text."""
    return decoded(path.read_bytes(), str(path)).replace("\r\n", "\n")
