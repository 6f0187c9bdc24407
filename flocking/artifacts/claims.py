"""Claims: who is writing what, so that no two do, and what a killed process left is known.

A claim on ``x.zarr`` is the folder ``.x.zarr.writing`` beside it, which one process only
can make. A note in it says who that is, and what it writes stays there until it is complete.
The folder goes when it is done. If the process was killed, the next one that writes in the same
folder finds the note, sees that its owner is gone, and removes what it left.

A folder without a note may be anybody's. So a claim comes with its note and goes with it, in one
step each: it is made and removed under a name that no one else uses, ``.flocking-....scrap``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import psutil

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    fcntl: Any = None
else:
    fcntl = _fcntl

NOTE = "flocking-owner.json"
WRITING, OLD, SCRAP = "writing", "old", "scrap"
LONGEST = 255  # bytes in a file's name
_YOUNG = 10.0  # seconds in which a claim without a note may still get one
_CLOCK = 2.0  # seconds by which the start of a process may seem to move
_SCRAP = re.compile(rf"\.flocking-[0-9a-f]{{32}}\.{SCRAP}")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # what systems say of a name that is taken

_held: dict[Path, IO[str]] = {}  # this process's claims, and their notes, which are locked


class BusyError(OSError):
    """Another process is writing the same file or folder."""


def beside(place: Path, kind: str) -> Path:
    """The folder beside a target that is a claim on it, or in which the old one is set aside."""
    name = f".{place.name}.{kind}"
    if len(os.fsencode(name)) > LONGEST:
        name = f".{hashlib.sha256(os.fsencode(place.name)).hexdigest()}.{kind}"
    return place.with_name(name)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Keep other processes from claims in a folder for a moment; gives whether that is so.

    Two that find the same dead claim could otherwise each remove what the other then made. The
    system ends this lock with the process, so that it cannot be left behind; some have none.
    """
    if fcntl is None:
        yield False
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _locked_within(handle, 5.0)
    finally:
        os.close(handle)


def _locked_within(handle: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return False


def make(folder: Path, target: str) -> None:
    """Make a claim, or a folder to set the old one aside in, with a note that says who made it.

    Raises
    ------
    FileExistsError
        If it is there.
    """
    owner = {
        "about": "flocking makes this folder while it writes, and removes it afterwards.",
        "target": target,
        "host": platform.node(),
        "process": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    scrap = _scrap_beside(folder)
    with ExitStack() as undoing:
        undoing.callback(discard, scrap)
        scrap.mkdir()
        note = undoing.enter_context((scrap / NOTE).open("x", encoding="utf-8"))
        json.dump(owner, note)
        note.flush()
        if fcntl is None:
            note.close()  # Windows renames no folder with an open file in it
        else:
            with contextlib.suppress(OSError):
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            scrap.rename(folder)
        except OSError as problem:
            if problem.errno not in _TAKEN:
                raise
            raise FileExistsError(problem.errno, problem.strerror, str(folder)) from problem
        undoing.pop_all()
    _held[folder] = note


def _scrap_beside(folder: Path) -> Path:
    """A name for a folder that is ours whatever is in it, and to be removed."""
    return folder.with_name(f".flocking-{uuid4().hex}.{SCRAP}")


def remove(folder: Path) -> None:
    """Remove a claim of this process, or the folder in which an old one was set aside."""
    with uninterrupted(), alone_in(folder.parent):
        clear(folder)


def clear(folder: Path) -> None:
    """Remove a claim, and what other threads still write into it.

    Other processes are to be kept out by :func:`alone_in`: one could make its claim in between.
    """
    if (note := _held.pop(folder, None)) is not None:
        note.close()
    owner, scraps = owner_of(folder), list[Path]()
    for pause in (0.0, 0.05, 0.2, 0.5):
        time.sleep(pause)
        is_there = folder.exists() and owner_of(folder) in ({}, owner)
        if not is_there and not any(scrap.exists() for scrap in scraps):
            return
        if is_there:
            with contextlib.suppress(OSError):
                scraps.append(folder.rename(_scrap_beside(folder)))
        for scrap in scraps:
            discard(scrap)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder, or what can be removed of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def owner_of(folder: Path) -> dict[str, Any]:
    """What a claim's note says; empty without one that can be read."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def is_ours(folder: Path) -> bool:
    """Whether a folder named like a claim is one: a note in it says so, and what it is a claim on.

    A folder without one may be anybody's, unless it has the name that claims come and go by.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    if _SCRAP.fullmatch(folder.name):
        return True
    target = owner_of(folder).get("target")
    return isinstance(target, str) and folder in (
        beside(folder.with_name(target), WRITING),
        beside(folder.with_name(target), OLD),
    )


def is_without_note(folder: Path) -> bool:
    """Whether a claim is empty, or its note is, as earlier versions left it when killed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return {path.name for path in folder.iterdir()} <= {NOTE} and not owner_of(folder)


def is_alive(folder: Path, alone: bool) -> bool:
    """Whether the owner of a claim still runs, or may, on another machine.

    Parameters
    ----------
    folder : Path
    alone : bool
        Whether no other process is just making it, see :func:`alone_in`.
    """
    owner = owner_of(folder)
    if not {"host", "process", "process_started"} <= owner.keys():
        return not alone and time.time() - folder.stat().st_mtime < _YOUNG
    if owner["host"] != platform.node():
        return True
    if owner["process"] == os.getpid() and folder in _held:
        return True
    return _runs(owner["process"], owner["process_started"]) or _is_locked(folder / NOTE)


def _runs(process: object, started: object) -> bool:
    """Whether there is this process, and not another one with its number."""
    if not isinstance(process, int) or not isinstance(started, int | float):
        return False
    if process == os.getpid():
        return False  # it holds no such claim
    try:
        found = psutil.Process(process)
        same = abs(found.create_time() - started) < _CLOCK
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def _is_locked(note: Path) -> bool:
    """Whether a process holds the note's lock, as its owner does for as long as it lives."""
    if fcntl is None:
        return False
    try:
        with note.open(encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def who(folder: Path) -> str:
    """The owner of a claim, in words."""
    owner = owner_of(folder)
    process, host = owner.get("process", "unknown"), owner.get("host", "unknown")
    since = f", since {owner['since']}" if "since" in owner else ""
    return f"process {process} on {host}{since}"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait that would end the process, for the moment in which files are moved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers of signals in the main thread only
        return
    came: list[int] = []
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
