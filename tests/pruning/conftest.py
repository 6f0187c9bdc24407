"""What tests of this room share."""

from __future__ import annotations

import pytest
import transformers as tf

import flocking


@pytest.fixture
def pair(llama: tf.PreTrainedModel) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    """A model and its twin."""
    return llama, flocking.griffin(llama, 0.5)
