"""Pictures of a recording: ``flocking.plot``.

Data in, axes out, as in seaborn: each function takes a recording (or what a measure returned),
draws it with the public measures on `ax`, or on new axes, and returns the axes. ``scores`` and
``drift`` need several panels: they take and return an array of axes, of a new figure by default.
The committed figures are made with the same functions. Nothing is computed here but means over
sequences and layers, and the user's own style is left as it is.

>>> texts = flocking.passages()[:2]
>>> recording = flocking.record(
...     model, texts, window=16, max_tokens=65, relative=[1], ranks=True, progress=False
... )
>>> axes = flocking.plot.scores(recording)
>>> ax = flocking.plot.heatmap(recording, sequence=0)

Imports ``analysis``, ``recording`` and ``drawing``; not ``pruning``, which is on the same floor.
"""

from flocking.plotting.later import drift
from flocking.plotting.layers import overlap, scores
from flocking.plotting.of_neurons import experts, selection
from flocking.plotting.of_tokens import heatmap

__all__ = ["drift", "experts", "heatmap", "overlap", "scores", "selection"]
