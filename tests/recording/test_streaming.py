"""Recordings that are written block by block: what is in them, and what ends or changes a run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import xarray as xr

import flocking
from flocking.artifacts import BusyError, claimed
from flocking.recording import forward_passes, growing

TEXTS = helpers.random_ids(*np.random.default_rng(0).integers(3, 60, 21).tolist(), seed=2)
SMALL = {"window": 8, "batch_size": 2, "progress": False}  # blocks of 8 texts
BLOCK = 8
ASIDE = ("prompt_tokens", "continuation")  # one for each text


def stream(path: Path, text: Any = TEXTS, name: str = "llama", **changes: Any) -> xr.Dataset:
    return flocking.record(helpers.proved(name), text, out=path, **SMALL | changes)


def by_block(name: str, texts: list[Any], **changes: Any) -> xr.Dataset:
    """The same, recorded in memory block by block and put together."""
    model, parts = helpers.proved(name), []
    for start in range(0, len(texts), BLOCK):
        here = slice(start, start + BLOCK)
        one = {
            key: value[here] if isinstance(value, list) and key in ASIDE else value
            for key, value in changes.items()
        }
        parts.append(flocking.record(model, texts[here], **SMALL | one))
    return flocking.concat(parts) if len(parts) > 1 else parts[0]


def assert_same_values(got: xr.Dataset, expected: xr.Dataset) -> None:
    """Bit for bit, in every variable and coordinate but the numbers of the sequences."""
    expected = expected.assign_coords(sequence=got.sequence)
    assert dict(got.sizes) == dict(expected.sizes)
    for name in expected.variables:
        assert got[name].dtype.kind == expected[name].dtype.kind, name
        np.testing.assert_array_equal(got[name].values, expected[name].values, err_msg=str(name))
    assert got.variables.keys() == expected.variables.keys()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"window": None}),
        ("llama", {"ranks": True, "relative": [1], "max_tokens": 30}),
        ("llama", {"relative": True, "layers": [1]}),
        ("llama", {"prompt_tokens": 2}),
        ("llama", {"prompt_tokens": [len(ids) // 2 for ids in TEXTS]}),
        ("llama", {"continuation": TEXTS[::-1]}),
        ("llama", {"max_new_tokens": 9}),
        ("llama", {"max_new_tokens": 9, "window": None, "do_sample": True, "seed": 3}),
        ("mixtral", {"ranks": True}),
        ("gpt2", {}),
    ],
)
def test_it_is_what_record_gives(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    got = stream(tmp_path / "x.zarr", name=name, **changes).load()
    assert_same_values(got, by_block(name, TEXTS, **changes))
    whole = flocking.record(helpers.proved(name), TEXTS, **SMALL | changes)
    assert got.attrs == whole.attrs
    helpers.assert_same(got, whole)
    assert got.sequence.values.tolist() == list(range(len(TEXTS)))


def test_texts_and_conversations(tmp_path: Path) -> None:
    tokenizer = helpers.letters("<s> $A")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"
    for number, texts in enumerate(
        [
            ["abc def", "b", "héllo"] * 4,
            [
                [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "ef" * n}]
                for n in range(1, 12)
            ],
        ]
    ):
        got = stream(tmp_path / f"{number}.zarr", texts, tokenizer=tokenizer).load()
        expected = flocking.record(helpers.proved("llama"), texts, tokenizer=tokenizer, **SMALL)
        helpers.assert_same(got, expected)
        assert got.attrs == expected.attrs
        assert got.text.values.tolist() == expected.text.values.tolist()
        assert got.token_text.values.tolist() == expected.token_text.values.tolist()


def test_one_text_is_one_sequence(tmp_path: Path) -> None:
    for number, text in enumerate([TEXTS[0], torch.tensor(TEXTS[0]), np.array(TEXTS[0])]):
        assert stream(tmp_path / f"{number}.zarr", text).sizes["sequence"] == 1
    got = stream(tmp_path / "s.zarr", "abc", tokenizer=helpers.letters("<s> $A"))
    assert got.text.values.tolist() == ["abc"]


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 30}, {"max_tokens": 70, "ranks": True}])
def test_an_iterator_gives_the_same_as_a_list(tmp_path: Path, changes: dict[str, Any]) -> None:
    got = stream(tmp_path / "x.zarr", iter(TEXTS), **changes).load()
    assert_same_values(got, by_block("llama", TEXTS, **changes))


def test_an_iterator_with_continuations(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr", iter(TEXTS), continuation=iter(TEXTS[::-1]), max_tokens=120)
    expected = by_block("llama", TEXTS, continuation=TEXTS[::-1], max_tokens=120)
    # (Prompts could have been longer: there are windows for them, which are empty.)
    got = got.isel(window=got.tokens.values.any(axis=0)).load()
    for name in ("energy", "mass", "tokens", "start", "phase", "norm", "prompt_tokens", "token_id"):
        np.testing.assert_array_equal(got[name].values, expected[name].values, err_msg=name)
    np.testing.assert_allclose(
        flocking.prompt_generation_overlap(got).values,
        flocking.prompt_generation_overlap(expected).values,
    )


def test_an_iterator_is_read_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, ahead = [], []

    def texts() -> Iterator[list[int]]:
        for number, ids in enumerate(TEXTS):
            taken.append(number)
            yield ids

    write = growing.GrowingStore.write

    def watched(self: Any, rows: slice, *args: Any) -> None:
        ahead.append(len(taken) - rows.start)
        write(self, rows, *args)

    monkeypatch.setattr(growing.GrowingStore, "write", watched)
    stream(tmp_path / "x.zarr", texts())
    assert max(ahead) <= BLOCK + 1


def test_plain_xarray_reads_it(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr").load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = xr.open_zarr(tmp_path / "x.zarr", chunks=None)
    for name in got.variables:
        assert plain[name].dtype.kind in (got[name].dtype.kind, "T")
        np.testing.assert_array_equal(plain[name].values, got[name].values)
    assert plain.coords.keys() - got.coords.keys() == set()
    assert (plain.recorded == 1).all()


def test_it_can_be_saved_and_loses_no_file_unnoticed(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr")
    flocking.save_recording(got, tmp_path / "y.zarr")
    xr.testing.assert_identical(flocking.open_recording(tmp_path / "y.zarr"), got)
    next((tmp_path / "x.zarr" / "mass").glob("[0-9]*")).unlink()
    with pytest.raises(ValueError, match=r"mass/\S+ is lost"):
        flocking.open_recording(tmp_path / "x.zarr")


def test_chunks_hold_one_layer_and_blocks_share_none() -> None:
    for sizes in ((1000, 4, 17, 1536), (1000, 32, 17, 14336), (1000, 32, 600, 14336)):
        chunk = growing._chunks(("sequence", "layer", "window", "neuron"), sizes, 4, 32)
        assert chunk[1] == 1
        assert 32 % chunk[0] == 0
        assert np.prod(chunk) * 4 <= 8 * 2**20
        assert chunk[3] == sizes[3]


# --------------------------------------------------------------------------------------
# Going on


class Ended(BaseException):
    """What no code of the package's catches."""


def ending_after(monkeypatch: pytest.MonkeyPatch, arrays: int) -> None:
    """End the run when so many arrays of blocks were written."""
    put, count = growing.GrowingStore._put, iter(range(arrays))

    def putting(self: Any, *args: Any) -> None:
        if next(count, None) is None:
            raise Ended
        put(self, *args)

    monkeypatch.setattr(growing.GrowingStore, "_put", putting)


@pytest.mark.parametrize("arrays", [0, 5, 10, 17, 24])
@pytest.mark.parametrize("kind", [list, iter])
def test_it_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: int, kind: Any
) -> None:
    path = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        ending_after(patch, arrays)
        with pytest.raises(Ended):
            stream(path, kind(TEXTS))
    assert [each.name for each in tmp_path.iterdir()] == ["x.zarr"]
    done = arrays // 10 * BLOCK
    with pytest.warns(UserWarning, match=f"x.zarr is not finished: {done} ") as caught:
        so_far = flocking.open_recording(path)
    assert len(caught) == 1
    assert so_far.sizes["sequence"] == done
    if done:
        np.testing.assert_array_equal(
            so_far.energy.values[:, :, 1], by_block("llama", TEXTS).energy.values[:done, :, 1]
        )
    passes = counted(monkeypatch)
    got = stream(path, kind(TEXTS)).load()
    assert len(passes) == 3 - done // BLOCK
    assert_same_values(got, by_block("llama", TEXTS))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the texts in each block that is recorded from now on."""
    found: list[int] = []
    inner = forward_passes._read

    def reading(model: Any, collector: Any, fed: Any, *args: Any) -> None:
        found.append(len(fed.ids))
        inner(model, collector, fed, *args)

    monkeypatch.setattr(forward_passes, "_read", reading)
    return found


KILLED = """
import os, sys
sys.path[:0] = {paths!r}
import helpers
from flocking.recording import growing
import test_streaming

put, count = growing.GrowingStore._put, iter(range(14))
def putting(self, *args):
    if next(count, None) is None:
        os.kill(os.getpid(), 9)
    put(self, *args)
growing.GrowingStore._put = putting
test_streaming.stream({path!r})
"""


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    here = Path(__file__).parent
    program = KILLED.format(paths=[str(here), str(here.parent)], path=str(path))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert (tmp_path / ".x.zarr.writing").exists()  # the claim of the dead
    assert_same_values(stream(path).load(), by_block("llama", TEXTS))
    assert [each.name for each in tmp_path.iterdir()] == ["x.zarr"]


def test_a_finished_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stream(tmp_path / "x.zarr").load()
    passes = counted(monkeypatch)
    for text in (TEXTS, iter(TEXTS)):
        again = stream(tmp_path / "x.zarr", text, progress=True)
        assert "x.zarr is finished: nothing is left to record" in capsys.readouterr().err
        xr.testing.assert_identical(again.load(), before)
    assert not passes


def test_a_run_that_ended_in_its_last_step_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("note_files", "zarr.consolidate_metadata")):
        path = tmp_path / f"{number}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(f"flocking.recording.growing.{name}", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream(path)
        assert_same_values(stream(path).load(), by_block("llama", TEXTS))


def test_what_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        ending_after(patch, 25)
        with pytest.raises(Ended):
            stream(path)
    other = [*TEXTS[:9], TEXTS[0], *TEXTS[10:]]
    for kind in (list, iter):
        with pytest.raises(ValueError, match=r"text 9 is another one than when .*x.zarr was begun"):
            stream(path, kind(other))
    with pytest.raises(ValueError, match="begun with 21 texts, and there are 22 now"):
        stream(path, [*TEXTS, TEXTS[0]])
    with pytest.raises(ValueError, match="text has 10 texts, and more are recorded"):
        stream(path, iter(TEXTS[:10]), max_tokens=None)
    changed = [
        ({"window": 16}, "another window (8; now 16)"),
        ({"ranks": True}, "another ranks (False; now True)"),
        ({"layers": [0]}, "another layers ([0, 1]; now [0])"),
        ({"relative": [0]}, "another relative ([]; now [0])"),
        ({"batch_size": 3}, "another batch_size (2; now 3)"),
        ({"max_tokens": 80}, "another max_tokens ('all'; now 80)"),
        ({"seed": 1}, "another seed (0; now 1)"),
        ({"prompt_tokens": 2}, "another prompt_tokens (None; now 2)"),
        ({"name": "gemma"}, "another architecture ('LlamaForCausalLM'; now "),
    ]
    for changes, said in changed:
        with pytest.raises(ValueError, match=re.escape(said)):
            stream(path, **changes)
    model = helpers.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="begun with another weights"):
        flocking.record(model, TEXTS, out=path, **SMALL)
    assert_same_values(stream(path).load(), by_block("llama", TEXTS))


def test_a_finished_one_takes_no_other_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    stream(path, iter(TEXTS))
    with pytest.raises(ValueError, match=r"finished with 21.*flocking.concat"):
        stream(path, iter([*TEXTS, TEXTS[0]]))
    with pytest.raises(ValueError, match="text has 20 texts, and more are recorded"):
        stream(path, iter(TEXTS[:20]))


def test_two_runs_into_one_store_are_refused(tmp_path: Path) -> None:
    with claimed(tmp_path / "x.zarr"), pytest.raises(BusyError, match="is being written by"):
        stream(tmp_path / "x.zarr")


def test_other_stores_stay_as_they_are(tmp_path: Path) -> None:
    flocking.save_recording(by_block("llama", TEXTS[:2]), tmp_path / "x.zarr")
    (tmp_path / "y.zarr").mkdir()
    for name in ("x.zarr", "y.zarr"):
        with pytest.raises(ValueError, match=r"exists and was not written by record\(out"):
            stream(tmp_path / name)
    assert flocking.open_recording(tmp_path / "x.zarr").sizes["sequence"] == 2


# --------------------------------------------------------------------------------------
# What goes wrong


BAD = [*TEXTS[:10], [], *TEXTS[10:14], [10**6], *TEXTS[14:]]


def test_a_text_that_fails_is_named_before_anything_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    with pytest.raises(ValueError, match=r"^text 10 has no tokens"):
        stream(tmp_path / "x.zarr", BAD)
    assert not passes
    assert not list(tmp_path.iterdir())


def test_a_text_that_fails_later_leaves_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    with pytest.raises(ValueError, match=r"^text 10 has no tokens"):
        stream(path, iter(BAD))
    with pytest.warns(UserWarning, match="not finished: 8 texts are recorded so far"):
        assert flocking.open_recording(path).sizes["sequence"] == 8


@pytest.mark.parametrize("kind", [list, iter])
def test_texts_that_fail_can_be_skipped(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "x.zarr"
    got = stream(path, kind(BAD), on_error="skip").load()
    assert got.sequence.values.tolist() == [n for n in range(23) if n not in (10, 15)]
    assert [line.split(":")[0] for line in got.attrs["skipped"]] == ["10", "15"]
    assert "text 10 has no tokens" in got.attrs["skipped"][0]
    assert "text 15 has token ids from 1000000" in got.attrs["skipped"][1]
    expected = flocking.record(helpers.proved("llama"), TEXTS, **SMALL)
    helpers.assert_same(got.assign_coords(sequence=range(21)), expected)
    again = stream(path, kind(BAD), on_error="skip").load()
    xr.testing.assert_identical(again, got)
    flocking.save_recording(got, tmp_path / "y.zarr")
    xr.testing.assert_identical(flocking.open_recording(tmp_path / "y.zarr").load(), got)


def test_activations_that_are_not_finite_can_be_skipped(tmp_path: Path) -> None:
    model = helpers.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    texts = [[1, 2, 3], [4, 7, 5], [6, 8, 8], [9, 9, 9, 9]]
    with pytest.raises(ValueError, match="not finite, first at token 0 of text 1"):
        flocking.record(model, iter(texts), out=tmp_path / "x.zarr", **SMALL)
    got = flocking.record(model, texts, out=tmp_path / "y.zarr", on_error="skip", **SMALL)
    assert got.sequence.values.tolist() == [0, 2, 3]
    assert "of text 1" in got.attrs["skipped"][0]
    assert flocking.flocking_score(got).notnull().all()


def test_where_every_text_fails(tmp_path: Path) -> None:
    for kind in (list, iter):
        with pytest.raises(ValueError, match="text 0 has no tokens"):
            stream(tmp_path / "x.zarr", kind([[], []]), on_error="skip")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ([], {}, "text is empty"),
        (iter([]), {}, "text is empty"),
        ({"input_ids": TEXTS}, {}, "text is a dict"),
        ({1, 2}, {}, "without an order"),
        (b"abc", {}, "decode it first"),
        (TEXTS, {"num_texts": 20}, "num_texts=20, and text has 21"),
        (iter(TEXTS), {"num_texts": 20}, "more texts than the 20"),
        (iter(TEXTS), {"num_texts": 22}, "text has 21 texts, and 22 were expected"),
        (TEXTS, {"num_texts": 0}, "num_texts=0"),
        (TEXTS, {"on_error": "ignore"}, "on_error='ignore': give 'stop' or 'skip'"),
        (TEXTS, {"continuation": TEXTS[:3]}, "continuation has 3 entries, and text has 21"),
        (iter(TEXTS), {"continuation": iter(TEXTS[:3])}, "continuation has 3 entries"),
        (iter(TEXTS[:3]), {"continuation": iter(TEXTS)}, "text has 3 entries"),
        (TEXTS, {"prompt_tokens": [1]}, "prompt_tokens has 1 entries"),
        (TEXTS, {"prompt_tokens": 50}, "prompt_tokens=50, and text 1 has"),
        ([*TEXTS[:9], "abc"], {}, "text 9 is 'abc'|string"),
        (iter([*TEXTS[:9], ["a", "b"]]), {}, "text 9 is a list of strings"),
    ],
)
def test_bad_input(tmp_path: Path, text: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        stream(tmp_path / "x.zarr", text, **changes)


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names end in \.zarr"):
        stream(tmp_path / "x")
    with pytest.raises(ValueError, match="num_texts=3 is for out="):
        flocking.record(helpers.proved("llama"), TEXTS, num_texts=3)
    with pytest.raises(ValueError, match="on_error='skip' is for out="):
        flocking.record(helpers.proved("llama"), TEXTS, on_error="skip")


def test_strings_and_ids_cannot_follow_each_other(tmp_path: Path) -> None:
    tokenizer = helpers.letters("<s> $A")
    with pytest.raises(ValueError, match="from text 8 on, texts come in another form"):
        stream(tmp_path / "x.zarr", iter(["abc"] * 8 + TEXTS[:2]), tokenizer=tokenizer)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, usage = tmp_path / "x.zarr", shutil.disk_usage
    free = iter([2**30, 2**30, 2**30, 1000])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda p: usage(p)._replace(free=next(free, 1000)))
        with pytest.raises(OSError, match="1,000 are free on the disk: make room"):
            stream(path)
    assert_same_values(stream(path).load(), by_block("llama", TEXTS))


# --------------------------------------------------------------------------------------
# Several processes


SHARE = """
import os, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import helpers, test_streaming
from flocking.recording import growing

path, dies = sys.argv[1], sys.argv[2:]
if dies and dies[0] == os.environ["RANK"]:
    write = growing.GrowingStore.write
    def writing(self, rows, *args):
        raise RuntimeError("the machine is gone")
    growing.GrowingStore.write = writing
test_streaming.stream(path)
"""


def share(path: Path, count: int, *dies: str) -> list[subprocess.CompletedProcess[str]]:
    """Run it in several processes, as torchrun starts them."""
    here = Path(__file__).parent
    program = SHARE.format(paths=[str(here), str(here.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--standalone", "--no-python", sys.executable, "-c", program, str(path), *dies]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_three_processes_write_what_one_does(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = by_block("llama", TEXTS)
    finally:
        torch.set_num_threads(threads)
    ended = share(tmp_path / "x.zarr", 3)
    assert ended.returncode == 0, ended.stderr
    assert_same_values(flocking.open_recording(tmp_path / "x.zarr").load(), expected)


def test_a_process_that_dies_is_named_and_others_go_on_without_it(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = by_block("llama", TEXTS)
        path = tmp_path / "x.zarr"
        ended = share(path, 2, "1")
        assert ended.returncode != 0
        assert "the machine is gone" in ended.stderr
        with pytest.warns(UserWarning, match="13 of 21 texts are recorded so far"):
            so_far = flocking.open_recording(path)
        assert so_far.sequence.values.tolist() == [*range(8), *range(16, 21)]
        got = stream(path).load()  # alone
    finally:
        torch.set_num_threads(threads)
    assert_same_values(got, expected)
