"""Which file of a model's folder an error comes from, and which field of it: found by trying.

Libraries that read these files raise errors of all kinds, most of which name neither. What the
error goes away without is what it comes from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PATIENCE = 20.0  # seconds; each trial may take one, of a model with many layers
_LARGEST = 2**22  # bytes of a file whose fields are tried: a vocabulary has no fields that help


class Suspect(NamedTuple):
    """Where an error comes from: a file and, if `field` is not empty, a field of its JSON."""

    file: str
    field: str = ""
    value: object = None


def find_suspect(
    folder: Path, files: Sequence[str], read: Callable[[Path], object]
) -> Suspect | None:
    """The file, or field of one, without which ``read(folder)`` does not raise its error.

    Parameters
    ----------
    folder : Path
        It is not changed: what is tried is tried on a copy.
    files : sequence of str
        Names of all files that `read` reads, those first that it can do without.
    read : callable
        Raises the same error each time.
    """
    with tempfile.TemporaryDirectory() as place:
        for name in files:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(place) / name)
        trial = _Trial(Path(place), read, time.monotonic() + _PATIENCE)
        if trial.error is None:  # it comes from other files
            return None
        there = [name for name in files if (Path(place) / name).exists()]
        found = next((found for name in there if (found := trial.field_of(name))), None)
        found = found or next((Suspect(name) for name in there if trial.helps_without(name)), None)
        return found or next((Suspect(name) for name in there if trial.is_enough(name)), None)


class _Trial:
    """Reads a copy of a folder again and again, each time without something else."""

    def __init__(self, folder: Path, read: Callable[[Path], object], deadline: float) -> None:
        self.folder, self.read, self.deadline = folder, read, deadline
        self.error = self._attempt()

    def helps_without(self, name: str) -> bool:
        """Whether all is well if that file is not there."""
        file = self.folder / name
        content = file.read_bytes()
        file.unlink()
        try:
            return self._attempt() is None
        finally:
            file.write_bytes(content)

    def is_enough(self, name: str) -> bool:
        """Whether the error comes up with that file alone."""
        with tempfile.TemporaryDirectory() as place:
            shutil.copyfile(self.folder / name, Path(place) / name)
            return self._attempt(Path(place)) == self.error

    def field_of(self, name: str) -> Suspect | None:
        """A field of a JSON file without which the error does not come up."""
        file = self.folder / name
        raw = file.read_bytes()
        try:
            content = json.loads(raw) if len(raw) <= _LARGEST else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict):
            return None
        try:
            found = self._path(file, content, ())
        finally:
            file.write_bytes(raw)
        if found is None:
            return None
        value: Any = content
        for key in found:
            value = value[key]
        return Suspect(name, ".".join(found), value)

    def _path(
        self, file: Path, content: dict[str, Any], above: tuple[str, ...]
    ) -> tuple[str, ...] | None:
        """Keys that lead to the field, below `above`, as far down as they can be told."""
        others: tuple[str, ...] | None = None
        inner: Any = content
        for key in above:
            inner = inner[key]
        for key in sorted(inner, key=lambda key: not self._speaks_of(key, inner[key])):
            if time.monotonic() > self.deadline:
                break
            path = (*above, key)
            file.write_text(json.dumps(_without(content, path)), encoding="utf-8")
            error = self._attempt()
            if error is None:
                deeper = isinstance(inner[key], dict) and self._path(file, content, path)
                return deeper or path
            # With two faults, the other one's error comes up without the first.
            if not above and error != self.error and self._speaks_of(key, inner[key]):
                others = others or path
        return others

    def _speaks_of(self, key: str, value: object) -> bool:
        """Whether the error has a field's name or value in it."""
        words = set(_words(self.error or ""))
        return key in words or (isinstance(value, str | int | float) and str(value) in words)

    def _attempt(self, folder: Path | None = None) -> str | None:
        try:
            self.read(folder or self.folder)
        except Exception as problem:  # of whatever kind: that is why this is here
            return f"{type(problem).__name__}: {problem}"
        return None


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        yield word.strip("`'\"()[]{}<>,:;!?=.")
        yield from (part.strip("`'\"()[]{}<>,:;!?.") for part in word.split("="))


def _without(content: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    if rest:
        return {**content, first: _without(content[first], rest)}
    return {key: value for key, value in content.items() if key != first}
