"""FF blocks are found in every architecture, and the model is left as it was."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

import flocking

# Written down by hand from each model's source: kind and names of (gate, up, down).
EXPECTED = {
    "llama": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "mistral": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen2": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gemma": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gemma2": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gemma3": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "phi": ("plain", None, "mlp.fc1", "mlp.fc2"),
    "phi3": ("fused", "mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "glm": ("fused", "mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": ("plain", None, "mlp.c_fc", "mlp.c_proj"),
    "opt": ("plain", None, "fc1", "fc2"),
    "opt-post-norm": ("plain", None, "fc1", "fc2"),
    "gpt_neox": ("plain", None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gptj": ("plain", None, "mlp.fc_in", "mlp.fc_out"),
    "gpt_neo": ("plain", None, "mlp.c_fc", "mlp.c_proj"),
    "falcon": ("plain", None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "bloom": ("plain", None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "starcoder2": ("plain", None, "mlp.c_fc", "mlp.c_proj"),
    "olmo2": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "stablelm": ("gated", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "bert": ("plain", None, "intermediate.dense", "output.dense"),
}


@pytest.fixture(params=EXPECTED)
def architecture(request: pytest.FixtureRequest) -> str:
    """The dense ones; mixtures of experts have their own tests."""
    return request.param


@pytest.fixture
def tiny(architecture: str) -> tf.PreTrainedModel:
    """Just built, since the proof is what these tests are about."""
    return helpers.build(architecture)


def layer_of(model: tf.PreTrainedModel, number: int) -> nn.Module:
    """Layer `number`, found by the one list of two modules that every tiny model has."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    return stacks[0][number]


def test_finds_the_projections(architecture: str, tiny: tf.PreTrainedModel) -> None:
    kind, gate, up, down = EXPECTED[architecture]
    blocks = flocking.feedforwards(tiny)
    assert [block.layer for block in blocks] == [0, 1]
    for block in blocks:
        layer = layer_of(tiny, block.layer)
        assert block.kind == kind
        assert block.gate is (layer.get_submodule(gate) if gate else None)
        assert block.up is layer.get_submodule(up)
        assert block.down is layer.get_submodule(down)
        assert block.d_ff == (256 if architecture == "bloom" else 160)
        assert block.error < 1e-5
        assert block.down in list(tiny.get_submodule(block.path).modules())


def by_hand(block: flocking.FeedForward, config: tf.PreTrainedConfig, x: torch.Tensor):
    """What z is, from the block's weights and the model's activation function alone."""

    def linear(module: nn.Module) -> torch.Tensor:
        transposed = isinstance(module, tf.pytorch_utils.Conv1D)
        return functional.linear(x, module.weight.T if transposed else module.weight, module.bias)

    names = ("hidden_activation", "activation_function", "hidden_act", "activation")
    name = next((n for k in names if (n := getattr(config, k, None))), "gelu")
    if config.model_type == "bloom":
        name = "gelu_pytorch_tanh"
    act = ACT2FN[name]
    if block.kind == "plain":
        return act(linear(block.up))
    if block.kind == "fused":  # Phi-3 and GLM stack the gate above up
        gate, up = linear(block.up).chunk(2, dim=-1)
        return act(gate) * up
    return act(linear(block.gate)) * linear(block.up)


def test_records_the_tensor_computed_by_hand(tiny: tf.PreTrainedModel) -> None:
    """Down to the last neuron, z is the formula of the block's own weights."""
    inputs, seen = {}, {}
    hooks = [
        block.up.register_forward_pre_hook(
            lambda module, args, layer=block.layer: inputs.update({layer: args[0]})
        )
        for block in flocking.feedforwards(tiny)
    ]
    ids = torch.tensor(helpers.random_ids(12))
    with torch.no_grad(), flocking.observe(tiny, lambda ff, z: seen.update({ff: z})):
        tiny(ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    for block, z in seen.items():
        expected = by_hand(block, tiny.config, inputs[block.layer])
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
        assert z.std() > 1e-3


def test_located_without_proof_on_the_meta_device(
    architecture: str, tiny: tf.PreTrainedModel
) -> None:
    proved = flocking.feedforwards(tiny)
    located = flocking.feedforwards(helpers.build(architecture).to("meta"))
    assert [(b.layer, b.path, b.kind, b.d_ff) for b in located] == [
        (b.layer, b.path, b.kind, b.d_ff) for b in proved
    ]
    assert all(math.isnan(block.error) for block in located)


def test_gate_and_up_are_told_apart_by_function() -> None:
    """A block that defines up before gate: the order of definition would get it wrong."""
    model = helpers.build("llama")
    for layer in model.model.layers:
        gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
        del layer.mlp.gate_proj, layer.mlp.up_proj
        layer.mlp.up_proj, layer.mlp.gate_proj = up, gate
    for block in flocking.feedforwards(model):
        mlp = model.get_submodule(block.path)
        assert block.gate is mlp.gate_proj
        assert block.up is mlp.up_proj


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_found_where_d_ff_equals_the_hidden_size(name: str) -> None:
    """Then attention's projections have the same shapes as the block's."""
    model = helpers.build(name, **{"ffn_dim" if name == "opt" else "intermediate_size": 64})
    _, _, up, down = EXPECTED[name]
    for block in flocking.feedforwards(model):
        layer = layer_of(model, block.layer)
        assert (block.up, block.down) == (layer.get_submodule(up), layer.get_submodule(down))


def test_the_model_is_left_as_it_was(tiny: tf.PreTrainedModel) -> None:
    tiny.train()
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    modules = dict(tiny.named_modules())
    random_state = torch.get_rng_state()
    flocking.feedforwards(tiny)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in tiny.modules())
    assert {name: id(m) for name, m in tiny.named_modules()} == {
        k: id(m) for k, m in modules.items()
    }
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_user_hooks_do_not_fire_in_the_proof(llama: tf.PreTrainedModel) -> None:
    fired = []
    llama.model.layers[0].mlp.register_forward_hook(lambda *args: fired.append(args))
    llama.model.layers[1].register_forward_pre_hook(lambda *args: fired.append(args))
    assert len(flocking.feedforwards(llama)) == 2
    assert not fired


def test_proved_again_when_a_projection_is_replaced(llama: tf.PreTrainedModel) -> None:
    first = flocking.feedforwards(llama)
    assert flocking.feedforwards(llama)[0] is first[0]
    mlp = llama.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        nn.Linear(64, 96, bias=False),
        nn.Linear(64, 96, bias=False),
        nn.Linear(96, 64, bias=False),
    )
    assert [block.d_ff for block in flocking.feedforwards(llama)] == [96, 160]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_proved_in_other_precisions(architecture: str, dtype: torch.dtype) -> None:
    model = helpers.build(architecture).to(dtype)
    assert [block.layer for block in flocking.feedforwards(model)] == [0, 1]


class Interleaved(nn.Module):
    """Gate and up alternate in one matrix, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(64, 320), nn.Linear(160, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up(x)
        return self.down(functional.silu(gate_up[..., ::2]) * gate_up[..., 1::2])


def test_interleaved_gate_and_up(llama: tf.PreTrainedModel) -> None:
    for layer in llama.model.layers:
        layer.mlp = Interleaved()
    blocks = flocking.feedforwards(llama)
    assert [(b.kind, b.interleaved, b.d_ff) for b in blocks] == [("fused", True, 160)] * 2


def test_a_massive_residual_hides_no_true_block(llama: tf.PreTrainedModel) -> None:
    llama.model.embed_tokens.weight.data[:, 5] *= 3000
    assert len(flocking.feedforwards(llama)) == 2


def test_other_three_dimensional_weights_are_not_experts() -> None:
    """RecurrentGemma's gates have three dimensions; its FF blocks are dense."""
    config = tf.RecurrentGemmaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        lru_width=64,
        attention_window_size=16,
    )
    model = tf.RecurrentGemmaForCausalLM(config).eval()
    assert [block.layer for block in flocking.feedforwards(model)] == [0, 1, 2]
