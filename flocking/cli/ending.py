"""How a command ends when it is interrupted: what it began to write is removed first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

told: list[str] = []  # what was said of interruptions
_PATIENCE = 10.0  # seconds in which a second Ctrl-C does not disturb what the first began


class Ended(SystemExit):
    """The end of a command by a signal; its code is the shell's for that."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that closes, end a command as Ctrl-C does.

    The exit code is the shell's for that signal: 143 for SIGTERM. A signal that is ignored, as
    under nohup, or that has another handler, is left alone. What the first signal has begun is
    not disturbed by another one that follows shortly.
    """
    first: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] < _PATIENCE:
            return
        first[:] = [time.monotonic()]
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(128 + number)

    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
    numbers = {
        getattr(signal, name): usual.get(name, signal.SIG_DFL)
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if hasattr(signal, name)
    }
    if threading.current_thread() is not threading.main_thread():
        numbers = {}  # handlers belong to the main thread
    before = {
        number: signal.signal(number, end)
        for number, handler in numbers.items()
        if signal.getsignal(number) == handler
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def left_behind(written: Sequence[Path], goes_on: bool, *said: str) -> str:
    """What an interrupted command has written, and how to go on.

    Parameters
    ----------
    written : list of Path
        Files and folders that are complete.
    goes_on : bool
        Whether the same command does only what is not there.
    *said : str
        What the command itself says of it, instead.
    """
    told.append(said[0] if said else _words(written, goes_on))
    return told[-1]


def _words(written: Sequence[Path], goes_on: bool) -> str:
    if not written:
        return "interrupted: nothing was written."
    more = f" and {len(written) - 3} more" if len(written) > 3 else ""
    named = ", ".join(map(str, written[:3]))
    are = "is" if len(written) == 1 else "are"
    rest = "; the same command does the rest" if goes_on else ""
    return f"interrupted: {named}{more} {are} complete{rest}; nothing else was written."
