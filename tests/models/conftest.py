"""A folder with a tiny model's files, to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import ggufs
import platformdirs
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's GGUF file."""
    folder = tmp_path_factory.mktemp("made")
    return ggufs.write(folder / "birds.Q8_0.gguf", ggufs.tiny("llama"), "Q8_0")


@pytest.fixture
def file(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copy(made, tmp_path))
