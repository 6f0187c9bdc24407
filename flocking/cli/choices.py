"""Names that options take, for the completion of command lines, which may import no room.

What is accepted is decided elsewhere; tests/cli/test_completion.py keeps both the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

FIGURES = (
    *("heatmaps", "scores", "sequence_overlap", "generation", "drift", "text_kinds"),
    *("token_order", "loss_by_prompt", "loss_by_density", "loss_by_method", "loss_by_batch"),
    *("loss_by_reference", "loss_by_allocation", "loss_by_distance", "atlas"),
    *("loss_by_lengths", "overlap_by_density"),
)
METHODS = ("topk", "sampled", "half-sampled", "random", "magnitude")
EVALUATED = (
    *("full", *METHODS, "static", "global-local", "static-domain"),
    *("refreshed-16", "refreshed-64", "shared-4", "shared-16"),
)
TASKS = (
    *("hellaswag", "piqa", "copa", "arc_easy", "arc_challenge", "boolq", "coqa", "gsm8k", "xsum"),
    *("cnn_dailymail", "qasper", "wikitext", "news"),
)
FIXED_METHODS = ("static", "global-local", "magnitude")
DOWN_TYPES = ("Q8_0", "Q5_0", "Q4_0", "F16", "BF16", "F32")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
SCOPES = ("shared", "sequence")
ON_ERROR = ("stop", "skip")
PROTOCOLS = ("context", "last-token", "authors", "authors-greedy")


def one_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of these names."""

    def found(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return found


def several_of(names: Sequence[str], equals: Sequence[str] = ()) -> Callable[[str], list[str]]:
    """Completion of an option that takes several of these names, with commas between them.

    With `equals`, each may be said for one of those alone, as in ``boolq=last-token``.
    """

    def found(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        task, sign, value = last.rpartition("=")
        there = before.split(",")
        begun = [name for name in names if name.startswith(value) and name not in there]
        named = [f"{one}=" for one in equals if one.startswith(last)] if not sign else []
        return [f"{before}{comma}{task}{sign}{name}" for name in begun] + [
            f"{before}{comma}{name}" for name in named
        ]

    return found
