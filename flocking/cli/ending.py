"""How a command ends when it is interrupted: what it began to write is removed first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(SystemExit):
    """The end of a command by a signal; its code is the shell's for that."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that closes, end a command as Ctrl-C does.

    The exit code is the shell's for that signal: 143 for SIGTERM. A signal that is ignored, as
    under nohup, or that has another handler, is left alone.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(128 + number)

    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # handlers belong to the main thread
    before = {
        number: signal.signal(number, end)
        for number in numbers
        if number is not None and signal.getsignal(number) == signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
