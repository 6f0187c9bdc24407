"""Layers that share a block, run several times, hold two blocks, or hold none."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
import transformers as tf
from torch import nn

import flocking
from flocking.feedforward import UnsupportedModelError


@pytest.fixture
def albert() -> tf.PreTrainedModel:
    """One layer, which runs three times."""
    config = tf.AlbertConfig(
        vocab_size=128,
        hidden_size=64,
        embedding_size=32,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    return tf.AlbertModel(config).eval()


def test_each_run_of_a_shared_layer_counts_as_a_layer(albert: tf.PreTrainedModel) -> None:
    """ALBERT runs one layer repeatedly: each run is recorded as a layer."""
    blocks = flocking.feedforwards(albert)
    assert [(b.layer, b.call, b.calls) for b in blocks] == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]
    assert len({block.down for block in blocks}) == 1
    texts = helpers.random_ids(6, 9)
    recording = flocking.record(albert, texts, progress=False)
    for row, ids in enumerate(texts):
        runs: list[torch.Tensor] = []
        handle = blocks[0].down.register_forward_pre_hook(
            lambda module, args, runs=runs: runs.append(args[0][0])
        )
        with torch.no_grad():
            albert(torch.tensor([ids]))
        handle.remove()
        for layer, z in enumerate(runs):
            expected = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            got = recording.energy.isel(sequence=row, layer=layer).sum("window")
            assert torch.allclose(torch.from_numpy(got.values), expected, atol=1e-5)
    only = flocking.record(albert, texts, layers=[1], progress=False)
    assert only.energy.isel(layer=0).equals(recording.energy.isel(layer=1))


def test_a_pass_that_fails_does_not_shift_the_runs_of_the_next(albert: tf.PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    seen: list[int] = []

    def callback(block: flocking.FeedForward, z: torch.Tensor) -> None:
        seen.append(block.layer)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with flocking.observe(albert, callback):
        with pytest.raises(KeyboardInterrupt):
            albert(ids)
        albert(ids)
    assert seen == [0, 1, 0, 1, 2]


class Twice(nn.Module):
    """Two FF blocks, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x + self.first(x))


def test_two_blocks_in_a_layer(llama: tf.PreTrainedModel) -> None:
    other = helpers.build("llama", intermediate_size=96)
    for layer, more in zip(llama.model.layers, other.model.layers, strict=True):
        layer.mlp = Twice(layer.mlp, more.mlp)
    blocks = flocking.feedforwards(llama)
    assert [(b.layer, b.path.removeprefix("model.layers."), b.d_ff) for b in blocks] == [
        (0, "0.mlp.first", 160),
        (1, "0.mlp.second", 96),
        (2, "1.mlp.first", 160),
        (3, "1.mlp.second", 96),
    ]
    texts = helpers.random_ids(7, 5)
    recording = flocking.record(llama, texts, progress=False)
    for row, ids in enumerate(texts):
        for layer, z in helpers.activations(llama, ids).items():
            expected = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            got = recording.energy.isel(sequence=row, layer=layer).sum("window")[: len(expected)]
            assert torch.allclose(torch.from_numpy(got.values), expected, atol=1e-5)
    assert flocking.check(llama).passed.all()


def test_layers_without_a_block_are_named(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[0].mlp = nn.Identity()
    with pytest.warns(UserWarning, match=r"1 layers hold no .* left out: model\.layers\.0"):
        blocks = flocking.feedforwards(llama)
    assert [block.layer for block in blocks] == [1]


def test_a_block_left_out_of_one_layer_only_is_an_error(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.layers\.1\.mlp\.down_proj could not be proved",
    ):
        flocking.feedforwards(llama)


class Strange(nn.Module):
    """A projection that is not an nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_a_layer_with_unknown_projections_is_an_error(llama: tf.PreTrainedModel) -> None:
    mlp = llama.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = map(
        Strange, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    with pytest.raises(UnsupportedModelError, match=r"could not be proved.*it is not a Linear"):
        flocking.feedforwards(llama)


def test_a_block_shared_by_two_layers_counts_for_both(llama: tf.PreTrainedModel) -> None:
    shared = copy.deepcopy(llama)
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    llama.model.layers[1].mlp.load_state_dict(llama.model.layers[0].mlp.state_dict())
    blocks = flocking.feedforwards(shared)
    assert [(b.layer, b.call, b.calls) for b in blocks] == [(0, 0, 2), (1, 1, 2)]
    one, other = (flocking.record(m, [[5, 6, 7]], progress=False) for m in (shared, llama))
    assert one.energy.equals(other.energy)
    # One selection for both runs, by the statistic of all.
    twin = flocking.griffin(shared)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    twin.generate(ids, max_new_tokens=2, pad_token_id=0)
    energy = flocking.record(shared, ids.tolist(), progress=False).energy.sum(("window", "layer"))
    expected = energy[0].argsort().values[-80:]
    for layer in (0, 1):
        assert sorted(expected.tolist()) == twin.selection[layer].tolist()
    assert twin.report().active_parameters < twin.report().parameters
    assert flocking.check(shared).passed.all()


def test_a_single_shared_projection_is_not_pruned(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.down_proj = llama.model.layers[0].mlp.down_proj
    assert flocking.record(llama, [[5, 6, 7]], progress=False).sizes["layer"] == 2
    with pytest.raises(ValueError, match="shares a single projection"):
        flocking.griffin(llama)


def test_added_layers_are_found(llama: tf.PreTrainedModel) -> None:
    assert len(flocking.feedforwards(llama)) == 2
    llama.model.layers.append(helpers.build("llama").model.layers[0])
    llama.config.num_hidden_layers = 3
    llama.config.layer_types = ["full_attention"] * 3
    assert [block.layer for block in flocking.feedforwards(llama)] == [0, 1, 2]
