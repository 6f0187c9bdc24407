"""What several files use: a tiny model that reads the packaged passages."""

from __future__ import annotations

import helpers
import pytest

import flocking


@pytest.fixture(scope="package")
def subject() -> tuple:
    """Model, tokenizer and four passages; the context is long enough for them."""
    _, tokenizer = flocking.load()
    model = helpers.build("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    return model, tokenizer, flocking.passages()[:4]
