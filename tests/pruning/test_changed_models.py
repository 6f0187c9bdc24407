"""What a user has added to a model (hooks, masks, parametrizations) is the twin's as well."""

from __future__ import annotations

import functools
from collections.abc import Callable

import helpers
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as weight_norm_by_hook

import flocking
from flocking.pruning import branches, graphs, side_by_side

Change = Callable[[tf.PreTrainedModel], None]
NEW = 6


def layers_of(model: tf.PreTrainedModel) -> nn.ModuleList:
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))


def attention_projection(model: tf.PreTrainedModel) -> nn.Module:
    """A projection of the first layer that is not part of an FF block."""
    blocks = flocking.feedforwards(model)
    taken = {id(part) for b in blocks for part in (b.up, b.gate, b.down)}
    inside = layers_of(model)[0].modules()
    found = [m for m in inside if isinstance(m, nn.Linear | tf.pytorch_utils.Conv1D)]
    return next(m for m in found if id(m) not in taken)


def forward_hook(model: tf.PreTrainedModel) -> None:
    def steer(module: nn.Module, args: tuple, output: object) -> object:
        states = output[0] if isinstance(output, tuple) else output
        states = states + torch.linspace(-2, 2, states.shape[-1])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers_of(model)[0].register_forward_hook(steer)


def pre_hook_with_arguments(model: tf.PreTrainedModel) -> None:
    def steer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args[0] * torch.linspace(0.5, 2, args[0].shape[-1]), *args[1:]), kwargs

    layers_of(model)[1].register_forward_pre_hook(steer, with_kwargs=True)


def hook_of_a_module(model: tf.PreTrainedModel) -> None:
    """A hook that is a method of a module inside of the model."""
    layer = layers_of(model)[0]

    class Steering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.linspace(-1, 1, 64))

        def add(self, module: nn.Module, args: tuple) -> tuple:
            return (args[0] + self.shift, *args[1:])

    layer.steering = Steering()
    layer.register_forward_pre_hook(layer.steering.add)


def hook_that_knows_its_module(model: tf.PreTrainedModel) -> None:
    """One for all layers, which tells by the module itself what to add."""
    shifts = {layers_of(model)[1]: torch.linspace(-2, 2, 64)}

    def steer(module: nn.Module, args: tuple, output: object) -> object:
        if module not in shifts:
            return None
        if isinstance(output, tuple):
            return (output[0] + shifts[module], *output[1:])
        return output + shifts[module]

    for layer in layers_of(model):
        layer.register_forward_hook(steer)


def mask(model: tf.PreTrainedModel) -> None:
    torch.manual_seed(1)
    prune.random_unstructured(attention_projection(model), "weight", 0.5)


def norm_by_hook(model: tf.PreTrainedModel) -> None:
    with pytest.warns(FutureWarning):  # deprecated, but models that were made with it are around
        projection = weight_norm_by_hook(attention_projection(model))
    projection.weight_g.data *= 3


def parametrization(model: tf.PreTrainedModel) -> None:
    projection = parametrizations.weight_norm(attention_projection(model))
    projection.parametrizations.weight.original0.data *= 3


def captured_outputs(model: tf.PreTrainedModel) -> None:
    with torch.no_grad():
        model(torch.tensor(helpers.random_ids(5)), output_hidden_states=True)


def wrapper_of_accelerate(model: tf.PreTrainedModel) -> None:
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    add_hook_to_module(layers_of(model)[1], AlignDevicesHook(io_same_device=True))


CHANGES = {
    change.__name__: change
    for change in (
        forward_hook,
        pre_hook_with_arguments,
        hook_of_a_module,
        hook_that_knows_its_module,
        mask,
        norm_by_hook,
        parametrization,
        captured_outputs,
        wrapper_of_accelerate,
    )
}
COMPILED = {"parametrization", "captured_outputs"}  # all others are hooks


@pytest.fixture(params=["llama", "gpt2", "gemma2", "mixtral"])
def plain(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return helpers.proved(request.param)


@pytest.fixture(params=list(CHANGES))
def change(request: pytest.FixtureRequest) -> Change:
    return CHANGES[request.param]


def greedy(model: tf.PreTrainedModel, ids: torch.Tensor) -> list[int]:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()


def test_a_changed_model_is_what_is_recorded_continued_and_pruned(
    plain: tf.PreTrainedModel, change: Change
) -> None:
    ids = torch.tensor(helpers.random_ids(60))
    before = plain(ids).logits
    change(plain)
    if change not in (captured_outputs, wrapper_of_accelerate):
        assert not torch.allclose(plain(ids).logits, before, atol=1e-3), "the change does nothing"
    expected = greedy(plain, ids)

    recording = flocking.record(plain, ids, max_new_tokens=NEW, relative=True, progress=False)
    assert recording.token_id.values[0].tolist() == expected[:-1]
    for layer, z in helpers.activations(plain, expected[:-1]).items():
        r = torch.nn.functional.normalize(z.reshape(-1, z.shape[-1]).abs(), dim=-1)
        np.testing.assert_allclose(recording.relative.sel(layer=layer).values[0], r, atol=2e-3)

    whole = flocking.griffin(plain, 1.0)
    assert greedy(whole, ids) == expected
    half = flocking.griffin(plain, 0.5)
    greedy(half, ids)
    prompt = flocking.record(plain, ids, progress=False)
    statistic = flocking.statistic(prompt).isel(sequence=0)
    kept = flocking.select(statistic, 0.5)
    for layer, neurons in half.selection.items():
        # (Experts that no token reached have zeros, and are pruned by their weights.)
        active = statistic.sel(layer=layer) > 0
        expected = np.flatnonzero(kept.sel(layer=layer) & active)
        assert [n for n in neurons.tolist() if active[n]] == expected.tolist()


def test_the_decoder_computes_the_changed_model_or_refuses_it(
    plain: tf.PreTrainedModel, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    ids = torch.tensor(helpers.random_ids(60))
    change(plain)
    twin = flocking.griffin(plain, 1.0)
    for model in (plain, twin):
        if change.__name__ not in COMPILED:
            with pytest.raises(ValueError, match="has a hook"):
                flocking.Decoder(model, max_length=80)
        else:
            decoder = flocking.Decoder(model, max_length=80)
            assert decoder.generate(ids, max_new_tokens=NEW)[0].tolist() == greedy(plain, ids)


def test_a_hook_that_comes_after_the_decoder_is_refused() -> None:
    model = helpers.proved("llama")
    decoder = flocking.Decoder(model, max_length=80)
    forward_hook(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0 has a hook"):
        decoder.generate(torch.tensor(helpers.random_ids(5)))


def test_a_users_hook_does_not_fire_in_trials() -> None:
    model = helpers.build("llama")
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
    for layer in model.model.layers:
        for inside in layer.mlp.children():  # where a hook is refused
            inside._forward_pre_hooks.clear()
    twin = flocking.griffin(model)
    assert not calls
    twin.generate(torch.tensor(helpers.random_ids(5)), max_new_tokens=2)
    assert set(calls) <= set(model.modules())  # with the modules that they were registered on
    assert calls


@pytest.mark.parametrize("outputs", ["output_hidden_states", "output_attentions"])
def test_a_twin_returns_what_is_asked_for_after_the_model_did(outputs: str) -> None:
    model = helpers.build("llama", _attn_implementation="eager")
    ids = torch.tensor(helpers.random_ids(9))
    asked = {
        "return_dict_in_generate": True,
        "max_new_tokens": 3,
        "do_sample": False,
        outputs: True,
    }
    expected = model.generate(ids, **asked)
    found = flocking.griffin(model, 1.0).generate(ids, **asked)
    name = outputs.removeprefix("output_")
    for step, other in zip(found[name], expected[name], strict=True):
        assert len(step) == len(other) > 0
        for one, another in zip(step, other, strict=True):
            torch.testing.assert_close(one, another)


def test_a_hook_that_comes_after_the_twin_is_told_to_act_on_decoding_only() -> None:
    model = helpers.proved("llama")
    forward_hook(model)
    twin = flocking.griffin(model)
    ids = torch.tensor(helpers.random_ids(9))
    greedy(twin, ids)
    layers_of(twin)[1].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match=r"on the twin \(model\.layers\.1\): it acts on decoding"):
        greedy(twin, ids)


@pytest.mark.parametrize("way", ["score", "perplexity", "side by side", "branches"])
def test_so_it_is_where_texts_are_scored(way: str) -> None:
    model, ids = helpers.proved("llama"), torch.tensor(helpers.random_ids(20))
    twin, other = flocking.griffin(model), flocking.griffin(model)
    layers_of(twin)[1].register_forward_hook(lambda module, args, output: None)
    text = ids[0].tolist()
    options = {"prompt_length": 9, "continuation_length": 5, "progress": False}
    run = {
        "score": lambda: flocking.score(twin, text[:9], text[9:]),
        "perplexity": lambda: flocking.perplexity(twin, [text], **options),
        "side by side": lambda: list(side_by_side([other, twin], ids, 9)),
        "branches": lambda: list(branches([other, twin], [ids[0]], [5], 9)),
    }[way]
    with pytest.warns(UserWarning, match=r"on the twin \(model\.layers\.1\): it acts on decoding"):
        run()


def other_embeddings(twin: tf.PreTrainedModel) -> None:
    twin.set_input_embeddings(nn.Embedding(128, 64))


def fewer_layers(twin: tf.PreTrainedModel) -> None:
    twin.model.layers = twin.model.layers[:1]


def adapter(twin: tf.PreTrainedModel) -> None:
    twin.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


@pytest.mark.parametrize("scope", ["shared", "sequence"])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (other_embeddings, r"model\.embed_tokens"),
        (fewer_layers, r"model\.layers"),
        (adapter, r"model\.layers\.0\.self_attn\.q_proj"),
    ],
)
def test_a_module_that_comes_into_the_twin_is_told_to_act_on_decoding_only(
    change: Change, where: str, scope: str
) -> None:
    twin = flocking.griffin(helpers.proved("llama"), scope=scope)
    one, several = torch.tensor(helpers.random_ids(9)), torch.tensor(helpers.random_ids(7, 7))
    for ids in (one, several, one):  # its own compact ones come and go
        greedy(twin, ids)
    change(twin)
    with pytest.warns(UserWarning, match=rf"put into the twin \({where}\): it acts on decoding"):
        greedy(twin, one)


def test_a_model_that_puts_modules_into_itself_is_not_told_of_them() -> None:
    """BigBird's attention becomes a full one, in other modules, once a text is short."""
    config = tf.BigBirdConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, block_size=16, max_position_embeddings=512, is_decoder=True,
    )  # fmt: skip
    twin = flocking.griffin(tf.BigBirdForCausalLM(config).eval())
    inner = twin.bert.encoder.layer[0].attention.self
    ids = torch.tensor(helpers.random_ids(9))
    assert greedy(twin, ids) == greedy(twin, ids)  # and warnings are errors here
    assert twin.bert.encoder.layer[0].attention.self is not inner


@pytest.mark.parametrize("name", ["down_proj", "gate_proj", "act_fn"])
def test_a_hook_that_would_see_the_kept_neurons_only_is_refused(name: str) -> None:
    model = helpers.proved("llama")
    inside = model.model.layers[1].mlp.get_submodule(name)
    inside.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match=r"a hook inside of model\.layers\.1\.mlp"):
        flocking.griffin(model)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma2", "mixtral", "falcon"])
def test_so_is_one_on_an_activation_function_wherever_it_is(architecture: str) -> None:
    model = helpers.proved(architecture)
    block = flocking.feedforwards(model)[0]
    parent = model.get_submodule(block.path)
    activation = next(
        m for n, m in parent.named_children() if "act" in n and not list(m.parameters())
    )
    activation.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match="would be given the kept neurons only"):
        flocking.griffin(model)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_no_twin_is_made_of_a_model_that_is_observed(name: str) -> None:
    model = helpers.proved(name)
    with flocking.observe(model, lambda block, z: None):
        with pytest.raises(RuntimeError, match="the model is observed"):
            flocking.griffin(model)
        model(torch.tensor(helpers.random_ids(40)))


def test_a_continuation_is_observed_as_its_replay_is() -> None:
    model = helpers.proved("llama")
    ids = torch.tensor(helpers.random_ids(14))
    plain = greedy(model, ids)
    with flocking.observe(model, lambda block, z: 0.3 * z):
        expected = greedy(model, ids)
        recording = flocking.record(model, ids, max_new_tokens=NEW, progress=False)
    assert recording.token_id.values[0].tolist() == expected[:-1]
    assert expected != plain


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (functools.partial(prune.random_unstructured, name="weight", amount=0.5), "prune.remove"),
        (parametrizations.weight_norm, "remove_parametrizations"),
    ],
)
def test_computed_weights_of_blocks_are_refused_with_the_true_reason(
    change: Callable[[nn.Module], object], remedy: str
) -> None:
    model = helpers.proved("llama")
    change(model.model.layers[0].mlp.up_proj)
    assert flocking.record(model, helpers.random_ids(9), progress=False).sizes["layer"] == 2
    with pytest.raises(ValueError, match=remedy):
        flocking.griffin(model)


def test_a_mask_that_comes_after_the_proof_is_seen() -> None:
    model = helpers.proved("llama")
    flocking.griffin(model)
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    with pytest.raises(ValueError, match="prune"):
        flocking.griffin(model)


def test_a_forward_that_would_run_the_original_in_a_copy_is_refused() -> None:
    model = helpers.proved("llama")
    layer = model.model.layers[0]
    before = layer.forward
    layer.forward = lambda *args, **kwargs: before(*args, **kwargs)
    with pytest.raises(ValueError, match=r"model\.layers\.0 has another forward"):
        flocking.griffin(model)


def test_a_generate_of_the_users_own_is_refused() -> None:
    model = helpers.proved("llama")
    model.generate = functools.partial(model.generate, do_sample=True)
    with pytest.raises(ValueError, match=r"model\.generate was replaced"):
        flocking.griffin(model)
