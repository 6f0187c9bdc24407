"""Finding, proving and hooking a model's feed-forward (FF) blocks.

A block is located by its structure and proved by its function; :func:`observe` hands out the
input of its down-projection. Imports ``models``, and what that may import.
"""

from flocking.feedforward.block import FeedForward, UnsupportedModelError
from flocking.feedforward.discovery import (
    copy_with_blocks,
    feedforwards,
    inherit,
    inherit_blocks,
    keeping_blocks,
    set_feedforwards,
)
from flocking.feedforward.hooks import anything_is_watched, is_observed, observe, select_layers
from flocking.feedforward.moe import Routed, by_interface, row_norms
from flocking.feedforward.projections import (
    copy_cut,
    cut,
    dense,
    fused_rows,
    is_plain,
    stored_transposed,
    width,
)

__all__ = [
    "FeedForward",
    "Routed",
    "UnsupportedModelError",
    "anything_is_watched",
    "by_interface",
    "copy_cut",
    "copy_with_blocks",
    "cut",
    "dense",
    "feedforwards",
    "fused_rows",
    "inherit",
    "inherit_blocks",
    "is_observed",
    "is_plain",
    "keeping_blocks",
    "observe",
    "row_norms",
    "select_layers",
    "set_feedforwards",
    "stored_transposed",
    "width",
]
