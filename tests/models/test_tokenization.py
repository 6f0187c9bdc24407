"""Doubts about texts: special tokens that they would get twice, names of files, odd characters."""

from __future__ import annotations

import warnings
from pathlib import Path

import helpers
import pytest
import transformers as tf
from helpers import letters, record

import flocking


@pytest.mark.parametrize(
    ("template", "text", "token"),
    [
        ("<s> $A", "<s>[A]ab", "<s>"),
        ("<s> $A", "<s>", "<s>"),
        ("<s> $A </s>", "<s>ab</s>", "<s>"),
        ("<s> $A </s>", "ab</s>", "</s>"),
        ("$A </s>", "ab</s>", "</s>"),
        ("[A] [B] $A", "[A][B]ab", "[A]"),
        ("<s> $A", "ab", None),
        ("<s> $A", "ab<s>ab", None),
        ("<s> $A", "[A]<s>ab", None),
        ("<s> $A", "ab</s>", None),
        ("$A", "<s>ab</s>", None),
        ("<s> $A </s>", "[A]ab", None),
    ],
)
def test_special_tokens_that_a_text_has_already(
    llama: tf.PreTrainedModel, template: str, text: str, token: str | None
) -> None:
    tokenizer = letters(template)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twice = record(llama, text, tokenizer=tokenizer)
    assert twice.token_id.values[0].tolist() == tokenizer(text)["input_ids"]
    assert len(caught) == (token is not None)
    if token is not None:
        message = str(caught[0].message)
        assert message.startswith(f"text 0 has the special token {token}, as from a chat template")
        assert "give tokenizer(text, add_special_tokens=False) instead" in message
        assert caught[0].filename == helpers.__file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            once = record(
                llama, tokenizer(text, add_special_tokens=False), tokenizer=tokenizer
            ).token_id.values[0]
        assert once.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_one_warning_for_all_texts_and_one_remedy(llama: tf.PreTrainedModel) -> None:
    tokenizer = letters("<s> $A")
    texts = ["ab", "<s>a", "<s>abc"]
    with pytest.warns(UserWarning, match=r"text 1 \(and 1 others\) has the special token <s>"):
        record(llama, texts, tokenizer=tokenizer)
    remedy = tokenizer(texts[1:], add_special_tokens=False)
    recording = record(llama, remedy, tokenizer=tokenizer)
    assert recording.token_id.values.tolist() == [[1, 10, -1, -1], [1, 10, 11, 12]]
    with pytest.warns(UserWarning, match="text 0 has the special token <s>"):
        flocking.score(llama, "<s>ab", "c", tokenizer=tokenizer)


def test_the_name_of_a_file_is_no_text(
    llama: tf.PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("abc")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    tokenizer = letters("$A")
    for name in ("notes.txt", str(tmp_path / "notes.txt")):
        with pytest.warns(
            UserWarning, match=r"text 1 is .*notes.txt', the name of a file"
        ) as found:
            recording = record(llama, ["abc", name], tokenizer=tokenizer)
        assert recording.text.values[1] == name
        (message,) = [str(each.message) for each in found]
        assert f"Path({name!r}).read_text(encoding='utf-8')" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("folder", "notes", "notes.txt\n", "~nobody/a", "a" * 300, "what is notes.txt"):
            record(llama, text[:250], tokenizer=tokenizer)


def test_characters_of_no_text(llama: tf.PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="text 0 has the character NUL at 1, as UTF-16"):
        record(llama, "a\0b\0", tokenizer=letters("$A"))


def test_max_tokens_is_the_beginning(llama: tf.PreTrainedModel) -> None:
    """What is read is what a shorter text would give, and the texts stay whole."""
    tokenizer = letters("<s> $A </s>")
    texts = ["abcdef", "ab"]
    recording = record(llama, texts, tokenizer=tokenizer, max_tokens=4, window=2)
    assert recording.token_id.values.tolist() == [[1, 10, 11, 12], [1, 10, 11, 2]]
    assert recording.text.values.tolist() == texts
    assert recording.attrs["max_tokens"] == 4
    ids = [tokenizer(text)["input_ids"][:4] for text in texts]
    helpers.assert_same(recording, record(llama, ids, window=2))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["tensor", "list"])
def test_padded_ids_without_their_mask_are_told(
    llama: tf.PreTrainedModel, side: str, form: str
) -> None:
    tokenizer = letters("<s> $A </s>")
    tokenizer.pad_token, tokenizer.padding_side = "</s>", side
    batch = tokenizer(["abcdef", "ab"], padding=True, return_tensors="pt")
    ids = batch["input_ids"] if form == "tensor" else batch["input_ids"].tolist()
    count = 5 if side == "right" else 4
    with pytest.warns(UserWarning, match=f"text 1 begins or ends with {count} padding tokens"):
        record(llama, ids, tokenizer=tokenizer)
    record(llama, batch, tokenizer=tokenizer)
    longer = tokenizer(["abcdef", "ab"], padding="max_length", max_length=16)["input_ids"]
    with pytest.warns(UserWarning, match=r"text 0 \(and 1 others\) begins or ends with"):
        record(llama, longer, tokenizer=tokenizer)
    record(llama, [each["input_ids"] for each in map(tokenizer, ["abcdef", "ab"])])
    record(llama, tokenizer(["abc", "def"])["input_ids"], tokenizer=tokenizer)  # each ends with it
    ends = [[5, 6, 2, 2], [7, 8, 2, 2]]
    record(llama, ends, tokenizer=tokenizer)  # and with two of them
    with pytest.warns(UserWarning, match=r"text 0 \(and 1 others\) begins or ends with 2 padding"):
        record(llama, [[5, 2, 2], [7, 8, 9], [1, 7, 8, 2, 2], [1, 7]], tokenizer=tokenizer)


def test_max_tokens_of_padded_ids_and_what_comes_with_them() -> None:
    model = helpers.proved("gpt2")
    text = {
        "input_ids": [[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]],
        "attention_mask": [[0, 0, 1, 1, 1, 1], [1] * 6],
        "token_type_ids": [[0, 0, 20, 21, 22, 23], [24] * 6],
    }
    got = record(model, text, max_tokens=3)
    assert got.token_id.values.tolist() == [[5, 6, 7], [9, 10, 11]]
    short = {"input_ids": [[5, 6, 7], [9, 10, 11]], "token_type_ids": [[20, 21, 22], [24] * 3]}
    helpers.assert_same(got, record(model, short))


def test_a_long_text_fits_with_max_tokens(llama: tf.PreTrainedModel) -> None:
    """As the error says; with new tokens, less of it fits."""
    (ids,) = helpers.random_ids(300)
    with pytest.raises(ValueError, match="split it, or read its beginning only: max_tokens=256"):
        record(llama, ids)
    assert record(llama, ids, max_tokens=256).sizes["token"] == 256
    message = "300 tokens and 8 new ones, 51 more .* max_tokens=249"
    with pytest.raises(ValueError, match=message):
        record(llama, ids, max_new_tokens=8)
    with pytest.raises(ValueError, match="256 tokens and 8 new ones, 7 more"):
        record(llama, ids, max_new_tokens=8, max_tokens=256)
    assert 249 <= record(llama, ids, max_new_tokens=8, max_tokens=249).sizes["token"] <= 256
    with pytest.raises(ValueError, match="max_tokens=256"):
        flocking.global_statistic(llama, [ids], progress=False)
    assert flocking.global_statistic(llama, [ids], max_tokens=9, progress=False).shape == (2, 160)
    for call in (
        lambda: flocking.score(llama, ids, [5]),
        lambda: flocking.perplexity(llama, [ids], prompt_length=200, continuation_length=99),
    ):
        with pytest.raises(ValueError, match=r"shorten it or split it\.$"):
            call()
    with pytest.raises(ValueError, match=r"300 new ones, .*: shorten it, and ask for fewer new"):
        record(llama, ids, max_new_tokens=300)  # no beginning would fit
    with pytest.raises(ValueError, match=r"1 token and 300 new ones, .*: ask for at most 256 "):
        record(llama, [5], max_new_tokens=300)
    record(llama, [5], max_new_tokens=256)
    with pytest.raises(ValueError, match="it, split it, ask for at most 7 new tokens, or read it"):
        record(llama, ids[:250], max_new_tokens=9)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, "8"])
def test_numbers_are_whole(llama: tf.PreTrainedModel, wrong: object) -> None:
    for name in ("window", "max_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}={wrong!r}: give a whole number from 1 up"):
            record(llama, [5], **{name: wrong})
    if wrong != 0:
        with pytest.raises(ValueError, match=f"max_new_tokens={wrong!r}: give a whole number from"):
            record(llama, [5], max_new_tokens=wrong)
