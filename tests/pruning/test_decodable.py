"""What a model must be like to be decoded in fixed shapes."""

from __future__ import annotations

import helpers
import pytest
import torch

import flocking
from flocking.pruning import graphs

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
IDS = torch.tensor(helpers.random_ids(20))


def test_a_model_that_trains_with_checkpointing_is_refused_with_the_true_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    model = helpers.proved("llama")
    model.activation_checkpointing_enable()
    flocking.Decoder(model, max_length=40)
    model.train()
    with pytest.raises(ValueError, match=r"training mode with gradient checkpointing.*eval\(\)"):
        flocking.Decoder(model, max_length=40)


def test_a_twins_decoder_ends_where_its_original_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    model = helpers.proved("llama")
    decoder = flocking.Decoder(flocking.griffin(model, 1.0), max_length=40)
    text = decoder.generate(IDS, max_new_tokens=8)[0].tolist()
    model.generation_config.eos_token_id = text[22]
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)[0].tolist()
    got = decoder.generate(IDS, max_new_tokens=8)[0].tolist()
    assert got[: len(expected)] == expected != text
