"""Pruned GGUF files, read with `gguf` itself and with transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ggufs
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from ggufs import chosen

import flocking
from flocking.pruning import gguf_files

# What transformers' reader gives a narrower model of: it takes the others' widths from elsewhere.
READ = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "stablelm", "nemotron"]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)


def loaded(path: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, ggufs.VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_the_original_without_the_other_neurons(
    name: str, tmp_path: Path
) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny(name))
    kept = chosen(70, 50)
    done = flocking.export_gguf(source, kept, tmp_path / "pruned.gguf")
    pruned = loaded(tmp_path / "pruned.gguf")
    assert pruned.config.intermediate_size == 96
    torch.testing.assert_close(
        logits(pruned), logits(ggufs.without(loaded(source), kept)), atol=1e-5, rtol=0
    )
    assert (done.kept, done.stored, done.zeros) == ({0: 70, 1: 50}, {0: 96, 1: 96}, 72)
    assert done.path == tmp_path / "pruned.gguf"
    assert done.bytes == done.path.stat().st_size < done.bytes_before == source.stat().st_size
    for path, count in ((done.path, done.parameters), (source, done.parameters_before)):
        assert count == sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)


@pytest.mark.parametrize("stored", ["Q8_0", "Q4_1", "Q5_0", "BF16", "F16"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_rows_keep_their_bytes(name: str, stored: str, tmp_path: Path) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny(name), stored)
    kept = chosen(70, 50)
    flocking.export_gguf(source, kept, tmp_path / "pruned.gguf")
    before, after = tensors_of(source), tensors_of(tmp_path / "pruned.gguf")
    assert list(after) == list(before)
    for tensor, new in after.items():
        old = before[tensor]
        number = int(tensor.split(".")[1]) if tensor.startswith("blk.") else 0
        halves = 2 if name == "phi3" else 1
        if "ffn_up" in tensor or "ffn_gate" in tensor:
            for half in range(halves):
                wanted = old.data[kept[number] + half * 160]
                found = new.data[half * 96 : half * 96 + len(wanted)]
                np.testing.assert_array_equal(found, wanted)
        if "ffn_down" not in tensor:
            assert new.tensor_type == old.tensor_type
        if "ffn_" not in tensor or "norm" in tensor:
            np.testing.assert_array_equal(new.data, old.data)


@pytest.mark.parametrize("stored", ["Q8_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize(
    ("down", "levels"),
    [("Q8_0", 127), ("q5_0", 16), ("Q4_0", 8), ("F16", 2**11), ("BF16", 2**8), ("F32", np.inf)],
)
def test_down_projections_are_quantised_again(
    stored: str, down: str, levels: float, tmp_path: Path
) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"), stored)
    kept = chosen(70, 50)
    flocking.export_gguf(source, kept, tmp_path / "pruned.gguf", down=down)
    before, after = tensors_of(source), tensors_of(tmp_path / "pruned.gguf")
    for number, neurons in kept.items():
        new = after[f"blk.{number}.ffn_down.weight"]
        assert new.tensor_type.name == down.upper()
        wanted = values_of(before[f"blk.{number}.ffn_down.weight"])[:, neurons]
        found = values_of(new)
        assert found.shape == (64, 96)
        assert (found[:, len(neurons) :] == 0).all()
        step = np.abs(wanted).max() / levels
        assert np.abs(found[:, : len(neurons)] - wanted).max() <= 1.01 * step
        assert found.any()


@pytest.mark.parametrize("stored", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL"])
def test_types_that_gguf_cannot_write_are_read(stored: str, tmp_path: Path) -> None:
    """Random bytes are as good as any, but for scales that would be no numbers."""
    kind, rng = Kind[stored], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_feed_forward_length(512)
    for name, rows, columns in [("up", 512, 256), ("gate", 512, 256), ("down", 256, 512)]:
        raw = rng.integers(0, 256, (rows * columns // block, size), np.uint8)
        raw.view(np.float16)[~(np.abs(raw.view(np.float16)) < 100)] = 1
        writer.add_tensor(f"blk.0.ffn_{name}.weight", raw.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kept = chosen(250, d_ff=512)
    flocking.export_gguf(tmp_path / "whole.gguf", kept, tmp_path / "pruned.gguf")
    before, after = tensors_of(tmp_path / "whole.gguf"), tensors_of(tmp_path / "pruned.gguf")
    for name in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"):
        np.testing.assert_array_equal(after[name].data[:250], before[name].data[kept[0]])
    wanted = values_of(before["blk.0.ffn_down.weight"])[:, kept[0]]
    found = values_of(after["blk.0.ffn_down.weight"])
    assert found.shape == (256, 256)
    assert not found[:, 250:].any()
    blocks = np.pad(wanted, ((0, 0), (0, 6))).reshape(256, 8, 32)
    steps = np.abs(blocks).max(axis=2, keepdims=True) / 127
    assert (np.abs(found.reshape(blocks.shape) - blocks) <= 0.6 * steps + 4e-6).all()


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_down_projections_of_plain_numbers_lose_nothing(stored: str, tmp_path: Path) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"), stored)
    kept = chosen(70, 50)
    flocking.export_gguf(source, kept, tmp_path / "pruned.gguf", down="Q4_0")
    before, after = tensors_of(source), tensors_of(tmp_path / "pruned.gguf")
    for number, neurons in kept.items():
        new = after[f"blk.{number}.ffn_down.weight"]
        assert new.tensor_type.name == stored
        wanted = values_of(before[f"blk.{number}.ffn_down.weight"])[:, neurons]
        np.testing.assert_array_equal(values_of(new)[:, : len(neurons)], wanted)
        assert not values_of(new)[:, len(neurons) :].any()


def test_what_is_kept_whole_keeps_its_bytes(tmp_path: Path) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"), "Q4_1")
    flocking.export_gguf(source, chosen(160, 160), tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    flocking.export_gguf(source, chosen(160, 50), tmp_path / "wide.gguf")
    after = tensors_of(tmp_path / "wide.gguf")
    kinds = [after[f"blk.{number}.ffn_down.weight"].tensor_type for number in (0, 1)]
    assert kinds == [Kind.Q4_1, Kind.Q8_0]  # the second is as wide, and filled up
    assert after["blk.1.ffn_up.weight"].data.shape == (160, 40)


def test_says_what_becomes_of_the_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"), "Q4_1")
    flocking.export_gguf(source, chosen(70, 50), tmp_path / "a.gguf", down="Q5_0")
    told = capsys.readouterr()
    assert "down-projections: Q5_0 in the new file, Q4_1 before" in told.err
    assert not told.out
    flocking.export_gguf(source, chosen(70, 50), tmp_path / "b.gguf", progress=False)
    flocking.export_gguf(source, chosen(160, 160), tmp_path / "c.gguf")
    assert "down-projections" not in capsys.readouterr().err


def test_all_metadata_goes_over(tmp_path: Path) -> None:
    """Of all kinds, with those that gguf's writer refuses, guesses or leaves out."""
    more = {
        "some.u8": (200, Value.UINT8),
        "some.i8": (-3, Value.INT8),
        "some.u16": (60000, Value.UINT16),
        "some.i16": (-300, Value.INT16),
        "some.i32": (-70000, Value.INT32),
        "some.u64": (2**40, Value.UINT64),
        "some.i64": (-(2**40), Value.INT64),
        "some.f64": (0.1, Value.FLOAT64),
        "some.bool": (True, Value.BOOL),
        "some.nothing": ("", Value.STRING),
        "some.u8s": ([1, 2], Value.ARRAY, Value.UINT8),
        "some.f32s": ([0.5, 1.5], Value.ARRAY, Value.FLOAT32),
        "some.bools": ([True, False], Value.ARRAY, Value.BOOL),
        "some.words": (["", "ü", "a b"], Value.ARRAY, Value.STRING),
    }
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"), metadata=more, alignment=128)
    # An array without elements, which the writer cannot write: in place of one of the same size.
    raw = source.read_bytes()
    some = b"some.u8s" + (9).to_bytes(4, "little") + (0).to_bytes(4, "little")
    assert raw.count(some) == 1
    raw = raw.replace(some + (2).to_bytes(8, "little") + b"\1\2", some + bytes(8))
    table = raw.index(b"token_embd.weight") - 8
    source.write_bytes(raw[:table] + _realigned(raw[table:], table, 128))
    flocking.export_gguf(source, chosen(64, 64), tmp_path / "pruned.gguf")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "pruned.gguf")
    assert list(after.fields) == list(before.fields)
    assert len(after.fields["some.u8s"].data) == 0
    for key, field in before.fields.items():
        found = [part.tolist() for part in after.fields[key].parts]
        wanted = [part.tolist() for part in field.parts]
        if key == "llama.feed_forward_length":
            assert (wanted.pop(), found.pop()) == ([160], [64])
        assert (after.fields[key].types, found) == (field.types, wanted), key
    assert after.alignment == 128
    assert all(tensor.data_offset % 128 == 0 for tensor in after.tensors)
    tokenizers = [
        tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=f"{name}.gguf")
        for name in ("whole", "pruned")
    ]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template == ggufs.TEMPLATE
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def _realigned(rest: bytes, table: int, alignment: int) -> bytes:
    """The table and data of a file from which two bytes before them were taken."""
    old = next(
        n for n in range(len(rest)) if (table + 2 + n) % alignment == 0 and _is_data(rest, n)
    )
    new = -(-(table + old) // alignment) * alignment - table
    return rest[:old].ljust(new, b"\0") + rest[old:]


def _is_data(rest: bytes, start: int) -> bool:
    first = ggufs.tiny("llama").model.embed_tokens.weight.detach().numpy().tobytes()
    return rest[start:].startswith(first[:64])


def test_takes_what_users_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ggufs.tiny("llama")
    source = ggufs.write(tmp_path / "whole.gguf", model)
    ids = [list(range(10, 40))]
    recording = flocking.record(model, ids, progress=False)
    selected = flocking.select(flocking.statistic(recording), 0.4).isel(sequence=0)
    monkeypatch.chdir(tmp_path)
    done = flocking.export_gguf("whole.gguf", selected, "array.gguf", progress=False)
    assert done.stored == {0: 64, 1: 64}
    indices = {layer: torch.tensor(np.flatnonzero(selected.sel(layer=layer))) for layer in (0, 1)}
    flocking.export_gguf(source, indices, "indices.gguf", progress=False)
    assert Path("array.gguf").read_bytes() == Path("indices.gguf").read_bytes()


def test_says_what_is_wrong_with_a_selection(tmp_path: Path) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"))
    several = xr.DataArray(np.ones((2, 2, 160), bool), dims=("sequence", "layer", "neuron"))
    wrong = [
        (several, "is of 2 sequences"),
        (chosen(70), "lacks layers"),
        (chosen(70, 70, 70), "layers that the model has not"),
        (chosen(300, 300, d_ff=320), "has neurons from"),
        ({0: [], 1: [1]}, "keeps no neuron of layer 0"),
    ]
    for selection, why in wrong:
        with pytest.raises(ValueError, match=why):
            flocking.export_gguf(source, selection, tmp_path / "pruned.gguf")
    with pytest.raises(TypeError, match="give the selection of a twin"):
        flocking.export_gguf(source, ggufs.tiny("llama"), tmp_path / "pruned.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


@pytest.mark.parametrize(
    ("down", "error", "why"),
    [
        ("Q4_K", ValueError, r"has no quantiser for it.*give one of F32, F16, BF16, Q8_0"),
        ("Q4_K_M", ValueError, "is no type"),
        ("Q4_1", ValueError, "does not keep the zeros"),
        (8, TypeError, "down is a int"),
    ],
)
def test_says_which_types_there_are(
    down: Any, error: type[Exception], why: str, tmp_path: Path
) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"))
    with pytest.raises(error, match=why):
        flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf", down=down)


def test_replaces_only_what_it_may(tmp_path: Path) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"))
    bytes_before = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "lost.gguf").symlink_to(tmp_path / "nowhere.gguf")
    (tmp_path / "notes.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    for name, why in [
        ("whole.gguf", "is where the model itself is from"),
        ("link.gguf", "is where the model itself is from"),
        ("lost.gguf", "which is not there"),
        ("notes.gguf", "exists and is no GGUF file .it has another format"),
        ("folder.gguf", "exists and is no GGUF file .it is a folder"),
    ]:
        with pytest.raises(ValueError, match=why):
            flocking.export_gguf(source, chosen(70, 50), tmp_path / name, overwrite=True)
    assert source.read_bytes() == bytes_before
    flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf")
    with pytest.raises(ValueError, match=r"pruned.gguf exists: .* overwrite=True"):
        flocking.export_gguf(source, chosen(30, 30), tmp_path / "pruned.gguf")
    done = flocking.export_gguf(source, chosen(30, 30), tmp_path / "pruned.gguf", overwrite=True)
    assert done.stored == {0: 32, 1: 32}
    assert gguf.GGUFReader(done.path).fields["llama.feed_forward_length"].contents() == 32
    for path, error, why in [
        ("", ValueError, "names no file"),
        ("half", ValueError, "let it end in .gguf"),
        (3, TypeError, "path is a int"),
    ]:
        with pytest.raises(error, match=why):
            flocking.export_gguf(source, chosen(70, 50), path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf does not exist"):
        flocking.export_gguf(tmp_path / "gone.gguf", chosen(70, 50), tmp_path / "new.gguf")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**21 // 8))
        full.setattr("flocking.artifacts.writing._LEAST_ROOM", 0)
        with pytest.raises(OSError, match=r"are needed, and .* are free: make room"):
            flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    resource = pytest.importorskip("resource", reason="limits are a matter of Unix")
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"pruned.gguf cannot be written") as told:
            flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "room" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Change one byte of one tensor as it is written: `tensor`: which byte."""
    where: dict[str, int] = {}
    cut = gguf_files._cut

    def broken(plan: gguf_files._Plan, tensor: Any) -> np.ndarray:
        found = np.array(cut(plan, tensor))
        if tensor.name in where:
            found[where[tensor.name]] ^= 64
        return found

    monkeypatch.setattr(gguf_files, "_cut", broken)
    return where


@pytest.mark.parametrize(
    ("tensor", "byte", "why"),
    [
        ("token_embd.weight", 5, "is not what it was"),
        ("output_norm.weight", 0, "is not what it was"),
        ("blk.1.ffn_gate.weight", 6, "has rows that differ"),
        ("blk.0.ffn_up.weight", -26 * 68 - 1, "has rows that differ"),
        ("blk.0.ffn_down.weight", 2, "has values that Q8_0 cannot hold"),
        ("blk.0.ffn_down.weight", -1, "has neurons that fill it up and are not zero"),
    ],
)
def test_what_was_written_is_read_again(
    tensor: str, byte: int, why: str, tmp_path: Path, damaged: dict[str, int]
) -> None:
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny("llama"), "Q8_0")
    damaged[tensor] = byte
    with pytest.raises((OSError, ValueError), match=f"was not written.*{tensor} {why}"):
        flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = ggufs.tiny("llama")
    state = model.model.layers[0].mlp.down_proj.weight
    before = state.detach().clone()
    state.data *= 1e6
    try:
        source = ggufs.write(tmp_path / "whole.gguf", model, "Q8_0")
        with pytest.raises(ValueError, match=r"ffn_down.weight has values that F16 .*'F32'"):
            flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf", down="F16")
        flocking.export_gguf(source, chosen(70, 50), tmp_path / "pruned.gguf", down="F32")
    finally:
        state.data.copy_(before)
