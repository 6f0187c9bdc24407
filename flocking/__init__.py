"""Flocking in language models: recording it, measuring it, and using it."""

from importlib.metadata import version as _version

from flocking.calibration import global_statistic
from flocking.checking import check
from flocking.decoding import Decoder
from flocking.feedforward import FeedForward, UnsupportedModelError, feedforwards
from flocking.griffin import griffin
from flocking.hooks import observe
from flocking.metrics import (
    between_consistency,
    chance_consistency,
    consistency,
    effective_neurons,
    flocking_score,
    rank_consistency,
    specificity,
)
from flocking.models import control, load
from flocking.moments import Moments
from flocking.overlap import (
    between_sequence_overlap,
    captured_energy,
    chance_jaccard,
    drift,
    jaccard,
    prompt_generation_overlap,
    select,
    statistic,
    statistic_of_others,
    weight_magnitude,
)
from flocking.recording import record
from flocking.scoring import perplexity, score
from flocking.texts import Passage, passages
from flocking.uncertainty import bootstrap

__version__ = _version("flocking")

__all__ = [
    "Decoder",
    "FeedForward",
    "Moments",
    "Passage",
    "UnsupportedModelError",
    "between_consistency",
    "between_sequence_overlap",
    "bootstrap",
    "captured_energy",
    "chance_consistency",
    "chance_jaccard",
    "check",
    "consistency",
    "control",
    "drift",
    "effective_neurons",
    "feedforwards",
    "flocking_score",
    "global_statistic",
    "griffin",
    "jaccard",
    "load",
    "observe",
    "passages",
    "perplexity",
    "prompt_generation_overlap",
    "rank_consistency",
    "record",
    "score",
    "select",
    "specificity",
    "statistic",
    "statistic_of_others",
    "weight_magnitude",
]
