"""The examples in docstrings of public names run, on a tiny model with a real tokenizer."""

from __future__ import annotations

import doctest
import inspect
import operator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import transformers as tf

import flocking

PARSER = doctest.DocTestParser()
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITHOUT: set[str] = set()  # public names without an example; this may only shrink


@pytest.fixture(scope="module")
def names(
    embedded: tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, object]:
    """What examples use without making it: `flocking`, `model` and `tokenizer`."""
    tokenizer = embedded[1]
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,  # room for any packaged passage
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny")
    tf.set_seed(42)  # not the seed of an example's control
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    return {"flocking": flocking, "model": model, "tokenizer": tokenizer}


PLOTS = [f"plot.{name}" for name in flocking.plot.__all__]
NAMES = [*flocking.__all__, *PLOTS]


def documented(name: str) -> str:
    return inspect.getdoc(operator.attrgetter(name)(flocking)) or ""


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WITHOUT])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of compilers about themselves
def test_example_runs(
    name: str, names: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flocking.pruning.graphs._COMPILER", "eager")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    test = PARSER.get_doctest(documented(name), dict(names), name, name, 0)
    assert test.examples, f"flocking.{name} has no example"
    problems: list[str] = []
    plt.figure()  # the current one, on which nothing is drawn yet
    doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=problems.append)
    plt.close("all")
    assert not problems, "".join(problems)


def test_names_without_an_example_are_listed() -> None:
    missing = {n for n in NAMES if not PARSER.get_examples(documented(n))}
    assert missing == WITHOUT
