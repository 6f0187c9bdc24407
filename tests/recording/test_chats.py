"""Conversations through the tokenizer's own chat template."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import datasets
import helpers
import numpy as np
import pandas as pd
import pytest
import streams
import torch
import transformers as tf
import xarray as xr
from helpers import letters, record, relative
from transformers.utils import chat_template_utils

import flocking
from flocking.recording import GENERATION, forward_passes

ASK = {"role": "user", "content": "rook"}
ANSWER = {"role": "assistant", "content": "caws"}
AGAIN = {"role": "user", "content": "why"}
CHATS = [[ASK, ANSWER, AGAIN, ANSWER], [ASK], [ASK, ANSWER]]
# As many templates are: a beginning, turns with both ends, and the opening of an answer.
TEMPLATE = (
    "<s>{% for m in messages %}{{ '[A]' if m.role == 'user' else '[B]' }}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[B]{% endif %}"
)


@pytest.fixture
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One that adds a special token by itself, which its template has already."""
    made = letters("<s> $A")
    made.chat_template = TEMPLATE
    return made


def ids_of(text: str, tokenizer: tf.PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(recording: xr.Dataset) -> list[list[int]]:
    return [
        [token for token in row if token >= 0] for row in recording.token_id.to_numpy().tolist()
    ]


def test_a_template_that_writes_the_date_is_not_mixed_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: tf.PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d.%m.%Y') }}" + TEMPLATE
    path, day = tmp_path / "x.zarr", [1]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            return cls(2031, 1, day[0])

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    chats = [[{"role": "user", "content": "rook" * n}] for n in range(1, 22)]
    with monkeypatch.context() as patch:
        streams.ending_after(patch, 13)
        with pytest.raises(streams.Ended):
            streams.stream(path, chats, tokenizer=tokenizer)
    day[0] = 2
    said = r"writes the same conversation otherwise .*01\.01\.2031.*; now .*02\.01\.2031"
    for kind in (list, iter):
        with pytest.raises(ValueError, match=said):
            streams.stream(path, kind(chats), tokenizer=tokenizer)
    day[0] = 1
    got = streams.stream(path, chats, tokenizer=tokenizer)
    assert all(text.startswith("01.01.2031") for text in got.text.to_numpy())
    day[0] = 3  # nothing is left to record, and no text is written again
    assert streams.stream(path, chats, tokenizer=tokenizer).identical(got)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_last_answer_is_the_generation(
    name: str, tokenizer: tf.PreTrainedTokenizerBase, one_thread: None
) -> None:
    model = helpers.proved(name)
    got = record(model, CHATS, tokenizer=tokenizer, window=4)
    prompts = ["<s>[A]rook</s>[B]caws</s>[A]why</s>[B]", "<s>[A]rook</s>[B]", "<s>[A]rook</s>[B]"]
    answers = ["caws</s>", "", "caws</s>"]
    pairs = list(zip(prompts, answers, strict=True))
    expected = [ids_of(prompt, tokenizer) + ids_of(answer, tokenizer) for prompt, answer in pairs]
    assert rows(got) == expected
    assert got.prompt_tokens.to_numpy().tolist() == [len(ids_of(p, tokenizer)) for p in prompts]
    assert got.text.to_numpy().tolist() == [prompt + answer for prompt, answer in pairs]
    assert got.attrs["special_tokens"] == "chat template"
    assert got.attrs["generation"] == "as given"
    for number, ids in enumerate(expected):
        cut = len(ids_of(prompts[number], tokenizer))
        for layer, z in helpers.activations(model, ids).items():
            r = relative(z)
            mine = got.energy.sel(sequence=number, layer=layer).groupby("phase").sum()
            np.testing.assert_allclose(
                mine.sel(phase=GENERATION), (r[cut:] ** 2).sum(0), rtol=1e-3, atol=1e-5
            )
            np.testing.assert_allclose(mine.sum("phase"), (r**2).sum(0), rtol=1e-3, atol=1e-5)
    for number in (0, 2):
        alone = record(model, CHATS[number], tokenizer=tokenizer, window=4)
        whole = record(model, expected[number], prompt_tokens=alone.prompt_tokens.item(), window=4)
        for variable in alone.data_vars:
            np.testing.assert_array_equal(alone[variable], whole[variable])


def test_an_answer_that_is_asked_for(
    llama: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, one_thread: None
) -> None:
    """Written by the model, and given as it was written: the same recording."""
    prompt = ids_of("<s>[A]rook</s>[B]", tokenizer)
    got = record(llama, [ASK], tokenizer=tokenizer, max_new_tokens=9)
    same = record(llama, prompt, max_new_tokens=9)
    given = record(llama, [ASK], tokenizer=tokenizer, continuation=rows(got)[0][len(prompt) :])
    for variable in got.data_vars:
        np.testing.assert_array_equal(got[variable], same[variable])
        np.testing.assert_array_equal(got[variable], given[variable])
    assert rows(got) == rows(same) == rows(given)
    assert got.prompt_tokens.item() == given.prompt_tokens.item() == len(prompt)
    text = record(llama, [ASK], tokenizer=tokenizer, continuation="caws")
    assert rows(text)[0] == prompt + ids_of("caws", tokenizer)


def test_each_answer_of_a_chat(
    llama: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase
) -> None:
    chat = CHATS[0]
    answered = [chat[:n] for n, turn in enumerate(chat, 1) if turn["role"] == "assistant"]
    got = record(llama, answered, tokenizer=tokenizer)
    first, second = rows(got)
    assert second[: len(first)] == first
    assert got.prompt_tokens.to_numpy().tolist() == [len(first) - 5, len(second) - 5]
    assert np.isfinite(flocking.prompt_generation_overlap(got)).all()


@pytest.mark.parametrize(
    "form",
    [
        lambda chats: tuple(map(tuple, chats)),
        lambda chats: (chat for chat in chats),
        lambda chats: pd.Series(chats, index=[7, 8, 9]),
        lambda chats: pd.Series([np.array(chat, dtype=object) for chat in chats]),
        lambda chats: datasets.Dataset.from_dict({"messages": chats})["messages"],
        lambda chats: dict(enumerate(chats)).values(),
    ],
    ids=["tuples", "generator", "series", "arrays", "datasets", "values"],
)
def test_every_form(
    llama: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, form: object
) -> None:
    expected = record(llama, CHATS, tokenizer=tokenizer)
    xr.testing.assert_identical(record(llama, form(CHATS), tokenizer=tokenizer), expected)


def test_contents_in_parts_and_calls_of_tools(
    llama: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase
) -> None:
    """What a template does with them is its own affair."""
    tokenizer.chat_template = (
        "{% for m in messages %}[A]{% for part in m.content or [] %}{{ part.text }}{% endfor %}"
        "{% for call in m.tool_calls or [] %}{{ call.name }}{% endfor %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "ro"}, {"type": "text", "text": "ok"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "caw"}]}
    got = record(llama, [{"role": "user", "content": parts}, call], tokenizer=tokenizer)
    assert rows(got) == [ids_of("[A]rook[A]caw", tokenizer)]
    assert got.prompt_tokens.item() == 5


def test_the_embedded_models_chats(embedded: tuple) -> None:
    model, tokenizer = embedded
    chat = [
        {"role": "user", "content": "Name three birds."},
        {"role": "assistant", "content": "Rook, crow and starling."},
    ]
    got = record(model, chat, layers=[5])  # with the tokenizer in its folder
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    cut = text.index("Rook")
    assert got.text.item() == text
    words = got.token_text.to_numpy()[0]
    assert "".join(words[: got.prompt_tokens.item()]) == text[:cut]
    assert "".join(words[got.prompt_tokens.item() :]) == text[cut:]
    ids = torch.tensor(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
    assert got.token_id.to_numpy()[0].tolist() == ids.tolist()
    seen = []
    down = model.model.layers[5].mlp.down_proj
    handle = down.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    try:
        with torch.no_grad():
            model.model(ids[None])
    finally:
        handle.remove()
    r = relative(seen[0][0])
    k = r.shape[1] // 2
    prompt, new = (
        set(np.argsort(-(part**2).sum(0))[:k].tolist())
        for part in (r[: got.prompt_tokens.item()], r[got.prompt_tokens.item() :])
    )
    overlap = flocking.prompt_generation_overlap(got, density=0.5).item()
    np.testing.assert_allclose(overlap, len(prompt & new) / len(prompt | new), atol=2e-3)


REFUSED = {
    "a string among them": ([[ASK], "rook"], {}, TypeError, "text 1 is not a conversation"),
    "ids among them": ([[5, 6], [ASK]], {}, TypeError, "text 0 is not a conversation"),
    "nothing among them": ([[ASK], []], {}, TypeError, "text 1 is not a conversation"),
    "a string in one": ([ASK, "caws"], {}, TypeError, "message 1 of text 0 is no dict"),
    "a role that is none": ([{"role": 1, "content": "a"}], {}, TypeError, "message 0 of text 0"),
    "no content": ([ASK, {"role": "user"}], {}, ValueError, "message 1 of text 0 has no content"),
    "half a character": (
        [{"role": "user", "content": "a\ud800"}],
        {},
        ValueError,
        "message 0 of text 0 has a lone surrogate",
    ),
    "an answer to nothing": ([ANSWER], {}, ValueError, "text 0 is one message of the assistant's"),
    "two answers": ([ASK, ANSWER], {"max_new_tokens": 3}, ValueError, "out, or max_new_tokens"),
    "two more": ([ASK, ANSWER], {"continuation": "a"}, ValueError, "out, or continuation"),
    "a number": ([ASK, ANSWER], {"prompt_tokens": 3}, ValueError, "whose roles say where"),
    "another's names": ([{"from": "human", "value": "a"}], {}, TypeError, "is a chat message"),
    "one message": (ASK, {}, ValueError, "text is a chat message"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(
    case: str, tokenizer: tf.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_passes, "feedforwards", None)
    chat, options, problem, message = REFUSED[case]
    with pytest.raises(problem, match=message) as caught:
        record(helpers.proved("llama"), chat, tokenizer=tokenizer, **options)
    assert "\n" not in str(caught.value)


TEMPLATES = {
    "none": (None, "the tokenizer has no chat template"),
    "an error": (
        "{{ raise_exception('roles must alternate') }}",
        r"text 0: .* does not take this conversation \(roles must alternate\)",
    ),
    "a fault": ("{% for %}", "does not take this conversation"),
    "answers before": (
        "{% for m in messages %}{{ m.content }}{{ 'ab'[loop.length - 1] }}{% endfor %}",
        "writes the messages before .* otherwise .* and its text as continuation",
    ),
    "nothing of it": ("[A]{{ messages[0].content }}", "its prompt has no clear end"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_that_do_not_serve(case: str, tokenizer: tf.PreTrainedTokenizerBase) -> None:
    template, message = TEMPLATES[case]
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as caught:
        record(helpers.proved("llama"), [ASK, ANSWER], tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
