"""What GRIFFIN's authors ask, in numbers (Dong, Chen and Chi 2024, arXiv 2404.01365)."""

from __future__ import annotations

import functools
from typing import Any

AUTHORS = ("authors", "authors-greedy")
MOST_ITEMS = 1000  # of summaries
NEW_TOKENS = 128
END = "###"
SAMPLING = {"temperature": 0.3, "top_k": 0, "top_p": 1.0}
SEED = 42


@functools.cache
def rouge_scorer() -> Any:
    """What scores their summaries: ``Rouge`` of the package ``rouge``.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        from rouge import Rouge  # this protocol alone needs it
    except ImportError as problem:
        raise ValueError(
            "the authors' protocol scores summaries by the package rouge: pip install rouge."
        ) from problem
    return Rouge()
