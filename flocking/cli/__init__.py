"""The ``flocking`` command.

Imports every room, but only inside of the command that needs it, so that help is quick.
"""

from flocking.cli.commands import app, main

__all__ = ["app", "main"]
