"""Files that are whole or not there, whatever else writes, ends or is killed meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flocking.artifacts import BusyError, claims, refuse_unwritable, replacing, set_aside, writing


def test_files_take_their_places_together(tmp_path: Path) -> None:
    one, two = tmp_path / "new" / "one.txt", tmp_path / "new" / "two.txt"
    with replacing(one, two) as partial:
        partial.write_text("1")
        partial.with_name("two.txt").write_text("2")
        assert not one.exists()
    assert (one.read_text(), two.read_text()) == ("1", "2")
    with pytest.raises(FileNotFoundError), replacing(two, one) as partial:
        partial.with_name("one.txt").write_text("3")  # and nothing in the place of the other
    assert one.read_text() == "1"
    assert sorted(path.name for path in one.parent.iterdir()) == ["one.txt", "two.txt"]


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("first", "second"):
        with replacing(store) as partial:
            partial.mkdir()
            (partial / name).touch()
        assert [path.name for path in store.iterdir()] == [name]
    with pytest.raises(FileNotFoundError), replacing(store):  # nothing was written
        pass
    assert [path.name for path in store.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_there_by_then_may_stay(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with replacing(store, overwrite=False) as partial:
        partial.mkdir()
        store.mkdir()  # another process was faster
        (store / "theirs").touch()
    assert [path.name for path in store.iterdir()] == ["theirs"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_target_has_one_writer(tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    with replacing(store) as partial:
        for other in (store, tmp_path / "sub" / ".." / "x.zarr"):
            with pytest.raises(BusyError, match=r"x\.zarr is being written by process \d+ on"):
                refuse_unwritable(other, wait=0)
        with replacing(tmp_path / "y.zarr") as another:  # this one is free
            another.mkdir()
        partial.mkdir()
        (partial / "mine").touch()
    assert names(store) == ["mine"]
    assert names(tmp_path) == ["x.zarr", "y.zarr"]


def test_another_writer_can_be_waited_for(tmp_path: Path) -> None:
    path, began = tmp_path / "x.txt", threading.Event()

    def first() -> None:
        with replacing(path) as partial:
            began.set()
            time.sleep(0.3)
            partial.write_text("first")

    thread = threading.Thread(target=first)
    thread.start()
    began.wait()
    with replacing(path, overwrite=False, wait=10):
        assert path.read_text() == "first"
    thread.join()
    assert names(tmp_path) == ["x.txt"]


def test_what_appeared_meanwhile_stays(tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"

    def ours(path: Path) -> None:
        if not (path / "ours").exists():
            raise ValueError(f"{path} exists and is not ours")

    def write(place: Path, appears: Path) -> None:
        with replacing(place, check=ours) as partial:
            partial.mkdir()
            appears.parent.mkdir(exist_ok=True)
            appears.touch()

    with pytest.raises(ValueError, match="something appeared there meanwhile, which stays"):
        write(store, store / "thesis")
    assert (names(tmp_path), names(store)) == (["x.zarr"], ["thesis"])
    with pytest.raises(ValueError, match="exists and is not ours"), replacing(store, check=ours):
        pytest.fail("asked too late")
    (store / "ours").touch()
    with replacing(store, check=ours) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert (names(tmp_path), names(store)) == (["x.zarr"], ["new"])
    with pytest.raises(ValueError, match="meanwhile"):
        write(tmp_path / "y", tmp_path / "y")  # a file in place of a folder
    assert (tmp_path / "y").is_file()


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / ".x.zarr.writing").mkdir()
    (tmp_path / ".x.zarr.writing" / "diary").touch()
    (tmp_path / ".y.zarr.old").write_text("mine")
    wrong = ("file/x", "/proc/x/y", "x.zarr", "y.zarr")
    for path in (tmp_path / name for name in wrong):
        with pytest.raises(OSError, match=r"cannot be written .*: name another place"):
            refuse_unwritable(path)
        with pytest.raises(OSError, match="cannot be written"), replacing(path):
            pytest.fail("said too late")
    assert names(tmp_path / ".x.zarr.writing") == ["diary"]
    refuse_unwritable(tmp_path / "new" / "deep" / "x")
    assert names(tmp_path) == [".x.zarr.writing", ".y.zarr.old", "file"]


def test_a_full_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("usage", (), {"total": 2**40, "free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="no space is left on the disk"):
        refuse_unwritable(tmp_path / "x")


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "real")
    with replacing(tmp_path / "link") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "data" / "real") == ["new"]
    assert names(tmp_path / "data") == ["real"]


def test_permissions_are_those_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "x") as partial:
            partial.mkdir(0o700)
            for name in ("weights", "run"):
                (partial / name).touch(0o600)
            (partial / "run").chmod(0o700)
    finally:
        os.umask(before)
    modes = [
        path.stat().st_mode & 0o777
        for path in (tmp_path / "x", *sorted((tmp_path / "x").iterdir()))
    ]
    assert modes == [0o755, 0o744, 0o644]


def test_a_long_name_has_a_claim_too(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with replacing(path) as partial:
        partial.write_text("1")
    assert names(tmp_path) == [path.name]


def test_unreadable_files_get_other_names(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "x.json").write_text(str(number))
        set_aside(tmp_path / "x.json")
    assert names(tmp_path) == ["x.json.set-aside", "x.json.set-aside-2", "x.json.set-aside-3"]


# --------------------------------------------------------------------------------------
# Killed


def claim(folder: Path, target: str, kind: str = "writing", **owner: object) -> Path:
    """A claim as a process that has ended left it."""
    place = folder / f".{target}.{kind}"
    place.mkdir()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    note = {"host": claims.platform.node(), "process": child.pid, "process_started": 1.0, **owner}
    (place / claims.NOTE).write_text(json.dumps({"target": target, **note}))
    return place


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    (claim(tmp_path, "dead.zarr") / "dead.zarr").mkdir()
    claim(tmp_path, "elsewhere.zarr", host="another machine")
    claim(tmp_path, "mine.zarr", process=os.getpid())  # another start: not this process
    parent = claims.psutil.Process(os.getppid())
    claim(tmp_path, "alive.zarr", process=parent.pid, process_started=parent.create_time())
    for name in (".notes.writing", ".notes.old", ".x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary").touch()
    (tmp_path / ".a.writing").write_text("a file")
    for name in (".book.old", ".draft.writing"):  # as claims are named, with what they would hold
        (tmp_path / name / name.split(".")[1]).mkdir(parents=True)
    (tmp_path / ".empty.old").mkdir()
    refuse_unwritable(tmp_path / "other")
    theirs = [".a.writing", ".alive.zarr.writing", ".book.old", ".draft.writing"]
    theirs += [".elsewhere.zarr.writing", ".empty.old", ".notes.old", ".notes.writing", ".x.old"]
    assert names(tmp_path) == theirs
    with pytest.raises(OSError, match=r"draft\.writing is in the way, and is not flocking's"):
        refuse_unwritable(tmp_path / "draft")
    assert names(tmp_path) == theirs
    with pytest.raises(BusyError, match=r"on another machine: wait .* remove .*\.writing"):
        refuse_unwritable(tmp_path / "elsewhere.zarr", wait=0)


@pytest.mark.parametrize("note", [None, ""])
def test_a_claim_whose_process_died_before_its_note_is_taken_over(
    tmp_path: Path, note: str | None
) -> None:
    (tmp_path / ".x.zarr.writing").mkdir()
    if note is not None:
        (tmp_path / ".x.zarr.writing" / claims.NOTE).write_text(note)
    refuse_unwritable(tmp_path / "x.zarr")
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["noted", "set aside", "replaced"])
def test_an_interrupted_replacement_is_finished_or_undone(tmp_path: Path, moment: str) -> None:
    new = claim(tmp_path, "x.zarr") / "x.zarr"
    old = claim(tmp_path, "x.zarr", "old") / "x.zarr"
    place = tmp_path / "x.zarr"
    (new if moment != "replaced" else place).mkdir()
    (new if moment != "replaced" else place).joinpath("new").touch()
    (place if moment == "noted" else old).mkdir()
    (place if moment == "noted" else old).joinpath("old").touch()
    refuse_unwritable(tmp_path / "other.zarr")
    assert names(tmp_path) == ["x.zarr"]
    assert names(place) == ["new" if moment == "replaced" else "old"]


def test_what_appeared_after_a_kill_stays_and_so_does_the_old(tmp_path: Path) -> None:
    (claim(tmp_path, "x.zarr") / "x.zarr").mkdir()
    old = claim(tmp_path, "x.zarr", "old") / "x.zarr"
    old.mkdir()
    (old / "old").touch()
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / "thesis").touch()
    refuse_unwritable(tmp_path / "other")
    assert names(tmp_path) == ["x.zarr", "x.zarr.set-aside"]
    assert names(tmp_path / "x.zarr") == ["thesis"]
    assert names(tmp_path / "x.zarr.set-aside") == ["old"]


WORK = """
import sys, time
from pathlib import Path
from flocking.artifacts import replacing
from flocking.cli.ending import ended_by_signals

store, picture, files, number = Path(sys.argv[1]), Path(sys.argv[2]), 20, sys.argv[3]
print("started", flush=True)
with ended_by_signals():
    while True:
        with replacing(store) as folder, replacing(picture) as file:
            folder.mkdir()
            for name in range(files):
                (folder / str(name)).write_text(number)
            file.write_text(number)
        print("written", flush=True)
        number = str(int(number) + 1)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment_the_old_or_the_new_is_there(tmp_path: Path, number: int) -> None:
    """Twenty files are of one writing, always; a SIGTERM leaves nothing but the targets."""
    rng, store, picture = random.Random(0), tmp_path / "x.zarr", tmp_path / "x.png"
    for trial in range(8):
        arguments = [sys.executable, "-c", WORK, store, picture, str(1000 * trial)]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        if not trial:
            assert child.stdout.readline() == b"written\n"
        time.sleep(0.02 + 0.1 * rng.random())
        child.send_signal(number)
        assert child.wait() == (-number if number == signal.SIGKILL else 128 + number)
        child.stdout.close()
        if number == signal.SIGTERM:
            assert set(names(tmp_path)) <= {"x.png", "x.zarr"}
        refuse_unwritable(tmp_path / "other")  # what any next command begins with
        assert set(names(tmp_path)) <= {"x.png", "x.zarr"}
        assert names(store) == sorted(map(str, range(20)))
        assert len({path.read_text() for path in store.iterdir()}) == 1
        assert picture.exists()


STEPS = """
import os, sys
from pathlib import Path
from flocking.artifacts import refuse_unwritable, replacing

folder, left = Path(sys.argv[1]), None


def write(number):
    with replacing(folder / "x.zarr") as store, replacing(folder / "x.png") as file:
        store.mkdir()
        for name in "ab":
            (store / name).write_text(number)
        file.write_text(number)


def count(event, arguments):
    global left
    if left is not None and (event == "open" or event.startswith("os.")):
        left -= 1
        if left < 0:
            os._exit(9)


sys.addaudithook(count)
for step in range(10_000):
    write("old")
    if not (child := os.fork()):
        left = step
        write("new")
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    refuse_unwritable(folder / "other")  # what any next command begins with
    assert sorted(os.listdir(folder)) == ["x.png", "x.zarr"], step
    store = {name: (folder / "x.zarr" / name).read_text() for name in "ab"}
    assert store in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"}), (step, store)
    if ended:
        break
assert store == {"a": "new", "b": "new"}
print(step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked before each step")
def test_killed_before_any_step_the_old_or_the_new_is_there(tmp_path: Path) -> None:
    """Each file that is opened, moved or removed, one after the other, is the last but one."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert int(done.stdout) > 40


CROWD = """
import sys, time
from pathlib import Path
from flocking.artifacts import replacing

shared, own, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
until = time.monotonic() + 1.5
while time.monotonic() < until:
    for store in (shared, own):
        with replacing(store, wait=30) as folder:
            folder.mkdir()
            for name in range(5):
                (folder / str(name)).write_text(number)
                time.sleep(0.001)
"""


def test_many_processes_write_one_target_in_turn(tmp_path: Path) -> None:
    """And their own beside it, while the others come and go."""
    children = []
    for number in range(4):
        places = [tmp_path / "shared", tmp_path / f"own-{number}"]
        arguments = [sys.executable, "-c", CROWD, *places, str(number)]
        children.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True))
    for child in children:
        assert child.communicate()[1] == ""
        assert child.returncode == 0
    assert names(tmp_path) == [*(f"own-{number}" for number in range(4)), "shared"]
    for store in tmp_path.iterdir():
        assert len({path.read_text() for path in store.iterdir()}) == 1


def test_a_name_that_is_too_long_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="its name is longer than 255 bytes"):
        refuse_unwritable(tmp_path / ("y" * 256))
    with replacing(tmp_path / ("y" * 255)) as partial:
        partial.write_text("whole")
    assert names(tmp_path) == ["y" * 255]


def test_a_disk_that_fills_up_is_told_with_the_name(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"x\.zarr cannot be written \(no space .* make room"),
        replacing(tmp_path / "x.zarr"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []
