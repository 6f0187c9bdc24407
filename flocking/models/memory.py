"""How much memory a process may use, which a container or a batch system may limit."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from torch import nn

from flocking.models.weights import parts

_MAPS = Path("/proc/self/maps")
# Memory that processes share under a file's name, which does not count as available.
_SHARED = ("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV")
_MEMBERSHIPS = Path("/proc/self/cgroup")  # a line a hierarchy: number:controllers:path
_HIERARCHIES = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes of memory, without swap.

    Attributes
    ----------
    total : int
        What the machine has, or what this process's control groups allow if that is less.
    available : int
        What can be given to this process now.
    """

    total: int
    available: int


def usable_memory() -> Memory:
    """How much memory there is for this process.

    psutil tells what the machine has. Docker, Kubernetes, Slurm and systemd limit a process by
    Linux's control groups, and end it when it uses more.

    Examples
    --------
    >>> 0 < usable_memory().available <= usable_memory().total
    True
    """
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used in _limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def mapped_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights that lie in files mapped into memory.

    The system counts them as available. If it gives them away, each pass reads them from the disk
    again, which stops everything else, too.
    """
    files = _mapped_files()
    found = {}
    for weight in model.parameters():
        for part in parts(weight):
            storage = part.untyped_storage()
            if part.device.type == "cpu" and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    starts = [start for start, _ in files]
    total = 0
    for address, size in found.items():
        place = bisect.bisect_right(starts, address) - 1
        if place >= 0 and address < files[place][1]:
            total += size
    return total


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which files are mapped into this process's memory, in order; Linux alone."""
    found = []
    for line in _lines(_MAPS):
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and not "".join(path).startswith(_SHARED):
            start, _, stop = addresses.partition("-")
            found.append((int(start, 16), int(stop, 16)))
    return sorted(found)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in, in bytes.

    Files are those of version 2, or of version 1
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html).
    """
    for line in _lines(_MEMBERSHIPS):
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:  # version 2 has one hierarchy
            yield from _of_group(_HIERARCHIES, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            yield from _of_group(_HIERARCHIES / "memory", path, *names)


def _of_group(
    root: Path, path: str, limit: str, usage: str, prefix: str
) -> Iterator[tuple[int, int]]:
    """The same for a group and those above it, each of which limits it, too."""
    # (Inside of a container the path may be the host's, of which only the root is to be seen.)
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            yield most, used - _of_files(folder / "memory.stat", prefix)
        if folder == root:
            return


def _of_files(file: Path, prefix: str) -> int:
    """Bytes of files that were read: they are counted, and given away when memory is needed."""
    names = {f"{prefix}{kind}" for kind in ("inactive_file", "active_file", "slab_reclaimable")}
    found = [line.split() for line in _lines(file)]
    return sum(int(value) for key, value in found if key in names)


def _number(file: Path) -> int | None:
    """What a file says; None if there is none, or no limit ("max")."""
    text = "".join(_lines(file))
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system, or not for this user's eyes
        return []
