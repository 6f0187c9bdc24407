"""The command with all of its commands on it."""

from flocking.cli import commands as _study
from flocking.cli import comparing as _compare
from flocking.cli import picture_commands as _draw
from flocking.cli import pruned_commands as _prune
from flocking.cli.front import app

__all__ = ["app"]

_REGISTERED = _study, _draw, _prune, _compare  # each puts its commands on `app`
