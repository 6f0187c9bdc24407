"""What tests of exports share: more mixtures, and the reference that exports are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import transformers as tf
import xarray as xr
from helpers import ARCHITECTURES, VOCABULARY, build
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import flocking
from flocking.feedforward import moe

_SIZES = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_SIZES, "num_key_value_heads": 4, "intermediate_size": 160, "moe_intermediate_size": 48,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 16,
}  # fmt: skip
MORE: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, intermediate_size=160, moe_intermediate_size=40,
        shared_expert_intermediate_size=40, mlp_only_layers=[0],
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SIZES, **_EXPERTS, moe_intermediate_size=40),
    "olmoe": lambda: tf.OlmoeConfig(**_SIZES, **_EXPERTS, intermediate_size=40),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**_DEEPSEEK),
    "llama4": lambda: tf.Llama4TextConfig(
        **_SIZES, intermediate_size=40, intermediate_size_mlp=160, num_local_experts=4,
        interleave_moe_layer_step=2,
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **_SIZES, intermediate_size=320, lru_width=64, attention_window_size=16,
        block_types=["recurrent", "attention"],
    ),
    "jamba": lambda: tf.JambaConfig(
        **_SIZES, **_EXPERTS, intermediate_size=40, attn_layer_period=2, attn_layer_offset=0,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4,
    ),
}  # fmt: skip


def made(name: str) -> tf.PreTrainedModel:
    if name in ARCHITECTURES:
        return build(name)
    ARCHITECTURES[name] = MORE[name]
    try:
        return build(name)
    finally:
        del ARCHITECTURES[name]


def selected(model: tf.PreTrainedModel) -> xr.DataArray:
    """Another number of neurons in each layer, none of them a multiple of 8."""
    densities = np.resize([0.49, 0.3], len(flocking.feedforwards(model)))
    return flocking.select(flocking.weight_magnitude(model), densities)


def masked(model: tf.PreTrainedModel, kept: xr.DataArray) -> tf.PreTrainedModel:
    """The whole model with zeros in the columns of the down-projections: the reference."""
    copied = copy.deepcopy(model)
    for block in flocking.feedforwards(copied):
        mask = torch.from_numpy(kept.sel(layer=block.layer).values[: block.d_ff])
        # (Other layers may have the same parameter.)
        weight = block.weight.detach().clone()
        named = "down_proj" if block.kind == "experts" else "weight"
        setattr(block.down, named, torch.nn.Parameter(weight))
        if block.kind == "experts":
            transposed = moe.axes(block.down)
            (axis,) = (axis for name, axis, _ in transposed if name == "down_proj")
            weight.mul_(mask.view(block.experts, -1).unsqueeze(3 - axis))
        else:
            weight.mul_(mask[:, None] if isinstance(block.down, Conv1D) else mask)
    return copied


def logits(model: tf.PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_close(got: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= most * expected.abs().max()
