"""What a trial finds out does not depend on torch's settings at the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import helpers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flocking
from flocking.models import traits


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        assert torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)


@contextmanager
def lower_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")


@contextmanager
def hooks_on_all_modules() -> Iterator[None]:
    def twice(module: torch.nn.Module, args: tuple, output: object) -> object:
        return 2 * output if isinstance(module, torch.nn.Linear) else output

    handle = torch.nn.modules.module.register_module_forward_hook(twice)
    try:
        yield
        linear = torch.nn.Linear(1, 1)
        assert torch.equal(linear(torch.ones(1)), 2 * (linear.weight[0] + linear.bias))
    finally:
        handle.remove()


MOMENTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "hooks on all modules": hooks_on_all_modules,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "one attention kernel": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
    "lower precision": lower_precision,
}


@pytest.mark.parametrize("moment", list(MOMENTS.values()), ids=list(MOMENTS))
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "opt"])
def test_findings_are_those_of_a_usual_moment(
    name: str, moment: Callable[[], AbstractContextManager]
) -> None:
    expected = helpers.proved(name)
    model = helpers.build(name)
    with moment():
        found = [(b.path, b.d_ff, b.prunable, b.error) for b in flocking.feedforwards(model)]
        assert traits(model) == traits(expected)
        twin = flocking.griffin(model, 0.5)
    assert found == [(b.path, b.d_ff, b.prunable, b.error) for b in flocking.feedforwards(expected)]
    ids = torch.tensor(helpers.random_ids(20))
    reference = flocking.griffin(expected, 0.5)
    for pruned in (twin, reference):
        pruned.generate(ids, max_new_tokens=3, do_sample=False)
    for layer, kept in reference.selection.items():
        assert torch.equal(twin.selection[layer], kept)


def test_a_recording_under_autocast_leaves_nothing_behind() -> None:
    model = helpers.build("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flocking.record(model, helpers.random_ids(20, 9), batch_size=2, progress=False)
    flocking.griffin(model).generate(torch.tensor(helpers.random_ids(9)), max_new_tokens=2)
