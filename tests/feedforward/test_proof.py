"""What only looks like an FF block is refused, and what cannot be cut is only recorded."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional

import flocking
from flocking.feedforward import UnsupportedModelError


@pytest.mark.parametrize(
    "config",
    [
        tf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2),
        tf.Mamba2Config(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16
        ),
    ],
    ids=["mamba", "mamba2"],
)
def test_mamba_is_refused(config: tf.PreTrainedConfig) -> None:
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"(?s)no feed-forward block.*backbone\.layers\.0"
    ):
        flocking.feedforwards(model)


def only_attention(model: tf.PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp = nn.Identity()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_refused(heads: int) -> None:
    """Its value-to-output pair has the structure: v_proj -> o_proj, one tensor between."""
    config = helpers.ARCHITECTURES["llama"]()
    config.num_attention_heads = config.num_key_value_heads = heads
    config.head_dim = 64 // heads
    model = tf.LlamaForCausalLM(config).eval()
    only_attention(model)
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.v_proj -> self_attn\.o_proj"):
        flocking.feedforwards(model)


class HeadlessAttention(nn.Module):
    """Causal averaging of values, of whatever width: cutting v and o to a half would pass."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(64, 160), nn.Linear(160, 64)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        value = self.value(hidden_states)
        steps = torch.arange(1, value.shape[1] + 1)[None, :, None]
        return self.out(value.cumsum(1) / steps), None


def test_what_mixes_tokens_is_refused(llama: tf.PreTrainedModel) -> None:
    only_attention(llama)
    for layer in llama.model.layers:
        layer.self_attn = HeadlessAttention()
    with pytest.raises(UnsupportedModelError, match="mixes tokens"):
        flocking.feedforwards(llama)


class InnerNorm(nn.Module):
    """As in BitNet: a norm over the neurons, so that a half of them differs from the whole."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.norm = mlp.up_proj, mlp.down_proj, nn.RMSNorm((), eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.up(x)
        return self.down(z / z.norm(dim=-1, keepdim=True))


def test_neurons_that_depend_on_each_other_are_refused(llama: tf.PreTrainedModel) -> None:
    for layer in llama.model.layers:
        layer.mlp = InnerNorm(layer.mlp)
    with pytest.raises(UnsupportedModelError, match="neurons depend on each other"):
        flocking.feedforwards(llama)


def bitnet() -> tf.PreTrainedModel:
    """A norm lies between the gate's product and the down-projection."""
    config = tf.BitNetConfig(
        vocab_size=helpers.VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def test_neurons_that_depend_on_each_other_are_recorded_and_not_pruned() -> None:
    model = bitnet()
    blocks = flocking.feedforwards(model)
    assert [(b.path, b.kind, b.d_ff, b.prunable) for b in blocks] == [
        (f"model.layers.{n}.mlp", "gated", 160, False) for n in (0, 1)
    ]
    ids = helpers.random_ids(20)[0]
    recording = flocking.record(model, ids, progress=False)
    for block, z in zip(blocks, helpers.activations(model, ids).values(), strict=True):
        mlp = model.get_submodule(block.path)
        assert (block.gate, block.up, block.down) == (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        np.testing.assert_allclose(recording.norm.sel(layer=block.layer)[0], z.norm(dim=-1))
    with pytest.raises(ValueError, match=r"only recorded: in 2 FF blocks \(model\.layers\.0\.mlp"):
        flocking.griffin(model)
    table = flocking.check(model)
    assert table.passed[:3].all()
    assert table.passed[3:].isna().all()


def test_gates_of_attention_are_not_blocks() -> None:
    """Their product with the attention's output looks like one, and depends on other tokens."""

    class Gated(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention, self.gate = attention, nn.Linear(64, 64)
            self.out, self.attention.o_proj = attention.o_proj, nn.Identity()

        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple:
            mixed, weights = self.attention(hidden_states=hidden_states, **kwargs)
            return self.out(mixed * torch.sigmoid(self.gate(hidden_states))), weights

    model = bitnet()
    for layer in model.model.layers:
        layer.self_attn = Gated(layer.self_attn)
        layer.mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.feedforwards(model)


class LowRank(nn.Module):
    """As LoRA's: two factors of one matrix, next to another one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def test_low_rank_factors_are_not_a_block(llama: tf.PreTrainedModel) -> None:
    for layer in llama.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    assert [block.path for block in flocking.feedforwards(llama)] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    only_attention(llama)
    with pytest.raises(UnsupportedModelError, match="no activation function"):
        flocking.feedforwards(llama)


class UsedTwice(nn.Module):
    """Its up-projection feeds something else besides z, which a cut would change."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.up, self.down = mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.up(x)
        return self.down(functional.silu(u)) + u.mean(-1, keepdim=True)


@pytest.mark.parametrize("size", [1, 3000])
def test_found_out_behind_a_massive_residual_too(llama: tf.PreTrainedModel, size: float) -> None:
    llama.model.embed_tokens.weight.data[:, 5] *= size
    for layer in llama.model.layers:
        layer.mlp = UsedTwice(layer.mlp)
    blocks = flocking.feedforwards(llama)
    assert [block.prunable for block in blocks] == [False, False]  # recorded, but not cut
    assert [block.down for block in blocks] == [layer.mlp.down for layer in llama.model.layers]
    with pytest.raises(ValueError, match="cannot be pruned, only recorded"):
        flocking.griffin(llama)


def test_weights_survive_a_model_that_rescales_them() -> None:
    """RWKV divides its weights in place when it is run: in a copy, they are the model's."""
    config = tf.RwkvConfig(
        vocab_size=128,
        hidden_size=64,
        attention_hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        rescale_every=2,
        context_length=64,
    )
    model = tf.RwkvForCausalLM(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"weights when it is run; .* run it once"):
        flocking.feedforwards(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert len(flocking.feedforwards(model)) == 4


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="model is a Sequential: give a transformers model"):
        flocking.feedforwards(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
