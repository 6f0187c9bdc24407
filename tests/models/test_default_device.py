"""Nothing depends on the device or dtype that torch uses where none is named."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils._device import _device_constructors

import flocking
from flocking.pruning import graphs

IDS = helpers.random_ids(20, 20)
LATER = helpers.random_ids(5, seed=1)[0]


@contextmanager
def set_for_all() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def results(model: tf.PreTrainedModel) -> list[np.ndarray]:
    """What users get of a model and its twins."""
    ids = torch.tensor(IDS, device="cpu")
    options = {"window": 8, "ranks": True, "relative": True, "progress": False}
    causal = model.can_generate()
    recording = flocking.record(model, IDS, max_new_tokens=4 if causal else 0, **options)
    found = [
        recording.energy,
        recording["rank"],
        recording.relative,
        flocking.select(flocking.statistic(recording)),
    ]
    found.append(flocking.weight_magnitude(model))
    if causal:
        reference = flocking.global_statistic(model, IDS, progress=False)
        found.append(reference)
        found.append(flocking.score(model, IDS[0], LATER))
        lengths = {"prompt_length": 8, "continuation_length": 4}
        for method, scope in (
            ("topk", "sequence"),
            ("half-sampled", "shared"),
            ("static", "shared"),
        ):
            given = {"reference": reference} if method == "static" else {}
            twin = flocking.griffin(model, 0.5, method=method, scope=scope, **given)
            found.append(twin.generate(ids, max_new_tokens=4, do_sample=False))
        found.append(flocking.perplexity(twin, IDS, progress=False, **lengths).perplexity)
        decoder = flocking.Decoder(flocking.griffin(model, 0.5), max_length=40, batch_size=2)
        found.append(decoder.generate(ids, max_new_tokens=4))
    return [np.asarray(each) for each in found]


@functools.cache
def usual(name: str) -> list[np.ndarray]:
    return results(helpers.build(name))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("llama", set_for_all),
        ("llama", default_dtype),
        ("mixtral", lambda: torch.device("meta")),
        ("opt", lambda: torch.device("meta")),
        ("bert", lambda: torch.device("meta")),
    ],
)
def test_results_are_the_same(name: str, setting: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    expected = usual(name)
    model = helpers.build(name)
    with setting():
        got = results(model)
    for mine, due in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, due)


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    makers = {function.__name__ for function in _device_constructors()}
    package = Path(flocking.__file__).parent
    unnamed = [
        f"{path.relative_to(package)}:{node.lineno} {ast.unparse(node)}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{name}" for name in makers}
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert unnamed == []
