"""The runs behind the figures, and the figures drawn from them.

Imports ``pruning``, ``drawing`` and ``artifacts``, and the rooms to the left; not ``evaluation``,
which stands beside it.
"""

from flocking.experiments.reproduce import EXPERIMENTS, regenerate

__all__ = ["EXPERIMENTS", "regenerate"]
