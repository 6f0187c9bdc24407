"""What ``record`` records is the definition, against bare hooks, in every arrangement."""

from __future__ import annotations

import itertools

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import assert_same, record, relative
from torch import nn

import flocking
from flocking.models import capabilities


@pytest.mark.parametrize("window", [1, 16, None])
def test_is_the_definition(tiny: tf.PreTrainedModel, window: int | None) -> None:
    (ids,) = helpers.random_ids(50)
    recording = record(tiny, ids, window=window, ranks=True)
    for layer, z in helpers.activations(tiny, ids).items():
        mine = recording.sel(sequence=0, layer=layer)
        r = relative(z)
        starts = [0, *range(1, 50, window or 50), 50]
        for number, (start, stop) in enumerate(itertools.pairwise(starts)):
            expected = r[start:stop]
            assert int(mine.tokens[number]) == len(expected)
            energy, mass = (expected**2).sum(0), expected.sum(0)
            np.testing.assert_allclose(mine.energy[number], energy, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(mine.mass[number], mass, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(mine.norm, np.linalg.norm(z, axis=-1), rtol=1e-5)
        np.testing.assert_allclose(mine.l1, r.sum(-1), rtol=1e-5)
        assert mine.sizes["window"] == len(starts) - 1


def test_energy_sums_to_the_number_of_tokens(tiny: tf.PreTrainedModel) -> None:
    recording = record(tiny, helpers.random_ids(50, 23, 1), window=16)
    per_window = recording.energy.sum("neuron")
    np.testing.assert_allclose(per_window, recording.tokens.broadcast_like(per_window), rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_batch_equals_its_members(tiny: tf.PreTrainedModel, side: str, batch_size: int) -> None:
    """Also where the caller has padded it, on whichever side."""
    texts = helpers.random_ids(50, 9, 31, 1, 17)
    width = max(map(len, texts))
    ids, mask = [], []
    for text in texts:
        padding, ones = [0] * (width - len(text)), [1] * len(text)
        ids.append(padding + text if side == "left" else text + padding)
        mask.append(padding + ones if side == "left" else ones + padding)
    padded = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    batch = record(tiny, padded, window=8, batch_size=batch_size)
    for number, text in enumerate(texts):
        alone = record(tiny, text, window=8)
        mine = batch.isel(sequence=[number]).assign_coords(sequence=[0])
        assert_same(mine, alone)
        beyond = mine.isel(window=slice(alone.sizes["window"], None))
        assert float(beyond.energy.sum()) == float(beyond.tokens.sum()) == 0
        assert bool(mine.norm.isel(token=slice(len(text), None)).isnull().all())


def test_chunks_equal_one_pass(tiny: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the sliding windows of the models that have one, and padded."""
    texts = helpers.random_ids(60, 41)
    whole = record(tiny, texts, window=8)
    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 14)
    fed = helpers.count_fed(tiny, monkeypatch)
    assert_same(record(tiny, texts, window=8), whole)
    causal = tiny.config.model_type != "bert"  # in chunks, a bidirectional model would err
    assert fed[-9:] == [7] * 8 + [4] if causal else fed[-1:] == [60]


def test_windows_of_any_size_add_up(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(150, 70)
    totals = [record(llama, texts, window=w).sum("window") for w in (1, 64, 150, None)]
    for other in totals[1:]:
        xr.testing.assert_allclose(other[["energy", "mass"]], totals[0][["energy", "mass"]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(architecture: str, dtype: torch.dtype) -> None:
    """Statistics are those of the model's own activations, in float32."""
    model = helpers.build(architecture).to(dtype)
    (ids,) = helpers.random_ids(40)
    recording = record(model, ids, window=None)
    for layer, z in helpers.activations(model, ids).items():
        r = relative(z)
        mine = recording.sel(sequence=0, layer=layer)
        np.testing.assert_allclose(mine.energy.sum("window"), (r**2).sum(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(mine.mass.sum("window"), r.sum(0), rtol=1e-3, atol=1e-5)
    assert recording.energy.dtype == np.float32
    assert recording.attrs["dtype"] == str(dtype).removeprefix("torch.")


def test_other_defaults_of_torch(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(20, 9)
    expected = record(llama, texts)
    torch.set_default_dtype(torch.float64)
    try:
        got = record(helpers.build("llama").float(), texts)
        got_again = record(llama, texts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.energy.dtype == np.float32
    assert_same(got_again, expected)


def test_with_autocast_around_it(llama: tf.PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = record(llama, helpers.random_ids(40))
    energy = recording.energy.sum("neuron")
    np.testing.assert_allclose(energy, recording.tokens.broadcast_like(energy), rtol=1e-5)


def test_a_device_map(tmp_path) -> None:
    """As accelerate dispatches it, with its own wrappers around every forward."""
    helpers.build("llama").save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    mapped = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    from accelerate import dispatch_model

    mapped = dispatch_model(mapped, device_map=places, force_hooks=True)
    assert hasattr(mapped.model.layers[0], "_hf_hook")
    texts = helpers.random_ids(30, 12)
    assert_same(record(mapped, texts), record(plain, texts))


def test_layers_of_different_widths(llama: tf.PreTrainedModel) -> None:
    mlp = llama.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        nn.Linear(64, 96, bias=False),
        nn.Linear(64, 96, bias=False),
        nn.Linear(96, 64, bias=False),
    )
    recording = record(llama, helpers.random_ids(20))
    assert recording.d_ff.values.tolist() == [96, 160]
    assert float(recording.energy.sel(layer=0).isel(neuron=slice(96, None)).sum()) == 0
    np.testing.assert_allclose(recording.energy.sum(("window", "neuron")), 20, rtol=1e-5)


def test_raw_relative_activations(tiny: tf.PreTrainedModel, capsys) -> None:
    texts = helpers.random_ids(20, 12)
    recording = flocking.record(tiny, texts, relative=[1])
    assert recording.relative.dims == ("sequence", "relative_layer", "token", "neuron")
    assert recording.relative.dtype == np.float16
    d_ff = recording.sizes["neuron"]
    size = 2 * 20 * d_ff * 2 / 1000
    assert f"keeping relative activations as float16: {size:.1f} kB" in capsys.readouterr().err
    for number, text in enumerate(texts):
        mine = recording.relative.sel(sequence=number, relative_layer=1)
        expected = relative(helpers.activations(tiny, text)[1])
        np.testing.assert_allclose(mine[: len(text)], expected, atol=1e-3)
        assert bool(mine[len(text) :].isnull().all())
    assert record(tiny, texts, relative=True).relative.dims[1] == "layer"
