"""A static statistic from texts that the model writes itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import as_masks, build, generate, tokens

import flocking
from flocking.models import sampled
from flocking.pruning import calibration_texts


def by_hand(
    model: tf.PreTrainedModel, prompt: list[int], number: int, tokens: int, t: float, seed: int
) -> list[int]:
    """One text, by inverting the distribution function in numpy, without a cache."""
    random = np.random.default_rng((seed, number))
    text = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1].double().numpy() / t
        share = np.exp(logits - logits.max())
        share = np.cumsum(share / share.sum())
        text.append(int(np.argmax(share > random.random())))
    return text


def drawn(model: tf.PreTrainedModel, prompt: list[int], **options: object) -> list[list[int]]:
    given = {
        "sequences": 5,
        "tokens": 12,
        "temperature": 1.0,
        "seed": 0,
        "batch_size": 2,
        "progress": False,
        **options,
    }
    sequences, tokens = given.pop("sequences"), given.pop("tokens")
    found = sampled(model, torch.tensor(prompt), sequences, tokens, **given)
    return [row.tolist() for row in found]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_texts_are_drawn_from_the_models_distribution(name: str) -> None:
    model = build(name)
    for t, seed in ((1.0, 0), (0.05, 3)):
        rows = drawn(model, [7, 9], temperature=t, seed=seed)
        assert rows == [by_hand(model, [7, 9], n, 12, t, seed) for n in range(5)]
        assert rows == drawn(model, [7, 9], temperature=t, seed=seed, batch_size=8)
    assert drawn(model, [7, 9], seed=1) != drawn(model, [7, 9], seed=2)


def test_every_text_is_as_long_and_the_generation_config_does_not_apply() -> None:
    model = build("llama")
    before = drawn(model, [1])
    frequent = int(np.bincount(np.concatenate(before)).argmax())
    model.generation_config.eos_token_id = frequent  # it ends no text here
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 3
    assert drawn(model, [1]) == before
    assert {len(row) for row in before} == {13}


def test_frequencies_of_first_tokens() -> None:
    """Of 4,000 texts of one token: against the softmax, within five standard errors."""
    model = build("llama", vocab_size=16, pad_token_id=None)
    with torch.no_grad():
        share = (model(torch.tensor([[1]])).logits[0, -1].double() * 4).softmax(-1).numpy()
    rows = drawn(model, [1], sequences=4000, tokens=1, temperature=0.25, batch_size=1000)
    got = np.bincount([row[1] for row in rows], minlength=16) / 4000
    assert (np.abs(got - share) < 5 * np.sqrt(share * (1 - share) / 4000)).all()


@pytest.mark.parametrize("prompt", [None, [7, 9, 11]])
def test_statistic_is_that_of_the_texts_as_they_are_read(prompt: list[int] | None) -> None:
    model = build("llama")
    bos = model.config.bos_token_id
    rows = [by_hand(model, prompt or [bos], n, 20, 1.0, 4) for n in range(3)]
    expected = flocking.global_statistic(model, rows, progress=False)
    options = {"sequences": 3, "tokens": 20, "seed": 4, "progress": False}
    got = flocking.global_statistic(model, prompt=prompt, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (got - flocking.global_statistic(model, prompt=prompt, **options | {"seed": 5})).any()
    twin = flocking.griffin(model, 0.5, method="static", reference=got)
    generate(twin, tokens(9), 2)
    np.testing.assert_array_equal(as_masks(twin, model), flocking.select(got, 0.5).values)


def test_leaves_generators_and_training_mode_alone() -> None:
    model = build("llama").train()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="training mode"):
        flocking.global_statistic(model, sequences=2, tokens=4, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_by_default_texts_fit_the_context() -> None:
    model = build("llama", max_position_embeddings=24)
    expected = flocking.global_statistic(model, tokens=23, sequences=32, progress=False)
    np.testing.assert_array_equal(flocking.global_statistic(model, progress=False), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": [[1, 2]], "tokens": 9}, "^tokens: of texts that the model writes itself"),
        ({"texts": [[1, 2]], "temperature": 1.0, "prompt": [3]}, "^temperature and prompt: of"),
        ({"max_tokens": 9}, "max_tokens=9 cuts texts, and none are given: say with tokens"),
        ({"sequences": 0}, "sequences=0: give a whole number from 1 up"),
        ({"tokens": 2.5}, "tokens=2.5: give a whole number"),
        ({"seed": -1}, "seed=-1: give a whole number from 0 up"),
        ({"temperature": 0}, r"temperature=0: give a number above 0"),
        ({"temperature": float("nan")}, "temperature=nan: give a number above 0"),
        ({"temperature": True}, "temperature=True: give a number above 0"),
        ({"prompt": [[1, 2], [3]]}, "prompt has 2 texts: give one"),
        ({"prompt": []}, "no tokens|empty"),
        ({"tokens": 256}, "prompt of 1 tokens and 256 new ones do not fit .* context of 256"),
        ({"prompt": [1] * 256}, "prompt of 256 tokens and 1 new ones do not fit"),
    ],
)
def test_refuses_what_it_cannot_draw(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.global_statistic(build("llama"), **options, progress=False)


def test_refuses_models_that_cannot_write() -> None:
    model = build("llama")
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM names no token .*: give prompt, a word"
    ):
        flocking.global_statistic(model, progress=False)
    flocking.global_statistic(model, prompt=[5], sequences=1, tokens=2, progress=False)
    with pytest.raises(ValueError, match="not a causal language model, so that it cannot write"):
        flocking.global_statistic(build("llama").model, prompt=[5], progress=False)
    twin = flocking.griffin(build("llama"))
    with pytest.raises(ValueError, match="model is a twin"):
        flocking.global_statistic(twin, progress=False)


def test_texts_of_a_folder_are_those_that_record_reads(tmp_path: Path) -> None:
    """Of JSON lines, not their syntax; and no file in silence, but for those without text."""
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n"three"\n')
    (tmp_path / "d.md").write_text("no text file")
    assert calibration_texts(tmp_path) == ["one", "two", "three"]
    assert calibration_texts(str(tmp_path / "c.jsonl")) == ["two", "three"]
    for empty in ("b.txt", "e.jsonl"):
        (tmp_path / "e.jsonl").write_text("")
        with pytest.raises(ValueError, match=r"no text in|no line with a text"):
            calibration_texts(tmp_path / empty)
