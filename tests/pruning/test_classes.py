"""A class that transformers does not know by the config: said, where another would be made."""

from __future__ import annotations

import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as tf
from helpers import build, tokens

import flocking
from flocking.pruning import classes


class Scaled(tf.LlamaForCausalLM):
    """Computes something else than its base."""

    def forward(self, *args: object, **kwargs: object) -> object:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


class Same(tf.LlamaForCausalLM):
    """Computes what its base does."""


def made(kind: type) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return kind(build("llama").config).eval()


def text_in(folder: Path) -> str:
    return huggingface_hub.ModelCard.load(folder / "README.md").text


def test_another_forward(tmp_path: Path) -> None:
    model, out = made(Scaled), tmp_path / "out"
    kept = flocking.select(flocking.weight_magnitude(model))
    with pytest.warns(UserWarning, match=r"read by Scaled alone.*make a LlamaForCausalLM of it"):
        done = flocking.export(model, kept, out)
    ids = tokens(9)
    right = Scaled.from_pretrained(out)(ids).logits
    automatic = tf.AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert not torch.allclose(right, automatic, rtol=0.1)
    assert done.only == "Scaled"
    assert "Scaled, not by AutoModelForCausalLM" in repr(done)
    for words in ("Only `Scaled` reads it right", "import Scaled", "Scaled.from_pretrained("):
        assert words in text_in(out), words


@pytest.mark.parametrize("local", [False, True])
def test_a_subclass_that_computes_the_same(local: bool, tmp_path: Path) -> None:
    class Local(tf.LlamaForCausalLM):
        pass

    model, out = made(Local if local else Same), tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = flocking.export(model, flocking.select(flocking.weight_magnitude(model)), out)
    assert done.only == ""
    assert "reads it right" not in text_in(out)
    where = "`Local` cannot be imported, since it was defined inside a function"
    assert (where in text_in(out)) == local
    assert ("import Local" in text_in(out)) is False


def test_classes_that_nobody_can_import() -> None:
    script = type("Mine", (), {"__module__": "__main__"})
    gone = type("Gone", (), {"__module__": __name__})
    assert "script or notebook" in classes.why_not_importable(script)
    assert "has no such class" in classes.why_not_importable(gone)
    for kind in (Scaled, tf.LlamaForCausalLM):
        assert classes.why_not_importable(kind) == ""
