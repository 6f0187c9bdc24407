"""A twin and its original: what they share, what they do not, and what a twin reports."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from helpers import VOCABULARY, build, generate, tokens
from torch import Tensor

import flocking
from flocking.pruning import full_model


def test_leaves_the_model_as_it_was(generating: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    before = {name: value.clone() for name, value in generating.state_dict().items()}
    own_hook = generating.register_forward_hook(lambda *_: None)
    modules = {name: id(module) for name, module in generating.named_modules()}
    config = copy.deepcopy(generating.generation_config.to_dict())
    output = generate(generating, ids)
    hooks = [len(module._forward_pre_hooks) for module in generating.modules()]
    for density in (0.5, 0.1):
        generate(flocking.griffin(generating, density), ids)
    assert modules == {name: id(module) for name, module in generating.named_modules()}
    assert hooks == [len(module._forward_pre_hooks) for module in generating.modules()]
    assert generating.generation_config.to_dict() == config
    assert own_hook.id in generating._forward_hooks
    own_hook.remove()
    for name, value in generating.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(generate(generating, ids), output)


def test_several_twins_at_once(llama: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    densities = (0.2, 0.5, 0.9)
    alone = [generate(flocking.griffin(llama, density), ids) for density in densities]
    twins = [flocking.griffin(llama, density) for density in densities]
    for twin in twins:  # in turn, so that one's selection would show in another
        generate(twin, tokens(20, seed=5))
    assert all(
        torch.equal(generate(twin, ids), due) for twin, due in zip(twins, alone, strict=True)
    )
    counts = [len(twin.selection[0]) for twin in twins]
    assert counts == [32, 80, 144]


def test_two_twins_in_two_threads(llama: tf.PreTrainedModel) -> None:
    """One's prompt does not count for the other's selection."""
    twins = [flocking.griffin(llama, density) for density in (0.5, 0.3)]
    prompts = [tokens(100, seed=seed) for seed in (1, 2)]
    alone = [generate(*pair) for pair in zip(twins, prompts, strict=True)]
    # The second is given its prompt in the middle of the first's.
    inner: list[Tensor] = []
    layer = full_model(twins[0]).model.layers[1]

    def interrupt(module: torch.nn.Module, args: tuple) -> None:
        if not inner:
            inner.append(generate(twins[1], prompts[1]))

    layer.register_forward_pre_hook(interrupt)
    assert torch.equal(generate(twins[0], prompts[0]), alone[0])
    assert torch.equal(inner[0], alone[1])
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for got, due in zip(pool.map(generate, twins, prompts), alone, strict=True):
                assert torch.equal(got, due)


def test_hooks_act_where_they_were_put(llama: tf.PreTrainedModel) -> None:
    """Those on a twin not on its original, nor the other way round, nor on another twin."""
    ids = tokens(20)
    twin, other = flocking.griffin(llama, 0.5), flocking.griffin(llama, 1.0)
    full, pruned = generate(llama, ids), generate(twin, ids)
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output * 0)
        for layer in twin.model.layers
    ]
    with pytest.warns(UserWarning, match="it acts on decoding only"):
        assert not torch.equal(generate(twin, ids), pruned)
    assert torch.equal(generate(llama, ids), full)
    assert torch.equal(generate(other, ids), full)
    for handle in handles:
        handle.remove()
    handle = llama.model.layers[0].mlp.register_forward_hook(lambda m, args, output: output * 0)
    assert not torch.equal(generate(llama, ids), full)
    with pytest.raises(RuntimeError, match=r"a hook was registered on model\.layers\.0\.mlp\)"):
        generate(other, ids)
    handle.remove()
    assert torch.equal(generate(other, ids), full)
    seen = []
    with flocking.observe(twin, lambda block, z: seen.append(z.shape[-1])):
        llama(ids)
        generate(twin, ids, 3)
    assert set(seen) == {80}


def test_of_a_compiled_model(llama: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    expected = generate(flocking.griffin(llama, 0.5), ids)
    llama.compile(backend="eager")
    llama.model.layers[0].mlp.forward = torch.compile(
        llama.model.layers[0].mlp.forward, backend="eager"
    )
    generate(llama, ids)
    assert torch.equal(generate(flocking.griffin(llama, 0.5), ids), expected)


def test_of_a_model_that_generate_has_compiled(llama: tf.PreTrainedModel) -> None:
    """For a static cache generate compiles the model's call, on a GPU by itself, and keeps it."""
    ids = tokens(20)
    config = tf.generation.CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    expected = generate(flocking.griffin(llama, 0.5), ids)
    full = generate(llama, ids, **options)
    assert "_compiled_call" in vars(llama)
    twin = flocking.griffin(llama, 0.5)
    for more in ({}, {"prefill_chunk_size": 7}):
        assert torch.equal(generate(twin, ids, **options, **more), expected)
    assert not torch.equal(expected, full)
    assert torch.equal(generate(llama, ids, **options), full)


@pytest.mark.parametrize("change", ["assigned", "head", "buffer", "config"])
def test_a_new_twin_is_of_the_model_as_it_is_now(change: str) -> None:
    model, ids = build("gemma2"), tokens(20)
    generate(flocking.griffin(model, 1.0), ids)
    with torch.no_grad():
        if change == "assigned":
            state = {name: value * 1.5 for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        elif change == "head":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
        elif change == "buffer":
            model.model.rotary_emb.inv_freq.mul_(0.3)
        else:
            model.config.final_logit_softcapping = 0.5
    options = {"return_dict_in_generate": True, "output_logits": True}
    got, due = (generate(m, ids, 4, **options) for m in (flocking.griffin(model, 1.0), model))
    for a, b in zip(got.logits, due.logits, strict=True):
        torch.testing.assert_close(a, b)


def test_of_a_model_converted_since(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, 0.5)
    llama.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"weight is in torch\.bfloat16 now\): make the twin"):
        generate(twin, tokens(20))


def test_of_a_model_in_training(llama: tf.PreTrainedModel) -> None:
    expected = generate(flocking.griffin(llama, 0.5), tokens(20))
    llama.train()
    assert torch.equal(generate(flocking.griffin(llama, 0.5), tokens(20)), expected)
    assert llama.training


def test_outlives_its_original() -> None:
    model = build("llama")
    twin = flocking.griffin(model, 0.5)
    expected = generate(twin, tokens(20))
    del model
    assert torch.equal(generate(twin, tokens(20)), expected)


# --------------------------------------------------------------------------------------
# Reports


def test_reports(generating: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(generating, 0.5)
    blocks = flocking.feedforwards(generating)
    assert twin.report().prefilled_tokens == 0
    generate(twin, tokens(20))
    report = twin.report()
    assert report.parameters == generating.num_parameters()
    assert report.active_parameters == sum(p.numel() for p in twin.parameters())
    shared = {id(p) for p in generating.parameters()}
    ours = sum(p.numel() * 4 for p in twin.parameters() if id(p) not in shared)
    biases = sum(
        p.numel() * 4
        for b in blocks
        for n, p in b.down.named_parameters()
        if n.endswith("bias") and not n.startswith("gate")
    )
    assert report.compact_bytes == ours + biases
    ff = {m for block in blocks for m in (block.up, block.gate, block.down) if m is not None}
    assert report.ff_bytes == sum(p.numel() * 4 for m in ff for p in m.parameters())
    assert report.parameters > report.active_parameters
    assert report.copy_seconds > 0 < report.selection_seconds
    assert "active parameters" in report._repr_html_()
    assert f"{report.active_parameters:,}" in repr(report)


def test_holds_weights_once_for_each_sequence(llama: tf.PreTrainedModel) -> None:
    shared, own = (flocking.griffin(llama, 0.5, scope=scope) for scope in ("shared", "sequence"))
    for sequences in (3, 1):
        ids = tokens(*[20] * sequences)
        for twin in (shared, own):
            generate(twin, ids, 2)
        once = 2 * 3 * 80 * 64 * 4  # layers, projections, kept neurons, hidden size, bytes
        assert shared.report().compact_bytes == once
        assert own.report().compact_bytes == sequences * once


def test_reports_tied_parameters_once() -> None:
    """Whichever of their names comes first."""
    config = tf.CamembertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
    )
    model = tf.CamembertForCausalLM(config).eval()
    assert flocking.griffin(model).report().parameters == model.num_parameters()
