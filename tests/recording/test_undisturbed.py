"""``record`` leaves the model, the hooks, the memory and the random numbers as they were."""

from __future__ import annotations

import gc
import tracemalloc

import helpers
import numpy as np
import psutil
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import hooks_of, record

import flocking


def test_fifty_calls_leave_nothing_behind(llama: tf.PreTrainedModel) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    texts = helpers.random_ids(200, 150)
    one = record(llama, texts, max_new_tokens=2).nbytes
    size = psutil.Process().memory_info().rss
    tracemalloc.start()  # of Python's own memory and numpy's
    try:
        alive, traced = [], []
        for _ in range(2):  # until the end of the first half, caches of others fill up
            for _ in range(25):
                record(llama, texts, max_new_tokens=2)
            alive.append(tensors())
            traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert alive[1] <= alive[0]  # fewer, if what another test left behind has gone meanwhile
    assert traced[1] - traced[0] < one  # not even one recording
    assert psutil.Process().memory_info().rss - size < 50e6
    assert hooks_of(llama) == []


def test_an_interrupted_call_leaves_the_model_as_it_was(llama: tf.PreTrainedModel) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    flocking.feedforwards(llama)
    llama.train()
    llama.model.layers[0].eval()
    flags = [module.training for module in llama.modules()]
    hook = llama.model.layers[1].mlp.register_forward_hook(interrupt)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="training mode"):
        record(llama, helpers.random_ids(9))
    hook.remove()
    assert hooks_of(llama) == []
    assert [module.training for module in llama.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_training_mode_is_warned_of_and_restored() -> None:
    model = helpers.build("gpt2", resid_pdrop=0.5)
    (ids,) = helpers.random_ids(20)
    expected = record(model, ids)
    model.train()
    with pytest.warns(UserWarning, match="recorded in eval mode"):
        got = record(model, ids)
    assert model.training
    assert model.transformer.h[0].mlp.training
    xr.testing.assert_identical(got, expected)


def test_a_models_own_randomness_is_seeded(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output + torch.randn_like(output)
    )
    (ids,) = helpers.random_ids(20)
    random_state = torch.get_rng_state()
    first, second = record(llama, ids, seed=1), record(llama, ids, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    xr.testing.assert_identical(first, second)
    assert not first.energy.equals(record(llama, ids, seed=2).energy)


def test_a_short_text_does_not_change_the_attention_for_good() -> None:
    config = tf.BigBirdConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        block_size=16,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = tf.BigBirdModel(config).eval()
    short, long = helpers.random_ids(40, 208)
    expected = record(model, long)
    alone = record(model, short)
    assert model.attention_type == "block_sparse"
    assert record(model, long).energy.equals(expected.energy)
    together = record(model, [short, long])
    assert np.allclose(together.energy[1], expected.energy[0], atol=1e-6)
    assert np.allclose(together.energy[0, :, :2], alone.energy[0], atol=1e-6)
    for text in (short, [short, long]):
        inner = model.encoder.layer[0].attention.self
        inner.register_forward_hook(lambda *given: None)
        random_state = torch.get_rng_state()
        record(model, text)
        assert model.encoder.layer[0].attention.self is inner  # with the user's hooks
        assert torch.equal(torch.get_rng_state(), random_state)


DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "rotary"),
    [
        ("llama", DYNAMIC),
        ("gemma3", {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC | {"factor": 7.0}}),
    ],
)
@pytest.mark.parametrize("new", [0, 6])
def test_a_longer_text_does_not_change_the_positions_of_others(
    name: str, rotary: dict, new: int
) -> None:
    """Dynamic rotary embeddings keep the longest text's frequencies: not here, nor afterwards."""

    def fresh() -> tf.PreTrainedModel:
        return helpers.build(
            name, rope_parameters=rotary, max_position_embeddings=16, initializer_range=0.3
        )

    long, short, other = helpers.random_ids(90, 50, 70)
    options = {"window": 10, "max_new_tokens": new}
    alone = record(fresh(), short, **options)
    model = fresh()
    with torch.no_grad():
        before = model(torch.tensor([other])).logits
        together = record(model, [long, short], **options)
        after = model(torch.tensor([other])).logits
        assert torch.equal(after, before)
        model(torch.tensor([long]))  # the user's own, which changes it
        again = record(model, short, **options)
    assert torch.equal(model(torch.tensor([other])).logits, before) is False
    fed = alone.sizes["token"]
    for got, row in ((together, 1), (again, 0)):
        norms = got.norm.isel(sequence=row, token=slice(fed))
        np.testing.assert_allclose(norms, alone.norm.isel(sequence=0), rtol=1e-4)
    if new:
        assert together.token_id.values[1, :fed].tolist() == alone.token_id.values[0].tolist()
