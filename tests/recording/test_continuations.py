"""Texts whose continuation the user has: recorded as those that the model writes are."""

from __future__ import annotations

import warnings

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import assert_same, letters, record, relative

import flocking
from flocking.models import capabilities
from flocking.recording import GENERATION, PROMPT, forward_passes

NAMES = ["llama", "gpt2", "mixtral"]


def same(got: xr.Dataset, expected: xr.Dataset) -> None:
    """Equal bit for bit, but for the texts and the arguments."""
    apart = ["text"]
    left = got.drop_vars(apart).drop_attrs(deep=False)
    xr.testing.assert_identical(left, expected.drop_vars(apart).drop_attrs(deep=False))


def written(recording: xr.Dataset) -> list[list[int]]:
    """The tokens of each sequence, without padding."""
    return [[token for token in row if token >= 0] for row in recording.token_id.values.tolist()]


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("name", NAMES)
def test_is_what_the_models_own_continuation_is(
    name: str, window: int | None, one_thread: None
) -> None:
    model = helpers.proved(name)
    prompts = helpers.random_ids(20, 13, 1)
    options = {"window": window, "ranks": True, "relative": [1]}
    own = record(model, prompts, max_new_tokens=12, **options)
    texts = written(own)
    same(record(model, texts, prompt_tokens=[20, 13, 1], **options), own)
    later = [text[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]
    joined = record(model, prompts, continuation=later, **options)
    same(joined, own)
    assert joined.text.equals(own.text)
    assert own.attrs["generation"] == "greedy"
    assert joined.attrs["generation"] == "as given"
    assert record(model, [5, 6]).attrs["generation"] == "none"


@pytest.mark.parametrize("name", NAMES)
def test_is_the_definition_and_so_is_its_overlap(name: str) -> None:
    """Against bare hooks on the model's own forward pass, text by text."""
    model = helpers.proved(name)
    texts = helpers.random_ids(30, 17, 24)
    prompts = [9, 12, 23]
    batch = record(model, texts, prompt_tokens=prompts, window=5)
    assert batch.prompt_tokens.values.tolist() == prompts
    overlap = flocking.prompt_generation_overlap(batch, density=0.25)
    for number, (text, cut) in enumerate(zip(texts, prompts, strict=True)):
        mine = batch.sel(sequence=number)
        for layer, z in helpers.activations(model, text).items():
            r = relative(z)
            energy = mine.energy.sel(layer=layer).groupby("phase").sum()
            np.testing.assert_allclose(
                energy.sel(phase=PROMPT), (r[1:cut] ** 2).sum(0), rtol=1e-4, atol=1e-6
            )
            np.testing.assert_allclose(
                energy.sel(phase=GENERATION), (r[cut:] ** 2).sum(0), rtol=1e-4, atol=1e-6
            )
            k = r.shape[1] // 4
            kept = [
                set(np.argsort(-(part**2).sum(0), kind="stable")[:k].tolist())
                for part in (r[:cut], r[cut:])
            ]
            if name != "mixtral":  # where experts that no token reached are told apart by weights
                expected = len(kept[0] & kept[1]) / len(kept[0] | kept[1])
                np.testing.assert_allclose(overlap.sel(sequence=number, layer=layer), expected)
        phases = mine.phase.values[mine.token_window.values[: len(text)]]
        assert (phases[cut:] == GENERATION).all()
        assert (phases[1:cut] == PROMPT).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_members(name: str) -> None:
    model = helpers.proved(name)
    texts, prompts = helpers.random_ids(40, 9, 21), [3, 8, 20]
    batch = record(model, texts, prompt_tokens=prompts, window=8)
    members = [
        record(model, text, prompt_tokens=count, window=8)
        for text, count in zip(texts, prompts, strict=True)
    ]
    for number, alone in enumerate(members):
        own = batch.isel(sequence=slice(number, number + 1)).assign_coords(sequence=[0])
        for phase in ("first", PROMPT, GENERATION):
            a, b = (each.isel(window=each.phase.values == phase) for each in (own, alone))
            assert_same(a.assign_coords(window=a.start), b.assign_coords(window=b.start))
    together = flocking.concat(members)
    assert_same(together, batch)
    np.testing.assert_allclose(
        flocking.prompt_generation_overlap(together),
        flocking.prompt_generation_overlap(batch),
    )


def test_one_number_for_all_and_in_every_form(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(9, 12)
    expected = record(llama, texts, prompt_tokens=[4, 4])
    for count in (4, np.int64(4), (4, 4), np.array([4, 4]), torch.tensor([4, 4])):
        xr.testing.assert_identical(record(llama, texts, prompt_tokens=count), expected)
    xr.testing.assert_identical(
        record(llama, texts, prompt_tokens=expected.prompt_tokens), expected
    )


def test_a_tokenizers_padding_does_not_count(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(9, 12)
    padded = {
        "input_ids": [[0, 0, 0, *texts[0]], texts[1]],
        "attention_mask": [[0] * 3 + [1] * 9, [1] * 12],
    }
    xr.testing.assert_identical(
        record(llama, padded, prompt_tokens=5), record(llama, texts, prompt_tokens=5)
    )


def test_in_chunks(llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = helpers.random_ids(60, 41)
    whole = record(llama, texts, prompt_tokens=[7, 30], window=8)
    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 14)
    fed = helpers.count_fed(llama, monkeypatch)
    assert_same(record(llama, texts, prompt_tokens=[7, 30], window=8), whole)
    assert fed[-9:] == [7] * 8 + [4]


def test_strings_are_joined_without_special_tokens(llama: tf.PreTrainedModel) -> None:
    tokenizer = letters("<s> $A")
    prompts, answers = ["rook", "a crow"], [" caws", " sits"]
    got = record(llama, prompts, continuation=answers, tokenizer=tokenizer)
    expected = [
        tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert written(got) == expected
    assert got.prompt_tokens.values.tolist() == [5, 7]
    assert got.text.values.tolist() == prompts
    assert got.attrs["special_tokens"] == "<s>"
    forms = (
        tokenizer(answers, add_special_tokens=False),
        [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers],
        (answer for answer in answers),
    )
    for form in forms:
        same(record(llama, prompts, continuation=form, tokenizer=tokenizer), got)
    one = record(llama, "rook", continuation=" caws", tokenizer=tokenizer)
    assert written(one) == expected[:1]
    score = flocking.score(llama, "rook", " caws", tokenizer=tokenizer)
    assert score.token_id.values.tolist() == written(one)[0][5:]
    whole = record(llama, "rook caws", prompt_tokens=5, tokenizer=tokenizer)
    same(whole, one)
    assert whole.text.item() == "rook caws"
    assert written(record(llama, [5, 6], continuation=[7])) == [[5, 6, 7]]


def test_a_special_token_amid_a_text_is_doubted(llama: tf.PreTrainedModel) -> None:
    tokenizer = letters("<s> $A")
    with pytest.warns(UserWarning, match="of text 0 begins with the special token <s>"):
        record(llama, "ab", continuation=tokenizer("cd"), tokenizer=tokenizer)
    tokenizer = letters("<s> $A </s>")
    ended = "prompt of text 0 ends with the special token </s>"
    for what in ({"continuation": "cd"}, {"max_new_tokens": 2}):
        for text in ("ab", tokenizer("ab")):
            with pytest.warns(UserWarning, match=ended):
                record(llama, text, tokenizer=tokenizer, **what)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bare = tokenizer("ab", add_special_tokens=False)
            record(llama, bare, tokenizer=tokenizer, **what)
            record(llama, "ab", tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_else_the_model_is_fed_goes_on(name: str, one_thread: None) -> None:
    model = helpers.proved(name)
    prompts = helpers.random_ids(20, 13)
    more = {"position_ids": [[place + 7 for place in range(len(ids))] for ids in prompts]}
    if name == "gpt2":
        more["token_type_ids"] = [[0] * 5 + [1] * (len(ids) - 5) for ids in prompts]
    own = record(model, {"input_ids": prompts, **more}, max_new_tokens=6)
    texts = written(own)
    later = [text[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]
    same(record(model, {"input_ids": prompts, **more}, continuation=later), own)
    more = {"position_ids": [[place + 7 for place in range(len(text))] for text in texts]}
    if name == "gpt2":
        more["token_type_ids"] = [[0] * 5 + [1] * (len(text) - 5) for text in texts]
    same(record(model, {"input_ids": texts, **more}, prompt_tokens=[20, 13]), own)


def test_the_beginning_of_long_texts(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(20, 30)
    got = record(llama, texts, prompt_tokens=8, max_tokens=12)
    same(got, record(llama, [text[:12] for text in texts], prompt_tokens=8))
    prompts, later = [text[:8] for text in texts], [text[8:] for text in texts]
    same(record(llama, prompts, continuation=later, max_tokens=12), got)


def test_a_model_without_a_head(one_thread: None) -> None:
    """It writes nothing, and reads what is given."""
    model = helpers.proved("gpt2")
    (ids,) = helpers.random_ids(20)
    got = record(model.transformer, ids, prompt_tokens=8)
    np.testing.assert_array_equal(got.energy, record(model, ids, prompt_tokens=8).energy)


REFUSED = {
    "none": ([5, 6], {"prompt_tokens": 0}, "prompt_tokens=0: give a whole number .* from 1 up"),
    "all": ([5, 6], {"prompt_tokens": 2}, "prompt_tokens=2, and text 0 has 2 tokens: its prompt"),
    "of one": ([[5, 6, 7], [5, 6]], {"prompt_tokens": 2}, "and text 1 has 2 tokens"),
    "too many": ([5, 6], {"prompt_tokens": [1, 1]}, "has 2 numbers, and text has 1 texts"),
    "too few": ([[5, 6]] * 2, {"prompt_tokens": [1]}, "has 1 numbers, and text has 2 texts"),
    "true": ([5, 6], {"prompt_tokens": True}, "prompt_tokens=True: give"),
    "half": ([5, 6], {"prompt_tokens": 1.0}, "prompt_tokens=1.0: give"),
    "a string": ([5, 6], {"prompt_tokens": "1"}, "prompt_tokens='1': give"),
    "ragged": ([5, 6], {"prompt_tokens": [[1], [1, 2]]}, "prompt_tokens=.*: give"),
    "empty list": ([5, 6], {"prompt_tokens": []}, r"prompt_tokens=\[\]: give"),
    "two sources": (
        [5, 6],
        {"prompt_tokens": 1, "max_new_tokens": 3},
        "max_new_tokens and prompt_tokens were given, and each says",
    ),
    "two others": (
        [5, 6],
        {"continuation": [7], "max_new_tokens": 3},
        "max_new_tokens and continuation were given",
    ),
    "both": ([5, 6], {"continuation": [7], "prompt_tokens": 1}, "prompt_tokens and continuation"),
    "one for two": ([[5], [6]], {"continuation": [7]}, "has 1 texts, and text has 2: give one"),
    "nothing": ([5], {"continuation": []}, "continuation: text is empty"),
    "an empty one": ([5], {"continuation": [[]]}, "continuation: text 0 has no tokens"),
    "no such id": ([5], {"continuation": [128]}, "continuation: .* vocabulary ends at 127"),
    "types": (
        [5],
        {"continuation": {"input_ids": [7], "position_ids": [1]}},
        "continuation has position_ids: give its token ids alone",
    ),
    "cut away": (
        [5, 6, 7],
        {"prompt_tokens": 2, "max_tokens": 2},
        "max_tokens=2, and the prompt of text 0 has 2: none would be left",
    ),
    "long": ([5] * 200, {"continuation": [5] * 100}, "300 tokens, 44 more than the model's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is run or its blocks are looked for."""
    monkeypatch.setattr(forward_passes, "feedforwards", None)
    text, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        record(helpers.proved("llama"), text, **options)
    assert "\n" not in str(caught.value)


def test_models_whose_prompt_sees_what_follows() -> None:
    for options in ({"prompt_tokens": 2}, {"continuation": [8]}):
        with pytest.raises(ValueError, match=r"BertModel is not a causal .* out the continuation"):
            record(helpers.proved("bert"), [5, 6, 7], **options)


def test_an_end_that_is_cut_off_is_not_doubted(llama: tf.PreTrainedModel) -> None:
    """What counts is the last token that is read."""
    tokenizer = letters("<s> $A </s>")
    ended = "prompt of text 0 ends with the special token </s>"
    options = {"max_new_tokens": 2, "tokenizer": tokenizer}
    with pytest.warns(UserWarning, match=ended):
        record(llama, "abcd", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(llama, "abcd", max_tokens=3, **options)
    ids = [*tokenizer("ab")["input_ids"], *tokenizer("cd")["input_ids"]]
    with pytest.warns(UserWarning, match=ended):
        record(llama, ids, max_tokens=4, **options)
