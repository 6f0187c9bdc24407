"""Which tensors of a GGUF file are its feed-forward blocks, and which files are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ggufs
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value

import flocking

Shape = tuple[int, ...]
DENSE = {"ffn_gate.weight": (160, 64), "ffn_up.weight": (160, 64), "ffn_down.weight": (64, 160)}
EXPERTS = {
    "ffn_gate_inp.weight": (4, 64),
    "ffn_gate_exps.weight": (4, 96, 64),
    "ffn_up_exps.weight": (4, 96, 64),
    "ffn_down_exps.weight": (4, 64, 96),
}
SHARED = {
    "ffn_gate_inp_shexp.weight": (64,),
    "ffn_gate_shexp.weight": (128, 64),
    "ffn_up_shexp.weight": (128, 64),
    "ffn_down_shexp.weight": (64, 128),
}
_EXPERT_WIDTH = "expert_feed_forward_length"
BESIDE = {"attn_q.weight": (64, 64), "attn_norm.weight": (64,), "ffn_norm.weight": (64,)}


def file_of(
    folder: Path,
    *blocks: Mapping[str, Shape],
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    **sizes: Any,
) -> Path:
    """A file of random tensors, block by block, with widths in its metadata."""
    rng = np.random.default_rng(0)
    tensors = [
        (f"blk.{number}.{name}", rng.normal(size=shape).astype(np.float32))
        for number, block in enumerate(blocks)
        for name, shape in {**BESIDE, **block}.items()
    ]
    metadata = {
        f"{architecture}.{name}": (value, Value.ARRAY, Value.INT32)
        if isinstance(value, list)
        else (value, Value.UINT32)
        for name, value in ({"block_count": len(blocks)} | sizes).items()
    }
    return ggufs.write_file(
        folder / "whole.gguf",
        architecture,
        (
            (name, values, kind if _is_matrix(name, values) else Kind.F32)
            for name, values in tensors
        ),
        metadata=metadata,
    )


def _is_matrix(name: str, values: np.ndarray) -> bool:
    return values.ndim > 1 and not name.endswith(".bias")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Values of all tensors, and the metadata that are numbers."""
    reader = gguf.GGUFReader(path)
    values = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    numbers = {key: field.contents() for key, field in reader.fields.items()}
    return values, numbers


def pruned(source: Path, selection: dict[int, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
    flocking.export_gguf(source, selection, source.with_name("pruned.gguf"), progress=False)
    return read(source.with_name("pruned.gguf"))


def test_experts_are_cut_inside_each(tmp_path: Path) -> None:
    biases = {
        "ffn_gate_exps.bias": (4, 96),
        "ffn_up_exps.bias": (4, 96),
        "ffn_down_exps.bias": (4, 64),
    }
    source = file_of(
        tmp_path, {**EXPERTS, **biases}, architecture="qwen3moe", expert_feed_forward_length=96,
        feed_forward_length=96, kind=Kind.Q8_0,
    )  # fmt: skip
    kept = ggufs.chosen(40, d_ff=96, experts=4)
    before, _ = read(source)
    after, numbers = pruned(source, kept)
    assert (numbers["qwen3moe.expert_feed_forward_length"]) == 64
    assert (numbers["qwen3moe.feed_forward_length"]) == 96
    for name in (*EXPERTS, *biases):
        old, new = before[f"blk.0.{name}"], after[f"blk.0.{name}"]
        for expert, neurons in enumerate(kept[0].reshape(4, 40) - 96 * np.arange(4)[:, None]):
            if "down_exps.weight" in name:
                np.testing.assert_allclose(
                    new[expert][:, :40], old[expert][:, neurons], atol=np.abs(old).max() / 127
                )
                assert not new[expert][:, 40:].any()
            elif "inp" in name or "down" in name:
                np.testing.assert_array_equal(new, old)
            else:
                np.testing.assert_array_equal(new[expert][:40], old[expert][neurons])


def test_gate_and_up_of_experts_in_one_matrix(tmp_path: Path) -> None:
    fused = {"ffn_gate_up_exps.weight": (4, 192, 64), "ffn_down_exps.weight": (4, 64, 96)}
    source = file_of(tmp_path, fused, architecture="qwen3moe", expert_feed_forward_length=96)
    kept = ggufs.chosen(40, d_ff=96, experts=4)
    before, _ = read(source)
    after, _ = pruned(source, kept)
    old, new = (one["blk.0.ffn_gate_up_exps.weight"] for one in (before, after))
    assert new.shape == (4, 128, 64)
    for expert, neurons in enumerate(kept[0].reshape(4, 40) - 96 * np.arange(4)[:, None]):
        np.testing.assert_array_equal(new[expert, :40], old[expert, neurons])
        np.testing.assert_array_equal(new[expert, 64:104], old[expert, 96 + neurons])


def test_one_expert_is_a_mixture_too(tmp_path: Path) -> None:
    one = {name: (1, *shape[1:]) if "exps" in name else shape for name, shape in EXPERTS.items()}
    source = file_of(tmp_path, one, architecture="qwen3moe", expert_feed_forward_length=96)
    after, _ = pruned(source, ggufs.chosen(40, d_ff=96))
    assert after["blk.0.ffn_down_exps.weight"].shape == (1, 64, 64)


def test_dense_layers_among_mixtures(tmp_path: Path) -> None:
    """Each has a width of its own; labels are those of the layers."""
    source = file_of(
        tmp_path, DENSE, EXPERTS, DENSE, architecture="qwen3moe",
        feed_forward_length=160, expert_feed_forward_length=96,
    )  # fmt: skip
    kept = ggufs.chosen(70, 0, 30) | {1: ggufs.chosen(40, d_ff=96, experts=4)[0]}
    after, numbers = pruned(source, kept)
    assert numbers["qwen3moe.feed_forward_length"] == 96
    assert numbers["qwen3moe.expert_feed_forward_length"] == 64
    shapes = [after[f"blk.{n}.ffn_down{kind}.weight"].shape for n, kind in
              enumerate(["", "_exps", ""])]  # fmt: skip
    assert shapes == [(64, 96), (4, 64, 64), (64, 96)]


def test_experts_and_a_shared_one_are_two_layers(tmp_path: Path) -> None:
    """In the order in which `flocking.feedforwards` counts them in such a model."""
    model = ggufs.tiny("qwen2_moe")
    order = [(block.layer, block.experts) for block in flocking.feedforwards(model)]
    assert order == [(0, 3), (1, 1), (2, 3), (3, 1)]
    source = file_of(
        tmp_path, {**EXPERTS, **SHARED}, {**EXPERTS, **SHARED}, architecture="qwen2moe",
        feed_forward_length=160, expert_feed_forward_length=96,
        expert_shared_feed_forward_length=128,
    )  # fmt: skip
    routed, shared = (
        ggufs.chosen(40, 50, d_ff=96, experts=4),
        ggufs.chosen(20, 30, d_ff=128, seed=1),
    )
    kept = {0: routed[0], 1: shared[0], 2: routed[1], 3: shared[1]}
    before, _ = read(source)
    after, numbers = pruned(source, kept)
    widths = {key: value for key, value in numbers.items() if key.endswith("feed_forward_length")}
    assert [*widths.values()] == [160, 64, 32]
    for number in (0, 1):
        name = f"blk.{number}.ffn_down_shexp.weight"
        np.testing.assert_array_equal(
            after[name][:, : len(shared[number])], before[name][:, shared[number]]
        )


def test_a_list_of_widths_stays_one(tmp_path: Path) -> None:
    """Then no layer is filled up but to the multiple; a layer without a block is left alone."""
    wide = {"ffn_gate.weight": (256, 64), "ffn_up.weight": (256, 64), "ffn_down.weight": (64, 256)}
    source = file_of(
        tmp_path, DENSE, {}, wide, architecture="deci", feed_forward_length=[160, 0, 256]
    )
    kept = ggufs.chosen(70) | {2: ggufs.chosen(20, d_ff=256)[0]}
    after, numbers = pruned(source, kept)
    assert numbers["deci.feed_forward_length"] == [96, 0, 32]
    assert after["blk.0.ffn_down.weight"].shape == (64, 96)
    assert after["blk.2.ffn_down.weight"].shape == (64, 32)


def test_widths_that_are_no_multiple(tmp_path: Path) -> None:
    """They are never wider than before."""
    odd = {"ffn_up.weight": (100, 64), "ffn_up.bias": (100,), "ffn_down.weight": (64, 100)}
    source = file_of(tmp_path, odd, architecture="starcoder2", feed_forward_length=100)
    after, numbers = pruned(source, ggufs.chosen(98, d_ff=100))
    assert numbers["starcoder2.feed_forward_length"] == 100
    assert after["blk.0.ffn_up.bias"].shape == (100,)


def test_widths_of_attention_may_be_equal_by_chance(tmp_path: Path) -> None:
    block = {**DENSE, "attn_qkv.weight": (160, 64), "attn_output.weight": (64, 160)}
    source = file_of(tmp_path, block, feed_forward_length=160)
    before, _ = read(source)
    after, _ = pruned(source, ggufs.chosen(70))
    for name in ("attn_qkv.weight", "attn_output.weight"):
        np.testing.assert_array_equal(after[f"blk.0.{name}"], before[f"blk.0.{name}"])


@pytest.mark.parametrize("experts", [1, 4])
def test_biases_of_outputs_stay(experts: int, tmp_path: Path) -> None:
    """Also where a model is as wide as its experts, as gpt-oss is."""
    more = () if experts == 1 else (experts,)
    kind, key = ("", "feed_forward_length") if not more else ("_exps", _EXPERT_WIDTH)
    block = {
        f"ffn_up{kind}.weight": (*more, 64, 64),
        f"ffn_up{kind}.bias": (*more, 64),
        f"ffn_gate{kind}.weight": (*more, 64, 64),
        f"ffn_down{kind}.weight": (*more, 64, 64),
        f"ffn_down{kind}.bias": (*more, 64),
    }
    source = file_of(tmp_path, block, **{key: 64})
    before, _ = read(source)
    kept = np.zeros((experts, 64), bool)
    kept[:, :32] = True
    after, _ = pruned(source, {0: np.flatnonzero(kept.reshape(-1))})
    name = f"blk.0.ffn_down{kind}.bias"
    np.testing.assert_array_equal(after[name], before[name])
    up = f"blk.0.ffn_up{kind}.bias"
    np.testing.assert_array_equal(after[up], before[up][..., :32])


@pytest.mark.parametrize(
    ("block", "sizes", "why"),
    [
        ({"ffn_sub_norm.weight": (160,)}, {}, "blk.0.ffn_sub_norm.weight has a value for each"),
        ({"ffn_act.scales": (160,)}, {}, "blk.0.ffn_act.scales has a value for each neuron"),
        ({"ffn_up.scale": (1,)}, {}, "blk.0.ffn_up.scale is neither weights nor biases"),
        ({"ffn_gate.0.weight": (160, 64)}, {}, "blk.0.ffn_gate.0.weight is neither"),
        ({"unheard_of": (64, 160)}, {}, "blk.0.unheard_of has a value for each neuron"),
        ({"ffn_up.weight": (150, 64)}, {}, r"ffn_up.weight is of 150 x 64, .* has 160 neurons"),
        ({"ffn_up.weight": (320, 64)}, {}, r"ffn_up.weight is of 320 x 64"),
        ({"ffn_up.bias": (64,)}, {}, r"ffn_up.bias is of 64"),
        ({"ffn_down.bias": (160,)}, {}, "blk.0.ffn_down.bias has a value for each neuron"),
        ({"ffn_down.weight": (4, 64, 160)}, {}, "ffn_down.weight has 3 dimensions"),
        (EXPERTS, {"expert_feed_forward_length": 96}, "both a dense block and experts in blk.0"),
        ({}, {"feed_forward_length": 100}, "says llama.feed_forward_length=100, and blk.0 has 160"),
        ({}, {"feed_forward_length": [100]}, "says llama.feed_forward_length=100"),
        ({}, {"feed_forward_length": []}, "says llama.feed_forward_length=None"),
        ({}, {"nextn_predict_layers": 1}, "layers that predict further tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_named(
    block: dict[str, Shape], sizes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    if sizes.get("feed_forward_length") == []:
        sizes = {"feed_forward_length": [160]}
        source = file_of(tmp_path, {}, DENSE, **sizes)
        why = "says llama.feed_forward_length=None, and blk.1 has 160"
    else:
        source = file_of(tmp_path, {**DENSE, **block}, **{"feed_forward_length": 160} | sizes)
    with pytest.raises(ValueError, match=why) as told:
        flocking.export_gguf(source, ggufs.chosen(70), tmp_path / "pruned.gguf")
    assert re.match(rf"{re.escape(str(source))} .*\.$", str(told.value))
    assert not (tmp_path / "pruned.gguf").exists()


@pytest.mark.parametrize(
    ("blocks", "sizes", "why"),
    [
        ([{"ffn_up.weight": (160, 64)}], {}, "has no ffn_down beside it"),
        ([{"ffn_down.weight": (64, 160)}], {}, "has no ffn_up beside it"),
        ([{"ffn_gate.0.weight": (160, 64)}], {}, "ffn_gate.0.weight is neither"),
        ([{}], {}, "has no feed-forward blocks"),
        ([DENSE], {"other": 160}, r"does not tell the width .*llama.feed_forward_length"),
        ([SHARED], {}, r"llama.expert_shared_feed_forward_length"),
        ([{**EXPERTS, **SHARED, "ffn_down_shexp.weight": (64, 384),
           "ffn_gate_shexp.weight": (384, 64), "ffn_up_shexp.weight": (384, 64)}],
         {"expert_feed_forward_length": 96}, "has as many neurons in the experts of blk.0 as"),
    ],
)  # fmt: skip
def test_what_is_no_block_is_refused(
    blocks: list[dict[str, Shape]], sizes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    source = file_of(tmp_path, *blocks, **sizes)
    with pytest.raises(ValueError, match=why):
        flocking.export_gguf(source, ggufs.chosen(70), tmp_path / "pruned.gguf")


@pytest.mark.parametrize("architecture", ["lfm2", "qwen35", "gemma4", "minimax-m2"])
def test_architectures_that_both_readers_know(architecture: str, tmp_path: Path) -> None:
    """They are spelled in two ways, and transformers has two lists of them."""
    if architecture not in gguf.MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf is older")
    if architecture == "qwen35":
        pytest.importorskip("transformers.integrations.gguf", reason="this transformers is older")
    source = file_of(tmp_path, DENSE, architecture=architecture, feed_forward_length=160)
    after, _ = pruned(source, ggufs.chosen(70))
    assert after["blk.0.ffn_down.weight"].shape == (64, 96)


@pytest.mark.parametrize(
    ("architecture", "reader"), [("olmo2", "transformers"), ("brand-new", "gguf")]
)
def test_architectures_that_a_reader_lacks_are_named(
    architecture: str, reader: str, tmp_path: Path
) -> None:
    source = file_of(tmp_path, DENSE, architecture=architecture, feed_forward_length=160)
    with pytest.raises(ValueError, match=f"{architecture}.*which the installed {reader} does not"):
        flocking.export_gguf(source, ggufs.chosen(70), tmp_path / "pruned.gguf")


def test_biases_in_blocks_are_refused(tmp_path: Path) -> None:
    shapes = {**DENSE, "ffn_up.bias": (160,)}
    rng = np.random.default_rng(0)
    source = ggufs.write_file(
        tmp_path / "whole.gguf",
        "llama",
        ((f"blk.0.{name}", rng.normal(size=shape).astype(np.float32), Kind.Q8_0)
         for name, shape in shapes.items()),
        metadata={"llama.feed_forward_length": (160, Value.UINT32)},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.bias is in Q8_0, in which biases share"):
        flocking.export_gguf(source, ggufs.chosen(70), tmp_path / "pruned.gguf")


def test_types_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    """Only of the down-projection: rows are copied in any type."""
    source = file_of(tmp_path, DENSE, kind=Kind.Q8_0, feed_forward_length=160)
    raw = source.read_bytes()
    entry = b"blk.0.ffn_down.weight" + (2).to_bytes(4, "little")
    entry += (160).to_bytes(8, "little") + (64).to_bytes(8, "little")
    assert raw.count(entry) == 1
    # It is the last tensor, and Q8_1 takes six bytes more for each of its blocks.
    changed = raw.replace(
        entry + (8).to_bytes(4, "little"), entry + (9).to_bytes(4, "little")
    ).ljust(len(raw) + 64 * 5 * 6, b"\0")
    source.write_bytes(changed)
    with pytest.raises(ValueError, match=r"ffn_down.weight in Q8_1, which .* cannot dequantise"):
        flocking.export_gguf(source, ggufs.chosen(70), tmp_path / "pruned.gguf")
