"""What a step is compiled from: written activations, and the attention that it runs with."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import build, random_ids
from torch import Tensor

import flocking
from flocking.pruning import decoding, graphs

PRODUCTS = (torch.nn.functional.linear, torch.addmm, torch.bmm)


def greedy(model: tf.PreTrainedModel, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    ("name", "scope", "count"),
    [
        ("llama", None, 3),
        ("gpt2", None, 3),
        ("opt", None, 3),
        ("phi3", None, 3),
        ("llama", "shared", 3),
        ("opt", "shared", 3),
        ("llama", "sequence", 3),
        ("opt", "sequence", 0),  # each sequence's bias is added apart, and hides the product
    ],
)
def test_what_enters_a_down_projection_is_written(
    name: str, scope: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a layer, and nothing else; the tokens stay the same."""
    compiled: list[torch.fx.GraphModule] = []

    def as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        assert options == {"config_patches": None}  # tuned on CUDA devices only
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", as_traced)
    model = build(name, num_hidden_layers=3)
    if scope is not None:
        model = flocking.griffin(model, 0.5, scope=scope)
    ids = torch.tensor(random_ids(12, 12))
    got = flocking.Decoder(model, 32, batch_size=2).generate(ids, max_new_tokens=8)
    assert torch.equal(got, greedy(model, ids))
    (graph,) = compiled
    written = [node for node in graph.graph.nodes if node.target is torch.as_strided]
    assert len(written) == count
    for node in written:
        z, shape, stride = node.args
        value = z.meta["example_value"]
        assert (shape, stride) == (tuple(value.shape), tuple(value.stride()))
        assert shape[-1] == (160 if scope is None else 80)  # z's width, and of nothing else here
        (reader,) = node.users
        assert reader.target in PRODUCTS


def test_eager_attention_gives_the_same_tokens_and_leaves_the_config(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA devices, where keys and values that heads share are read where they are."""
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    assert llama.config.num_key_value_heads < llama.config.num_attention_heads
    for model in (llama, flocking.griffin(llama, 0.5)):
        before = model.config._attn_implementation
        assert before == "sdpa"
        ids = torch.tensor(random_ids(12))
        expected = greedy(model, ids)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "faster_attention", lambda model, device: "eager")
            decoder = flocking.Decoder(model, 32)
        used: list[str] = []
        attention = model.model.layers[0].self_attn
        step = decoder._compiled._compiled

        def watched(
            owner: object, attention: Any = attention, step: Any = step, used: list[str] = used
        ) -> None:
            used.append(attention.config._attn_implementation)
            step(owner)

        monkeypatch.setattr(decoder._compiled, "_compiled", watched)
        assert torch.equal(decoder.generate(ids, max_new_tokens=8), expected)
        assert used == ["eager"] * 7
        assert model.config._attn_implementation == before
        assert torch.equal(greedy(model, ids), expected)


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cuda", {}, "eager"),
        ("cpu", {}, None),
        ("cuda", {"num_key_value_heads": 4}, None),
        ("cuda", {"_attn_implementation": "eager"}, None),
    ],
    ids=str,
)
def test_which_attention_is_preferred(device: str, changes: dict, expected: str | None) -> None:
    model = build("llama", **changes)
    assert decoding.faster_attention(model, torch.device(device)) == expected


def test_an_attention_that_fails_the_trial_is_not_used(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    monkeypatch.setattr(decoding, "faster_attention", lambda model, device: "nonsense")
    ids = torch.tensor(random_ids(12))
    decoder = flocking.Decoder(llama, 32)
    assert torch.equal(decoder.generate(ids, max_new_tokens=8), greedy(llama, ids))
    assert llama.config._attn_implementation == "sdpa"


def test_a_graph_is_captured_again_if_a_config_changes_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a model class of the user's own, on which a twin keeps other things each time."""
    monkeypatch.setattr(graphs, "_COMPILER", "eager")

    class Mine(tf.MistralForCausalLM):
        pass

    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model = Mine(config).eval()
    for subject in (model, flocking.griffin(model, 1.0)):
        config.sliding_window = 4
        decoder = flocking.Decoder(subject, 40)
        ids = torch.tensor(random_ids(12)) % 128
        decoder.generate(ids, max_new_tokens=8)
        forgotten: list[bool] = []
        forget = functools.partial(forgotten.append, True)
        monkeypatch.setattr(decoder._compiled, "forget_graph", forget)
        for seed in range(3):
            decoder.generate(torch.tensor(random_ids(12, seed=seed)) % 128, max_new_tokens=8)
        assert forgotten == []
        config.sliding_window = None
        got = decoder.generate(ids, max_new_tokens=8)
        assert forgotten == [True]
        assert torch.equal(got, greedy(model, ids))
