"""Watching a model changes nothing, leaves nothing behind, and never fails silently."""

from __future__ import annotations

import helpers
import pytest
import torch
import transformers as tf
from helpers import hooks_of

import flocking


def test_logits_are_bit_identical(tiny: tf.PreTrainedModel) -> None:
    ids = torch.tensor(helpers.random_ids(33))
    with torch.no_grad():
        before = tiny(ids)[0]
        with flocking.observe(tiny, lambda ff, z: None):
            watched = tiny(ids)[0]
        after = tiny(ids)[0]
    assert torch.equal(watched, before)
    assert torch.equal(after, before)


def test_removes_its_own_hooks_and_no_others(llama: tf.PreTrainedModel) -> None:
    mine = []
    llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *args: mine.append(1))
    before = hooks_of(llama)
    with flocking.observe(llama, lambda ff, z: None):
        with flocking.observe(llama, lambda ff, z: None, layers=[1]):
            assert len(hooks_of(llama)) == len(before) + 3
            llama(torch.tensor([[5, 6]]))
        assert len(hooks_of(llama)) == len(before) + 2
    assert hooks_of(llama) == before
    assert mine == [1]


def test_nested_observers_both_see_everything(llama: tf.PreTrainedModel) -> None:
    outer, inner = [], []
    with flocking.observe(llama, lambda ff, z: outer.append(ff.layer)):
        with flocking.observe(llama, lambda ff, z: inner.append(ff.layer)):
            llama(torch.tensor([[5, 6]]))
        llama(torch.tensor([[5, 6]]))
    assert (outer, inner) == ([0, 1, 0, 1], [0, 1])


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_removes_its_hooks_when_the_forward_raises(
    llama: tf.PreTrainedModel, problem: type[BaseException]
) -> None:
    def fail(ff: flocking.FeedForward, z: torch.Tensor) -> None:
        if ff.layer == 1:
            raise problem

    before = hooks_of(llama)
    with pytest.raises(problem), flocking.observe(llama, fail):
        llama(torch.tensor([[5, 6]]))
    assert hooks_of(llama) == before


def test_sees_what_the_users_own_hook_made_of_z(llama: tf.PreTrainedModel) -> None:
    down = llama.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    seen = {}
    plain = helpers.activations(llama, [5, 6, 7])[0]
    with flocking.observe(llama, lambda ff, z: seen.update({ff.layer: z}), layers=[0]):
        llama(torch.tensor([[5, 6, 7]]))
    assert torch.equal(seen[0][0], plain)


def test_a_returned_tensor_replaces_z(tiny: tf.PreTrainedModel) -> None:
    """Masked through the hook, the model gives what it gives without those neurons."""
    block = flocking.feedforwards(tiny)[0]
    mask = torch.arange(block.d_ff) % 2
    ids = torch.tensor(helpers.random_ids(9))
    with torch.no_grad():
        whole = tiny(ids)[0]
        with flocking.observe(tiny, lambda ff, z: z * mask, layers=[0]):
            masked = tiny(ids)[0]
        if block.kind == "experts":
            mask = mask.view(block.experts, -1)
            mask = mask[:, :, None] if block.down.is_transposed else mask[:, None]
        elif isinstance(block.down, tf.pytorch_utils.Conv1D):
            mask = mask[:, None]
        block.weight.mul_(mask)
        torch.testing.assert_close(masked, tiny(ids)[0])
    assert not torch.allclose(masked, whole)


def compiled_call(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    model.compile(backend="eager")
    return model


def compiled_wrapper(model: tf.PreTrainedModel) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


def compiled_forward(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_layers(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compiled_layer_forwards(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")
    return model


WAYS_TO_COMPILE = [
    compiled_call,
    compiled_wrapper,
    compiled_forward,
    compiled_layers,
    compiled_layer_forwards,
]


@pytest.mark.parametrize("how", WAYS_TO_COMPILE)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_models_are_seen(llama: tf.PreTrainedModel, how) -> None:
    """torch silently skips hooks that are set after compilation; observe must not."""
    ids = torch.tensor(helpers.random_ids(9))
    expected = flocking.record(llama, ids, progress=False)
    model = how(llama)
    with torch.no_grad():
        model(ids)  # now it is compiled
        bare = []
        hook = llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda *args: bare.append(1)
        )
        model(ids)
        hook.remove()
        assert bare == []  # the trap is real
        seen = []
        with flocking.observe(model, lambda ff, z: seen.append(ff.layer)):
            model(ids)
    assert seen == [0, 1]
    assert flocking.record(model, ids, progress=False).energy.equals(expected.energy)
    again = helpers.build("llama")
    assert len(flocking.feedforwards(how(again))) == 2  # proved on a model compiled already


def test_compiling_goes_on_when_the_last_of_several_is_through() -> None:
    """The stance belongs to the process, and threads may leave in any order."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        compiled.append(graph)
        return graph.forward

    first, second = helpers.build("llama"), helpers.build("llama")
    watches = [flocking.observe(model, lambda ff, z: None) for model in (first, second)]
    for watch in watches:
        watch.__enter__()
    for number, (watch, model) in enumerate(zip(watches, (first, second), strict=True)):
        model(torch.tensor(helpers.random_ids(5)))
        watch.__exit__(None, None, None)
        torch.compile(lambda x, n=number: x + n, backend=backend)(torch.ones(3))
        assert len(compiled) == number


def test_a_hook_that_never_fired_is_an_error(llama: tf.PreTrainedModel) -> None:
    with (
        pytest.raises(RuntimeError, match=r"2 of 2 observed FF blocks never ran .*layers\.0\.mlp"),
        flocking.observe(llama, lambda ff, z: None),
    ):
        pass

    def run_around_a_block() -> None:
        with flocking.observe(llama, lambda ff, z: None):
            llama.model.layers[1].mlp.forward = lambda x: x
            llama(torch.tensor([[5, 6]]))

    with pytest.raises(RuntimeError, match=r"1 of 2 observed FF blocks never ran .*layers\.1\.mlp"):
        run_around_a_block()
    assert hooks_of(llama) == []


@pytest.mark.parametrize(("layers", "message"), [([7], r"layers=\[7\]"), ([], "layers is empty")])
def test_unknown_layers_are_refused(llama: tf.PreTrainedModel, layers, message: str) -> None:
    with (
        pytest.raises(ValueError, match=message),
        flocking.observe(llama, lambda ff, z: None, layers=layers),
    ):
        pass
    assert hooks_of(llama) == []
