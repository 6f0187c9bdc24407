"""Flocking in language models: recording it, measuring it, and using it.

Public names are imported from their rooms when they are first asked for, so that what needs no
model does not wait for torch.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flocking import plotting as plot
    from flocking.analysis import (
        RunningScores,
        RunningStatistic,
        between_consistency,
        between_sequence_overlap,
        bootstrap,
        captured_energy,
        chance_consistency,
        chance_jaccard,
        consistency,
        drift,
        effective_neurons,
        flocking_score,
        jaccard,
        mean_scores,
        prompt_generation_overlap,
        rank_consistency,
        select,
        specificity,
        statistic,
        statistic_of_others,
        weight_magnitude,
    )
    from flocking.checking import check
    from flocking.exploring import explore
    from flocking.feedforward import (
        FeedForward,
        UnsupportedModelError,
        feedforwards,
        observe,
        set_feedforwards,
    )
    from flocking.models import control, load
    from flocking.pruning import (
        Decoder,
        Exported,
        allocate,
        export,
        export_gguf,
        global_statistic,
        griffin,
        perplexity,
        score,
    )
    from flocking.recording import Moments, concat, open_recording, record, save_recording
    from flocking.texts import Passage, passages

__version__ = _version("flocking")

__all__ = [
    "Decoder",
    "Exported",
    "FeedForward",
    "Moments",
    "Passage",
    "RunningScores",
    "RunningStatistic",
    "UnsupportedModelError",
    "allocate",
    "between_consistency",
    "between_sequence_overlap",
    "bootstrap",
    "captured_energy",
    "chance_consistency",
    "chance_jaccard",
    "check",
    "concat",
    "consistency",
    "control",
    "drift",
    "effective_neurons",
    "explore",
    "export",
    "export_gguf",
    "feedforwards",
    "flocking_score",
    "global_statistic",
    "griffin",
    "jaccard",
    "load",
    "mean_scores",
    "observe",
    "open_recording",
    "passages",
    "perplexity",
    "plot",
    "prompt_generation_overlap",
    "rank_consistency",
    "record",
    "save_recording",
    "score",
    "select",
    "set_feedforwards",
    "specificity",
    "statistic",
    "statistic_of_others",
    "weight_magnitude",
]

_ROOMS = {
    "Decoder": "flocking.pruning",
    "Exported": "flocking.pruning",
    "FeedForward": "flocking.feedforward",
    "Moments": "flocking.recording",
    "Passage": "flocking.texts",
    "RunningScores": "flocking.analysis",
    "RunningStatistic": "flocking.analysis",
    "UnsupportedModelError": "flocking.feedforward",
    "allocate": "flocking.pruning",
    "between_consistency": "flocking.analysis",
    "between_sequence_overlap": "flocking.analysis",
    "bootstrap": "flocking.analysis",
    "captured_energy": "flocking.analysis",
    "chance_consistency": "flocking.analysis",
    "chance_jaccard": "flocking.analysis",
    "check": "flocking.checking",
    "concat": "flocking.recording",
    "consistency": "flocking.analysis",
    "control": "flocking.models",
    "drift": "flocking.analysis",
    "effective_neurons": "flocking.analysis",
    "explore": "flocking.exploring",
    "export": "flocking.pruning",
    "export_gguf": "flocking.pruning",
    "feedforwards": "flocking.feedforward",
    "flocking_score": "flocking.analysis",
    "global_statistic": "flocking.pruning",
    "griffin": "flocking.pruning",
    "jaccard": "flocking.analysis",
    "load": "flocking.models",
    "mean_scores": "flocking.analysis",
    "observe": "flocking.feedforward",
    "open_recording": "flocking.recording",
    "passages": "flocking.texts",
    "perplexity": "flocking.pruning",
    "prompt_generation_overlap": "flocking.analysis",
    "rank_consistency": "flocking.analysis",
    "record": "flocking.recording",
    "save_recording": "flocking.recording",
    "score": "flocking.pruning",
    "select": "flocking.analysis",
    "set_feedforwards": "flocking.feedforward",
    "specificity": "flocking.analysis",
    "statistic": "flocking.analysis",
    "statistic_of_others": "flocking.analysis",
    "weight_magnitude": "flocking.analysis",
}


# Public names that are a whole room, whose functions are called as flocking.plot.heatmap.
_WHOLE = {"plot": "flocking.plotting"}


def __getattr__(name: str) -> object:
    """A public name, from its room."""
    value: object
    if name in _WHOLE:
        value = _import_module(_WHOLE[name])
    elif name in _ROOMS:
        value = getattr(_import_module(_ROOMS[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
