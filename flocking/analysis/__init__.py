"""Measures of a recording, and selections made from it.

How similar tokens are, which neurons a statistic keeps, how well these serve another part of the
text, and intervals for all of it. Imports ``recording``, ``feedforward`` and ``models``.
"""

from flocking.analysis.between import between_consistency, common_windows, specificity
from flocking.analysis.densities import densities_in_words, density_by_layer, kept_count
from flocking.analysis.metrics import (
    chance_consistency,
    consistency,
    effective_neurons,
    flocking_score,
    named,
    rank_consistency,
)
from flocking.analysis.overlap import (
    between_sequence_overlap,
    captured_energy,
    chance_jaccard,
    jaccard,
    overlap_of,
    prompt_generation_overlap,
)
from flocking.analysis.prompt_lengths import drift
from flocking.analysis.provenance import is_changed, made_of, mark_of, marked, said_by
from flocking.analysis.running import (
    STATIC,
    RunningScores,
    RunningStatistic,
    energy_per_token,
    in_words,
    mean_scores,
)
from flocking.analysis.selection import (
    magnitude,
    select,
    statistic,
    statistic_of_others,
    top_k,
    weight_magnitude,
    where_reached,
)
from flocking.analysis.texts_in_turn import Batch, in_turn
from flocking.analysis.uncertainty import bootstrap, bounds, intervals, tails

__all__ = [
    "STATIC",
    "Batch",
    "RunningScores",
    "RunningStatistic",
    "between_consistency",
    "between_sequence_overlap",
    "bootstrap",
    "bounds",
    "captured_energy",
    "chance_consistency",
    "chance_jaccard",
    "common_windows",
    "consistency",
    "densities_in_words",
    "density_by_layer",
    "drift",
    "effective_neurons",
    "energy_per_token",
    "flocking_score",
    "in_turn",
    "in_words",
    "intervals",
    "is_changed",
    "jaccard",
    "kept_count",
    "made_of",
    "magnitude",
    "mark_of",
    "marked",
    "mean_scores",
    "named",
    "overlap_of",
    "prompt_generation_overlap",
    "rank_consistency",
    "said_by",
    "select",
    "specificity",
    "statistic",
    "statistic_of_others",
    "tails",
    "top_k",
    "weight_magnitude",
    "where_reached",
]
