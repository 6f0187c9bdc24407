"""What ``record`` refuses, with one clear sentence."""

from __future__ import annotations

import helpers
import psutil
import pytest
import torch
import transformers as tf
from helpers import hooks_of, record

import flocking


@pytest.mark.parametrize(
    ("text", "kwargs", "problem", "message"),
    [
        ("", {}, ValueError, "text 0 is empty"),
        (["a", ""], {}, ValueError, "text 1 is empty"),
        ([], {}, ValueError, "text is empty"),
        ([[5], []], {}, ValueError, "text 1 has no tokens but padding"),
        (
            {"input_ids": [[5, 6]], "attention_mask": [[0, 0]]},
            {},
            ValueError,
            "no tokens but padding",
        ),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, {}, ValueError, "2 token ids and 1 in"),
        ({"ids": [5]}, {}, ValueError, "without 'input_ids'"),
        (7, {}, TypeError, "text is of type int"),
        (["a", [5]], {}, TypeError, "cannot be mixed"),
        ([[0.5, 1.5]], {}, TypeError, "whole-number token ids"),
        ([[5, 128]], {}, ValueError, "vocabulary ends at 127"),
        ([5], {"ranks": [3, 4]}, TypeError, r"ranks=\[3, 4\]: give True or False"),
        ([5], {"ranks": "no"}, TypeError, "ranks='no': give True or False"),
        ("a", {}, ValueError, "No tokenizer was found with the model"),
        ([5], {"window": 0}, ValueError, "window=0"),
        ([5], {"layers": [2]}, ValueError, r"layers=\[2\]: there are FF blocks in layers 0 to 1"),
        ([5], {"relative": [2]}, ValueError, r"relative=\[2\]: there are FF"),
        ([5], {"layers": 1}, TypeError, "layers=1: give a list"),
        ([5], {"layers": [0.7]}, TypeError, r"layers=\[0.7\]: give a list"),
        ([5], {"layers": [True, False]}, TypeError, r"layers=\[True, False\]: give a list"),
        ([5], {"layers": "1"}, TypeError, "layers='1': give a list"),
        ([5], {"layers": [-1]}, ValueError, r"layers=\[-1\]: there are FF blocks in layers 0"),
        ([5], {"relative": 1}, TypeError, "relative=1: give a list"),
        ([5], {"seed": 2**64}, ValueError, f"seed={2**64}: give a number below 2"),
        ([5], {"window": 2**70}, ValueError, "give a number below 2"),
        ([5], {"layers": [1], "relative": [0]}, ValueError, r"relative=\[0\]: there are FF"),
        ([5], {"window": 2.5}, ValueError, "window=2.5"),
        ([5], {"seed": None}, ValueError, "seed=None"),
        (b"abc", {}, TypeError, "text is of type bytes"),
        ([[True, False]], {}, TypeError, "whole-number token ids"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, {}, ValueError, "gaps in its"),
        ([5], {"batch_size": 0}, ValueError, "batch_size=0"),
        ([5], {"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ([[5] * 300], {}, ValueError, "text 0 has 300 tokens, 44 more than the model's context"),
        ([[5] * 250], {"max_new_tokens": 8}, ValueError, "250 tokens and 8 new ones, 1 more than"),
    ],
)
def test_bad_input_gets_one_clear_sentence(
    llama: tf.PreTrainedModel, text: object, kwargs: dict, problem: type, message: str
) -> None:
    with pytest.raises(problem, match=message) as caught:
        record(llama, text, **kwargs)
    assert "\n" not in str(caught.value)
    assert hooks_of(llama) == []


def test_not_finite_activations_are_named(llama: tf.PreTrainedModel) -> None:
    flocking.feedforwards(llama)

    def spoil(module: object, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] == 3:
            output[0, 2, 5] = torch.inf
        return output

    llama.model.layers[1].mlp.up_proj.register_forward_hook(spoil)
    before = hooks_of(llama)
    with pytest.raises(ValueError, match=r"layer 1 .* not finite, first at token 2 of text 0"):
        record(llama, [[5, 6, 7], [5, 6, 7, 8]])  # the longer text is read first
    assert hooks_of(llama) == before


def test_weights_on_the_meta_device_are_refused(llama: tf.PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="meta device"):
        record(llama.to("meta"), [5, 6])


def test_models_that_record_cannot_feed_are_refused() -> None:
    with pytest.raises(TypeError, match="model is a Linear"):
        record(torch.nn.Linear(3, 3), [5, 6])


def test_a_model_of_images_and_texts_names_what_it_lacks() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config={**sizes, "num_hidden_layers": 2, "vocab_size": 64},
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
    )
    model = tf.CLIPModel(config).eval()
    with pytest.raises(ValueError, match=r"CLIPModel has no table of tokens .*: give the part"):
        record(model, [5, 6])
    assert record(model.text_model, [5, 6]).sizes["layer"] == 2


def test_a_recording_larger_than_memory_is_refused(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, with the window that would fit."""
    free = type("Memory", (), {"total": 2**40, "available": 400_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    (ids,) = helpers.random_ids(200)
    with pytest.raises(MemoryError, match=r"would take 1\.0 MB .*: window=64 would fit"):
        record(llama, ids, window=1)
    assert record(llama, ids, window=64).sizes["window"] == 5
    free.available = 1000
    with pytest.raises(MemoryError, match="no window would fit"):
        record(llama, ids)
