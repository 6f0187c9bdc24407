"""Labels of a recording, and texts in every form that ``record`` takes."""

from __future__ import annotations

from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import record


def test_layout_of_windows(llama: tf.PreTrainedModel) -> None:
    recording = record(llama, helpers.random_ids(10, 6), window=4, max_new_tokens=6)
    assert recording.phase.values.tolist() == ["first", *["prompt"] * 3, *["generation"] * 2]
    assert recording.start.values.tolist() == [0, 1, 5, 9, 0, 4]
    assert recording.tokens.values.tolist()[0] == [1, 4, 4, 1, 4, 1]
    assert recording.tokens.values.tolist()[1][:4] == [1, 4, 1, 0]
    of_token = recording.token_window.values[0]
    assert of_token.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]


def test_labels(embedded: tuple) -> None:
    model, _ = embedded
    recording = record(model, ["Birds of a feather", "flock"], layers=[3, 28], window=2)
    assert dict(recording.sizes) == {
        "sequence": 2, "layer": 2, "window": 3, "neuron": 1536, "token": 4
    }  # fmt: skip
    assert recording.layer.values.tolist() == [3, 28]
    assert recording.module.values.tolist() == ["model.layers.3.mlp", "model.layers.28.mlp"]
    assert recording.token_text.values.tolist() == [
        ["Birds", " of", " a", " feather"],
        ["fl", "ock", "", ""],
    ]
    assert recording.text.values.tolist() == ["Birds of a feather", "flock"]
    assert recording.attrs["model"] == "SmolLM2-135M-Instruct"
    path = recording.attrs["model_path"]
    assert Path(path).expanduser() == Path(model.name_or_path)
    assert recording.attrs["special_tokens"] == "none"
    assert recording.attrs["window"] == 2


def test_special_tokens_are_as_the_tokenizer_adds_them(llama: tf.PreTrainedModel, bos) -> None:
    recording = record(llama, "ab", tokenizer=bos)
    assert recording.token_id.values.tolist() == [[1, 10, 11]]
    assert recording.attrs["special_tokens"] == "<s>"


@pytest.fixture
def bos() -> tf.PreTrainedTokenizerFast:
    """A tokenizer of single letters that adds a beginning-of-sequence token."""
    return helpers.letters("<s> $A")


LEFT_PADDED = {
    "input_ids": torch.tensor([[0, 5, 6, 7]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1]]),
}


@pytest.mark.parametrize(
    "text",
    [
        [5, 6, 7],
        [[5, 6, 7]],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]]),
        np.array([5, 6, 7]),
        [torch.tensor([5, 6, 7])],
        {"input_ids": [5, 6, 7]},
        {"input_ids": [[5, 6, 7, 0]], "attention_mask": [[1, 1, 1, 0]]},
        tf.BatchEncoding(LEFT_PADDED),
    ],
    ids=lambda text: type(text).__name__,
)
def test_every_form_of_token_ids(llama: tf.PreTrainedModel, text: object) -> None:
    assert record(llama, text).token_id.values.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("window", [4, None])
def test_zarr_round_trip(llama: tf.PreTrainedModel, tmp_path, window: int | None) -> None:
    recording = record(
        llama, helpers.random_ids(9, 7), window=window, relative=[1], ranks=True, max_new_tokens=4
    )
    recording = recording.assign_coords(text=("sequence", ["naïve \n", "日本"]))
    recording.to_zarr(tmp_path / "r.zarr", zarr_format=2)
    with xr.open_zarr(tmp_path / "r.zarr") as restored:
        xr.testing.assert_identical(restored.load(), recording)
        numbers = [v for v in recording.variables if recording[v].dtype.kind in "if"]
        assert all(restored[v].dtype == recording[v].dtype for v in numbers)
