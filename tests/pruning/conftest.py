"""What tests of this room share."""

from __future__ import annotations

import pytest
import transformers as tf
from helpers import exact

import flocking


@pytest.fixture
def pair(llama: tf.PreTrainedModel) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    """A model and its twin."""
    return llama, flocking.griffin(llama, 0.5)


@pytest.fixture(scope="module", params=["llama", "mistral", "opt"])
def some(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    """Plain, with sliding windows of 16, and with learned positions and biases."""
    return exact(request.param)
