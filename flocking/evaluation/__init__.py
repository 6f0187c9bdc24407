"""Tasks by methods by densities: a model and its twins asked, compared, and reported on.

Imports ``pruning``, ``drawing`` and ``artifacts``, and the rooms below; not ``experiments``,
which is on the same floor. Its files are imported by their own names, since most of them need the
lm-evaluation-harness, which is not always there; ``sources`` and ``summary`` do not.
"""

__all__ = ["cells", "harness", "plan", "report", "runner", "sources", "summary"]
