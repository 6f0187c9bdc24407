"""What is proved of a model holds for the model as it was then, and is proved once."""

from __future__ import annotations

import types
from collections.abc import Callable

import helpers
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import flocking
from flocking.models import traits
from flocking.models.running import context

Change = Callable[[tf.PreTrainedModel], object]
IDS = helpers.random_ids(20, 9)


class Mixer(nn.Module):
    """A projection of which later tokens see earlier ones, if it is on in any of these ways."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.on, self.strength = inner, False, 0.0
        self.options, self.by_name = types.SimpleNamespace(on=False), {"on": False}
        self.function = self.nothing
        self.calls, self.log = 0, []

    @staticmethod
    def nothing(y: Tensor) -> float:
        return 0.0

    @staticmethod
    def mean(y: Tensor) -> Tensor:
        return 3 * y.mean(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.calls += 1
        self.log.append(x.shape)
        on = self.on or self.options.on or self.by_name["on"]
        return y + (float(on) + self.strength) * self.mean(y) + self.function(y)


def attention(model: tf.PreTrainedModel) -> nn.Module:
    return model.model.layers[0].self_attn


def mixer(model: tf.PreTrainedModel) -> Mixer:
    return attention(model).o_proj


def another_forward(module: nn.Module) -> None:
    def forward(self: nn.Module, *args: object, **kwargs: object) -> tuple:
        output = type(self).forward(self, *args, **kwargs)
        return (output[0] + Mixer.mean(output[0]), *output[1:])

    module.forward = types.MethodType(forward, module)


MIXING: dict[str, Change] = {
    "flag of transformers": lambda m: setattr(attention(m), "is_causal", False),
    "config": lambda m: setattr(m.config, "is_causal", False),
    "forward": lambda m: another_forward(attention(m)),
    "flag": lambda m: setattr(mixer(m), "on", True),
    "number": lambda m: setattr(mixer(m), "strength", 1.0),
    "in a namespace": lambda m: setattr(mixer(m).options, "on", True),
    "in a dict": lambda m: mixer(m).by_name.update(on=True),
    "function": lambda m: setattr(mixer(m), "function", Mixer.mean),
}


def build() -> tf.PreTrainedModel:
    model = helpers.build("llama")
    attention(model).o_proj = Mixer(attention(model).o_proj)
    return model


def found(model: tf.PreTrainedModel) -> list[object]:
    """What a fresh model and one that was recorded before must agree in."""
    results: list[object] = [flocking.record(model, IDS, progress=False).energy.values.tolist()]
    for run in (
        lambda: flocking.record(model, IDS, prompt_tokens=5, progress=False),
        lambda: flocking.griffin(model),
    ):
        try:
            results.append(type(run()))
        except ValueError as problem:
            results.append(str(problem))
    return results


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_was_changed_is_proved_again(name: str) -> None:
    model, fresh = build(), build()
    causal = found(model)
    for each in (model, fresh):
        MIXING[name](each)
    expected = found(fresh)
    assert expected[1:] != causal[1:], "the change does nothing"
    assert found(model) == expected


def normed(model: tf.PreTrainedModel) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        z = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.normalize(z, dim=-1))

    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(forward, mlp)


def test_neurons_that_have_come_to_depend_on_each_other_are_seen() -> None:
    model = build()
    flocking.griffin(model)
    normed(model)
    with pytest.raises(ValueError, match="neurons depend on each other"):
        flocking.griffin(model)


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each proof of traits."""
    proved: list[object] = []
    find = traits._find

    def counted(model: tf.PreTrainedModel) -> object:
        proved.append(model)
        return find(model)

    monkeypatch.setattr(traits, "_find", counted)
    return proved


@pytest.mark.filterwarnings("ignore:The model is in training mode:UserWarning")
def test_it_is_proved_once_whatever_it_keeps_as_it_runs(proofs: list[object]) -> None:
    """Counters, also a hook's, dynamic rotary embeddings, training mode and adapters' weights."""

    def count(module: nn.Module, args: tuple, output: object) -> None:
        module.times = getattr(module, "times", 0) + 1
        module.output = output

    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = helpers.build("llama", rope_parameters=parameters, max_position_embeddings=16)
    attention(model).o_proj = Mixer(attention(model).o_proj)
    model.model.layers[1].register_forward_hook(count)
    flocking.record(model, IDS, progress=False)
    ids = torch.tensor(helpers.random_ids(40))
    for run in (
        lambda: model(ids),
        model.train,
        model.eval,
        lambda: setattr(model.config, "use_cache", False),
        lambda: setattr(model.config, "use_cache", True),
        lambda: model.lm_head.weight.data.mul_(2),
    ):
        run()
        flocking.record(model, IDS, progress=False)
    twin = flocking.griffin(model)
    for _ in range(2):
        twin.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model(ids)
    assert len(proofs) == 1


def test_a_state_that_comes_back_is_still_known(proofs: list[object]) -> None:
    model = build()
    for on in (False, True, False, True):
        mixer(model).on = on
        assert traits(model).causal is not on
    assert len(proofs) == 2


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default"}, 16),
        ({"rope_type": "linear", "factor": 4.0}, 16),  # some models' are scaled, some are not
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}, 16),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
    ],
)
def test_texts_may_be_as_long_as_rotary_embeddings_reach(rope: dict, tokens: int) -> None:
    rope = {**rope, "rope_theta": 1e4}
    model = helpers.build("llama", rope_parameters=rope, max_position_embeddings=16)
    assert context(model) == tokens
    flocking.record(model, helpers.random_ids(tokens), progress=False)
    with pytest.raises(ValueError, match=f"1 more than the model's context of {tokens}"):
        flocking.record(model, helpers.random_ids(tokens + 1), progress=False)
