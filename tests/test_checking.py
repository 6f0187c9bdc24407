"""The self-check passes on what the suite tests, and fails where something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import VOCABULARY, random_ids

import flocking
from flocking import checking

NAMES = ["proof", "watching", "batch", "selection", "density 1", "density 0.5"]


def test_passes_on_every_architecture(architecture: str, tiny: tf.PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    state = torch.random.get_rng_state()
    table = flocking.check(tiny)
    assert table.index.tolist() == NAMES
    assert table.passed.isna().tolist() == [False] * 3 + [architecture == "bert"] * 3
    assert table.passed.all(), table
    assert (table.error.dropna() <= table.allowed.dropna().max()).all()
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_on_the_embedded_model_and_real_text(embedded: tuple) -> None:
    assert flocking.check(*embedded).passed.all()


def test_passes_with_a_hook_that_the_twin_has_too(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    assert flocking.check(llama).passed.all()


@pytest.mark.filterwarnings("ignore:a module was put into the twin")
def test_fails_where_a_twin_differs_from_its_model(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checking.griffin

    def wrong(model: tf.PreTrainedModel, *args: object, **options: object) -> object:
        twin = real(model, *args, **options)
        twin.model.layers[1].mlp.act_fn = torch.nn.Tanh()
        return twin

    monkeypatch.setattr(checking, "griffin", wrong)
    table = flocking.check(llama)
    assert table.passed.tolist() == [True] * 4 + [False] * 2
    assert (table.reason[4:] == "the error is more than rounding explains").all()
    assert (table.error[4:] > 1e-2).all()


def test_fails_where_a_batch_differs_from_its_members(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checking.record

    def wrong(model: tf.PreTrainedModel, texts: list, **options: object):
        recording = real(model, texts, **options)
        wrong = recording.assign(energy=recording.energy * 1.1)
        return wrong if options.get("batch_size") == 3 else recording

    monkeypatch.setattr(checking, "record", wrong)
    table = flocking.check(llama)
    assert table.passed.to_numpy().tolist() == [True, True, False, True, True, True]
    assert np.isclose(table.error["batch"], np.sqrt(1.1) - 1, rtol=1e-3)


def test_says_what_cannot_be_checked() -> None:
    with pytest.raises(TypeError, match="model is a Linear: give a transformers model"):
        flocking.check(torch.nn.Linear(2, 2))
    small = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
    table = flocking.check(tf.MambaForCausalLM(tf.MambaConfig(**small)))
    assert table.index.tolist() == ["proof"]
    assert not table.passed["proof"]
    assert "no feed-forward block" in table.reason["proof"]
    gpt = tf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    table = flocking.check(tf.OpenAIGPTLMHeadModel(gpt))
    assert table.passed[:3].all()
    assert table.passed[3:].isna().all()
    assert table.reason["selection"].startswith("OpenAIGPTLMHeadModel cannot go on from a cache")


def test_models_that_take_one_token_at_a_time_are_pruned_and_not_scored() -> None:
    """Jamba's state-space layers, on top of a cache."""
    model = tf.JambaForCausalLM(
        tf.JambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=4,
            pad_token_id=0,
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # so that what is carried along matters
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert flocking.check(model).passed.all()
    for subject in (model, flocking.griffin(model)):
        with pytest.raises(ValueError, match="takes only one token at a time on top of a cache"):
            flocking.score(subject, *random_ids(5, 5))
