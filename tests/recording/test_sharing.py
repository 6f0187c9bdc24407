"""Runs of several processes, which share the texts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from streams import TEXTS, Ended, assert_same_values, by_block, ending_after, stream

import flocking

SHARE = """
import os, sys, time
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import helpers, streams
from flocking.recording import growing

path, dies = sys.argv[1], sys.argv[2:]
rank = int(os.environ["RANK"])
if dies[:1] == ["out"]:
    path = path.replace(".zarr", str(rank) + ".zarr")
texts = streams.TEXTS
if dies[:1] == ["share"]:
    texts = texts[rank::2]
elif dies[:1] in (["last"], ["late"]):
    texts = [*texts[:-1], texts[rank]]
if dies[:1] == ["late"] and rank == 1:  # it comes to the last block when the other wrote it
    put = growing.GrowingStore.write
    def late(self, rows, *args):
        put(self, rows, *args)
        while not (self.state(slice(16, 21)) > 0).all():
            time.sleep(0.05)
    growing.GrowingStore.write = late
if dies and dies[0] == os.environ["RANK"]:
    write = growing.GrowingStore.write
    def writing(self, rows, *args):
        if dies[1:] == ["killed"]:
            os.kill(os.getpid(), 9)
        raise RuntimeError("the machine is gone")
    growing.GrowingStore.write = writing
streams.stream(path, texts)
"""


def share(path: Path, count: int, *dies: str) -> list[subprocess.CompletedProcess[str]]:
    """Run it in several processes, as torchrun starts them."""
    here = Path(__file__).parent
    program = SHARE.format(paths=[str(here), str(here.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--standalone", "--no-python", sys.executable, "-c", program, str(path), *dies]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_three_processes_write_what_one_does(tmp_path: Path, one_thread: None) -> None:
    expected = by_block("llama", TEXTS)
    ended = share(tmp_path / "x.zarr", 3)
    assert ended.returncode == 0, ended.stderr
    assert_same_values(flocking.open_recording(tmp_path / "x.zarr").load(), expected)


def test_a_process_that_dies_is_named_and_others_go_on_without_it(
    tmp_path: Path, one_thread: None
) -> None:
    expected = by_block("llama", TEXTS)
    path = tmp_path / "x.zarr"
    ended = share(path, 2, "1")
    assert ended.returncode != 0
    assert "the machine is gone" in ended.stderr
    with pytest.warns(UserWarning, match="13 of 21 texts are recorded so far"):
        so_far = flocking.open_recording(path)
    assert so_far.sequence.values.tolist() == [*range(8), *range(16, 21)]
    assert_same_values(stream(path).load(), expected)  # alone


def test_a_process_that_is_killed_is_told_of_by_the_others(tmp_path: Path) -> None:
    here = Path(__file__).parent
    program = SHARE.format(paths=[str(here), str(here.parent)])
    command = [sys.executable, "-c", program, str(tmp_path / "x.zarr"), "1", "killed"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    )
    told = first.communicate(timeout=300)[1]
    second.communicate(timeout=300)
    assert second.returncode == -9
    assert first.returncode == 1
    assert "one of the 2 processes ended without a word" in told


@pytest.mark.parametrize("other", ["out", "share", "last", "late"])
def test_processes_that_were_given_other_things_are_told(tmp_path: Path, other: str) -> None:
    """Such as a share of the texts, or a store, for each."""
    ended = share(tmp_path / "x.zarr", 2, other)
    assert ended.returncode != 0
    what = "out" if other == "out" else "texts"
    assert f"ValueError: process 1 of 2 was given another {what} than process 0" in ended.stderr
    if other not in ("last", "late"):
        assert not list(tmp_path.iterdir())
        return
    with pytest.warns(UserWarning, match="x.zarr is not finished"):
        flocking.open_recording(tmp_path / "x.zarr")


def test_several_go_on_with_what_was_begun_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    path = tmp_path / "x.zarr"
    expected = by_block("llama", TEXTS)
    with monkeypatch.context() as patch:
        ending_after(patch, 12)
        with pytest.raises(Ended):
            stream(path, iter(TEXTS))
    ended = share(path, 2)
    assert ended.returncode == 0, ended.stderr
    assert_same_values(flocking.open_recording(path).load(), expected)


AGAIN = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import streams
for number in range(3):
    streams.stream(sys.argv[1] + f"/{{number}}.zarr")
assert not torch.distributed.is_initialized()
"""


def test_one_program_records_several_times(tmp_path: Path) -> None:
    here = Path(__file__).parent
    program = AGAIN.format(paths=[str(here), str(here.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "--no-python", sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for number in range(3):
        assert flocking.open_recording(tmp_path / f"{number}.zarr").sizes["sequence"] == 21
