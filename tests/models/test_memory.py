"""How much memory a process may use: what the machine has, or what its control groups allow."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from flocking.models import memory
from flocking.models.memory import Memory, mapped_bytes, usable_memory

MACHINE = psutil.virtual_memory()._replace(total=64_000, available=40_000)

# Files of a system, and what a process may use there.
SYSTEMS = {
    "none": ({}, (64_000, 40_000)),
    "version 2": (
        {
            "cgroup": "0::/job\n",
            "job/memory.max": "8000\n",
            "job/memory.current": "3000\n",
            "job/memory.stat": "anon 1000\ninactive_file 500\nactive_file 1500\n",
        },
        (8000, 7000),
    ),
    "version 2, without a limit": (
        {"cgroup": "0::/\n", "memory.max": "max\n", "memory.current": "3000\n"},
        (64_000, 40_000),
    ),
    "a limit that is wider than what is free": (
        {"cgroup": "0::/\n", "memory.max": "60000\n", "memory.current": "3000\n"},
        (60_000, 40_000),
    ),
    "a limit of a group above": (
        {
            "cgroup": "0::/slurm/job/step\n",
            "slurm/job/memory.max": "8000\n",
            "slurm/job/memory.current": "3000\n",
            "slurm/job/step/memory.max": "max\n",
            "slurm/job/step/memory.current": "2000\n",
        },
        (8000, 5000),
    ),
    "several limits": (
        {
            "cgroup": "0::/job/step\n",
            "job/memory.max": "8000\n",
            "job/memory.current": "7500\n",
            "job/step/memory.max": "6000\n",
            "job/step/memory.current": "2000\n",
        },
        (6000, 500),
    ),
    "version 1": (
        {
            "cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
            "memory/job/memory.limit_in_bytes": "8000\n",
            "memory/job/memory.usage_in_bytes": "3000\n",
            "memory/job/memory.stat": (
                "inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 70\n"
            ),
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "50000\n",
        },
        (8000, 5570),
    ),
    "the host's path, inside of a container": (
        {
            "cgroup": "4:memory:/docker/0123\n",
            "memory/memory.limit_in_bytes": "8000\n",
            "memory/memory.usage_in_bytes": "3000\n",
        },
        (8000, 5000),
    ),
    "more in use than is allowed now": (
        {"cgroup": "0::/\n", "memory.max": "2000\n", "memory.current": "3000\n"},
        (2000, 0),
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_limits_of_control_groups_count(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = SYSTEMS[system]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_MEMBERSHIPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_HIERARCHIES", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: MACHINE)
    assert usable_memory() == Memory(*expected)


def test_here_it_is_no_more_than_the_machine_has() -> None:
    found = usable_memory()
    assert 0 < found.available <= found.total <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is mapped")
def test_weights_that_are_mapped_from_files_are_counted_once(tmp_path: Path) -> None:
    """psutil counts them as available, whether they are in use or not."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 100), "b": torch.nn.Linear(64, 100)})
    assert mapped_bytes(model) == 0
    place, count = tmp_path / "w'ö \n.bin", 3 * 6400
    place.write_bytes(bytes(4 * count))
    mapped = torch.from_file(str(place), shared=False, size=count, dtype=torch.float32)
    model.a.weight = torch.nn.Parameter(mapped[6400:12800].view(100, 64))
    model.b.weight = torch.nn.Parameter(mapped[12800:].view(100, 64))
    assert mapped_bytes(model) == 4 * count
    del model.a.weight, model.b.weight
    assert mapped_bytes(model) == 0
