"""Where the store of a growing recording is: a folder on a disk, or the URL of an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import zarr

from flocking.artifacts import claimed, free_bytes
from flocking.recording.inventory import has_files_noted, note_files

_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")  # of zarr's
_CHUNK = re.compile(r"\d+(\.\d+)*")
_URL = re.compile(r"[a-z0-9+]{2,}:/")


class Location(Protocol):
    """A place of a store; its string is its name in messages."""

    def opened(self, mode: Any) -> zarr.Group:
        """The Zarr group there."""

    def is_there(self) -> bool:
        """Whether there is anything."""

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from writing it meanwhile."""

    def make(self, create: Callable[[Location], object]) -> None:
        """Let a function create the store."""

    def refuse_full(self, size: int) -> None:
        """Raise an OSError if there is less room than so many bytes."""

    def tidy(self) -> None:
        """Remove what a killed process left half-written."""

    def chunks(self) -> set[str] | None:
        """Names of the chunks that are there; None where that is not looked at."""

    def finish(self) -> None:
        """Note what has to be there from now on."""

    def is_finished(self) -> bool:
        """Whether that was done."""


class Folder:
    """A folder on a disk.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: Path | None = None

    def __str__(self) -> str:  # noqa: D105
        return str(self.path)

    def opened(self, mode: Any) -> zarr.Group:
        """The Zarr group there."""
        # (Of other paths, zarr would expand "~" itself.)
        return zarr.open_group(self.path.absolute(), mode=mode, zarr_format=2)

    def is_there(self) -> bool:
        """Whether there is anything, be it a link that leads nowhere."""
        return os.path.lexists(self.path)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from writing it; a BusyError if another one does."""
        with claimed(self.path) as self._claim:
            yield

    def make(self, create: Callable[[Location], object]) -> None:
        """Let a function create the store, which is there in one step or not at all."""
        assert self._claim is not None
        partial = self._claim / self.path.name
        create(Folder(partial))
        partial.rename(self.path)

    def refuse_full(self, size: int) -> None:
        """Raise an OSError if the disk has less than so many bytes free."""
        if (free := free_bytes(self.path)) < size:
            raise OSError(
                f"{self} has no room for the next texts, which may take {size:,} bytes, and "
                f"{free:,} are free on the disk: make room, and run the same again, which goes on."
            )

    def tidy(self) -> None:
        """Remove what a killed process left: what zarr had not renamed yet, and empty chunks."""
        for path in self.path.rglob("*"):
            partial, chunk = _PARTIAL.search(path.name), _CHUNK.fullmatch(path.name)
            if partial or (chunk and path.is_file() and not path.stat().st_size):
                path.unlink(missing_ok=True)

    def chunks(self) -> set[str] | None:
        """Names of the chunks that are there."""
        return {
            Path(folder, name).relative_to(self.path).as_posix()
            for folder, _, names in os.walk(self.path)
            for name in names
        }

    def finish(self) -> None:
        """Note which files there are, so that one that is lost is missed."""
        note_files(self.path)

    def is_finished(self) -> bool:
        """Whether it was noted which files there are."""
        return has_files_noted(self.path)


class Url:
    """An address that fsspec knows, such as ``s3://bucket/corpus.zarr``.

    There is no way to keep others from writing there, nor to tell how much room there is.

    Parameters
    ----------
    address : str
    """

    def __init__(self, address: str) -> None:
        if not address.rstrip("/").endswith(".zarr"):
            raise ValueError(
                f"{address}: recordings are Zarr stores, whose names end in .zarr: give such a one."
            )
        self.address = address

    def __str__(self) -> str:  # noqa: D105
        return self.address

    @property
    def options(self) -> dict[str, Any] | None:
        """What fsspec is to be told."""
        return {"auto_mkdir": True} if re.match("(file|local):", self.address) else None

    def opened(self, mode: Any) -> zarr.Group:
        """The Zarr group there.

        Raises
        ------
        ValueError
            If fsspec does not know the address, or lacks a package for it.
        """
        options = self.options
        try:
            return zarr.open_group(self.address, mode=mode, zarr_format=2, storage_options=options)
        except (FileNotFoundError, FileExistsError):
            raise
        except (ImportError, OSError, ValueError) as problem:
            raise ValueError(f"{self.address} cannot be reached ({problem}).") from problem

    def is_there(self) -> bool:
        """Whether a group is there."""
        try:
            self.opened("r")
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Nothing: object stores have no locks."""
        yield

    def make(self, create: Callable[[Location], object]) -> None:
        """Let a function create the store."""
        create(self)

    def refuse_full(self, size: int) -> None:
        """Nothing: object stores do not say."""

    def tidy(self) -> None:
        """Nothing: object stores have no half of an object."""

    def chunks(self) -> set[str] | None:
        """None: it would take long."""
        return None

    def finish(self) -> None:
        """Nothing."""

    def is_finished(self) -> bool:
        """True: the store's own attributes say so."""
        return True


def is_url(path: object) -> bool:
    """Whether this is an address rather than a path."""
    return isinstance(path, str) and _URL.match(path) is not None
