"""Threads that share a model wait for each other, or are told; none gets another's numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import helpers
import pytest
import torch
import transformers as tf

import flocking

IDS = [torch.tensor(helpers.random_ids(40, seed=seed)) for seed in range(4)]


def elsewhere(function: Callable[[], object]) -> object:
    """What a function returns, or raises, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_recordings_of_several_threads_are_those_of_one() -> None:
    model = helpers.build("llama")
    expected = [flocking.record(model, ids, progress=False) for ids in IDS]
    fresh = helpers.build("llama").train()

    def recorded(number: int) -> bool:
        found = flocking.record(fresh, IDS[number % 4], progress=False)
        return found.drop_vars("text").equals(expected[number % 4].drop_vars("text"))

    with pytest.warns(UserWarning, match="training mode"), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(recorded, range(24)))
    assert all(module.training for module in fresh.modules())
    assert not helpers.hooks_of(fresh)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_passes_of_other_threads_are_not_observed(name: str) -> None:
    model = helpers.proved(name)
    seen: list[int] = []
    with flocking.observe(model, lambda block, z: seen.append(block.layer)):
        elsewhere(lambda: model(IDS[0]))
        assert seen == []
        model(IDS[0])
        assert seen == [0, 1]


def test_an_observation_of_another_thread_alone_says_so() -> None:
    model = helpers.proved("llama")
    with (
        pytest.raises(RuntimeError, match="only another thread ran them"),
        flocking.observe(model, lambda block, z: None),
    ):
        elsewhere(lambda: model(IDS[0]))


def test_another_thread_waits_until_a_model_is_no_longer_observed() -> None:
    model = helpers.proved("llama")
    with ThreadPoolExecutor(1) as pool:
        with flocking.observe(model, lambda block, z: None):
            waiting = pool.submit(flocking.record, model, IDS[0], progress=False)
            model(IDS[1])
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
        found = waiting.result(timeout=60)
    expected = flocking.record(model, IDS[0], progress=False)
    assert found.energy.equals(expected.energy)


class _Interrupting(tf.LogitsProcessor):
    """Calls a function once, in the middle of a generation."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.step = function, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.step == 3:
            self.function()
        return scores


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_a_twin_refuses_a_second_request_while_it_serves_one(scope: str) -> None:
    twin = flocking.griffin(helpers.proved("llama"), 0.5, scope=scope)
    asked = {"max_new_tokens": 8, "do_sample": False}
    alone = twin.generate(IDS[0], **asked)
    told: list[BaseException | None] = []
    requests = [
        lambda: twin.generate(IDS[1], **asked),
        lambda: flocking.score(twin, IDS[1][0].tolist(), [5, 6, 7]),
        lambda: twin(IDS[1]),
    ]

    def interrupt() -> None:
        for request in requests:
            with ThreadPoolExecutor(1) as pool:
                told.append(pool.submit(request).exception(timeout=60))

    found = twin.generate(IDS[0], **asked, logits_processor=[_Interrupting(interrupt)])
    assert torch.equal(found, alone)
    assert [type(problem) for problem in told] == [RuntimeError] * 3
    assert "busy in another thread" in str(told[0])


def test_a_selection_is_not_used_by_the_thread_that_made_another() -> None:
    twin = flocking.griffin(helpers.proved("llama"), 0.5)
    twin.generate(IDS[0], max_new_tokens=2)
    elsewhere(lambda: twin.generate(IDS[1], max_new_tokens=2))
    with pytest.raises(RuntimeError, match="neurons were selected in another thread"):
        twin(IDS[0])
    twin.generate(IDS[0], max_new_tokens=2)
    twin(IDS[0])


def test_models_of_two_threads_do_not_wait_for_each_other() -> None:
    first, second = helpers.proved("llama"), helpers.proved("gpt2")
    started = threading.Event()
    with flocking.observe(first, lambda block, z: None):
        elsewhere(lambda: (flocking.record(second, IDS[0], progress=False), started.set()))
        assert started.is_set()
        first(IDS[0])


def test_sums_that_are_not_those_of_the_tokens_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = flocking.Moments.update

    def twice(self: flocking.Moments, *args: object) -> object:
        real(self, *args)
        return real(self, *args)

    monkeypatch.setattr(flocking.Moments, "update", twice)
    with pytest.raises(RuntimeError, match="the energy of some windows is not their number of"):
        flocking.record(helpers.proved("llama"), IDS[0], progress=False)
