"""GRIFFIN: a model's pruned twin, its methods, and what is done with it.

Twins are made, scored, calibrated and decoded with here; selections that hold for all texts are
written as smaller models, for transformers (``exporting``) and llama.cpp (``gguf_files``).
Imports ``analysis`` and the rooms below it; no experiment and no evaluation.
"""

from flocking.pruning.allocation import MEASURED, allocate, first_runs, layer_harms, spread
from flocking.pruning.build import check_refresh, check_scope, griffin, require_prunable
from flocking.pruning.calibration import calibration_texts, global_statistic
from flocking.pruning.decoding import Decoder
from flocking.pruning.exported import Exported
from flocking.pruning.exporting import export, refuse_unexportable
from flocking.pruning.fixed import FIXED, fixed_selection, rounded_densities
from flocking.pruning.gguf_blocks import blocks_of
from flocking.pruning.gguf_files import export_gguf, refuse_unexportable_gguf, type_of_down
from flocking.pruning.halves import split_texts
from flocking.pruning.lost import Lost, measure_lost
from flocking.pruning.methods import DRAWN, METHODS, WITH_REFERENCE, WITHOUT_TEXT
from flocking.pruning.parts import are_pruned
from flocking.pruning.places import refuse_existing
from flocking.pruning.predictions import Compared, compare_predictions
from flocking.pruning.scoring import (
    Protocol,
    cut_of,
    perplexity,
    refuse_unscorable,
    score,
)
from flocking.pruning.together import (
    SharedPrompts,
    branches,
    logits_side_by_side,
    side_by_side,
)
from flocking.pruning.twin import full_model, refresh_of

__all__ = [
    "DRAWN",
    "FIXED",
    "MEASURED",
    "METHODS",
    "WITHOUT_TEXT",
    "WITH_REFERENCE",
    "Compared",
    "Decoder",
    "Exported",
    "Lost",
    "Protocol",
    "SharedPrompts",
    "allocate",
    "are_pruned",
    "blocks_of",
    "branches",
    "calibration_texts",
    "check_refresh",
    "check_scope",
    "compare_predictions",
    "cut_of",
    "export",
    "export_gguf",
    "first_runs",
    "fixed_selection",
    "full_model",
    "global_statistic",
    "griffin",
    "layer_harms",
    "logits_side_by_side",
    "measure_lost",
    "perplexity",
    "refresh_of",
    "refuse_existing",
    "refuse_unexportable",
    "refuse_unexportable_gguf",
    "refuse_unscorable",
    "require_prunable",
    "rounded_densities",
    "score",
    "side_by_side",
    "split_texts",
    "spread",
    "type_of_down",
]
