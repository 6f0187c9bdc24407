"""The ``flocking`` command.

Imports every room, but only inside of the command that needs it, so that help is quick.
"""

from flocking.cli import commands as _study
from flocking.cli import pruned_commands as _prune
from flocking.cli.app import app

__all__ = ["app", "main"]

_REGISTERED = _study, _prune  # each puts its commands on `app`


def main() -> None:
    """Entry point of the ``flocking`` command."""
    app()
