"""Warnings that point at the user's line, however deep inside of the package they arise."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Issue a UserWarning at the innermost line of the call stack that is not the package's."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_of(package, frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_of(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")
