"""Full float32, whatever precision the user has chosen for products of matrices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")


class _InUse:
    """How many contexts are open at the moment, in all threads: the settings are the process's."""

    def __init__(self) -> None:
        self.changing = threading.Lock()
        self.running = 0
        self.restored = ExitStack()


_in_use = _InUse()


@contextmanager
def full_precision() -> Iterator[None]:
    """A context in which float32 is multiplied as float32.

    ``torch.set_float32_matmul_precision("high")`` lets models be faster, at the price of some
    digits, which sums over many tokens should not pay. The user's settings are back when the last
    thread has left.
    """
    with _in_use.changing:
        if not _in_use.running:
            _set_aside(_in_use.restored)
        _in_use.running += 1
    try:
        yield
    finally:
        with _in_use.changing:
            _in_use.running -= 1
            if not _in_use.running:
                _in_use.restored.close()


def _set_aside(restored: ExitStack) -> None:
    """Change the settings that reduce the precision, to be restored by what is given."""
    backends: Any = torch.backends  # (its parts' attributes are made as it is imported)
    # What is not set itself follows the one before it, and shall do so afterwards.
    places = (backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in places]
    if not {*before} & {*_REDUCED}:
        return
    restored.callback(_restore, places, before)
    # The older setting first, since torch refuses to read one of the two if they disagree.
    if (older := _older_setting()) in ("high", "medium"):
        torch.set_float32_matmul_precision("highest")
        restored.callback(torch.set_float32_matmul_precision, older)
    for backend in places:
        if backend.fp32_precision in _REDUCED:
            backend.fp32_precision = "ieee"


def _older_setting() -> str:
    """That of ``torch.set_float32_matmul_precision``; empty where only the newer one was used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def _restore(places: tuple[Any, ...], before: list[str]) -> None:
    for backend, precision in zip(places, before, strict=True):
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision
