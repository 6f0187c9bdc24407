"""Flocking in language models: recording it, measuring it, and using it."""

from importlib.metadata import version as _version

from flocking.feedforward import FeedForward, UnsupportedModelError, feedforwards
from flocking.hooks import observe
from flocking.metrics import (
    chance_consistency,
    consistency,
    effective_neurons,
    flocking_score,
    rank_consistency,
)
from flocking.models import load
from flocking.moments import Moments
from flocking.recording import record
from flocking.texts import Passage, passages

__version__ = _version("flocking")

__all__ = [
    "FeedForward",
    "Moments",
    "Passage",
    "UnsupportedModelError",
    "chance_consistency",
    "consistency",
    "effective_neurons",
    "feedforwards",
    "flocking_score",
    "load",
    "observe",
    "passages",
    "rank_consistency",
    "record",
]
