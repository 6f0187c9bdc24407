"""Processes that share one job, as torchrun and accelerate start them."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

# The first to come to the end waits for the last one, however long that takes.
_PATIENCE = timedelta(days=30)


class Processes(NamedTuple):
    """The processes of one job, seen from one of them.

    Attributes
    ----------
    rank, number : int
        Which of them this is, and how many there are.
    group : torch.distributed.ProcessGroup or None
        Through which they speak; None where there is one.
    """

    rank: int = 0
    number: int = 1
    group: Any = None

    def of_first(self, function: Callable[[], Any]) -> Any:
        """What a function returns in the first process; an error in it is one in all.

        The others wait for it, and do not run it.
        """
        if self.group is None:
            return function()
        told: list[Any] = [None, None]
        problem: Exception | None = None
        if self.rank == 0:
            try:
                told[0] = function()
            except Exception as error:
                problem, told[1] = error, f"{type(error).__name__}: {error}"
        with self._hearing():
            dist.broadcast_object_list(told, group=self.group, group_src=0)
        if problem is not None:
            raise problem
        if told[1] is not None:
            raise RuntimeError(f"process 0 of {self.number} failed: {told[1]}")
        return told[0]

    def settle(self, problem: Exception | None) -> None:
        """Wait for all processes; raise an error if this one has one, or else another.

        Raises
        ------
        Exception
            `problem`.
        RuntimeError
            If another process has failed.
        """
        told: list[Any] = [None] * self.number
        if self.group is not None:
            mine = None if problem is None else f"{type(problem).__name__}: {problem}"
            with self._hearing(problem):
                dist.all_gather_object(told, mine, group=self.group)
        if problem is not None:
            raise problem
        for rank, other in enumerate(told):
            if other is not None:
                raise RuntimeError(f"process {rank} of {self.number} failed: {other}")

    def refuse_unlike(self, what: str, value: Any) -> None:
        """Raise a ValueError, in all processes, if they were given different values of something.

        Parameters
        ----------
        what : str
            Its name.
        value : object
            What this process was given: anything that can be sent and compared.
        """
        if self.group is None:
            return
        told: list[Any] = [None] * self.number
        with self._hearing():
            dist.all_gather_object(told, value, group=self.group)
        for rank, other in enumerate(told):
            if other != told[0]:
                raise ValueError(
                    f"process {rank} of {self.number} was given another {what} than process 0: "
                    "give all the same, and they share the texts among themselves."
                )

    @contextmanager
    def _hearing(self, problem: Exception | None = None) -> Iterator[None]:
        """What torch.distributed says when a process is gone, in a sentence; or `problem`."""
        try:
            yield
        except RuntimeError as gone:
            raise problem or RuntimeError(
                f"one of the {self.number} processes ended without a word, or cannot be reached; "
                "start all of them again: the same call goes on with what is done."
            ) from gone


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that this one was started with; one where there are no others.

    They are those of ``torch.distributed``, where the user's program or accelerate has set it up,
    or those that torchrun names in the environment.
    """
    if not dist.is_available():
        yield Processes()
        return
    started = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if started:
        _start()
    try:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield Processes()
            return
        # (A group of our own: what the program uses on GPUs cannot send words.)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            yield Processes(dist.get_rank(), dist.get_world_size(), group)
        finally:
            if not started:
                dist.destroy_process_group(group)
    finally:
        if started:
            dist.destroy_process_group()


_starts = itertools.count()


def _start() -> None:
    """Set up ``torch.distributed``, by what torchrun names in the environment.

    The place where processes leave their addresses for each other outlives this. So each time has
    its own names there: under the same ones, a process would find the addresses of the time before.
    """
    store, rank, number = _meeting_place()
    store = dist.PrefixStore(f"flocking-{next(_starts)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=_PATIENCE)


@functools.cache  # (without torchrun, it is gone when the first process lets go of it)
def _meeting_place() -> tuple[dist.Store, int, int]:
    """Where processes leave their addresses for each other; which this is, of how many."""
    store, rank, number = next(dist.rendezvous("env://", timeout=_PATIENCE))
    store.set_timeout(_PATIENCE)
    return store, rank, number
