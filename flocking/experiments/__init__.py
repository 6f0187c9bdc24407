"""The runs behind the figures, and the figures drawn from them.

Imports ``pruning``, ``plotting``, ``drawing`` and ``artifacts``, and the rooms below; not
``evaluation``, which is on the same floor.
"""

from flocking.experiments.reproduce import EXPERIMENTS, Outcome, check, redraw, regenerate, unmade

__all__ = ["EXPERIMENTS", "Outcome", "check", "redraw", "regenerate", "unmade"]
