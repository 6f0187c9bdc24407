"""How a variant of a model is written."""

from __future__ import annotations


def label(method: str, density: float) -> str:
    """A variant as it is written in a plan: ``full``, ``topk@0.5``."""
    return method if method == "full" else f"{method}@{density:g}"
