"""Mixtures of experts: watched, cut down, and which neuron belongs to which expert."""

from __future__ import annotations

import copy
import warnings

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from helpers import build, random_ids
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import flocking
from flocking.feedforward.moe import Routed, row_norms, shape, take
from flocking.feedforward.moe_hooks import watching
from flocking.models import trial_copy
from flocking.recording import Moments, Windows

SMALL = {
    "vocab_size": helpers.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}
MIXTURES = ["mixtral", "gpt_oss"]
# With shared experts next to the routed ones; and also with a dense first layer.
SHARED = {
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **SMALL, num_experts=4, shared_expert_intermediate_size=80
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **SMALL,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}


def shared(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(SHARED[name]()).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def experts_of(model: tf.PreTrainedModel) -> list[torch.nn.Module]:
    return [block.down for block in flocking.feedforwards(model) if block.kind == "experts"]


@pytest.mark.parametrize("name", MIXTURES)
def test_are_found(name: str) -> None:
    blocks = flocking.feedforwards(build(name))
    assert [(b.layer, b.path, b.kind, b.d_ff, b.experts) for b in blocks] == [
        (n, f"model.layers.{n}.mlp.experts", "experts", 160, 4) for n in (0, 1)
    ]
    assert all(block.error < 1e-5 for block in blocks)
    located = flocking.feedforwards(build(name).to("meta"))
    assert [(b.path, b.d_ff, b.experts) for b in located] == [
        (b.path, b.d_ff, b.experts) for b in blocks
    ]


def test_routed_experts_with_shared_and_dense_blocks() -> None:
    found = {
        name: [(b.path.partition("layers.")[2], b.kind, b.d_ff) for b in flocking.feedforwards(m)]
        for name, m in ((name, shared(name)) for name in SHARED)
    }
    assert found == {
        "qwen2_moe": [
            ("0.mlp.experts", "experts", 160),
            ("0.mlp.shared_expert", "gated", 80),
            ("1.mlp.experts", "experts", 160),
            ("1.mlp.shared_expert", "gated", 80),
        ],
        "deepseek_v3": [
            ("0.mlp", "gated", 160),
            ("1.mlp.experts", "experts", 320),
            ("1.mlp.shared_experts", "gated", 40),
        ],
    }


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", MIXTURES)
def test_watching_changes_nothing(name: str, implementation: str) -> None:
    model = build(name)
    model.set_experts_implementation(implementation)
    config = copy.deepcopy(model.config.to_dict())
    owners = [experts.config for experts in experts_of(model)]
    ids = torch.tensor(random_ids(20, 20))
    with torch.no_grad():
        plain = model(ids).logits
        seen = []
        with flocking.observe(model, lambda block, z: seen.append((block.layer, z))):
            watched = model(ids).logits
        after = model(ids).logits
    assert torch.equal(after, plain)
    if implementation == "eager":  # is watched as grouped_mm
        torch.testing.assert_close(watched, plain, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(watched, plain)
    assert [(layer, z.shape) for layer, z in seen] == [(0, (40, 160)), (1, (40, 160))]
    assert model.config.to_dict() == config
    assert all(e.config is own for e, own in zip(experts_of(model), owners, strict=True))
    assert model.get_experts_implementation()[""] == implementation
    assert {"grouped_mm", "batched_mm", "flocking"} <= set(ALL_EXPERTS_FUNCTIONS.keys())


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", MIXTURES)
def test_hands_out_the_tensor_computed_by_hand(name: str, implementation: str) -> None:
    model = build(name)
    model.set_experts_implementation(implementation)
    ids = random_ids(30)[0]
    expected = helpers.activations(model, ids)
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad(), flocking.observe(model, lambda b, z: seen.update({b.layer: z})):
        model(torch.tensor([ids]))
    for layer, z in seen.items():
        torch.testing.assert_close(z, expected[layer], rtol=1e-5, atol=1e-6)
        assert ((z != 0).unflatten(-1, (4, -1)).any(-1).sum(-1) == 2).all()  # two experts a token
        assert z.std() > 1e-3


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_replaced_activations_are_what_is_computed_with(name: str, implementation: str) -> None:
    """Masked through the hook, experts give what they give cut down to the mask."""
    model = build(name)
    model.set_experts_implementation(implementation)
    experts = experts_of(model)[0]
    generator = torch.Generator().manual_seed(1)
    half = torch.stack([torch.randperm(40, generator=generator)[:20].sort()[0] for _ in range(4)])
    mask = torch.zeros(4, 40).scatter_(1, half, 1)
    x, weights = torch.randn(9, 64, generator=generator), torch.rand(9, 2, generator=generator)
    index = torch.rand(9, 4, generator=generator).argsort(dim=1)[:, :2]
    with torch.no_grad():
        with watching(experts, lambda routed: routed.z * mask[routed.expert]):
            masked = experts(x, index, weights)
        whole, cut = experts(x, index, weights), take(experts, half)
        got = cut(x, index, weights)
    torch.testing.assert_close(got, masked, rtol=1e-5, atol=1e-6)
    assert (whole - masked).abs().max() > 0.1 * whole.abs().max()
    assert shape(cut) == (4, 20)
    assert shape(experts) == (4, 40)
    # Into tensors that are there already.
    other = torch.stack([torch.randperm(40, generator=generator)[:20].sort()[0] for _ in range(4)])
    places = {n: p.data_ptr() for n, p in cut.named_parameters()}
    take(experts, other, out=cut)
    assert places == {n: p.data_ptr() for n, p in cut.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(
            cut(x, index, weights), take(experts, other)(x, index, weights), rtol=0, atol=0
        )


def test_weight_magnitude_is_by_hand() -> None:
    for name in MIXTURES:
        experts = experts_of(build(name))[0]
        up = experts.gate_up_proj.detach()
        up = up.transpose(1, 2) if experts.is_transposed else up
        gate, up = (up[:, ::2], up[:, 1::2]) if name == "gpt_oss" else up.chunk(2, dim=1)
        torch.testing.assert_close(row_norms(experts), gate.norm(dim=2) * up.norm(dim=2))


@pytest.mark.parametrize("name", [*MIXTURES, *SHARED])
def test_recorded_in_a_batch_as_alone_and_by_hand(name: str) -> None:
    model = build(name) if name in MIXTURES else shared(name)
    texts = random_ids(30, 17, 5)
    batch = flocking.record(model, texts, batch_size=3, window=8, progress=False)
    for number, text in enumerate(texts):
        alone = flocking.record(model, text, window=8, progress=False)
        for layer, z in helpers.activations(model, text).items():
            r = z.double().abs() / z.double().norm(dim=-1, keepdim=True)
            experts = int(batch.experts.sel(layer=layer))
            reached = (z != 0).unflatten(-1, (experts, -1)).any(-1).double()
            for recording, row in ((batch, number), (alone, 0)):
                here = recording.sel(layer=layer).isel(sequence=row)
                windows = [slice(0, 1), *(slice(a, a + 8) for a in range(1, len(text), 8))]
                for window, tokens in enumerate(windows):
                    got = here.isel(window=window)
                    for name_, expected in (("energy", r[tokens] ** 2), ("mass", r[tokens])):
                        values = got[name_].values[: z.shape[1]]
                        np.testing.assert_allclose(values, expected.sum(0), atol=1e-5)
                    if experts > 1:
                        np.testing.assert_array_equal(got.routed[:experts], reached[tokens].sum(0))
                np.testing.assert_allclose(here.l1[: len(text)], r.sum(-1), rtol=1e-5)
                np.testing.assert_allclose(here.norm[: len(text)], z.norm(dim=-1), rtol=1e-5)
                owner = here.expert.values[: z.shape[1]]
                expected = (
                    np.repeat(np.arange(experts), z.shape[1] // experts) if experts > 1 else -1
                )
                np.testing.assert_array_equal(owner, np.broadcast_to(expected, owner.shape))


def test_ranks_and_raw_activations() -> None:
    model, text = build("mixtral"), random_ids(20)[0]
    recording = flocking.record(model, text, ranks=True, relative=True, window=8, progress=False)
    z = helpers.activations(model, text)[1]
    r = z / z.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(
        recording.relative.sel(layer=1)[0], r.abs().numpy(), atol=1e-3, rtol=1e-3
    )
    plain = Moments.zeros(1, 1, 160, ranks=True)
    plain.update(z[None], Windows.of(torch.zeros(1, 20, dtype=torch.int64)))
    np.testing.assert_allclose(
        recording["rank"].sel(layer=1)[0].sum("window"), plain.rank[0, 0], atol=1e-5
    )
    assert 0 < flocking.rank_consistency(recording).sel(layer=1).item() < 1


def test_routed_activations_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 2, 5, generator=generator)
    expert = torch.tensor([[0, 3], [2, 1], [3, 0]])
    routed = Routed(z, expert, 4)
    dense = routed.dense()
    assert dense.shape == routed.shape == (3, 20)
    for token in range(3):
        for slot in range(2):
            first = 5 * int(expert[token, slot])
            assert torch.equal(dense[token, first : first + 5], z[token, slot])
    assert (dense != 0).sum() == 30
    assert torch.equal(routed.of(dense), z)


@pytest.mark.parametrize("name", SHARED)
def test_griffin_with_shared_and_dense_blocks(name: str) -> None:
    model = shared(name)
    ids, later = (torch.tensor(random_ids(24, 24, seed=seed)) for seed in (0, 1))
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
    }
    full = model.generate(ids, **options)
    for scope in ("shared", "sequence"):
        whole = flocking.griffin(model, 1.0, scope=scope)
        assert torch.equal(whole.generate(ids, **options), full)
        twin = flocking.griffin(model, 0.5, scope=scope)
        twin.generate(ids, **options)
        keep = {}
        for block in flocking.feedforwards(model):
            experts = twin.selection[block.layer].expand(2, -1)
            assert experts.shape[1] == block.d_ff // 2
            keep[block.layer] = torch.zeros(2, 1, block.d_ff).scatter_(2, experts[:, None], 1)
            by_expert = keep[block.layer].view(2, block.experts, -1).sum(-1)
            assert (by_expert == block.d_ff // block.experts // 2).all()

        def masked(block: flocking.FeedForward, z: torch.Tensor, keep=keep) -> torch.Tensor:
            return (z.view(2, -1, block.d_ff) * keep[block.layer]).view_as(z)

        with torch.no_grad():
            past = model(ids, use_cache=True).past_key_values
            other = copy.deepcopy(past)
            with flocking.observe(model, masked):
                expected = model(later, past_key_values=past).logits
            got = twin(later, past_key_values=other).logits
            unpruned = model(torch.cat((ids, later), 1)).logits[:, 24:]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (got - unpruned).abs().max() > 1e-2 * expected.abs().max()


def test_experts_that_the_prompt_did_not_reach_keep_their_largest_neurons() -> None:
    model = build("mixtral")
    twin = flocking.griffin(model, 0.5)
    counts = []
    for tokens in (1, 60):
        ids = torch.tensor(random_ids(tokens))
        twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        expected = helpers.activations(model, ids[0].tolist())
        counts.append(0)
        for block in flocking.feedforwards(model):
            z = expected[block.layer]
            statistic = (z / z.norm(dim=-1, keepdim=True)).norm(dim=0).view(4, 40)
            chosen = twin.selection[block.layer].view(4, 20) - 40 * torch.arange(4)[:, None]
            for expert, norms in enumerate(row_norms(block.down)):
                reached = bool((statistic[expert] > 0).any())
                counts[-1] += not reached
                by = statistic[expert] if reached else norms
                assert chosen[expert].tolist() == by.topk(20).indices.sort().values.tolist()
        assert twin.report().unreached_experts == counts[-1]
    assert counts[0] == 4  # of two layers with four experts, one token reaches two in each
    assert counts[1] < 4


def test_experts_with_a_weight_of_zero_are_not_routed_to() -> None:
    """As where a router leaves all experts out, by giving one of them no weight."""
    model = build("mixtral")

    def without_second(module: torch.nn.Module, args: object, output: tuple) -> tuple:
        logits, weights, index = output
        weights = weights.clone()
        weights[:, 1] = 0
        return logits, weights, index

    (ids,) = random_ids(12)
    whole = flocking.record(model, [ids], progress=False)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(without_second)
    found = flocking.record(model, [ids], relative=True, progress=False)
    assert whole.routed.sum() == 2 * 2 * 12
    assert found.routed.sum() == 2 * 12
    size = model.config.intermediate_size
    used = found.relative.values.reshape(2, 12, -1, size).any(axis=-1).sum(axis=-1)
    assert (used == 1).all()
    energy = found.energy.sum(("window", "neuron")) / found.tokens.sum("window")
    np.testing.assert_allclose(energy, 1, rtol=1e-3)


def test_watched_by_one_at_a_time() -> None:
    model = build("mixtral")
    with flocking.observe(model, lambda block, z: None):
        with (
            pytest.raises(RuntimeError, match="watched already"),
            flocking.observe(model, lambda block, z: None),
        ):
            pass
        model(torch.tensor(random_ids(5)))
    with flocking.observe(model, lambda block, z: None):
        model(torch.tensor(random_ids(5)))


# --------------------------------------------------------------------------------------
# Experts that do not follow the interface


@pytest.fixture
def llama4() -> tf.PreTrainedModel:
    """Routed experts in every other layer, all computed at once, next to a shared one."""
    small = {k: v for k, v in SMALL.items() if k != "moe_intermediate_size"}
    config = tf.Llama4TextConfig(
        **{**small, "intermediate_size": 40, "num_experts_per_tok": 1},
        num_local_experts=4,
        head_dim=16,
        intermediate_size_mlp=160,
        interleave_moe_layer_step=2,
    )
    torch.manual_seed(0)
    model = tf.Llama4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_experts_computed_at_once_are_recorded_as_by_hand(llama4: tf.PreTrainedModel) -> None:
    blocks = flocking.feedforwards(llama4)
    assert [(b.kind, b.experts, b.d_ff) for b in blocks] == [
        ("gated", 1, 160),
        ("experts", 4, 160),
        ("gated", 1, 40),
    ]
    mixture = blocks[1]
    texts = random_ids(9, 5)
    recording = flocking.record(llama4, texts, window=4, progress=False)
    logits = []
    for row, ids in enumerate(texts):
        given: list[torch.Tensor] = []
        handle = mixture.down.register_forward_pre_hook(
            lambda m, args, given=given: given.append(args[0])
        )
        with torch.no_grad():
            logits.append(llama4(torch.tensor([ids])).logits)
        handle.remove()
        x = given[0].view(4, len(ids), 64)
        gate, up = (x @ mixture.down.gate_up_proj).chunk(2, dim=-1)
        z = (torch.nn.functional.silu(gate) * up).transpose(0, 1)  # (token, expert, d)
        reached = z.abs().sum(dim=-1) > 0
        assert (reached.sum(dim=1) == 1).all()
        r = z.flatten(1) / z.flatten(1).norm(dim=1, keepdim=True)
        got = recording.isel(sequence=row, layer=1)
        assert np.allclose(got.energy.sum("window"), (r**2).sum(dim=0).detach(), atol=1e-5)
        assert got.routed.sum("window").values.tolist() == reached.sum(dim=0).tolist()
    with flocking.observe(llama4, lambda block, z: None):
        watched = llama4(torch.tensor(texts[:1])).logits
    assert torch.equal(watched, logits[0])
    assert "down_proj" not in vars(mixture.down)


def test_griffin_on_experts_computed_at_once(llama4: tf.PreTrainedModel) -> None:
    assert flocking.check(llama4).passed.all()
    with pytest.raises(ValueError, match="scope='shared'"):
        flocking.griffin(llama4, scope="sequence")


def test_copies_made_while_watching_are_of_the_model_as_it_is(llama4: tf.PreTrainedModel) -> None:
    """A twin and a trial's copy are not watched and do not write to the weights."""
    before = {name: value.clone() for name, value in llama4.state_dict().items()}
    ids = torch.tensor(random_ids(9))
    for model in (llama4, build("mixtral")):
        twin = flocking.griffin(model, 0.45)
        expected = twin.generate(ids, max_new_tokens=4, pad_token_id=0)
        logits = model(ids).logits
        with flocking.observe(model, lambda block, z: torch.zeros_like(z)):
            copied = trial_copy(model)
            model(ids)
            assert torch.equal(twin.generate(ids, max_new_tokens=4, pad_token_id=0), expected)
        assert torch.equal(copied(ids).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in llama4.state_dict().items())


def test_experts_with_zero_activations_are_not_counted(llama4: tf.PreTrainedModel) -> None:
    (text,) = random_ids(16)
    expected = flocking.record(llama4, text, progress=False).routed.sum("window")[0, 1].values
    mixture = flocking.feedforwards(llama4)[1].down
    dead = int(expected.argmax())
    mixture.gate_up_proj.data[dead] = 0
    got = flocking.record(llama4, text, progress=False).routed.sum("window")[0, 1].values
    expected[dead] = 0
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("name", MIXTURES)
def test_long_texts_are_recorded_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is recorded before anything else, so that its traits are found while watched."""
    (text,) = random_ids(50)
    expected = flocking.record(build(name), text, progress=False)
    monkeypatch.setattr("flocking.models.capabilities.CHUNK_TOKENS", 16)
    model = build(name)
    fed = helpers.count_fed(model, monkeypatch)
    got = flocking.record(model, text, progress=False)
    assert fed[-4:] == [16, 16, 16, 2]
    assert np.allclose(got.energy, expected.energy, atol=1e-4)


def test_shared_experts_with_adapters_are_not_left_out() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = shared("qwen2_moe")
    every = [block.path for block in flocking.feedforwards(model)]
    config = peft.LoraConfig(
        target_modules=r".*shared_expert\.(gate|up|down)_proj", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    blocks = flocking.feedforwards(adapted)
    assert [block.path for block in blocks] == every
    assert [block.prunable for block in blocks] == [block.kind == "experts" for block in blocks]
    with pytest.raises(ValueError, match="merge_and_unload"):
        flocking.griffin(adapted)


def test_weight_magnitude_of_experts_computed_at_once(llama4: tf.PreTrainedModel) -> None:
    mixture = flocking.feedforwards(llama4)[1].down
    gate, up = mixture.gate_up_proj.chunk(2, dim=2)
    expected = (gate.norm(dim=1) * up.norm(dim=1)).flatten()
    assert torch.allclose(row_norms(mixture).flatten(), expected)


def test_experts_in_a_loop_of_their_own_are_refused_by_name() -> None:
    config = tf.LongcatFlashConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_hidden_size=160,
        expert_ffn_hidden_size=40,
        num_layers=1,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    model = tf.LongcatFlashForCausalLM(config).eval()
    with pytest.raises(flocking.UnsupportedModelError, match=r"mlp\.experts could not be proved"):
        flocking.feedforwards(model)
    with pytest.warns(UserWarning, match="left out"):
        blocks = flocking.set_feedforwards(model, allow_partial=True)
    assert {block.kind for block in blocks} == {"gated"}


def test_experts_that_are_modules_of_their_own_are_refused_by_name() -> None:
    config = tf.SwitchTransformersConfig(
        vocab_size=128, d_model=64, d_ff=160, num_layers=2, num_sparse_encoder_layers=1, num_heads=4
    )
    model = tf.SwitchTransformersForConditionalGeneration(config).eval()
    with pytest.raises(flocking.UnsupportedModelError, match=r"mlp\.experts are experts"):
        flocking.feedforwards(model)
