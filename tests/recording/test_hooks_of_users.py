"""Hooks that look at more than one token see each text as it is alone."""

from __future__ import annotations

from collections.abc import Callable

import helpers
import pytest
import torch
import transformers as tf

import flocking
from flocking.models import capabilities


def centred(module: torch.nn.Module, args: tuple) -> tuple:
    return (args[0] - args[0].mean(dim=1, keepdim=True), *args[1:])


def last_moved(module: torch.nn.Module, args: tuple) -> tuple:
    moved = args[0].clone()
    moved[:, -1] += 1
    return (moved, *args[1:])


def of_batch(module: torch.nn.Module, args: tuple) -> tuple:
    return (args[0] - args[0].mean(dim=0, keepdim=True) / 2, *args[1:])


@pytest.mark.parametrize("hook", [centred, last_moved, of_batch])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_batch_gives_what_its_texts_give_alone(
    name: str, hook: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 8)
    model = helpers.proved(name)
    layers = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    layers[1].register_forward_pre_hook(hook)
    texts = helpers.random_ids(20, 9, 20)
    together = flocking.record(model, texts, progress=False)
    for row, text in enumerate(texts):
        for layer, z in helpers.activations(model, text).items():
            expected = torch.linalg.vector_norm(z, dim=-1)
            got = together.norm.sel(layer=layer).values[row, : len(text)]
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_kwargs", [True, False])
def test_a_pre_hook_of_the_whole_model_is_refused(
    llama: tf.PreTrainedModel, with_kwargs: bool
) -> None:
    llama.register_forward_pre_hook(lambda *args: None, with_kwargs=with_kwargs)
    with pytest.raises(ValueError, match=r"pre-hook itself.*on model\.base_model"):
        flocking.record(llama, helpers.random_ids(9), progress=False)


def bart() -> tf.PreTrainedModel:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}
    config = tf.BartConfig(vocab_size=128, d_model=64, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    return tf.BartForCausalLM(config).eval()


SIZES = {"ffn_dim": 96, "layers": 2, "attention_heads": 4}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "bart"])
def test_hooks_fire_where_they_do_with_the_head(name: str) -> None:
    """OPT and BART go around their base model, whose own hooks then never fire."""
    model = bart() if name == "bart" else helpers.proved(name)
    ids = helpers.random_ids(12)
    before = flocking.record(model, ids, relative=True, progress=False)
    paths = [path for path, module in model.base_model.named_modules(prefix="base")]
    calls: list[str] = []
    for path, module in zip(paths, model.base_model.modules(), strict=True):
        module.register_forward_pre_hook(lambda m, args, path=path: calls.append(path))
        module.register_forward_hook(lambda m, args, output, path=path: calls.append(path))
    with torch.no_grad():
        model(torch.tensor(ids))
    expected, calls[:] = calls.copy(), []
    recording = flocking.record(model, ids, relative=True, progress=False)
    assert calls == expected
    assert ("base" in calls) == (name not in ("opt", "bart"))
    assert recording.relative.equals(before.relative)
    if name not in ("bart", "mixtral"):
        calls.clear()
        model.generate(torch.tensor(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        generated, calls[:] = calls.copy(), []
        for module in model.base_model.modules():  # where the twin refuses hooks
            if not list(module.children()):
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        generated = [path for path in generated if list(module_at(model, path).children())]
        twin = flocking.griffin(model, 1.0)
        twin.generate(torch.tensor(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert calls == generated


def module_at(model: tf.PreTrainedModel, path: str) -> torch.nn.Module:
    return model.base_model.get_submodule(path.removeprefix("base").removeprefix("."))
