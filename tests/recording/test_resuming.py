"""Runs that write block by block: they end, go on, are refused what changed, and share the work."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import peft
import pytest
import torch
import xarray as xr
import zarr
from streams import (
    BLOCK,
    SMALL,
    TEXTS,
    Ended,
    assert_same_values,
    by_block,
    counted,
    ending_after,
    stream,
)
from transformers import AutoModelForCausalLM

import flocking
from flocking.artifacts import BusyError, claimed
from flocking.recording import chunking, growing


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


KILLED = """
import os, sys
sys.path[:0] = {paths!r}
import helpers
from flocking.recording import growing
import streams

put, count = growing.GrowingStore._put, iter(range(14))
def putting(self, *args):
    if next(count, None) is None:
        os.kill(os.getpid(), 9)
    put(self, *args)
growing.GrowingStore._put = putting
streams.stream({path!r})
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
    for number, name in enumerate(("locations.note_files", "growing.zarr.consolidate_metadata")):
        path = tmp_path / f"{number}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(f"flocking.recording.{name}", lambda *a, **k: 1 / 0)
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


def steer(scale: float, *_: object) -> None:
    """A hook."""


CHANGES = {
    "adapter": lambda m: m.add_adapter(peft.LoraConfig(target_modules=["up_proj"], r=2)),
    "hook": lambda m: m.model.layers[0].register_forward_hook(functools.partial(steer, 2.0)),
    "structure": lambda m: setattr(m.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
    "structure again": lambda m: setattr(
        m.model.layers[1].mlp, "act_fn", torch.nn.GELU(approximate="tanh")
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("name", CHANGES)
def test_what_hangs_on_a_model_is_not_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither weights nor config tell of it."""
    path, model = tmp_path / "x.zarr", helpers.build("llama")
    if name == "structure again":
        CHANGES["structure"](model)
    with monkeypatch.context() as patch:
        ending_after(patch, 17)
        with pytest.raises(Ended):
            flocking.record(model, TEXTS, out=path, **SMALL)
    CHANGES[name](model)
    with pytest.raises(ValueError, match=f"begun with another {name.split()[0]} "):
        flocking.record(model, TEXTS, out=path, **SMALL)


def test_a_hook_that_is_gone_does_not_matter_to_a_finished_store(tmp_path: Path) -> None:
    path, model = tmp_path / "x.zarr", helpers.build("llama")
    hook = model.model.layers[0].register_forward_hook(functools.partial(steer, 2.0))
    before = flocking.record(model, TEXTS, out=path, **SMALL).load()
    hook.remove()
    assert_same_values(flocking.record(model, TEXTS, out=path, **SMALL).load(), before)
    model.model.layers[1].register_forward_hook(functools.partial(steer, 2.0))
    with pytest.raises(ValueError, match="begun with another hook "):
        flocking.record(model, TEXTS, out=path, **SMALL)


def test_a_store_that_does_not_tell_of_adapters_goes_on(tmp_path: Path) -> None:
    """It was begun by an older version."""
    path, model = tmp_path / "x.zarr", helpers.build("llama")
    flocking.record(model, TEXTS, out=path, **SMALL)
    recorded = zarr.open_group(path, mode="r+")["recorded"]
    older = dict(recorded.attrs["arguments"])
    for name in ("adapter", "autocast", "structure", "hook"):
        del older[name]
    recorded.attrs["arguments"] = older
    zarr.consolidate_metadata(path, zarr_format=2)
    flocking.record(model, TEXTS, out=path, **SMALL)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_and_autocast_are_told_and_not_mixed(tmp_path: Path) -> None:
    model = helpers.build("llama")
    options = {"progress": False, "window": 8}
    plain = flocking.record(model, TEXTS[:2], **options)
    assert (plain.adapter, plain.autocast) == ("none", "none")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = flocking.record(model, TEXTS[:2], **options)
    assert (rounded.adapter, rounded.autocast) == ("none", "bfloat16")
    config = peft.LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="birds")
    wrapped.add_adapter("fish", config)
    path = tmp_path / "x.zarr"
    adapted = flocking.record(wrapped, TEXTS, out=path, **SMALL)
    assert adapted.adapter.startswith("birds (")
    wrapped.set_adapter("fish")
    other = flocking.record(wrapped, TEXTS[:2], **options)
    assert other.adapter.startswith("fish (")
    with wrapped.disable_adapter():
        assert flocking.record(wrapped, TEXTS[:2], **options).adapter == "none"
        with pytest.raises(ValueError, match=r"another adapter \('birds \(.*; now 'none'\)"):
            flocking.record(wrapped, TEXTS, out=path, **SMALL)
    wrapped.set_adapter("birds")
    assert flocking.record(wrapped, TEXTS, out=path, **SMALL).adapter == adapted.adapter
    wrapped.base_model.model.model.layers[1].mlp.up_proj.scaling["birds"] *= 2
    with pytest.raises(ValueError, match="begun with another adapter"):
        flocking.record(wrapped, TEXTS, out=path, **SMALL)
    for one, name in ((rounded, "autocast"), (other, "adapter")):
        with pytest.raises(ValueError, match=f"recording 1 has {name} "):
            flocking.concat([plain, one])
    merged = peft.get_peft_model(helpers.build("llama"), config, adapter_name="birds")
    merged.merge_adapter()
    assert flocking.record(merged, TEXTS[:2], **options).adapter.startswith("birds (")
    older = plain.copy()
    del older.attrs["adapter"], older.attrs["autocast"]
    assert flocking.concat([older, other]).attrs["adapter"] == other.adapter
    with pytest.raises(ValueError, match="recording 2 has adapter "):
        flocking.concat([older, plain, other])
    assert flocking.concat([flocking.concat([older, plain]), plain]).sizes["sequence"] == 6


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


@pytest.mark.parametrize("lost", ["lost", "empty"])
def test_a_block_of_which_a_file_is_lost_is_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    path = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        ending_after(patch, 25)
        with pytest.raises(Ended):
            stream(path)
    file = path / "energy" / "0.1.0.0"
    file.unlink() if lost == "lost" else file.write_bytes(b"")
    (path / "energy" / f"0.0.0.{'0' * 32}.partial").write_bytes(b"half")
    assert_same_values(stream(path).load(), by_block("llama", TEXTS))
    assert not list(path.rglob("*.partial"))
    flocking.save_recording(stream(path).isel(sequence=[0]), tmp_path / "y.zarr")


@pytest.mark.parametrize("continued", [False, True])
def test_any_file_of_a_block_is_missed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, continued: bool
) -> None:
    """Also those of later windows and tokens, where a text is cut into several chunks."""
    path, given = tmp_path / "x.zarr", tmp_path / "given.zarr"
    changes: dict[str, Any] = {"relative": True, "ranks": True}
    if continued:
        changes["prompt_tokens"] = [len(ids) // 2 for ids in TEXTS]
    monkeypatch.setattr(chunking, "_CHUNK", 1000)
    expected = by_block("llama", TEXTS, **changes)
    with monkeypatch.context() as patch:
        ending_after(patch, 28)
        with pytest.raises(Ended):
            stream(path, **changes)
    passes = counted(monkeypatch)
    shutil.copytree(path, given)
    assert_same_values(stream(given, **changes).load(), expected)
    alone, others = len(passes), 0
    files = [
        file
        for file in sorted(path.rglob("*"))
        if re.fullmatch(r"[0-7](\.\d+)+", file.name)
        or (file.parent.name in ("text", "text_digest", "problem") and file.name in "01")
    ]
    assert any(file.name.split(".")[-2:] not in (["0", "0"], ["0"]) for file in files)
    for file in files[:: max(1, len(files) // 24)]:
        shutil.rmtree(given)
        shutil.copytree(path, given)
        (given / file.relative_to(path)).unlink()
        passes.clear()
        assert_same_values(stream(given, **changes).load(), expected)
        others += len(passes) > alone
    assert others == len(files[:: max(1, len(files) // 24)])


def test_the_tokenizer_beside_a_model_is_compared(tmp_path: Path) -> None:
    folder, arguments = tmp_path / "model", {"out": tmp_path / "x.zarr", **SMALL}
    helpers.build("llama").save_pretrained(folder)
    helpers.letters("<s> $A").save_pretrained(folder)
    flocking.record(AutoModelForCausalLM.from_pretrained(folder), ["abc"], **arguments)
    given = helpers.letters("<s> $A")
    flocking.record(
        AutoModelForCausalLM.from_pretrained(folder), ["abc"], tokenizer=given, **arguments
    )
    helpers.letters("$A").save_pretrained(folder)
    with pytest.raises(ValueError, match="begun with another tokenizer"):
        flocking.record(AutoModelForCausalLM.from_pretrained(folder), ["abc"], **arguments)


def test_a_store_of_unknown_length_has_room_for_all_once_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no two processes enlarge it at the same time."""
    path = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        ending_after(patch, 12)
        with pytest.raises(Ended):
            stream(path, iter(TEXTS))
    resized = []
    resize = growing.GrowingStore._resize

    def noted(self: Any, sizes: Any) -> None:
        resized.append(dict(sizes))
        resize(self, sizes)

    monkeypatch.setattr(growing.GrowingStore, "_resize", noted)
    assert_same_values(stream(path).load(), by_block("llama", TEXTS))
    assert [sizes["sequence"] for sizes in resized if "sequence" in sizes] == [21, 21]


def test_texts_that_are_longer_than_planned_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, counts = tmp_path / "x.zarr", [2] * len(TEXTS)
    with monkeypatch.context() as patch:
        ending_after(patch, 12)
        with pytest.raises(Ended):
            stream(path, prompt_tokens=counts)
    longer = [*TEXTS[:BLOCK], *helpers.random_ids(*[70] * (len(TEXTS) - BLOCK))]
    with pytest.raises(ValueError, match=r"from 8 to 15, or its prompt .* is longer than those"):
        stream(path, longer, prompt_tokens=counts)
    wide = [ids if len(ids) > 20 else ids * 9 for ids in TEXTS]
    with pytest.raises(ValueError, match=r"is longer than those|is another one"):
        stream(path, wide, prompt_tokens=[*counts[:BLOCK], *[14] * (len(TEXTS) - BLOCK)])


def test_another_config_or_chat_template_is_refused(tmp_path: Path) -> None:
    model, tokenizer = helpers.build("llama"), helpers.letters("<s> $A")
    tokenizer.chat_template = "x{{ messages[0]['content'] }}"
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "x.zarr", **SMALL}
    flocking.record(model, ["abc"], **arguments)
    tokenizer.chat_template = "y{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="begun with another tokenizer"):
        flocking.record(model, ["abc"], **arguments)
    tokenizer.chat_template = "x{{ messages[0]['content'] }}"
    flocking.record(model, ["abc"], **arguments)
    model.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="begun with another config"):
        flocking.record(model, ["abc"], **arguments)


def test_a_number_of_texts_that_was_wrong_can_be_corrected(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    for wrong in (9, 30):
        with pytest.raises(ValueError, match="correct it"):
            stream(path, iter(TEXTS), num_texts=wrong)
    got = stream(path, iter(TEXTS), num_texts=len(TEXTS))
    assert_same_values(got.load(), by_block("llama", TEXTS))


def test_a_smaller_number_cuts_nothing_off(tmp_path: Path) -> None:
    """A call that is refused leaves the store as it was, whatever it said of the texts."""
    path = tmp_path / "x.zarr"
    with pytest.raises(ValueError, match="correct it"):
        stream(path, iter(TEXTS), num_texts=30)
    with pytest.raises(ValueError, match="text has 5 texts, and more are recorded in"):
        stream(path, iter(TEXTS[:5]), num_texts=5)
    with pytest.raises(ValueError, match="was begun with another window"):
        stream(path, iter(TEXTS), num_texts=len(TEXTS), window=4)
    assert zarr.open_array(path / "recorded", mode="r").attrs["texts"] == 30
    got = stream(path, iter(TEXTS), num_texts=np.int64(len(TEXTS)))
    assert_same_values(got.load(), by_block("llama", TEXTS))


def test_what_was_appended_to_it_is_not_taken_away(tmp_path: Path) -> None:
    """Neither read as if it was not there, nor cut off by the same call."""
    path = tmp_path / "x.zarr"
    model, texts = helpers.proved("llama"), helpers.random_ids(20, 20, 20)
    helpers.record(model, texts[:2], window=8, out=path)
    helpers.record(model, texts[2], window=8).to_zarr(path, append_dim="sequence")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for again in (
        lambda: flocking.open_recording(path),
        lambda: helpers.record(model, texts[:2], window=8, out=path),
    ):
        with pytest.raises(ValueError, match=r"more sequences \(by 1\) than .* were appended"):
            again()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    left = xr.open_zarr(path, drop_variables=["recorded", "text_digest", "problem"])
    flocking.save_recording(left, tmp_path / "y.zarr")  # as the error says
    saved = flocking.open_recording(tmp_path / "y.zarr")
    together = helpers.record(model, texts, window=8)
    np.testing.assert_allclose(saved.energy, together.energy, rtol=1e-5)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    model, ids = helpers.proved("llama"), helpers.random_ids(20)
    options = {"window": 8, "max_new_tokens": 2, "max_tokens": 30, "batch_size": 2, "seed": 3}
    expected = helpers.record(model, ids, **options)
    for dtype in (np.int64, np.uint8):
        given = {name: dtype(value) for name, value in options.items()}
        xr.testing.assert_identical(helpers.record(model, ids, **given), expected)
        stored = helpers.record(model, ids, **given, out=tmp_path / f"{dtype.__name__}.zarr")
        assert stored.energy.equals(expected.energy)


@pytest.mark.parametrize(
    "one", [np.array([1]), torch.tensor([1]), xr.DataArray([1]), np.array([1, 1]), {1}, range(1, 2)]
)
def test_layers_in_any_form(one: Any) -> None:
    model, ids = helpers.proved("llama"), helpers.random_ids(20)
    got = helpers.record(model, ids, layers=one, relative=one)
    xr.testing.assert_identical(got, helpers.record(model, ids, layers=[1], relative=[1]))
    assert helpers.record(model, ids, relative=np.True_).relative.sizes["layer"] == 2
    assert "relative" not in helpers.record(model, ids, relative=np.False_)
    with pytest.raises(TypeError, match=r"relative=.*: give a list of layer numbers"):
        helpers.record(model, ids, relative=np.array([False, True]))


@pytest.mark.parametrize("where", ["{}/x.zarr", "memory://shorter/{}/x.zarr", "lost"])
def test_other_texts_in_a_block_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Nothing is left of the longer ones that a run had begun to write, or had written."""
    address: Any = where.format(tmp_path) if where != "lost" else str(tmp_path / "x.zarr")
    with monkeypatch.context() as patch:
        ending_after(patch, 20 if where == "lost" else 19)
        with pytest.raises(Ended):
            stream(address)
    if where == "lost":
        (tmp_path / "x.zarr" / "energy" / "1.0.0.0").unlink()
    shorter = [*TEXTS[:BLOCK], *(ids[:3] for ids in TEXTS[BLOCK : 2 * BLOCK]), *TEXTS[2 * BLOCK :]]
    got = stream(address, shorter).load()
    assert_same_values(got, by_block("llama", shorter))
