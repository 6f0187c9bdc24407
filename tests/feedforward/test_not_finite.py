"""A weight that is not finite is named itself, not a layer that its values reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from helpers import build, record

import flocking

WEIGHTS = {
    "llama": (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
    ),
    "gpt2": ("transformer.h.0.mlp.c_proj.bias", "transformer.h.1.mlp.c_fc.weight"),
    "mixtral": ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight"),
}
ASKED: dict[str, Callable[[tf.PreTrainedModel], object]] = {
    "record": lambda model: record(model, [[5, 6, 7]]),
    "griffin": flocking.griffin,
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("kind", "weight"), [(kind, weight) for kind, weights in WEIGHTS.items() for weight in weights]
)
def test_the_weight_is_named(kind: str, weight: str, value: float) -> None:
    model = build(kind)
    model.get_parameter(weight).data.view(-1)[:3] = value
    for ask in ASKED.values():
        with pytest.raises(ValueError, match=rf"{weight} has values that are not finite") as caught:
            ask(model)
        assert "\n" not in str(caught.value)


def test_the_last_blocks_output_is_no_blocks_activation() -> None:
    """Recorded is what comes before it; a twin would decode what is not a number."""
    model = build("llama")
    weight = "model.layers.1.mlp.down_proj.weight"
    model.get_parameter(weight).data.view(-1)[0] = torch.nan
    assert bool(record(model, [[5, 6, 7]]).energy.notnull().all())
    with pytest.raises(ValueError, match=rf"{weight} has values that are not finite"):
        flocking.griffin(model)


def test_parts_may_be_left_out_all_the_same() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"left out, since model\.layers\.1\.mlp"):
        blocks = flocking.set_feedforwards(model, allow_partial=True)
    assert [block.layer for block in blocks] == [0]
