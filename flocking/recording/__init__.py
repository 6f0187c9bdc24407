"""From a model and texts to a Dataset of windowed moments.

Imports ``feedforward`` and ``models``.
"""

from flocking.recording.moments import Moments
from flocking.recording.recorder import record
from flocking.recording.windows import Windows

__all__ = ["Moments", "Windows", "record"]
