"""What a twin follows beside weights: what modules keep, unsaved buffers, the generation config."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from torch import Tensor, nn

import flocking

Change = Callable[[tf.PreTrainedModel], object]
IDS = torch.tensor(helpers.random_ids(30, 30))
NEW = 5
SHIFT = torch.linspace(-2, 2, 64)


class Mode(enum.Enum):
    OFF = 0
    ON = 1


class Steering(nn.Module):
    """A module of a user's, which keeps what it adds in every way."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.by_name = {"a": torch.zeros(64)}
        self.listed = [torch.zeros(64)]
        self.frozen = (torch.zeros(64),)
        self.number, self.array = np.float32(0), np.zeros(64, dtype=np.float32)
        self.options = types.SimpleNamespace(scale=1.0)
        self.mode, self.function = Mode.OFF, torch.abs
        self.modules_of = [inner]
        self._hidden = 0.0
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.modules_of[0](x) * self.options.scale + self.by_name["a"] + self.listed[0]
        y = y + self.frozen[0] + float(self.number) + torch.from_numpy(self.array) + self._hidden
        y = y + (1.0 if self.mode is Mode.ON else 0.0) + getattr(self, "new", 0.0)
        return self.function(y if self.later is None else y + self.later)


def layer(model: tf.PreTrainedModel) -> nn.Module:
    return model.model.layers[0]


def steered() -> tf.PreTrainedModel:
    model = helpers.proved("llama")
    layer(model).self_attn.o_proj = Steering(layer(model).self_attn.o_proj)
    return model


def steering(model: tf.PreTrainedModel) -> Steering:
    return layer(model).self_attn.o_proj


KEPT: dict[str, Callable[[Steering], object]] = {
    "tensor in a dict": lambda s: s.by_name.update(a=SHIFT),
    "tensor in a dict, in place": lambda s: s.by_name["a"].add_(SHIFT),
    "dict": lambda s: setattr(s, "by_name", {"a": SHIFT}),
    "tensor in a list": lambda s: s.listed.__setitem__(0, SHIFT),
    "tuple": lambda s: setattr(s, "frozen", (SHIFT,)),
    "number of numpy": lambda s: setattr(s, "number", np.float32(2)),
    "array": lambda s: setattr(s, "array", SHIFT.numpy()),
    "array, in place": lambda s: s.array.__iadd__(1),
    "namespace": lambda s: setattr(s, "options", types.SimpleNamespace(scale=-2.0)),
    "in a namespace": lambda s: setattr(s.options, "scale", -2.0),
    "enum": lambda s: setattr(s, "mode", Mode.ON),
    "function": lambda s: setattr(s, "function", torch.neg),
    "underscore": lambda s: setattr(s, "_hidden", 2.0),
    "modules in a list": lambda s: setattr(s, "modules_of", [torch.nn.Identity()]),
    "buffer of nothing": lambda s: setattr(s, "later", SHIFT),
    "buffer": lambda s: s.register_buffer("new", SHIFT),
    "attribute": lambda s: setattr(s, "new", SHIFT),
}


def data(tensor: Tensor, values: Tensor) -> None:
    tensor.data.copy_(values)


def frequencies(model: tf.PreTrainedModel) -> Tensor:
    return model.model.rotary_emb.inv_freq


UNSAVED: dict[str, tuple[str, Change]] = {
    "frequencies": (
        "llama",
        lambda m: setattr(m.model.rotary_emb, "inv_freq", frequencies(m) * 0.3),
    ),
    "frequencies through data": ("llama", lambda m: data(frequencies(m), frequencies(m) * 0.3)),
    "frequencies registered": (
        "llama",
        lambda m: m.model.rotary_emb.register_buffer(
            "inv_freq", frequencies(m) * 0.3, persistent=False
        ),
    ),
    "scaling beside them": (
        "llama",
        lambda m: setattr(m.model.rotary_emb, "attention_scaling", 3.0),
    ),
    "scale of embeddings": (
        "gemma3",
        lambda m: setattr(m.model.embed_tokens, "embed_scale", torch.tensor(24.0)),
    ),
    "scale of attention": (
        "gptj",
        lambda m: setattr(m.transformer.h[0].attn, "scale_attn", torch.tensor(0.5)),
    ),
}


def logits(model: tf.PreTrainedModel) -> Tensor:
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    return torch.stack(model.generate(IDS, max_new_tokens=NEW, **options).logits)


def check(model: tf.PreTrainedModel, change: Change) -> None:
    """What a twin of all neurons computes is what the model does, before and after a change."""
    twins = [flocking.griffin(model, 1.0), flocking.griffin(model, 1.0, scope="sequence")]
    before = logits(model)
    torch.testing.assert_close(logits(twins[0]), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        change(model)
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-3), "the change does nothing"
    for twin in twins:
        torch.testing.assert_close(logits(twin), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KEPT)
def test_what_a_users_module_keeps_is_followed(name: str) -> None:
    check(steered(), lambda m: KEPT[name](steering(m)))


@pytest.mark.parametrize("name", UNSAVED)
def test_unsaved_buffers_and_what_is_beside_them_are_followed(name: str) -> None:
    architecture, change = UNSAVED[name]
    check(helpers.proved(architecture), change)


def test_rounded_frequencies_are_followed() -> None:
    """They are rounded on the way to bfloat16 and back, as all weights are."""
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    before = frequencies(model).clone()
    model.bfloat16().float()
    assert not torch.equal(frequencies(model), before)
    logits(twin)
    for each in (twin, twin._griffin.full):
        assert torch.equal(frequencies(each), frequencies(model))


def test_so_are_those_of_an_offloaded_model() -> None:
    """Accelerate offloads parameters only, unless it is told otherwise."""
    model = cpu_offload(helpers.proved("llama"), execution_device=torch.device("cpu"))
    check(model, lambda m: frequencies(m).mul_(0.3))


def test_a_hook_that_takes_the_place_of_another_is_refused() -> None:
    model = helpers.proved("llama")
    handle = layer(model).register_forward_hook(lambda module, args, output: output)
    twin = flocking.griffin(model)
    layer(model)._forward_hooks[handle.id] = lambda module, args, output: output * 2
    with pytest.raises(RuntimeError, match=r"a hook was registered on model\.layers\.0"):
        logits(twin)


def test_a_method_that_was_replaced_is_refused() -> None:
    model = helpers.proved("llama")
    twin = flocking.griffin(model)
    model.prepare_inputs_for_generation = types.MethodType(lambda self, *args: {}, model)
    with pytest.raises(RuntimeError, match="prepare_inputs_for_generation was replaced"):
        logits(twin)


def written(model: tf.PreTrainedModel) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0).tolist()


GENERATION: dict[str, Change] = {
    "penalty": lambda m: setattr(m.generation_config, "repetition_penalty", 50.0),
    "suppressed": lambda m: setattr(m.generation_config, "suppress_tokens", list(range(3, 100))),
    "end": lambda m: setattr(m.generation_config, "eos_token_id", written(m)[0][31]),
    "another": lambda m: setattr(
        m, "generation_config", tf.GenerationConfig(suppress_tokens=list(range(3, 100)))
    ),
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_generation_config_is_followed(name: str) -> None:
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    before = written(twin)
    GENERATION[name](model)
    assert written(twin) == written(model) != before


def test_what_was_set_on_the_twin_stays() -> None:
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    twin.generation_config.suppress_tokens = list(range(3, 100))
    expected = written(twin)
    assert written(twin) == expected != written(model)
    model.generation_config.repetition_penalty = 1.0  # as it was
    model.generation_config.max_length = 99
    assert written(twin) == expected
    model.generation_config.suppress_tokens = [5]
    assert written(twin) == expected


def test_what_was_set_on_the_twin_after_the_model_stays() -> None:
    """Both are set before the twin runs again."""
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    before = written(twin)
    model.generation_config.suppress_tokens = before[0]
    twin.generation_config.suppress_tokens = list(range(3, 100))
    chosen = written(twin)
    assert twin.generation_config.suppress_tokens == list(range(3, 100))
    model.generation_config.suppress_tokens = None
    assert written(twin) == chosen != written(model)


def test_a_generation_config_that_was_given_to_the_twin_is_not_written_to() -> None:
    model = helpers.proved("llama")
    twin = flocking.griffin(model, 1.0)
    twin.generation_config = mine = tf.GenerationConfig(max_new_tokens=3)
    model.generation_config.repetition_penalty = 50.0
    written(twin)
    assert mine.repetition_penalty != 50.0


@pytest.mark.parametrize("change", ["causal", "softmax"])
def test_a_twin_is_not_used_once_griffin_would_refuse_the_model(change: str) -> None:
    model = helpers.proved("llama")
    twin = flocking.griffin(model)
    before = logits(twin)

    def switch(on: bool) -> None:
        if change == "causal":
            layer(model).self_attn.is_causal = not on
        else:
            steering.on = on

    if change == "softmax":
        steering = Switch(layer(model).mlp.act_fn)
        layer(model).mlp.act_fn = steering
        twin = flocking.griffin(model)
    switch(on=True)
    with pytest.raises(ValueError, match="cannot"):
        flocking.griffin(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot"):
            logits(twin)
    switch(on=False)
    torch.testing.assert_close(logits(twin), before, atol=1e-4, rtol=1e-4)


class Switch(nn.Module):
    """An activation function that can be made to let neurons depend on each other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.on = inner, False

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(dim=-1) if self.on else self.inner(x)
