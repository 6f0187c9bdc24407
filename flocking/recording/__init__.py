"""From a model and texts to a recording: a Dataset of windowed moments.

``dataset`` knows the schema, ``entrance`` in which form measures get it, whatever was selected
from it; ``stores`` keeps it on disk, and ``streaming`` writes it there, block by block of texts.
Imports ``feedforward``, ``models``, ``texts`` and ``artifacts``.
"""

from flocking.recording.arguments import Options, check_numbers, require_bool, whole_number
from flocking.recording.block_reading import refuse_mixture, renamed
from flocking.recording.continuations import Wanted
from flocking.recording.dataset import (
    COORDINATES,
    FIRST,
    GENERATION,
    MOMENT_DIMS,
    PROMPT,
    SCHEMA_VERSION,
    VARIABLES,
    coordinates_of,
)
from flocking.recording.entrance import canonical, measure, require, whole_neurons
from flocking.recording.grown import done_so_far, is_growing
from flocking.recording.joining import concat
from flocking.recording.locations import Folder
from flocking.recording.moments import Moments
from flocking.recording.recorder import record
from flocking.recording.stores import (
    new_store_path,
    not_a_recording,
    open_recording,
    refuse_store,
    save_recording,
    write_store,
)
from flocking.recording.streaming import stream
from flocking.recording.windows import Windows

__all__ = [
    "COORDINATES",
    "FIRST",
    "GENERATION",
    "MOMENT_DIMS",
    "PROMPT",
    "SCHEMA_VERSION",
    "VARIABLES",
    "Folder",
    "Moments",
    "Options",
    "Wanted",
    "Windows",
    "canonical",
    "check_numbers",
    "concat",
    "coordinates_of",
    "done_so_far",
    "is_growing",
    "measure",
    "new_store_path",
    "not_a_recording",
    "open_recording",
    "record",
    "refuse_mixture",
    "refuse_store",
    "renamed",
    "require",
    "require_bool",
    "save_recording",
    "stream",
    "whole_neurons",
    "whole_number",
    "write_store",
]
