"""Whatever a public function is given in the place of a model, one sentence says what it wants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import build

import flocking

OF_MODELS = {
    name: getattr(flocking, name)
    for name in flocking.__all__
    if inspect.isroutine(getattr(flocking, name)) or name == "Decoder"
    if next(iter(inspect.signature(getattr(flocking, name)).parameters), "") == "model"
}
MORE = {
    "export": ({}, "out"),
    "score": ("a prompt", " and more"),
    "allocate": ("a text",),
    "perplexity": ("a text",),
    "record": ("a text",),
    "global_statistic": ("a text",),
    "mean_scores": ("a text",),
    "observe": (print,),
    "set_feedforwards": (lambda layer: None,),
    "Decoder": (8,),
}


def tokenizer() -> tf.PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))


def pipeline() -> object:
    return tf.TextGenerationPipeline(build("llama"), tokenizer())


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a name": (
        lambda: "my/model",
        r"is a str: load it first, with model, tokenizer = flocking\.load\('my/model'\)\.",
    ),
    "a path": (lambda: Path("my-model"), r"Path: load it first, .* = flocking\.load\('my-model'\)"),
    "none": (lambda: None, "is a NoneType: give a transformers model"),
    "a tokenizer": (tokenizer, "Backend: give the model before its tokenizer"),
    "what load gives": (
        lambda: (build("llama"), tokenizer()),
        r"is a tuple: give the model in it, as in `model, tokenizer = flocking\.load\(\)`",
    ),
    "a class": (lambda: tf.LlamaForCausalLM, r"class\): give .* LlamaForCausalLM\.from_pretrained"),
    "a module": (lambda: torch.nn.Linear(2, 2), "is a Linear: give a transformers model"),
    "a config": (lambda: tf.LlamaConfig(), "is a LlamaConfig: give a transformers model"),
    "parallel": (lambda: torch.nn.DataParallel(build("llama")), r"is in it, its \.module"),
    "a pipeline": (pipeline, r"TextGenerationPipeline: give .* that is in it, its \.model"),
    "a recording": (lambda: xr.Dataset(), "is a Dataset: give a transformers model"),
    "many": (lambda: [build("llama")], "is a list: give a transformers model"),
    "a holder": (lambda: SimpleNamespace(model="x"), "Namespace: give a transformers model"),
}


def called(name: str, model: object) -> None:
    options = {"prompt_length": 1, "continuation_length": 1} if name == "perplexity" else {}
    result = OF_MODELS[name](model, *MORE.get(name, ()), **options)
    with result:  # of what does nothing before it is entered
        pass


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_wrong_kind_of_model_is_refused(name: str) -> None:
    for make, match in WRONG.values():
        with pytest.raises(TypeError, match=match) as caught:
            called(name, make())
        assert "\n" not in str(caught.value)


def test_functions_of_models_are_found() -> None:
    assert {"griffin", "record", "check", "control", "Decoder", "score"} <= OF_MODELS.keys()


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_part_that_is_compiled_is_named(name: str) -> None:
    model = build("llama")
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp is wrapped by torch\.compile"):
        called(name, model)
