"""The packaged passages, texts of clearly different kinds, and texts in files."""

from __future__ import annotations

import codecs
import glob
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

STDIN = "-"  # names standard input
_LINES = ".jsonl"  # files of JSON lines end so

_Path = TypeVar("_Path", str, Path)


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


# First bytes of texts in other encodings, the longest first.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decoded(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark; a ValueError names `where` if it fails."""
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            raise ValueError(
                f"{where} is not text in UTF-8 (byte 0), but in {encoding}: convert it first."
            )
    if (zero := raw.find(0)) >= 0:  # valid in UTF-8, but no text has it
        raise ValueError(
            f"{where} is not text in UTF-8 (byte {zero}), since it has NUL bytes as UTF-16, UTF-32 "
            "and files that are no text have: convert it first."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{where} is not text in UTF-8 (byte {problem.start}): convert it first."
        ) from problem


class TextFiles:
    """Texts in files, each read when it is its turn, so that they need not fit in memory.

    Parameters
    ----------
    names : list of str
        Text files in UTF-8, one text each; files of JSON lines, whose names end in ``.jsonl`` and
        of which each line is one text; folders, of which both are taken; and patterns of such,
        such as ``news/**/*.txt``. ``~`` is the user's folder, and ``-`` is standard input, which
        is one text and is read at once, as pipes are.
    field : str
        Of the objects in JSON lines, the field with the text. (A line may be a string, too.)

    Attributes
    ----------
    names : list of str
        Where each text is from: ``a.txt``, or ``b.jsonl:3`` for the third line.

    Raises
    ------
    ValueError
        If there is no such file, none in a folder, or a line is not JSON.
    """

    def __init__(self, names: Sequence[str], field: str = "text") -> None:
        refuse_stdin_twice(names)
        self._field = field
        paths = [p for name in names for p in ([None] if name == STDIN else _files_of(name))]
        # What can be read once is held, as one text.
        pipes = {path for path in paths if path and path.is_fifo()}
        self._held = {path: read_text(path) for path in pipes}
        self._files = [
            (path, None if path is None or path in pipes else _lines_of(path)) for path in paths
        ]
        if not self._files:
            raise ValueError("no file was named: name some with texts.")
        self._stdin = read_stdin() if STDIN in names else ""
        self.names = [
            str(path or STDIN) if lines is None else f"{path}:{line}"
            for path, lines in self._files
            for line in ([0] if lines is None else lines)
        ]
        if not self.names:
            raise ValueError(f"{', '.join(names)}: there is no line with a text: name other files.")

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        """Each text."""
        for path, lines in self._files:
            yield from self._texts_of(path, lines)

    def __getitem__(self, number: int) -> str:
        """A text by its number; of a file of lines, those before it are read again."""
        left = range(len(self))[number]
        for path, lines in self._files:
            if left < (here := 1 if lines is None else len(lines)):
                return next(itertools.islice(self._texts_of(path, lines), left, None))
            left -= here
        raise IndexError(number)

    def _texts_of(self, path: Path | None, lines: list[int] | None) -> Iterator[str]:
        """The texts of one file."""
        if path is None:
            yield self._stdin
        elif path in self._held:
            yield self._held[path]
        elif lines is None:
            yield read_text(path)
        else:
            yield from _texts_of_lines(path, self._field)


def _files_of(name: str) -> list[Path]:
    """The files that a name stands for."""
    if not name:
        raise ValueError("the name of a text file is empty: name text files.")
    path = expanded(Path(name))
    if not (why := why_no_file(path)):
        return [path]
    if why == "is a folder":
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in (".txt", _LINES))
        if not found:
            raise ValueError(f"{path} has no files whose names end in .txt or {_LINES}: name some.")
        return found
    found = _once(map(Path, glob.glob(str(path), recursive=True))) if glob.has_magic(name) else []
    if not found:
        raise ValueError(f"{path} {why}: name a text file, a folder or a pattern.")
    return _once(file for each in found for file in _files_of(str(each)))


def _once(paths: Iterable[Path]) -> list[Path]:
    """Paths in order; of several that lead to one file, by links, only the shortest."""
    by_place: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        by_place.setdefault(os.path.realpath(path), path)
    return sorted(by_place.values())


def has_lines(path: Path) -> bool:
    """Whether a file is one of JSON lines, by its name."""
    return path.suffix.lower() == _LINES


def _lines_of(path: Path) -> list[int] | None:
    """Numbers of the lines that are texts; None where the file is one."""
    if not has_lines(path):
        return None
    with path.open("rb") as file:
        return [number for number, line in enumerate(file, 1) if line.strip()]


def _texts_of_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of_line(line, f"{path}:{number}", field)


def _text_of_line(line: bytes, where: str, field: str) -> str:
    try:
        found = json.loads(decoded(line, where))
    except json.JSONDecodeError as problem:
        raise ValueError(f"{where} is not JSON ({problem}): correct it.") from problem
    if isinstance(found, str):
        return found
    if not isinstance(found, dict):
        raise ValueError(f"{where} is neither an object nor a string: give one a line.")
    if not isinstance(found.get(field), str):
        there = ", ".join(name for name, value in found.items() if isinstance(value, str))
        raise ValueError(
            f"{where} has no text in field {field!r} (texts are in: {there or 'none'}): put it "
            "there, or name its field (--field of flocking record)."
        )
    return str(found[field])


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with any line endings; an error names it if it is not text."""
    return in_lines(decoded(read_bytes(path), str(path)))


def read_stdin() -> str:
    """Text from standard input, with any line endings; an error says if there is none."""
    text = in_lines(decoded(sys.stdin.buffer.read(), "standard input"))
    if not text:
        raise ValueError("standard input is empty: give some text.")
    return text


def refuse_stdin_twice(names: Iterable[str]) -> None:
    """Raise a ValueError if standard input is named more than once."""
    if list(names).count(STDIN) > 1:
        raise ValueError("- stands for standard input, which can be read once: name it once.")


def in_lines(text: str) -> str:
    """A text whose lines end in a line feed alone, whichever system it was written on."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path) -> bytes:
    """What is in a file; a ValueError or OSError says in a sentence why it cannot be read."""
    if why := why_no_file(path):
        raise ValueError(f"{path} {why}: name a text file.")
    try:
        return path.read_bytes()
    except OSError as problem:
        raise OSError(
            f"{path} cannot be read ({problem.strerror or problem}): name a text file."
        ) from problem


def why_no_file(path: str | Path) -> str:
    """Why nothing can be read from a path as from a file; empty if nothing speaks against it."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return dangling(path) or "does not exist"
    except (OSError, ValueError) as problem:
        return f"cannot be read ({getattr(problem, 'strerror', None) or problem})"
    if stat.S_ISDIR(mode):
        return "is a folder"
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        return "is a device or socket, which may never end"
    return "" if os.access(path, os.R_OK) else "cannot be read (Permission denied)"


def dangling(path: str | Path) -> str:
    """Which link on the way to a path leads nowhere; empty if none does."""
    for one in (Path(path), *Path(path).parents):
        if os.path.islink(one) and not os.path.exists(one):
            what = "is" if one == Path(path) else f"is below {one},"
            return f"{what} a link to {os.readlink(one)}, which is not there"
    return ""


def expanded(path: _Path) -> _Path:
    """A path with the user's folder in place of ``~``, unless something of that name is there.

    A shell does this itself, but not within ``--out=~/x`` or quotes.
    """
    if os.path.lexists(path):
        return path
    return type(path)(os.path.expanduser(path))


def check_string(text: str, where: str) -> None:
    """Raise a ValueError that names `where` if a string is no text that can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise ValueError(
            f"{where} has a lone surrogate at character {problem.start}, half of a character: "
            "replace it, with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from problem


_LONGEST_NAME = 255  # characters that file systems allow


def doubt(text: str) -> str:
    """Why a string may not be the text that was meant; empty if nothing speaks against it."""
    if "\0" in text:
        return (
            f"has the character NUL at {text.index(chr(0))}, as UTF-16 and files that are no text "
            "have it when they are read in another encoding: open them with the right one"
        )
    if len(text) <= _LONGEST_NAME and _is_file(text):
        return (
            f"is {text!r}, the name of a file, and is read itself: to read the file, give "
            f"Path({text!r}).read_text(encoding='utf-8')"
        )
    return ""


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # it cannot be a name at all
        return False
