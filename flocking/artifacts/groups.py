"""Files that make one output together: replaced together, and nothing else in their folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flocking.artifacts.writing import replacing

_PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class FileGroup:
    """The files of one kind of output: tables, and figures as PNG and SVG.

    Attributes
    ----------
    tables : tuple of str
        Names of files that are always there.
    figures : tuple of str
        Names, without an ending, of figures that may be there.
    is_ours : callable
        Whether a file is of such an output. One that cannot be read, and raises an OSError or a
        ValueError, is not.
    what : str
        What is said of one that is not, such as "is not a report: choose another --out".
    """

    tables: tuple[str, ...]
    figures: tuple[str, ...]
    is_ours: Callable[[Path], bool]
    what: str

    def paths(self, folder: Path, figures: Sequence[str] | None = None) -> list[Path]:
        """All files with these figures, or with all that there may be, in a folder."""
        drawn = self.figures if figures is None else figures
        pictures = [f"{name}{suffix}" for name in drawn for suffix in _PICTURES]
        return [folder / name for name in (*self.tables, *pictures)]

    def refuse_foreign(self, folder: Path) -> None:
        """Raise a ValueError if there is a file in a folder that has one of the names only."""
        for path in self.paths(folder):
            self._refuse(path)

    @contextmanager
    def replacing(self, folder: Path, figures: Sequence[str], wait: float = 0.0) -> Iterator[Path]:
        """Give a folder to write to; its files are moved to theirs when all are complete.

        A figure that was there before, and is not drawn any more, is removed.

        Parameters
        ----------
        folder : Path
            Where the files are to be.
        figures : sequence of str
            Those that are written.
        wait : float
            As of :func:`replacing`.

        Yields
        ------
        Path

        Raises
        ------
        ValueError
            For files in the folder that are of something else.
        OSError
            As :func:`replacing`.
        """
        self.refuse_foreign(folder)
        places = self.paths(folder, figures)
        with replacing(*places, check=self._refuse, wait=wait) as first:
            yield first.parent
        for path in set(self.paths(folder)) - set(places):
            path.unlink(missing_ok=True)

    def _refuse(self, path: Path) -> None:
        if os.path.lexists(path) and not self._is_ours(path):
            raise ValueError(f"{path} exists and {self.what}.")

    def _is_ours(self, path: Path) -> bool:
        try:
            return self.is_ours(path)
        except (OSError, ValueError):  # it cannot be read as what its name says
            return False
