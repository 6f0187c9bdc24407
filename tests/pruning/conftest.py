"""Models that tests of this room share, so that each is built and proved once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as tf
from helpers import ARCHITECTURES, build, hooks_of

import flocking


class Shared:
    """A model that no test may change, and its copies in other dtypes."""

    def __init__(self, name: str) -> None:
        self.model = build(name)
        self.before = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.configs = self._configs()
        self.copies: dict[torch.dtype, tf.PreTrainedModel] = {}

    def _configs(self) -> tuple[dict, dict]:
        return self.model.config.to_dict(), self.model.generation_config.to_dict()

    def converted(self, dtype: torch.dtype) -> tf.PreTrainedModel:
        """Such a copy, which no test may change either."""
        if dtype == self.model.dtype:
            return self.model
        if dtype not in self.copies:
            self.copies[dtype] = copy.deepcopy(self.model).to(dtype)
        return self.copies[dtype]

    def check(self) -> None:
        """Fail unless the model is as it was built."""
        assert not hooks_of(self.model)
        assert not any(module.training for module in self.model.modules())
        assert self._configs() == self.configs
        for key, value in self.model.state_dict().items():
            assert torch.equal(value, self.before[key]), key


@pytest.fixture(scope="session", params=[name for name in ARCHITECTURES if name != "bert"])
def shared(request: pytest.FixtureRequest) -> Shared:
    return Shared(request.param)


@pytest.fixture
def generating(shared: Shared) -> Iterator[tf.PreTrainedModel]:
    """Each architecture that generates, in turn; not to be changed."""
    yield shared.model
    shared.check()


@pytest.fixture
def generating_in(shared: Shared) -> Iterator[Callable[[torch.dtype], tf.PreTrainedModel]]:
    """The same in a dtype; not to be changed."""
    yield shared.converted
    shared.check()


@pytest.fixture
def pair(llama: tf.PreTrainedModel) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    """A model and its twin."""
    return llama, flocking.griffin(llama, 0.5)
