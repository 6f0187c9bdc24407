"""Fixtures: tiny models with random weights, and the embedded one."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["MPLBACKEND"] = "agg"  # nor for a screen

import hypothesis
import pytest
import torch
import transformers as tf
from helpers import ARCHITECTURES, build, proved

import flocking

# The same examples on every machine; `make fuzz` draws others.
hypothesis.settings.register_profile(
    "few", max_examples=20, derandomize=True, deadline=None, database=None
)
hypothesis.settings.register_profile("large", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("few")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU is skipped without one, and says so."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For results that are equal bit for bit: several threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(architecture: str) -> tf.PreTrainedModel:
    """Each architecture in turn; its blocks are known, so that no test waits for the proof."""
    return proved(architecture)


@pytest.fixture(params=[name for name in ARCHITECTURES if name != "bert"])
def generating(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    """Each architecture that generates, in turn; its blocks are known, as in `tiny`."""
    return proved(request.param)


@pytest.fixture
def llama() -> tf.PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="session")
def chromium() -> None:
    """Skips where selenium or Debian's chromium is not; `make browser` has both."""
    pytest.importorskip("selenium")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("there is no Chromium here")


@pytest.fixture(scope="session")
def embedded() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase]:
    """The embedded model; `make env` installs its weights."""
    return flocking.load()


@pytest.fixture(scope="session")
def shallow(
    embedded: tuple, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase]:
    """Four layers of the embedded model, in a folder, and its tokenizer: a fifth of the time."""
    model, tokenizer = embedded
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 4
    few = type(model)(config)
    few.load_state_dict(model.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("models") / "shallow"
    few.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return flocking.load(folder)
