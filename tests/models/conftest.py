"""A folder with a tiny model's files, to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers as tf
from helpers import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel


@pytest.fixture(scope="package")
def tokenizer() -> tf.PreTrainedTokenizerBase:
    words = Tokenizer(WordLevel({"birds": 0, "flock": 1}, unk_token="birds"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture(scope="package")
def whole(tokenizer: tf.PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))
