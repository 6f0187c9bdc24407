"""Writing files and folders whole or not at all, whatever ends the process.

New output is written beside its target, within a claim (:mod:`flocking.artifacts.claims`), and
renamed when it is complete. A file takes another file's place in one step. Two folders cannot be
swapped in one step everywhere (Linux has a call for it that not all of its file systems know, and
Python has none), so there is one way for all systems: the old one is set aside into
``.x.zarr.old``, the new one takes its place, and the old one is removed. At every moment the old
or the new is complete on disk; the next command that writes in the same folder finishes or undoes
what was interrupted.

What holds after a kill does not hold after a loss of power: nothing is forced to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flocking.artifacts.claims import (
    LONGEST,
    NOTE,
    OLD,
    SCRAP,
    WRITING,
    BusyError,
    alone_in,
    beside,
    clear,
    is_alive,
    is_ours,
    is_without_note,
    make,
    remove,
    uninterrupted,
    who,
)

_noted: list[list[Path]] = []  # where it is noted what was put in its place
_LEAST_ROOM = 2**20  # bytes that must be free on a disk before anything is computed for it


@contextmanager
def replacing(
    path: Path,
    *more: Path,
    overwrite: bool = True,
    check: Callable[[Path], None] | None = None,
    wait: float = 0.0,
) -> Iterator[Path]:
    """Give a path to write to, and move it to `path` when it is complete.

    Enter it before anything slow: that `path` cannot be written, or that another process is
    writing it, is then said before.

    Parameters
    ----------
    path : Path
        Of a file or folder. A link is followed.
    *more : Path
        Others in the same folder: they are written next to the first one under their own names,
        and are moved to their places, one after the other, when all are complete.
    overwrite : bool
        If false, a file that exists by the time that all are complete stays.
    check : callable, optional
        Refuses, by raising, to replace what is at one of the paths. It is asked before anything
        is written, and again when all is complete, since something may have appeared by then.
    wait : float
        Seconds to wait for another process that is writing `path`.

    Yields
    ------
    Path
        In a folder beside `path`.

    Raises
    ------
    BusyError
        If another process is writing `path`.
    OSError
        If `path` cannot be written.
    """
    given = (path, *more)
    _check(given, check)
    # From the first move on, signals wait until the old ones and the claim are gone.
    with ExitStack() as ending, claimed(path, wait) as claim, ExitStack() as replaced:
        _check(given, check)  # what an interrupted command had set aside may be back
        with _told_of_room(path):
            yield claim / path.name
        wanted = [one for one in given if overwrite or not os.path.lexists(one)]
        for one in wanted:
            if not (claim / one.name).exists():
                raise FileNotFoundError(f"{one} was not written.")
            _open_to_others(claim / one.name, claim / NOTE)
        for one in wanted:
            _check_again(one, one, check)
        ending.enter_context(uninterrupted())
        for one in wanted:
            _put(claim / one.name, one, overwrite, check, replaced)
        if not (path.parent / NOTE).exists():  # inside of a claim, it is not in its place yet
            for places in _noted:
                places.append(path)


@contextmanager
def noting() -> Iterator[list[Path]]:
    """List the first path of each :func:`replacing` that comes to its end meanwhile."""
    places: list[Path] = []
    _noted.append(places)
    try:
        yield places
    finally:
        _noted[:] = [one for one in _noted if one is not places]


def refuse_unwritable(path: Path, wait: float = 60.0) -> None:
    """Raise an OSError if a file cannot be written, before anything is computed for it."""
    with claimed(path, wait):
        pass


def set_aside(path: Path) -> Path:
    """Give a file that is not what it should be another name, so that it is in nobody's way."""
    free = _free_name(path)
    path.rename(free)
    return free


def _free_name(path: Path) -> Path:
    free, number = path.with_name(f"{path.name}.set-aside"), 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.set-aside-{number}")
    return free


# --------------------------------------------------------------------------------------
# Claims


def _check(given: tuple[Path, ...], check: Callable[[Path], None] | None) -> None:
    for path in given:
        if check is not None and os.path.lexists(path):
            check(path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def claimed(path: Path, wait: float = 0.0) -> Iterator[Path]:
    """Keep other processes from writing a file or folder, for what is written in place.

    Parameters
    ----------
    path : Path
        A link is followed. Folders that are missing above it are made, and go again if they are
        empty at the end.
    wait : float
        Seconds to wait for another process that is writing `path`.

    Yields
    ------
    Path
        The claim: a folder, whose content goes at the end.

    Raises
    ------
    BusyError
        If another process is writing `path`.
    OSError
        If `path` cannot be written.
    """
    place, taken = _real(path), False
    claim = beside(place, WRITING)
    with ExitStack() as made:
        try:
            with _said_of(path):
                if len(os.fsencode(place.name)) > LONGEST:
                    raise OSError(f"its name is longer than {LONGEST} bytes")
                _make_parents(place.parent, made)
                if free_bytes(place.parent) < _LEAST_ROOM:
                    raise OSError("no space is left on the disk")
                deadline = time.monotonic() + wait
                while not taken:
                    with uninterrupted():
                        taken = _take(claim, place)
                    if not taken:
                        _wait(path, claim, deadline)
            yield claim
        finally:
            if taken:
                remove(claim)


def free_bytes(folder: Path) -> float:
    """Bytes free on the disk of a folder; infinite where its file system does not tell."""
    room = shutil.disk_usage(folder)
    return room.free if room.total else math.inf


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Let errors name what cannot be written."""
    try:
        yield
    except BusyError:
        raise
    except OSError as problem:
        why = problem.strerror or str(problem)
        raise type(problem)(f"{path} cannot be written ({why}): name another place.") from problem


@contextmanager
def _told_of_room(path: Path) -> Iterator[None]:
    """Let the error of a full disk name what was being written."""
    try:
        yield
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"{path} cannot be written (no space is left on the disk): make room, or name another "
            "place."
        ) from problem


def _make_parents(folder: Path, stack: ExitStack) -> None:
    """Make a folder and those above it; at the end, those go that are empty."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    for above in reversed(missing):
        above.mkdir(exist_ok=True)
        stack.callback(_remove_if_empty, above)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _take(claim: Path, place: Path) -> bool:
    """Make the claim, in place of a dead one if there is one; false if another process has it."""
    with alone_in(place.parent) as alone:
        _sweep(place.parent, alone)
        old = beside(place, OLD)
        for one in (claim, old):
            if is_without_note(one):
                if is_alive(one, alone):
                    return False
                clear(one)
            if os.path.lexists(one) and not is_ours(one):
                raise OSError(f"{one} is in the way, and is not flocking's: move it")
        if os.path.lexists(claim) or os.path.lexists(old):
            return False
        try:
            make(claim, place.name)
        except FileExistsError:
            return False  # where folders cannot be locked, another process was faster
        return True


def _wait(path: Path, claim: Path, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise BusyError(
            f"{path} is being written by {who(claim)}: wait for it, or name another place. "
            f"(If that process no longer runs, remove {claim}.)"
        )
    time.sleep(0.1)


def _sweep(folder: Path, alone: bool) -> None:
    """Settle what dead processes replaced, before what they were writing is removed."""
    found = [path for path in folder.iterdir() if path.name.startswith(".")]
    for kind in (OLD, WRITING, SCRAP):
        for path in found:
            # Another's, in a folder open to all, may not be ours to remove, or has gone meanwhile.
            with contextlib.suppress(OSError):
                if path.name.endswith(f".{kind}") and is_ours(path) and not is_alive(path, alone):
                    if kind == OLD:
                        _settle(path)
                    clear(path)


def _settle(old: Path) -> None:
    """Undo a replacement that was interrupted, if the new one is not in its place."""
    for kept in old.iterdir():
        if kept.name == NOTE:
            continue
        place = old.with_name(kept.name)
        if not os.path.lexists(place):
            kept.rename(place)
        elif os.path.lexists(beside(place, WRITING) / kept.name):
            kept.rename(_free_name(place))  # something else appeared there: both are kept


# --------------------------------------------------------------------------------------
# Moving what is complete


def _put(
    written: Path,
    path: Path,
    overwrite: bool,
    check: Callable[[Path], None] | None,
    replaced: ExitStack,
) -> None:
    """Move what is complete to its place; the old one goes when all are in theirs."""
    place = _real(path)
    if not os.path.lexists(place) or not (written.is_dir() or place.is_dir()):
        try:
            written.replace(place)
        except OSError:
            if overwrite or not os.path.lexists(place):
                raise  # (otherwise another process was faster)
        return
    old = beside(place, OLD)
    with alone_in(place.parent):
        make(old, place.name)
    replaced.callback(remove, old)
    place.rename(old / place.name)
    try:
        # Asked of what was set aside, which nothing else can take the place of any more.
        _check_again(old / place.name, path, check)
        written.rename(place)
    except BaseException:
        (old / place.name).rename(place)
        raise


def _check_again(found: Path, path: Path, check: Callable[[Path], None] | None) -> None:
    try:
        _check((found,), check)
    except ValueError as problem:
        raise ValueError(
            f"{path} is not what was there before: something appeared there meanwhile, which "
            "stays, and what was computed is lost. Choose another name."
        ) from problem


def _open_to_others(path: Path, like: Path) -> None:
    """Give what was written the permissions that a new file has; some libraries give fewer."""
    if os.name != "posix":
        return
    mode = stat.S_IMODE(like.stat().st_mode)
    for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not one.is_symlink():
            wanted = mode | (mode & 0o444) >> 2 if one.is_dir() else mode
            has = stat.S_IMODE(one.stat().st_mode)
            if wanted & ~has:
                one.chmod(has | wanted)
