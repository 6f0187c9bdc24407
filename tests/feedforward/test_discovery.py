"""Blocks are found in every architecture, and what only looks like one is not."""

from __future__ import annotations

import copy
import math

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

import flocking
from flocking.feedforward import UnsupportedModelError, cut, fused_rows
from flocking.models import relative_error, shadow

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
    """The dense ones; mixtures of experts have tests of their own."""
    return request.param


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


def test_gates_of_attention_are_no_blocks() -> None:
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


# ---------------------------------------------------------------- what must be refused


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


def test_a_block_left_out_of_one_layer_only_is_an_error(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.layers\.1\.mlp\.down_proj could not be proved",
    ):
        flocking.feedforwards(llama)


@pytest.fixture
def albert() -> tf.PreTrainedModel:
    """One layer, which runs three times."""
    config = tf.AlbertConfig(
        vocab_size=128,
        hidden_size=64,
        embedding_size=32,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    return tf.AlbertModel(config).eval()


def test_each_run_of_a_shared_layer_counts_as_a_layer(albert: tf.PreTrainedModel) -> None:
    """ALBERT runs one layer again and again: recorded run by run, and GRIFFIN refuses."""
    blocks = flocking.feedforwards(albert)
    assert [(b.layer, b.call, b.calls) for b in blocks] == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]
    assert len({block.down for block in blocks}) == 1
    texts = helpers.random_ids(6, 9)
    recording = flocking.record(albert, texts, progress=False)
    for row, ids in enumerate(texts):
        runs: list[torch.Tensor] = []
        handle = blocks[0].down.register_forward_pre_hook(
            lambda module, args, runs=runs: runs.append(args[0][0])
        )
        with torch.no_grad():
            albert(torch.tensor([ids]))
        handle.remove()
        for layer, z in enumerate(runs):
            due = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            got = recording.energy.isel(sequence=row, layer=layer).sum("window")
            assert torch.allclose(torch.from_numpy(got.values), due, atol=1e-5)
    only = flocking.record(albert, texts, layers=[1], progress=False)
    assert only.energy.isel(layer=0).equals(recording.energy.isel(layer=1))


def test_a_pass_that_fails_does_not_shift_the_runs_of_the_next(albert: tf.PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    seen: list[int] = []

    def callback(block: flocking.FeedForward, z: torch.Tensor) -> None:
        seen.append(block.layer)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with flocking.observe(albert, callback):
        with pytest.raises(KeyboardInterrupt):
            albert(ids)
        albert(ids)
    assert seen == [0, 1, 0, 1, 2]


class Strange(nn.Module):
    """A projection that is no nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_a_layer_with_unknown_projections_is_an_error(llama: tf.PreTrainedModel) -> None:
    mlp = llama.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = map(
        Strange, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    with pytest.raises(UnsupportedModelError, match=r"could not be proved.*it is not a Linear"):
        flocking.feedforwards(llama)


def test_what_cannot_be_recorded_may_be_left_out(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(UnsupportedModelError, match=r"allow_partial=True"):
        flocking.record(llama, [[5, 6, 7]], progress=False)
    with pytest.warns(UserWarning, match=r"left out, since model\.layers\.1\.mlp\.down_proj could"):
        blocks = flocking.set_feedforwards(llama, allow_partial=True)
    assert [block.layer for block in blocks] == [0]
    # From then on, everywhere; until it is said otherwise.
    assert flocking.record(llama, [[5, 6, 7]], progress=False).layer.values.tolist() == [0]
    twin = flocking.griffin(llama)
    twin.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    assert list(twin.selection) == [0]
    twin.set_attn_implementation("eager")  # what reads its prompts is proved anew, as it was
    with pytest.warns(UserWarning, match="left out"):
        twin.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"allow_partial=True"):
        flocking.set_feedforwards(llama)


class Twice(nn.Module):
    """Two FF blocks, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x + self.first(x))


def test_two_blocks_in_a_layer(llama: tf.PreTrainedModel) -> None:
    other = helpers.build("llama", intermediate_size=96)
    for layer, more in zip(llama.model.layers, other.model.layers, strict=True):
        layer.mlp = Twice(layer.mlp, more.mlp)
    blocks = flocking.feedforwards(llama)
    assert [(b.layer, b.path.removeprefix("model.layers."), b.d_ff) for b in blocks] == [
        (0, "0.mlp.first", 160),
        (1, "0.mlp.second", 96),
        (2, "1.mlp.first", 160),
        (3, "1.mlp.second", 96),
    ]
    texts = helpers.random_ids(7, 5)
    recording = flocking.record(llama, texts, progress=False)
    for row, ids in enumerate(texts):
        for layer, z in helpers.activations(llama, ids).items():
            due = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            got = recording.energy.isel(sequence=row, layer=layer).sum("window")[: len(due)]
            assert torch.allclose(torch.from_numpy(got.values), due, atol=1e-5)
    assert flocking.check(llama).passed.all()


def test_layers_without_a_block_are_named(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[0].mlp = nn.Identity()
    with pytest.warns(UserWarning, match=r"1 layers hold no .* left out: model\.layers\.0"):
        blocks = flocking.feedforwards(llama)
    assert [block.layer for block in blocks] == [1]


class LowRank(nn.Module):
    """As LoRA's: two factors of one matrix, beside another one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def test_low_rank_factors_are_no_block(llama: tf.PreTrainedModel) -> None:
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
    """Its up-projection feeds something else beside z, which a cut would change."""

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


def test_a_massive_residual_hides_no_true_block(llama: tf.PreTrainedModel) -> None:
    llama.model.embed_tokens.weight.data[:, 5] *= 3000
    assert len(flocking.feedforwards(llama)) == 2


def test_a_block_shared_by_two_layers_counts_for_both(llama: tf.PreTrainedModel) -> None:
    shared = copy.deepcopy(llama)
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    llama.model.layers[1].mlp.load_state_dict(llama.model.layers[0].mlp.state_dict())
    blocks = flocking.feedforwards(shared)
    assert [(b.layer, b.call, b.calls) for b in blocks] == [(0, 0, 2), (1, 1, 2)]
    one, other = (flocking.record(m, [[5, 6, 7]], progress=False) for m in (shared, llama))
    assert one.energy.equals(other.energy)
    # One selection for both runs, by the statistic of all.
    twin = flocking.griffin(shared)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    twin.generate(ids, max_new_tokens=2, pad_token_id=0)
    energy = flocking.record(shared, ids.tolist(), progress=False).energy.sum(("window", "layer"))
    due = energy[0].argsort().values[-80:]
    for layer in (0, 1):
        assert sorted(due.tolist()) == twin.selection[layer].tolist()
    assert twin.report().active_parameters < twin.report().parameters
    assert flocking.check(shared).passed.all()


def test_a_single_shared_projection_is_not_pruned(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.down_proj = llama.model.layers[0].mlp.down_proj
    assert flocking.record(llama, [[5, 6, 7]], progress=False).sizes["layer"] == 2
    with pytest.raises(ValueError, match="shares a single projection"):
        flocking.griffin(llama)


def test_added_layers_are_found(llama: tf.PreTrainedModel) -> None:
    assert len(flocking.feedforwards(llama)) == 2
    llama.model.layers.append(helpers.build("llama").model.layers[0])
    llama.config.num_hidden_layers = 3
    llama.config.layer_types = ["full_attention"] * 3
    assert [block.layer for block in flocking.feedforwards(llama)] == [0, 1, 2]


def test_weights_survive_a_model_that_rescales_them() -> None:
    """RWKV divides its weights in place when it is run: on a shadow, they are the model's."""
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
    with pytest.raises(UnsupportedModelError, match="changes its own weights"):
        flocking.feedforwards(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_three_dimensional_weights_are_no_experts() -> None:
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


def test_what_is_not_finite_agrees_with_nothing() -> None:
    ones = torch.ones(3)
    assert relative_error(ones * torch.nan, ones) == math.inf
    assert relative_error(ones * torch.inf, ones) == math.inf
    mask = torch.tensor([0.0, -torch.inf])
    assert relative_error(mask, mask) == 0
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones * 1000.5, ones * 1000, ones * 999) == pytest.approx(0.5, rel=1e-2)


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="model is a Sequential: give a transformers model"):
        flocking.feedforwards(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))


# ------------------------------------------------------------------------ the tools


def test_cut_keeps_rows_columns_and_bias() -> None:
    keep = torch.tensor([0, 3])
    for projection in (nn.Linear(5, 7), tf.pytorch_utils.Conv1D(7, 5)):
        x = torch.randn(2, 3, 5)
        torch.testing.assert_close(cut(projection, outputs=keep)(x), projection(x)[..., keep])
        masked = torch.zeros_like(x)
        masked[..., keep] = x[..., keep]
        torch.testing.assert_close(cut(projection, inputs=keep)(x[..., keep]), projection(masked))
        assert projection(x).shape == (2, 3, 7)


def test_fused_rows() -> None:
    neurons = torch.tensor([1, 2])
    assert fused_rows(neurons, 4, interleaved=False).tolist() == [1, 2, 5, 6]
    assert fused_rows(neurons, 4, interleaved=True).tolist() == [2, 3, 4, 5]


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


def test_shadow_shares_weights_and_nothing_else(tiny: tf.PreTrainedModel) -> None:
    tiny.train()
    tiny.get_input_embeddings().register_forward_hook(lambda *args: None)
    copied = shadow(tiny)
    assert not any(m is n for m, n in zip(copied.modules(), tiny.modules(), strict=True))
    assert all(p is q for p, q in zip(copied.parameters(), tiny.parameters(), strict=True))
    assert not any(m._forward_hooks or m.training for m in copied.modules())
    tiny.eval()
    ids = torch.tensor(helpers.random_ids(9))
    with torch.no_grad():
        assert relative_error(copied(ids)[0], tiny(ids)[0]) == 0


# --------------------------------------------------------------------------------------
# Models whose blocks a user has to name


class ListsConfig(tf.PreTrainedConfig):
    model_type = "lists"

    def __init__(self, **kwargs: object) -> None:
        super().__init__(vocab_size=128, hidden_size=32, num_hidden_layers=3, **kwargs)


class Lists(tf.PreTrainedModel):
    """All up-projections in one list and all down-projections in another: no layer holds both."""

    config_class = ListsConfig

    def __init__(self, config: ListsConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(128, 32)
        self.up = nn.ModuleList(nn.Linear(32, 80) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(80, 32) for _ in range(3))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> tuple:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return (x,)


@pytest.fixture
def lists() -> Lists:
    torch.manual_seed(0)
    model = Lists(ListsConfig()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def test_blocks_that_a_user_names(lists: Lists) -> None:
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.feedforwards(lists)
    named = {f"down.{n}": [f"up.{n}"] for n in range(3)}
    blocks = flocking.set_feedforwards(lists, named)
    assert [(b.layer, b.down, b.up) for b in blocks] == [
        (n, lists.down[n], lists.up[n]) for n in range(3)
    ]
    assert all(block.kind == "plain" and block.error < 1e-5 and block.prunable for block in blocks)
    assert [block.path for block in blocks] == ["down.0", "down.1", "down.2"]
    recording = flocking.record(lists, [[5, 6, 7, 8]], progress=False)  # from then on
    named.clear()  # the user's own, to do with as they please
    assert flocking.feedforwards(lists) == blocks
    z = helpers.activations(lists, [5, 6, 7, 8])
    for layer in range(3):
        r = z[layer] / z[layer].norm(dim=1, keepdim=True)
        energy = recording.energy.sel(layer=layer).sum("window").values[0]
        assert torch.allclose(torch.from_numpy(energy), (r**2).sum(0), atol=1e-5)


def test_names_can_be_forgotten(lists: Lists) -> None:
    flocking.set_feedforwards(lists, {"down.0": "up.0"})
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.set_feedforwards(lists, {})


def test_a_function_that_names_them(lists: Lists) -> None:
    blocks = flocking.set_feedforwards(
        lists, lambda model: {f"down.{n}": f"up.{n}" for n in range(len(model.up))}
    )
    assert len(blocks) == 3


def test_wrong_names_do_not_pass_the_proof(lists: Lists) -> None:
    with pytest.raises(UnsupportedModelError, match=r"down\.1 could not be proved"):
        flocking.set_feedforwards(lists, {"down.0": "up.0", "down.1": "up.0"})
    with pytest.raises(UnsupportedModelError, match=r"before its down-projection"):
        flocking.set_feedforwards(lists, {"down.0": "up.1"})
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.feedforwards(lists)  # what failed is not remembered


@pytest.mark.parametrize(
    ("locate", "error", "match"),
    [
        ({"down.0": ["nowhere"]}, ValueError, "'nowhere'"),
        ({"down.0": ["down.1"]}, ValueError, r"down\.1 \(80, 32\)"),
        ({"down.0": []}, ValueError, r"d_ff, d"),
        ({"embed": ["up.0"]}, ValueError, "None"),
        (["down.0"], TypeError, "give a dict"),
        ({"down.0": 3}, TypeError, "3 for 'down.0': give a path"),
        ({"down.0": ["up.0", 3]}, TypeError, "give a path"),
    ],
)
def test_names_that_make_no_sense(
    lists: Lists, locate: object, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        flocking.set_feedforwards(lists, locate)


def test_naming_what_would_be_found_changes_nothing(tiny: tf.PreTrainedModel) -> None:
    found = flocking.feedforwards(tiny)
    paths = {module: path for path, module in tiny.named_modules()}
    named = {
        paths[b.down]: []
        if b.kind == "experts"
        else [paths[m] for m in {b.up: None, b.gate: None} if m is not None]
        for b in found
    }
    again = flocking.set_feedforwards(tiny, named)
    fields = ("layer", "path", "d_ff", "up", "gate", "down", "interleaved", "experts", "prunable")
    for one, other in zip(again, found, strict=True):
        assert all(getattr(one, field) == getattr(other, field) for field in fields)
