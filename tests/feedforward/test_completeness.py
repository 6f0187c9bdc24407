"""Blocks that a proof could take for others, and parts that must not be left out in silence."""

from __future__ import annotations

import helpers
import pytest
import torch
import transformers as tf
from torch import nn

import flocking
from flocking.feedforward import UnsupportedModelError

SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma3n(**changes: object) -> tf.PreTrainedModel:
    config = tf.Gemma3nTextConfig(
        **SMALL,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
        laurel_rank=8,
        **changes,
    )
    torch.manual_seed(0)
    return tf.Gemma3nForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_over_many_neurons_is_found_in_any_dtype(dtype: torch.dtype) -> None:
    """Mean and deviation over a random half of many neurons are nearly those over all."""
    model = gemma3n(intermediate_size=8192, activation_sparsity_pattern=[0.95, 0.0]).to(dtype)
    sparse, dense = flocking.feedforwards(model)
    assert not sparse.prunable
    assert dense.prunable
    with pytest.raises(ValueError, match="neurons depend on each other"):
        flocking.griffin(model)


def test_experts_that_are_looked_up_by_number_are_named() -> None:
    config = tf.DogeConfig(
        **SMALL, intermediate_size=160, is_moe=True, num_experts=16, num_experts_per_tok=4
    )
    model = tf.DogeForCausalLM(config).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.mlp are experts that do not follow"
    ):
        flocking.feedforwards(model)
    with pytest.warns(UserWarning, match=r"left out, since model\.layers\.0\.mlp"):
        blocks = flocking.set_feedforwards(model, allow_partial=True)
    assert [block.kind for block in blocks] == ["gated", "gated"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT's
def test_a_gate_of_what_a_layer_is_given_is_no_block() -> None:
    """With adapters, no projection can be cut, and that of Gemma's inputs of layers looks alike."""
    peft = pytest.importorskip("peft")
    config = tf.Gemma4TextConfig(
        **SMALL,
        intermediate_size=160,
        num_key_value_heads=4,
        head_dim=16,
        global_head_dim=16,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = tf.Gemma4ForCausalLM(config).eval()
    paths = [block.path for block in flocking.feedforwards(model)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora" in name:
                weight.normal_(0, 0.1)
    found = flocking.feedforwards(adapted.base_model.model)
    assert [block.path for block in found] == paths
    assert [block.layer for block in found] == [0, 1]


def test_an_odd_activation_function_is_one() -> None:
    model = helpers.build("gpt2", activation_function="tanh")
    blocks = flocking.feedforwards(model)
    assert [block.kind for block in blocks] == ["plain", "plain"]
    assert all(block.prunable for block in blocks)


def test_two_factors_of_one_matrix_are_none() -> None:
    model = helpers.build("gpt2")
    for block in model.transformer.h:
        block.mlp.act = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="it has no activation function"):
        flocking.feedforwards(model)


def test_blocks_that_run_again_for_gradients_are_refused() -> None:
    model = helpers.build("llama")
    ids = torch.tensor(helpers.random_ids(12))
    expected = flocking.record(model, ids, progress=False)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()  # (as older versions call it)
    model.train()
    watching = flocking.observe(model, lambda block, z: None)
    refused = pytest.raises(RuntimeError, match="gradient checkpointing")
    with refused, watching:
        model(ids)
    with torch.no_grad(), flocking.observe(model, lambda block, z: None):
        model(ids)
    with pytest.warns(UserWarning, match="training mode"):
        got = flocking.record(model, ids, progress=False)
    helpers.assert_same(got, expected)
    assert model.model.layers[0].gradient_checkpointing
