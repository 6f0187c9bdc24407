"""``record`` leaves the model, the hooks, the memory and the random numbers as they were."""

from __future__ import annotations

import gc

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
    record(llama, texts)
    alive, size = tensors(), psutil.Process().memory_info().rss
    for _ in range(50):
        record(llama, texts, max_new_tokens=2)
    assert tensors() <= alive  # fewer, if what another test left behind has gone meanwhile
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
