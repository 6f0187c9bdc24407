"""The ``flocking`` command.

Imports every room, but only inside of the command that needs it, so that help is quick.
"""

from __future__ import annotations

import io
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flocking.cli.registered import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``flocking`` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # (Where it is not UTF-8, a character that it lacks would end a command that did its work.)
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from flocking.cli.registered import app

        app()
    except KeyboardInterrupt:
        _say_interrupted()
        raise SystemExit(130) from None
    except SystemExit as end:  # of typer, which says nothing when it is interrupted itself
        if end.code == 130:
            _say_interrupted()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt


def _say_interrupted() -> None:
    """Say it where no command has: before one began, or after it has ended."""
    from flocking.cli.ending import told

    if not told:
        print("flocking: interrupted: nothing was written.", file=sys.stderr)


def __getattr__(name: str) -> object:
    """The command itself, whose modules are imported when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flocking.cli.registered import app

    return app
