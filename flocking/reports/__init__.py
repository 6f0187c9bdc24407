"""Outputs of several models side by side: one table and three figures, and what differs.

Reads what ``flocking evaluate`` and ``flocking figures`` wrote, and runs no model. Imports
``evaluation`` (what of it needs no harness), ``analysis``, ``drawing``, ``artifacts`` and
``texts``; ``experiments`` only by the files that it writes.
"""

from flocking.reports.comparison import by_layer, compared, missing
from flocking.reports.contrasts import contrasted
from flocking.reports.gathering import collect
from flocking.reports.outputs import Difference, Evaluation, Measured, Numbers, Outputs
from flocking.reports.writing import Written, write

__all__ = [
    "Difference",
    "Evaluation",
    "Measured",
    "Numbers",
    "Outputs",
    "Written",
    "by_layer",
    "collect",
    "compared",
    "contrasted",
    "missing",
    "write",
]
