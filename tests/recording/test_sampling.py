"""Continuations as arguments of the model's own ``generate`` have them."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import record

import flocking
from flocking.recording import forward_passes

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0}


STOPPED = tf.StoppingCriteriaList(
    [lambda ids, _: torch.full((len(ids),), ids.shape[1] > 15, dtype=torch.bool)]
)


def written(recording: xr.Dataset) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in recording.token_id.values.tolist()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_what_is_recorded_is_the_replay_of_the_tokens(name: str, one_thread: None) -> None:
    model = helpers.proved(name)
    prompts = helpers.random_ids(20, 13)
    got = record(model, prompts, max_new_tokens=12, window=4, **SAMPLED)
    assert written(got) != written(record(model, prompts, max_new_tokens=12))
    replayed = record(model, written(got), prompt_tokens=[20, 13], window=4)
    apart = ["text"]
    xr.testing.assert_identical(
        got.drop_vars(apart).drop_attrs(deep=False),
        replayed.drop_vars(apart).drop_attrs(deep=False),
    )
    assert got.attrs["generation"] == "do_sample=True, temperature=1.3, top_k=0"


def test_a_seed_makes_the_same_again_and_nothing_global_moves(llama: tf.PreTrainedModel) -> None:
    prompts = helpers.random_ids(20, 13)
    before = torch.get_rng_state()
    first = written(record(llama, prompts, max_new_tokens=12, **SAMPLED))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert written(record(llama, prompts, max_new_tokens=12, **SAMPLED)) == first
    assert written(record(llama, prompts, max_new_tokens=12, seed=1, **SAMPLED)) != first


def test_a_text_has_its_own_random_numbers(llama: tf.PreTrainedModel) -> None:
    """Others beside it change nothing, and the same text is sampled anew."""
    one, other = helpers.random_ids(20, 13)
    alone = written(record(llama, one, max_new_tokens=12, **SAMPLED))
    several = written(record(llama, [other, one, one, one], max_new_tokens=12, **SAMPLED))
    assert several[1] == alone[0]
    assert len({tuple(text) for text in several[1:]}) == 3


def test_draws_are_from_the_models_own_distribution(llama: tf.PreTrainedModel) -> None:
    """The first new token of 400 samples, against the softmax of the model's logits."""
    (ids,) = helpers.random_ids(9)
    recording = record(llama, [ids] * 400, max_new_tokens=2, layers=[0], **SAMPLED)
    first = recording.token_id.values[:, 9]  # (what ends a text at once is not fed)
    drawn = np.bincount(np.where(first < 0, llama.config.eos_token_id, first), minlength=128)
    with torch.no_grad():
        logits = llama(torch.tensor([ids])).logits[0, -1]
    expected = 400 * torch.softmax(logits.double() / 1.3, 0).numpy()
    likely = expected > 5
    assert likely.sum() > 5
    chi = ((drawn - expected) ** 2 / expected)[likely].sum()
    assert chi < likely.sum() + 5 * np.sqrt(2 * likely.sum())


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 4},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [5, 6, 7]},
        {"min_new_tokens": 12, "eos_token_id": list(range(64))},
        {"stopping_criteria": STOPPED},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_whatever_else_generate_takes(llama: tf.PreTrainedModel, arguments: dict) -> None:
    (ids,) = helpers.random_ids(11)
    expected = llama.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, 11, dtype=int),
        max_new_tokens=12,
        do_sample=False,
        **arguments,
    )[0].tolist()
    recording = record(llama, ids, max_new_tokens=12, **arguments)
    assert written(recording) == [expected[:-1]]
    assert "0x" not in recording.attrs["generation"]


def test_strings_that_stop_it(embedded: tuple) -> None:
    model, tokenizer = embedded
    plain = record(model, "Birds of a", max_new_tokens=20, layers=[0], tokenizer=tokenizer)
    words = plain.token_text.values[0, 3:].tolist()
    stop = words[8]
    short = record(
        model, "Birds of a", max_new_tokens=20, layers=[0], tokenizer=tokenizer, stop_strings=stop
    )
    assert short.token_text.values[0, 3:].tolist() == words[: words.index(stop)]


REFUSED = {
    "a typing error": ({"windw": 8}, TypeError, "unexpected keyword argument 'windw'"),
    "a method's name": ({"validate": 8}, TypeError, "unexpected keyword argument 'validate'"),
    "nothing to write": (
        {"max_new_tokens": 0, "do_sample": True},
        ValueError,
        "do_sample is for a continuation that the model writes: give max_new_tokens",
    ),
    "ids": ({"input_ids": [[5]]}, ValueError, "input_ids cannot be given: what the model is fed"),
    "length": ({"max_length": 8}, ValueError, "max_length cannot be given: max_new_tokens says"),
    "config": ({"generation_config": None}, ValueError, "generation_config cannot be given"),
    "assistant": ({"assistant_model": None}, ValueError, "assistant_model cannot be given"),
    "custom": ({"custom_generate": "a/b"}, ValueError, "with prompt_tokens=, the numbers"),
    "outputs": ({"output_scores": True}, ValueError, "a recording is what is returned"),
    "several": ({"num_return_sequences": 2}, ValueError, "Give the text several times"),
    "a draft": ({"prompt_lookup_num_tokens": 3}, ValueError, "ask for assisted generation"),
    "contrast": ({"penalty_alpha": 0.5, "top_k": 4}, ValueError, "cannot use|ask for contrastive"),
    "a word": ({"do_sample": "no"}, ValueError, "do_sample='no': give True or False"),
    "a dict": ({"watermarking_config": {"bias": 2.5}}, ValueError, "cannot use these arguments"),
    "unused": ({"temperature": 0.5}, ValueError, "`temperature`: `do_sample` is not set"),
    "cold": ({"do_sample": True, "temperature": -1.0}, ValueError, "strictly positive float"),
    "no beams": ({"num_beams": 0}, ValueError, "generate cannot use these arguments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(
    case: str, llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, problem, message = REFUSED[case]
    if case not in ("cold", "no beams"):  # those are known when generate is called
        monkeypatch.setattr(forward_passes, "feedforwards", None)
    state = torch.get_rng_state()
    with pytest.raises(problem, match=message) as caught:
        record(llama, [5, 6, 7], **{"max_new_tokens": 3, **arguments})
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_changes_the_text_itself_is_noticed(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    flocking.feedforwards(llama)
    monkeypatch.setattr(
        type(llama), "generate", lambda self, input_ids, **_: torch.cat([input_ids + 1] * 2, 1)
    )
    with pytest.raises(ValueError, match="generate changed the tokens of text 0 itself"):
        record(llama, [5, 6, 7], max_new_tokens=3, do_sample=True)
