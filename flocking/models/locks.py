"""One thread at a time for what changes how a model runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_guard = threading.Lock()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Let other threads that want the same model wait until the end of the ``with``.

    Hooks, training flags and the generators of random numbers belong to all threads, so that no
    two may use them on one model. A thread may enter again what it has entered.
    """
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield
