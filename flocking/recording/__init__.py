"""From a model and texts to a recording: a Dataset of windowed moments.

``dataset`` knows the schema. Imports ``feedforward`` and ``models``.
"""

from flocking.recording.dataset import (
    COORDINATES,
    FIRST,
    GENERATION,
    MOMENT_DIMS,
    PROMPT,
    VARIABLES,
    coordinates_of,
    require,
)
from flocking.recording.moments import Moments
from flocking.recording.recorder import check_numbers, record
from flocking.recording.windows import Windows

__all__ = [
    "COORDINATES",
    "FIRST",
    "GENERATION",
    "MOMENT_DIMS",
    "PROMPT",
    "VARIABLES",
    "Moments",
    "Windows",
    "check_numbers",
    "coordinates_of",
    "record",
    "require",
]
