"""Weights of other forms: a trial gives back what it borrows; what cannot be read is refused."""

from __future__ import annotations

import copy
import inspect
from types import MethodType, SimpleNamespace

import helpers
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from transformers import cache_utils

import flocking
from flocking.models.rewinding import refuse_unknown
from flocking.models.wrapping import _refuse_outside


class Eightbit(torch.nn.Linear):
    """A Linear that moves its scales from its weight to itself when it first runs.

    As bitsandbytes' ``Linear8bitLt`` does, which is not installed here.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.weight.CB, self.weight.SCB = codes, scale
        self.state = SimpleNamespace(CB=None, SCB=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.CB is not None:
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        out = x @ (self.state.CB.to(x.dtype) * self.state.SCB).T
        self.weight.data = self.state.CB
        return out


class LowRank(torch.nn.Module):
    """Two matrices in the place of one; it has no weight of its own."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.a = torch.nn.Parameter(torch.randn(rank, linear.in_features) / 8)
        self.b = torch.nn.Parameter(torch.randn(linear.out_features, rank) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.T @ self.b.T


def quantised(has_run: bool) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    """A model with such weights, and one with the same values in float32."""
    model = helpers.build("llama")
    plain = copy.deepcopy(model)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            packed = Eightbit(getattr(layer.mlp, name))
            setattr(layer.mlp, name, packed)
            linear = getattr(other.mlp, name)
            linear.weight.data = packed.weight.CB.float() * packed.weight.SCB
    if has_run:
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
    return model, plain


@pytest.mark.parametrize("has_run", [False, True])
def test_a_trial_leaves_weights_their_scales(has_run: bool) -> None:
    model, plain = quantised(has_run)
    (ids,) = helpers.random_ids(20)
    before = [(p.data_ptr(), dict(vars(p))) for p in model.parameters()]
    flocking.feedforwards(model)
    for parameter, (place, own) in zip(model.parameters(), before, strict=True):
        assert parameter.data_ptr() == place
        assert vars(parameter).keys() == own.keys()
        assert all(vars(parameter)[name] is own[name] for name in own)
    found = flocking.record(model, [ids], progress=False)
    expected = flocking.record(plain, [ids], progress=False)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        tokens = torch.tensor([ids])
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)


def test_a_projection_without_a_weight_is_recorded() -> None:
    torch.manual_seed(0)
    model = helpers.build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj, 8)
    paths = [f"model.layers.{n}.mlp" for n in range(2)]
    named = {f"{path}.down_proj": [f"{path}.up_proj", f"{path}.gate_proj"] for path in paths}
    blocks = flocking.set_feedforwards(model, named)
    assert [block.d_ff for block in blocks] == [160, 160]
    (ids,) = helpers.random_ids(20)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, n=n: seen.update({n: args[0].detach()[0]})
        )
        for n, layer in enumerate(model.model.layers)
    ]
    found = flocking.record(model, [ids], relative=True, progress=False)
    for hook in hooks:
        hook.remove()
    for n, z in seen.items():
        expected = (z.abs() / z.norm(dim=-1, keepdim=True)).numpy()
        np.testing.assert_allclose(found.relative[0, n], expected, atol=1e-3)
    with pytest.raises(ValueError, match="LowRank"):
        flocking.griffin(model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's
def test_adapters_that_work_outside_of_the_model_are_refused() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    model = peft.get_peft_model(helpers.build("llama"), config)
    with pytest.raises(ValueError, match="has an adapter of aLoRA"):
        flocking.record(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="has an adapter of X-LoRA"):
        _refuse_outside(peft.XLoraConfig(hidden_size=64, adapters={}))
    flocking.feedforwards(model.get_base_model())


def test_a_replaced_forward_of_the_whole_model_is_refused() -> None:
    """As accelerate's mixed precision has it, which `record` would not run."""
    model = helpers.build("llama")
    plain = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: plain(*args, **kwargs), model)
    with pytest.raises(ValueError, match="has another forward than its class"):
        flocking.record(model, [[1, 2, 3]])
    del model.forward
    flocking.record(model, [[1, 2, 3]], progress=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_magnitudes_of_what_is_not_in_the_weights_are_refused(name: str) -> None:
    target = {"llama": "up_proj", "gpt2": "c_fc"}[name]
    config = peft.LoraConfig(
        target_modules=[target], init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    model = peft.get_peft_model(helpers.build(name), config)
    with pytest.raises(ValueError, match=r"has an adapter: merge it"):
        flocking.weight_magnitude(model)
    merged = flocking.weight_magnitude(model.merge_and_unload())
    assert (merged > 0).all()
    packed, _ = quantised(has_run=False)
    with pytest.raises(ValueError, match="is packed in int8, with scales beside it"):
        flocking.weight_magnitude(packed)


def test_the_control_of_an_offloaded_model_has_values() -> None:
    model = helpers.build("llama")
    expected = flocking.control(model, seed=3)
    found = flocking.control(cpu_offload(model, execution_device="cpu"), seed=3)
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's
def test_flex_attention_is_recorded() -> None:
    (ids,) = helpers.random_ids(20)
    recordings = []
    for attention in ("eager", "flex_attention"):
        model = helpers.build("llama")
        model.set_attn_implementation(attention)
        recordings.append(flocking.record(model, [ids], progress=False))
    np.testing.assert_allclose(*(each.energy for each in recordings), rtol=1e-3, atol=1e-5)


def test_every_quantised_cache_is_refused_by_name() -> None:
    """They have several bases in transformers, and keep tuples of numbers and scales."""
    found = vars(cache_utils).items()
    kinds = [kind for name, kind in found if name.endswith("QuantizedLayer") and name[0] != "B"]
    assert kinds
    for kind in filter(lambda kind: not inspect.isabstract(kind), kinds):
        with pytest.raises(ValueError, match=f"{kind.__name__}, in which tokens are cached"):
            refuse_unknown(object.__new__(kind))
