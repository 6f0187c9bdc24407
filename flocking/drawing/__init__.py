"""A style, and pieces that several figures share.

Numbers come in, matplotlib's artists go out. Imports no other room, and neither torch nor
transformers.
"""

from flocking.drawing.pieces import (
    band,
    below,
    by_layer,
    guide,
    heatmap,
    known,
    legend,
    logarithmic,
    powers_of_two,
)
from flocking.drawing.style import (
    BLUE,
    BY_ALLOCATION,
    BY_REFERENCE,
    BY_SELECTION,
    BY_WEIGHTS,
    CONTROL,
    HINDSIGHT,
    MAGNITUDE,
    OTHERS,
    TRAINED,
    in_style,
    page,
    save,
    titled,
)

__all__ = [
    "BLUE",
    "BY_ALLOCATION",
    "BY_REFERENCE",
    "BY_SELECTION",
    "BY_WEIGHTS",
    "CONTROL",
    "HINDSIGHT",
    "MAGNITUDE",
    "OTHERS",
    "TRAINED",
    "band",
    "below",
    "by_layer",
    "guide",
    "heatmap",
    "in_style",
    "known",
    "legend",
    "logarithmic",
    "page",
    "powers_of_two",
    "save",
    "titled",
]
