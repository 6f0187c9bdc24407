"""Forms of text and tokenizers: those that are taken, and what is said of the others."""

from __future__ import annotations

import enum
import io
from collections.abc import Callable
from pathlib import Path

import datasets
import helpers
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import letters, record

import flocking
from flocking.pruning import graphs

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
ROWS = [{"text": "a"}, {"text": "b"}]


class Bird(str, enum.Enum):  # noqa: UP042 # the older way, whose str() is not the value
    ROOK = "rook"


@pytest.mark.parametrize(
    "text",
    [
        ["rook", "crow"],
        ("rook", "crow"),
        np.array(["rook", "crow"]),
        np.array(["rook", "crow"], dtype=object),
        pd.Series(["rook", "crow"], index=[7, 3]),
        pd.Series(["rook", "crow"], dtype="category"),
        pd.Index(["rook", "crow"]),
        xr.DataArray(["rook", "crow"]),
        datasets.Dataset.from_dict({"text": ["rook", "crow"]})["text"],
        (text for text in ("rook", "crow")),
        {"a": "rook", "b": "crow"}.values(),
        [np.str_("rook"), flocking.Passage("crow")],
        [Bird.ROOK, "crow"],
    ],
    ids=lambda text: type(text).__name__,
)
def test_every_form_of_strings(text: object) -> None:
    tokenizer = letters("$A")
    recording = record(helpers.proved("llama"), text, tokenizer=tokenizer)
    texts = recording.text.to_numpy()
    assert texts.tolist() == ["rook", "crow"]
    assert all(type(each) is str for each in texts)
    ids = [tokenizer("rook")["input_ids"], tokenizer("crow")["input_ids"]]
    assert recording.token_id.to_numpy().tolist() == ids


def test_spaces_around_a_text_are_kept() -> None:
    tokenizer = letters("$A")
    recording = record(helpers.proved("llama"), "  rook \n", tokenizer=tokenizer)
    assert recording.sizes["token"] == 8
    assert recording.text.item() == "  rook \n"
    assert recording.token_id.to_numpy()[0].tolist() == tokenizer("  rook \n")["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        [[5, 6, 7], [8, 9]],
        [np.array([5, 6, 7], np.uint8), np.array([8, 9], np.int32)],
        [torch.tensor([5, 6, 7], dtype=torch.uint8), (8, 9)],
        [[np.int64(5), np.int16(6), 7], range(8, 10)],
        np.array([[5, 6, 7], [8, 9]], dtype=object),
        pd.Series([[5, 6, 7], [8, 9]], index=[7, 3]),
        [pd.Series([5, 6, 7]), pd.Series([8, 9])],
        {"input_ids": pd.Series([[5, 6, 7], [8, 9]])},
        {
            "input_ids": [[5, 6, 7, 0], [8, 9, 0, 0]],
            "attention_mask": np.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]),
        },
        tf.BatchEncoding(
            {
                "input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]),
                "attention_mask": torch.tensor([[True] * 3, [False, True, True]]),
            }
        ),
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings("error")
def test_every_form_of_ids(text: object) -> None:
    ids = record(helpers.proved("llama"), text).token_id.to_numpy()
    assert ids.tolist() == [[5, 6, 7], [8, 9, -1]]


MASKED = np.ma.masked_array([[5, 6]], mask=[[False, True]])


@pytest.mark.parametrize(
    ("text", "problem", "message"),
    [
        (MESSAGES[0], ValueError, "text is a chat message"),
        ([{"from": "human", "value": "Hi"}], TypeError, "text 0 is a chat message"),
        ({"text": ["a"], "label": [0]}, ValueError, "(it has text, label): .*such as data['text']"),
        ({"idx": [0], "content": ["a"]}, ValueError, "such as data['content']"),
        ({}, ValueError, "text is a dict without 'input_ids' (it has nothing)"),
        (ROWS, TypeError, "text 0 is a dict (of text): give a list of its texts"),
        ([{"messages": MESSAGES, "id": 3}], TypeError, "such as [row['messages'] for row in rows]"),
        ([{"input_ids": [5]}], TypeError, "text 0 is a tokenizer's output: tokenize all texts at"),
        ({"input_ids": ["a"]}, TypeError, "'input_ids' are strings: give the strings alone"),
        (datasets.Dataset.from_list(ROWS), TypeError, "columns, such as dataset['text']"),
        (pd.DataFrame(ROWS), TypeError, "a table (of type DataFrame): give one of its columns"),
        (io.StringIO("a\nb"), TypeError, "text is an open file (of type StringIO): give its text"),
        ({"a", "b"}, TypeError, "text is of type set, without an order: give a list"),
        (Path("a.txt"), TypeError, "give what is in the file, path.read_text(encoding='utf-8')"),
        ([Path("a.txt")], TypeError, "text 0 is of type PosixPath"),
        (b"abc", TypeError, "text is of type bytes: decode it first"),
        (["a", b"abc"], TypeError, "text 1 is of type bytes: decode it first"),
        (bytearray(b"abc"), TypeError, "text is of type bytearray"),
        (memoryview(b"abc"), TypeError, "text is of type memoryview"),
        (np.array([b"abc"]), TypeError, "text 0 is of type bytes"),
        ([["a"]], TypeError, "text 0 is a list of strings: give one string for each text"),
        ([["a", "b"], ["c"]], TypeError, "text 0 is a list of strings"),
        (["a", None], TypeError, "text 1 is None, neither a string"),
        (pd.Series(["a", None]), TypeError, "neither a string among strings nor a sequence"),
        (["a", [5]], TypeError, "text 0 is 'a', neither a string among strings"),
        ([5, "a"], TypeError, "text 0 is neither a string nor a sequence of token ids"),
        ([5, [6]], TypeError, "text 0 is neither a string nor a sequence of token ids"),
        ([0.5, 1.5], TypeError, "text 0 is 0.5, neither"),
        ([[2**70]], TypeError, "text 0 is neither"),
        (np.array([2**64 - 1], np.uint64), ValueError, "token ids from -1"),
        ([True, False], TypeError, "whole-number token ids"),
        (torch.zeros(1, 2, 3, dtype=int), TypeError, "and 2 dimensions"),
        ([[[5, 6]]], TypeError, "and 2 dimensions"),
        (torch.tensor(5), TypeError, "text is of type Tensor"),
        (np.float32(1), TypeError, "text is of type float32"),
        (torch.tensor([[0.5]]), TypeError, "dtype torch.float32"),
        (np.zeros((1, 0), int), ValueError, "text 0 has no tokens"),
        (["a", "", "b"], ValueError, "text 1 is empty"),
        (None, TypeError, "text is of type NoneType"),
        (tf.PreTrainedTokenizerFast, TypeError, "text is of type type"),
        (torch.ones(1, 3).to_sparse(), TypeError, "text is a sparse tensor (torch.sparse_coo)"),
        ([torch.ones(3, dtype=int).to_sparse()], TypeError, "text 0 is a sparse tensor"),
        (torch.ones(3, dtype=int, device="meta"), TypeError, "on the meta device, without values"),
        (torch.ones(1, 3, dtype=torch.complex64), TypeError, "dtype torch.complex64"),
        (torch.ones(1, 3, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (MASKED, TypeError, "text is a masked array, whose mask would be lost"),
        ([MASKED[0], MASKED[0]], TypeError, "text 0 is a masked array"),
        (list(MASKED[0]), TypeError, "text is a masked array"),
        ({"input_ids": [[5, 6]], "attention_mask": MASKED}, TypeError, "attention_mask is a"),
        (np.array([[5, 6]], "M8[s]"), TypeError, "text is an array of dtype datetime64[s]"),
        ([np.array([5, 6], "m8[s]")], TypeError, "text 0 is an array of dtype timedelta64[s]"),
        (["a", "b\ud800c"], ValueError, "text 1 has a lone surrogate at character 1, half of a"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:20],
)  # fmt: skip
def test_what_is_no_text_gets_a_sentence(text: object, problem: type, message: str) -> None:
    """That says what to give instead, before the model is run."""
    with pytest.raises(problem) as caught:
        record(helpers.proved("llama"), text)
    sentence = str(caught.value)
    for part in message.split(".*"):
        assert part in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_what_is_advised_works() -> None:
    model, tokenizer = helpers.proved("llama"), letters("<s> $A")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    chat = tokenizer.apply_chat_template(MESSAGES, return_dict=True)
    one = record(model, chat, tokenizer=tokenizer)
    assert one.token_id.to_numpy()[0].tolist() == chat["input_ids"]
    for text in (MESSAGES, [MESSAGES, MESSAGES]):  # where chats are not read as such
        with pytest.raises(TypeError, match=r"apply the .*apply_chat_template\(messages, return_d"):
            flocking.perplexity(
                model, text, tokenizer=tokenizer, prompt_length=1, continuation_length=1
            )
    chats = tokenizer.apply_chat_template([MESSAGES, MESSAGES[:1]], return_dict=True)
    two = record(model, chats, tokenizer=tokenizer)
    shorter = chats["input_ids"][1]
    assert two.token_id.to_numpy()[1, : len(shorter)].tolist() == shorter
    text = "b\ud800c".encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert record(model, text, tokenizer=tokenizer).text.item() == "b\ufffdc"
    table = datasets.Dataset.from_list(ROWS)
    texts = record(model, table["text"], tokenizer=tokenizer).text
    assert texts.to_numpy().tolist() == ["a", "b"]


class Odd:
    """Something that is called, but decodes nothing."""

    def __call__(self, text: str) -> dict:
        return {"input_ids": [5]}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("gpt2", "tokenizer is 'gpt2': give a .*AutoTokenizer.from_pretrained('gpt2')"),
        (Odd(), "tokenizer is a Odd"),
        (tf.AutoTokenizer, "tokenizer is <class"),
        (tf.PreTrainedTokenizerFast, "tokenizer is <class"),
        (["gpt2"], "tokenizer is a list"),
        (True, "tokenizer is a bool"),
        (torch.nn.Linear(2, 2), "tokenizer is a Linear"),
        (0, "tokenizer is a int"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_tokenizer_gets_a_sentence(tokenizer: object, message: str) -> None:
    """Wherever one can be given, with strings and with ids."""
    model = helpers.proved("llama")
    lengths = {"prompt_length": 1, "continuation_length": 1}
    calls = [
        lambda: record(model, "a", tokenizer=tokenizer),
        lambda: record(model, [5], tokenizer=tokenizer),
        lambda: flocking.score(model, "a", "b", tokenizer=tokenizer),
        lambda: flocking.perplexity(model, "a", tokenizer=tokenizer, **lengths),
        lambda: flocking.global_statistic(model, "a", tokenizer=tokenizer),
        lambda: flocking.check(model, tokenizer),
    ]
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        for part in message.split(".*"):
            assert part in str(caught.value)


def test_the_tokenizer_of_a_processor() -> None:
    model, tokenizer = helpers.proved("llama"), letters("<s> $A")

    class Processor(tf.ProcessorMixin):
        def __init__(self) -> None:
            self.tokenizer = tokenizer

    mine = record(model, "rook", tokenizer=Processor())
    assert mine.equals(record(model, "rook", tokenizer=tokenizer))


@pytest.mark.filterwarnings("ignore:.*quantize|The PyTorch API of nested")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ids: ids.to_sparse(), "a sparse tensor"),
        (lambda ids: torch.nested.nested_tensor(list(ids)), "a nested tensor"),
        (lambda ids: torch.quantize_per_tensor(ids.float(), 1, 0, torch.quint8), "a quantised"),
        (lambda ids: ids > 50, "torch.bool"),
        (lambda ids: ids.to(torch.complex64), "torch.complex64"),
        (lambda ids: ids.to("meta"), "on the meta device"),
    ],
)
def test_tensors_without_whole_numbers_are_refused_everywhere(
    make: Callable[[torch.Tensor], torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    model, ids = helpers.proved("llama"), torch.tensor(helpers.random_ids(9))
    odd = make(ids)
    decoder = flocking.Decoder(model, max_length=16)
    for entry in (
        lambda: flocking.record(model, odd, progress=False),
        lambda: flocking.global_statistic(model, odd, progress=False),
        lambda: flocking.score(model, odd, ids),
        lambda: flocking.score(model, ids, odd),
        lambda: flocking.perplexity(
            model, odd, prompt_length=3, continuation_length=2, progress=False
        ),
        lambda: decoder.generate(odd, max_new_tokens=2),
    ):
        with pytest.raises(TypeError, match=message):
            entry()
