"""Modules of a model, in torch's order."""

from __future__ import annotations

import pytest
from torch import nn

from flocking.models import modules_of, named_modules_of


def nested() -> nn.Module:
    """A module in two places, an empty place, and one below another."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.ModuleDict({"a": shared}))
    model.register_module("nothing", None)
    model.add_module("again", model[0])
    model.add_module("last", nn.Sequential(nn.Sequential(nn.ReLU()), shared))
    return model


@pytest.mark.parametrize("model", [nested(), nn.ReLU(), nn.TransformerDecoderLayer(8, 2)])
def test_order_and_names_are_torchs(model: nn.Module) -> None:
    assert named_modules_of(model) == list(model.named_modules())
    assert modules_of(model) == list(model.modules())


def test_a_module_that_is_in_itself_comes_once() -> None:
    model = nn.Sequential(nn.ReLU())
    model.add_module("itself", model)
    assert named_modules_of(model) == list(model.named_modules())
    assert modules_of(model) == [model, model[0]]
