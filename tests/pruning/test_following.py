"""What is changed in a model after a twin was made of it shows in the twin, or is refused."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable

import helpers
import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import flocking
from flocking.pruning import graphs

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

Change = Callable[[tf.PreTrainedModel], object]
IDS = torch.tensor(helpers.random_ids(30, 30))
NEW = 5


class Shift(nn.Module):
    """A module of a user's: a projection with something added, which is kept in every way."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, 1.0
        self.register_buffer("saved", torch.linspace(-1, 1, 64))
        self.register_buffer("unsaved", torch.zeros(64), persistent=False)
        self.plain = torch.zeros(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale + self.saved + self.unsaved + self.plain


def attention(model: tf.PreTrainedModel) -> nn.Module:
    return model.model.layers[0].self_attn


def shift(model: tf.PreTrainedModel) -> Shift:
    return attention(model).o_proj


def fresh(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) / 5)


def replace(module: nn.Module, name: str = "weight") -> None:
    setattr(module, name, fresh(getattr(module, name)))


def with_adapters(model: tf.PreTrainedModel) -> None:
    """Two, of which the first is active."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.add_adapter("other", config)


def adapted(model: tf.PreTrainedModel) -> peft.tuners.lora.Linear:
    return attention(model).q_proj


def as_it_is(model: tf.PreTrainedModel) -> None:
    pass


def shifted(model: tf.PreTrainedModel) -> None:
    attention(model).o_proj = Shift(attention(model).o_proj)


def masked(model: tf.PreTrainedModel) -> None:
    torch.manual_seed(1)
    prune.random_unstructured(attention(model).q_proj, "weight", 0.5)


def normed(model: tf.PreTrainedModel) -> None:
    parametrizations.weight_norm(attention(model).q_proj)


def hooked(model: tf.PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def data(tensor: Tensor, factor: float) -> None:
    tensor.data = tensor.data * factor


FOLLOWED: dict[str, tuple[Change, Change]] = {
    "parameter replaced": (as_it_is, lambda m: replace(attention(m).q_proj)),
    "head replaced": (as_it_is, lambda m: replace(m.lm_head)),
    "norm replaced": (as_it_is, lambda m: replace(m.model.norm)),
    "FF parameter replaced": (as_it_is, lambda m: replace(m.model.layers[0].mlp.up_proj)),
    "in place": (as_it_is, lambda m: attention(m).q_proj.weight.data.mul_(3)),
    "FF in place": (as_it_is, lambda m: m.model.layers[1].mlp.down_proj.weight.data.mul_(3)),
    "data": (as_it_is, lambda m: data(attention(m).q_proj.weight, 3)),
    "state": (
        as_it_is,
        lambda m: m.load_state_dict({k: 1.5 * v for k, v in m.state_dict().items()}, assign=True),
    ),
    "rotary buffer": (as_it_is, lambda m: m.model.rotary_emb.inv_freq.mul_(0.3)),
    "attribute": (as_it_is, lambda m: setattr(attention(m), "scaling", 3.0)),
    "mask": (masked, lambda m: attention(m).q_proj.weight_mask.zero_()),
    "mask replaced": (
        masked,
        lambda m: setattr(attention(m).q_proj, "weight_mask", torch.ones(64, 64)),
    ),
    "norm": (normed, lambda m: attention(m).q_proj.parametrizations.weight.original0.data.mul_(3)),
    "hook removed": (hooked, lambda m: m.model.layers[0]._forward_hooks.popitem()),
    "hooks replaced": (hooked, lambda m: setattr(m.model.layers[0], "_forward_hooks", {})),
    "user's buffer": (shifted, lambda m: shift(m).saved.mul_(-2)),
    "user's buffer replaced": (shifted, lambda m: setattr(shift(m), "saved", torch.ones(64))),
    "user's unsaved buffer": (shifted, lambda m: shift(m).unsaved.add_(1)),
    "user's tensor": (shifted, lambda m: shift(m).plain.add_(1)),
    "user's tensor replaced": (shifted, lambda m: setattr(shift(m), "plain", torch.ones(64))),
    "user's number": (shifted, lambda m: setattr(shift(m), "scale", -2.0)),
    "adapter merged": (with_adapters, lambda m: adapted(m).merge()),
    "adapter switched": (with_adapters, lambda m: adapted(m).set_adapter("other")),
    "adapter disabled": (with_adapters, lambda m: adapted(m).enable_adapters(False)),
    "adapter scaled": (with_adapters, lambda m: adapted(m).scaling.update(default=9.0)),
}

REFUSED: dict[str, tuple[Change, Change, str]] = {
    "module": (
        as_it_is,
        lambda m: setattr(m, "lm_head", nn.Linear(64, 128, bias=False)),
        r"\(lm_head was replaced\)",
    ),
    "FF module": (
        as_it_is,
        lambda m: setattr(m.model.layers[1].mlp, "up_proj", nn.Linear(64, 160, bias=False)),
        r"\(model\.layers\.1\.mlp\.up_proj was replaced\)",
    ),
    "layer": (
        as_it_is,
        lambda m: m.model.layers.__delitem__(1),
        r"\(model\.layers\.1 was removed\)",
    ),
    "bias": (
        as_it_is,
        lambda m: setattr(attention(m).q_proj, "bias", nn.Parameter(torch.ones(64))),
        r"\(model\.layers\.0\.self_attn\.q_proj\.bias was replaced\)",
    ),
    "shape": (as_it_is, lambda m: m.resize_token_embeddings(140), r"was replaced\)"),
    "dtype": (as_it_is, lambda m: m.double(), r"weight is in torch\.float64 now\)"),
    "hook": (as_it_is, hooked, r"\(a hook was registered on model\.layers\.0\)"),
    "mask": (as_it_is, masked, r"\(a hook was registered on model\.layers\.0\.self_attn\.q_proj\)"),
    "mask removed": (
        masked,
        lambda m: prune.remove(attention(m).q_proj, "weight"),
        r"\(model\.layers\.0\.self_attn\.q_proj\.weight was added\)",
    ),
    "parametrization": (as_it_is, normed, r"q_proj is a ParametrizedLinear now\)"),
    "forward": (
        as_it_is,
        lambda m: setattr(m.model.norm, "forward", lambda x: x),
        r"\(model\.norm has another forward\)",
    ),
    "adapter": (as_it_is, with_adapters, r"self_attn\.q_proj was replaced\)"),
    "adapter deleted": (
        with_adapters,
        lambda m: adapted(m).delete_adapter("other"),
        r"q_proj\.lora_\w+\.other was removed\)",
    ),
}


def logits(model: tf.PreTrainedModel) -> Tensor:
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    return torch.stack(model.generate(IDS, max_new_tokens=NEW, **options).logits)


def twins(model: tf.PreTrainedModel) -> list[flocking.pruning.twin.Twin]:
    return [flocking.griffin(model, 1.0), flocking.griffin(model, 1.0, scope="sequence")]


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_twin_follows(name: str) -> None:
    prepare, change = FOLLOWED[name]
    model = helpers.proved("llama")
    prepare(model)
    made = twins(model)
    before = logits(model)
    torch.testing.assert_close(logits(made[0]), before)
    change(model)
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-3) or name == "adapter merged"
    for twin in made:
        torch.testing.assert_close(logits(twin), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_twin_refuses(name: str) -> None:
    prepare, change, message = REFUSED[name]
    model = helpers.proved("llama")
    prepare(model)
    made = twins(model)
    change(model)
    for twin in made:
        with pytest.raises(RuntimeError, match=f"since this twin was made .*{message}: make"):
            twin.generate(IDS, max_new_tokens=NEW)
        with pytest.raises(RuntimeError, match="has no selection"):
            twin(IDS)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "phi", "gpt_oss", "mixtral"])
def test_parameters_of_down_projections_are_those_of_the_moment(architecture: str) -> None:
    """Biases among them, which are the same whatever neurons are kept."""
    model = helpers.proved(architecture)
    made = twins(model)
    for twin in made:
        logits(twin)  # takes the memory
    for block in flocking.feedforwards(model):
        for parameter in block.down.parameters(recurse=False):
            parameter.data.mul_(1.5).add_(0.05)
    for change in (False, True):
        for block in flocking.feedforwards(model) if change else []:
            for name in list(block.down._parameters):
                if getattr(block.down, name) is not None:
                    replace(block.down, name)
        expected = logits(model)
        for twin in made:
            torch.testing.assert_close(logits(twin), expected, atol=1e-4, rtol=1e-4)


def test_numbers_of_experts_are_refused() -> None:
    """In a twin, others stand in the place of the experts."""
    model = helpers.proved("gpt_oss")
    twin = flocking.griffin(model, 1.0)
    model.model.layers[0].mlp.experts.alpha = 0.1
    with pytest.raises(RuntimeError, match=r"an attribute of model\.layers\.0\.mlp\.experts was"):
        logits(twin)


def test_parameters_may_be_swapped_in_place() -> None:
    """As torch does where it converts quantised weights; it refuses where there are references."""
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    weight = attention(model).q_proj.weight
    torch.utils.swap_tensors(weight, fresh(weight))
    torch.testing.assert_close(logits(twin), logits(model))


@pytest.mark.parametrize("run", ["call", "train", "record", "hidden", "compile", "observe"])
def test_what_changes_nothing_is_not_refused(run: str) -> None:
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    expected = logits(twin)
    if run == "call":
        model(IDS)
    elif run == "train":
        model.train()
    elif run == "record":
        flocking.record(model, IDS, max_new_tokens=2, progress=False)
    elif run == "hidden":
        model(IDS, output_hidden_states=True)
    elif run == "compile":
        model.compile(backend="eager")
        forward = model.model.layers[0].forward
        model.model.layers[0].forward = torch.compile(forward, backend="eager")
    else:
        with flocking.observe(model, lambda block, z: None):
            model(IDS)
            torch.testing.assert_close(logits(twin), expected)
    torch.testing.assert_close(logits(twin), expected)


def test_what_a_model_computed_as_it_ran_is_not_the_twins() -> None:
    """Dynamic rotary embeddings keep what the longest text so far needs."""
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = helpers.build("llama", rope_parameters=parameters, max_position_embeddings=40)
    twin = flocking.griffin(model, 1.0)
    expected = logits(twin)
    model(torch.tensor(helpers.random_ids(90)))
    torch.testing.assert_close(logits(twin), expected)


def test_neither_keeps_the_other_alive() -> None:
    model = helpers.build("llama")
    twin = flocking.griffin(model)
    gc.collect()
    gc.disable()
    try:
        known = weakref.ref(model), weakref.ref(twin), weakref.ref(twin._griffin.full)
        del model
        assert known[0]() is None
        twin.generate(IDS, max_new_tokens=2)
        del twin
        assert known[1]() is None
        assert known[2]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("refresh", [None, 3])
def test_a_twin_is_gone_at_once(refresh: int | None) -> None:
    """Its memory is that of half a model: it does not wait for the garbage collector."""
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 0.5, refresh=refresh)
    twin.generate(IDS, max_new_tokens=5)
    gc.collect()
    gc.disable()
    try:
        compact = twin._griffin.compacts[0].modules[0].weight
        known = [weakref.ref(each) for each in (twin, twin._griffin.full, compact)]
        del twin, compact
        assert [each() for each in known] == [None] * 3
    finally:
        gc.enable()


def test_so_is_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    decoder = flocking.Decoder(helpers.proved("llama"), max_length=50)
    decoder.generate(IDS[:1], max_new_tokens=3)
    gc.collect()  # what tracing leaves behind
    gc.disable()
    try:
        known = weakref.ref(decoder), weakref.ref(decoder._cache)
        del decoder
        assert [each() for each in known] == [None, None]
    finally:
        gc.enable()


class Cutoff(nn.Module):
    """FF neurons with a cutoff, if `cut` is set, that depends on all of them: not prunable."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act, self.cut = mlp.act_fn, False

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.gate(x)) * self.up(x)
        if self.cut:
            z = nn.functional.relu(z - z.mean(dim=-1, keepdim=True) - z.std(dim=-1, keepdim=True))
        return self.down(z)


@pytest.mark.parametrize("way", ["score", "perplexity", "generate"])
def test_what_is_refused_once_is_refused_again(way: str) -> None:
    """A value that a twin follows is not taken for one that the model changes by itself."""
    model = helpers.build("llama")
    for layer in model.model.layers:
        layer.mlp = Cutoff(layer.mlp)
    twin, ids = flocking.griffin(model), IDS[0].tolist()

    def run() -> object:
        if way == "score":
            return flocking.score(twin, ids[:12], ids[12:])
        if way == "generate":
            return twin.generate(IDS[:1], max_new_tokens=3)
        options = {"prompt_length": 12, "continuation_length": 5, "progress": False}
        return flocking.perplexity(twin, [ids], **options)

    run()
    for layer in model.model.layers:
        layer.mlp.cut = True
    for _ in range(3):
        with pytest.raises(ValueError, match=r"cannot be pruned|not prunable|depend"):
            run()
    with pytest.raises(ValueError, match=r"cannot be pruned|not prunable|depend"):
        flocking.griffin(model)
    for layer in model.model.layers:
        layer.mlp.cut = False
    run()


def test_a_bound_method_in_place_of_a_forward_is_compared_by_what_it_is() -> None:
    """A new one may stand where the one before was in memory; an equal one is the same."""
    model = helpers.proved("llama")
    norm = model.model.norm

    def half(self: nn.Module, x: Tensor) -> Tensor:
        return x / 2

    def third(self: nn.Module, x: Tensor) -> Tensor:
        return x / 3

    norm.forward = types.MethodType(half, norm)
    twin = flocking.griffin(model, 1.0)
    for _ in range(3):
        del norm.forward
        norm.forward = types.MethodType(half, norm)
        assert torch.equal(logits(twin), logits(model))
    del norm.forward
    norm.forward = types.MethodType(third, norm)
    with pytest.raises(RuntimeError, match=r"model\.norm has another forward"):
        logits(twin)


def test_a_forward_that_counts_is_the_same_forward() -> None:
    model = helpers.proved("llama")
    norm, seen = model.model.norm, []

    def counted(seen: list[int], x: Tensor) -> Tensor:
        seen.append(len(x))
        return x / 2

    norm.forward = functools.partial(counted, seen)
    twin = flocking.griffin(model, 1.0)
    for _ in range(2):
        assert torch.equal(logits(model), logits(twin))
    assert len(seen) > 2


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_a_hook_that_removes_itself_acts_as_often_as_in_the_model(kind: str) -> None:
    def calls_of(generate: Callable[[tf.PreTrainedModel], Tensor]) -> tuple[int, Tensor]:
        model = helpers.proved("llama")
        calls = []

        def once(module: nn.Module, args: tuple, output: object = None) -> object:
            handle.remove()
            calls.append(module)
            return (args[0] * 2, *args[1:]) if kind == "pre-hook" else output * 2

        layer = model.model.layers[1]
        register = "register_forward_pre_hook" if kind == "pre-hook" else "register_forward_hook"
        handle = getattr(layer, register)(once)
        result = generate(model)
        return len(calls), result

    expected = calls_of(logits)
    assert expected[0] == 1
    for scope in ("shared", "sequence"):
        got = calls_of(lambda m, scope=scope: logits(flocking.griffin(m, 1.0, scope=scope)))
        assert got[0] == 1
        torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="a hook on the model was removed"):
        calls_of(lambda m: flocking.record(m, IDS, max_new_tokens=3, progress=False))


def test_a_decoder_follows_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    model = helpers.proved("llama")
    with_adapters(model)
    decoder = flocking.Decoder(flocking.griffin(model, 1.0), max_length=50)
    plain = flocking.Decoder(model, max_length=50)
    for change in (as_it_is, FOLLOWED["adapter switched"][1], FOLLOWED["parameter replaced"][1]):
        if change is not FOLLOWED["parameter replaced"][1]:
            change(model)
        else:
            replace(attention(model).v_proj)
        expected = model.generate(IDS[:1], max_new_tokens=NEW, do_sample=False).tolist()
        for each in (decoder, plain):
            assert each.generate(IDS[:1], max_new_tokens=NEW).tolist() == expected


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook"])
def test_a_decoder_refuses_hooks_on_all_modules(
    register: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    decoder = flocking.Decoder(helpers.proved("llama"), max_length=50)
    register_on_all = getattr(nn.modules.module, f"register_module_{register}")
    handle = register_on_all(lambda module, *args: None)
    try:
        with pytest.raises(ValueError, match="a hook on all modules"):
            decoder.generate(IDS[:1])
    finally:
        handle.remove()
    decoder.generate(IDS[:1], max_new_tokens=2)
