"""Weights in other forms than float32 in memory: half precision, quantised, adapted, offloaded."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import xarray as xr
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import ARCHITECTURES, build, proved, random_ids
from torch import nn

import flocking
from flocking.models import relative_error
from flocking.pruning import full_model

TEXTS = random_ids(9, 17, 12)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def recorded(model: nn.Module, batch_size: int = 3) -> xr.Dataset:
    return flocking.record(model, TEXTS, window=8, batch_size=batch_size, progress=False)


def generated(model: nn.Module) -> torch.Tensor:
    return model.generate(torch.tensor(TEXTS[1:2]), **GREEDY)


# --------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_records_what_float32_does(
    architecture: str, tiny: tf.PreTrainedModel, dtype: torch.dtype
) -> None:
    expected = recorded(tiny)
    got = recorded(tiny.to(dtype))
    assert got.attrs["dtype"] == str(dtype).removeprefix("torch.")
    assert got.energy.dtype == expected.energy.dtype
    energy = expected.energy.sum("window")
    error = abs(got.energy.sum("window") - energy).sum("neuron") / energy.sum("neuron")
    # A mixture may route a token elsewhere where two experts are equally good up to rounding.
    assert error.median() < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bert"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_twin_in_half_precision_at_density_1_is_the_full_model(
    architecture: str, tiny: tf.PreTrainedModel, dtype: torch.dtype
) -> None:
    model = tiny.to(dtype)
    twin = flocking.griffin(model, density=1.0)
    ids = torch.tensor(TEXTS[1:2])
    first = twin.generate(ids, **GREEDY)
    assert torch.equal(first, model.generate(ids, **GREEDY))


# --------------------------------------------------------------------------------------
# Quantised


def quantised(name: str, how: str) -> tf.PreTrainedModel:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    configs = {
        "int8": lambda: torchao.Int8WeightOnlyConfig(),
        "int8 by tensor": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()),
        "int8 by group": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32)),
        "int4": lambda: torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(32)
        ),
    }
    model = build(name)
    torchao.quantize_(model, configs[how](), _inside)
    return model


def _inside(module: nn.Module, path: str) -> bool:
    """What transformers quantises: all but the head, which may share the embeddings' weight."""
    return isinstance(module, nn.Linear) and path != "lm_head"


def dequantised(model: tf.PreTrainedModel, name: str) -> tf.PreTrainedModel:
    """A plain model with the values that a quantised one computes with."""
    plain = build(name)
    for path, module in model.named_modules():
        if hasattr(module, "weight") and type(module.weight) is not nn.Parameter:
            values = module.weight.dequantize().detach()
            plain.get_submodule(path).weight.data.copy_(values)
    return plain


@pytest.mark.parametrize("how", ["int8", "int8 by tensor", "int8 by group", "int4"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "mixtral"])
def test_quantised_models_are_recorded_like_the_same_values_in_full(name: str, how: str) -> None:
    model = quantised(name, how)
    got, expected = recorded(model), recorded(dequantised(model, name))
    assert torch.allclose(*(torch.from_numpy(r.energy.values) for r in (got, expected)), atol=1e-4)
    xr.testing.assert_allclose(got.energy, recorded(model, batch_size=1).energy, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "int8 by tensor"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_a_twin_keeps_rows_and_scales_of_int8(name: str, how: str) -> None:
    model = quantised(name, how)
    twin = flocking.griffin(model)
    same = flocking.griffin(dequantised(model, name))
    ids = torch.tensor(TEXTS[1:2])
    tokens = generated(twin)
    generated(same)
    later = {"past_key_values": None, "use_cache": True}
    got, expected = (other(ids, **later).logits for other in (twin, same))
    assert relative_error(got, expected) < 1e-4
    for layer, kept in twin.selection.items():
        assert torch.equal(kept, same.selection[layer])
    assert torch.equal(tokens, generated(twin))  # in the memory of the time before
    block = flocking.feedforwards(model)[0]
    down = twin.get_submodule(block.path).get_submodule("fc2" if name == "opt" else "down_proj")
    kept = twin.selection[0]
    assert type(down.weight) is type(block.down.weight)  # not made plain
    assert torch.equal(down.weight.qdata, block.down.weight.qdata[:, kept])
    assert torch.equal(down.weight.dequantize(), block.down.weight.dequantize()[:, kept])
    report = twin.report()
    assert report.compact_bytes < 0.55 * report.ff_bytes  # scales, and biases of down-projections


def test_proved_again_once_it_is_quantised() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = build("llama")
    assert all(block.prunable for block in flocking.feedforwards(model))
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    torchao.quantize_(model, config, _inside)
    assert not any(block.prunable for block in flocking.feedforwards(model))


def test_int8_passes_the_self_check() -> None:
    assert flocking.check(quantised("llama", "int8")).passed.all()


@pytest.mark.parametrize("how", ["int8 by group", "int4"])
def test_griffin_refuses_other_quantisations_by_name(how: str) -> None:
    model = quantised("llama", how)
    kind = type(model.model.layers[0].mlp.down_proj.weight).__name__
    with pytest.raises(ValueError, match=rf"quantised \({kind}\)"):
        flocking.griffin(model)


def test_griffin_by_sequence_refuses_quantised_models() -> None:
    with pytest.raises(ValueError, match="scope='shared'"):
        flocking.griffin(quantised("llama", "int8"), scope="sequence")


def test_weight_magnitude_of_quantised_models() -> None:
    model = quantised("llama", "int8")
    expected = flocking.weight_magnitude(dequantised(model, "llama"))
    xr.testing.assert_allclose(flocking.weight_magnitude(model), expected)


# --------------------------------------------------------------------------------------
# Adapters

TARGETS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_fc", "c_proj"],
    "opt": ["fc1", "fc2"],
    "phi3": ["gate_up_proj", "down_proj"],
}


def adapted(name: str, **changes: object) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        **{"target_modules": TARGETS[name], "init_lora_weights": False, **changes}
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about transformers' names and Conv1D
        return peft.get_peft_model(build(name), config).eval()


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_are_recorded_like_the_merged_model(name: str) -> None:
    model = adapted(name)
    got = recorded(model)
    plain = recorded(build(name))
    merged = recorded(model.merge_and_unload())
    xr.testing.assert_allclose(got.energy, merged.energy, atol=1e-5)
    assert got.module.equals(merged.module)
    assert abs(got.energy - plain.energy).max() > 1e-3  # so that it says something


def test_griffin_refuses_adapters_on_the_blocks_and_takes_them_merged() -> None:
    model = adapted("llama")
    with pytest.raises(ValueError, match=r"peft.*merge_and_unload"):
        flocking.griffin(model)
    generated(flocking.griffin(model.merge_and_unload()))


def test_griffin_takes_adapters_elsewhere() -> None:
    model = adapted("llama", target_modules=["q_proj", "v_proj"])
    twin = generated(flocking.griffin(model))
    assert torch.equal(twin, generated(flocking.griffin(model.merge_and_unload())))


def test_tokens_that_an_adapter_adds_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="get_base_model"):
        recorded(model)


# --------------------------------------------------------------------------------------
# Offloaded


def to_cpu(model: tf.PreTrainedModel, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def to_disk(model: tf.PreTrainedModel, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device="cpu")


def to_both(model: tf.PreTrainedModel, folder: Path) -> nn.Module:
    """One layer on disk and everything else where it was, by a device map."""

    def places(module: nn.Module, prefix: str = "") -> Iterator[str]:
        for name, child in module.named_children():
            if any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
                yield from places(child, f"{prefix}{name}.")
            else:
                yield prefix + name

    device_map = {path: "disk" if path.endswith(".1") else "cpu" for path in places(model)}
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


OFFLOADING = [to_cpu, to_disk, to_both]
SIZES = ("parameters", "active_parameters", "ff_bytes", "compact_bytes")


@functools.cache
def in_memory(architecture: str) -> tuple[xr.Dataset, torch.Tensor | None, list[int]]:
    """What the same model gives that lies in memory: its recording, its twin's tokens and sizes."""
    model = proved(architecture)
    if architecture == "bert":
        return recorded(model), None, []
    twin = flocking.griffin(model)
    new = generated(twin)
    return recorded(model), new, [getattr(twin.report(), field) for field in SIZES]


@pytest.mark.parametrize("offload", OFFLOADING)
def test_offloaded_models_are_recorded_and_pruned_like_others(
    architecture: str,
    tiny: tf.PreTrainedModel,
    offload: Callable[[tf.PreTrainedModel, Path], nn.Module],
    tmp_path: Path,
) -> None:
    expected, tokens, sizes = in_memory(architecture)
    model = offload(tiny, tmp_path)
    places = {path: p.device for path, p in model.named_parameters()}
    assert any(device.type == "meta" for device in places.values())
    xr.testing.assert_equal(recorded(model), expected)
    if architecture != "bert":
        twin = flocking.griffin(model)
        assert torch.equal(generated(twin), tokens)
        assert [getattr(twin.report(), field) for field in SIZES] == sizes
    assert {path: p.device for path, p in model.named_parameters()} == places


def test_by_sequence_with_offloaded_experts(tmp_path: Path) -> None:
    ids = torch.tensor([TEXTS[0], TEXTS[1][:9]])
    for name in ("llama", "mixtral", "gpt_oss"):
        twin = flocking.griffin(to_cpu(build(name), tmp_path), scope="sequence")
        plain = flocking.griffin(build(name), scope="sequence")
        assert torch.equal(twin.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


def test_offloaded_values_are_not_held_twice(tmp_path: Path) -> None:
    model = to_cpu(build("llama"), tmp_path)
    flocking.griffin(model)  # proof, traits, two copies

    def held() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        # (Other tests' sparse ones have no storage.)
        tensors = [t for t in tensors if not t.is_meta and t.layout == torch.strided]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    before = held()
    twin = flocking.griffin(model)
    generated(twin)
    compact = twin.report().compact_bytes
    assert held() - before < 1.5 * compact


def test_a_twin_of_an_offloaded_model_is_a_twin(tmp_path: Path) -> None:
    """Accelerate binds methods to a model: those of a copy must not act on the original."""
    model = to_both(build("llama"), tmp_path)
    twin = flocking.griffin(model, scope="sequence")
    with pytest.raises(ValueError, match="shares its parameters"):
        twin.to(torch.float16)
    assert model.dtype == torch.float32
    ids = torch.tensor([TEXTS[0], TEXTS[1][:9]])
    twin.generate(ids, **GREEDY)
    with pytest.raises(RuntimeError, match="holds selections for 2 sequences, and was given 4"):
        twin(ids.repeat(2, 1))


def test_the_self_check_runs_offloaded(tmp_path: Path) -> None:
    assert flocking.check(to_disk(build("llama"), tmp_path)).passed.all()


# --------------------------------------------------------------------------------------
# griffin(..., offload="cpu")


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_a_twin_may_leave_the_full_weights_in_host_memory(
    generating: tf.PreTrainedModel, scope: str
) -> None:
    ids = torch.tensor([TEXTS[0], TEXTS[1][:9]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = {name: (id(p), p.device, p.clone()) for name, p in generating.named_parameters()}
    plain = flocking.griffin(generating, scope=scope)
    twin = flocking.griffin(generating, scope=scope, offload="cpu")
    expected = plain.generate(ids, attention_mask=mask, **GREEDY)
    for _ in range(2):
        assert torch.equal(twin.generate(ids, attention_mask=mask, **GREEDY), expected)
    for layer, kept in plain.selection.items():
        assert torch.equal(twin.selection[layer], kept)
    for field in ("parameters", "active_parameters", "ff_bytes", "compact_bytes"):
        assert getattr(twin.report(), field) == getattr(plain.report(), field)
    for name, p in generating.named_parameters():
        same, device, values = before[name]
        assert (id(p), p.device) == (same, device)
        assert torch.equal(p, values)


def stream_of(twin: tf.PreTrainedModel) -> Any:
    """What brings the blocks of a twin's full model to the device."""
    modules = full_model(twin).modules()
    return next(module._hf_hook.stream for module in modules if hasattr(module, "_hf_hook"))


def test_two_blocks_weights_are_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, as if the device were another one: brought once to read a prompt, once to select."""
    model = build("llama", num_hidden_layers=5)
    twin = flocking.griffin(model, offload="cpu", method="magnitude")
    stream = stream_of(twin)
    brought: list[int] = []
    bring = stream._bring

    def counting(place: int) -> None:
        bring(place)
        stream.there[place] = {
            module: {name: value.clone() for name, value in values.items()}
            for module, values in stream.there[place].items()
        }
        brought.append(place)
        assert len(stream.there) <= 2

    monkeypatch.setattr(stream, "_bring", counting)
    expected = generated(flocking.griffin(model, method="magnitude"))
    assert torch.equal(generated(twin), expected)
    # To read the prompt, to score by the weights, to copy the kept neurons.
    assert brought == 3 * list(range(5))
    assert not any(parts for parts in stream.there.values())


def test_offload_is_for_models_in_host_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is on meta, and offload='cpu' is for a model in host"):
        flocking.griffin(to_cpu(build("llama"), tmp_path), offload="cpu")
    with pytest.raises(ValueError, match="offload='disk': give 'cpu', or leave it out"):
        flocking.griffin(build("llama"), offload="disk")


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(ValueError, match="meta device"):
        recorded(model)
    with pytest.raises(ValueError, match="meta device"):
        flocking.griffin(model)


def test_offloaded_blocks_are_copied_once_for_all_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each sequence's neurons are taken from the same copy of a block."""
    twin = flocking.griffin(build("llama"), offload="cpu", scope="sequence")
    stream = stream_of(twin)
    brought: list[int] = []
    bring = stream._bring
    monkeypatch.setattr(stream, "_bring", lambda place: (brought.append(place), bring(place)))
    ids = torch.arange(1, 41).view(4, 10)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    plain = flocking.griffin(build("llama"), scope="sequence")
    for _ in range(2):  # (The first time also makes room for so many sequences.)
        brought.clear()
        assert torch.equal(twin.generate(ids, **options), plain.generate(ids, **options))
    assert brought == [0, 1, 0, 1]  # to read the prompts, to copy the kept neurons
