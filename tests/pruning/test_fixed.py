"""Selections for a model that is pruned for good."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import build, random_ids
from scipy.stats import rankdata

import flocking
from flocking.pruning import fixed
from flocking.pruning.chosen import layers_of, masks_of
from flocking.pruning.fixed import fixed_selection, rounded_densities

TEXTS = random_ids(60, 40, 50)


def test_widths_are_multiples_rounded_down() -> None:
    blocks = flocking.feedforwards(build("llama"))  # of 160 neurons
    for density, multiple, kept in ((0.5, 1, 80), (0.5, 32, 64), (0.99, 32, 128), (1.0, 32, 160)):
        shares = rounded_densities(blocks, density, multiple)
        assert [round(share * 160, 9) for share in shares] == [kept, kept]
    with pytest.raises(ValueError, match=r"keeps 16 of 160 neurons.*give 0.2 or more"):
        rounded_densities(blocks, 0.1, 32)
    with pytest.raises(ValueError, match=r"multiples of 161 where there are 160 neurons"):
        rounded_densities(blocks, 0.5, 161)
    with pytest.raises(ValueError, match=r"density=1\.5"):
        rounded_densities(blocks, 1.5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_methods_against_their_definitions(name: str) -> None:
    model = build(name)
    blocks = flocking.feedforwards(model)
    local = flocking.global_statistic(model, TEXTS, progress=False)
    found = fixed_selection(model, None, "static", TEXTS, 0.25)
    xr.testing.assert_identical(found.drop_attrs(), flocking.select(local, 0.25).drop_attrs())

    told = fixed_selection(model, None, "static", TEXTS, 0.25, sources=2).made_from
    assert "of 3 pieces of 2 texts, 150 tokens" in told

    own = flocking.global_statistic(model, seed=3, progress=False)
    found = fixed_selection(model, None, "global-local", TEXTS, 0.25, seed=3)
    for row, block in enumerate(blocks):
        size = block.d_ff // block.experts
        for start in range(0, block.d_ff, size):
            part = slice(start, start + size)
            ranks = sum(rankdata(values[row, part]) for values in (local.values, own.values))
            kept = found.values[row, part]
            assert kept.sum() == size // 4
            assert ranks[kept].min() >= ranks[~kept].max()
    assert found.made_from.startswith("mean of ranks by two statistics: static statistic")

    found = fixed_selection(model, None, "magnitude", None, 0.25)
    expected = flocking.select(flocking.weight_magnitude(model), 0.25)
    np.testing.assert_array_equal(found, expected)


def test_without_texts_the_model_writes_them() -> None:
    model = build("llama")
    own = flocking.global_statistic(model, seed=1, progress=False)
    found = fixed_selection(model, None, "static", None, 0.5, multiple=32, seed=1)
    np.testing.assert_array_equal(found, flocking.select(own, 0.4))
    assert (found.sum("neuron") == 64).all()


def test_a_model_that_writes_nothing_says_so_before_texts_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    statistic = fixed.global_statistic

    def without_texts(model: object, texts: object = None, **options: object) -> object:
        assert texts is None
        return statistic(model, texts, **options)

    monkeypatch.setattr(fixed, "global_statistic", without_texts)
    with pytest.raises(ValueError, match="names no token that opens a text"):
        fixed_selection(model, None, "global-local", TEXTS)


def test_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from static, global-local, magnitude"):
        fixed_selection(build("llama"), None, "topk", TEXTS)


@pytest.mark.parametrize("method", ["static", "global-local"])
def test_experts_that_no_text_reaches_are_pruned_by_their_weights(method: str) -> None:
    """As by a twin whose prompt does not reach them; and how many these are is said."""
    model = build("mixtral")
    for layer in model.model.layers:  # all tokens to the last two of the experts
        gate = layer.mlp.gate.weight
        gate.data[:-2] = 0.0
        gate.data[-2:] = 10 * gate.data[-2:].abs()
        # (Where states are positive, these two always win.)
        layer.mlp.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    block = flocking.feedforwards(model)[0]
    kept = fixed_selection(model, None, method, TEXTS, 0.25, seed=3)
    by_weights = flocking.select(flocking.weight_magnitude(model), 0.25)
    d = block.d_ff // block.experts
    unreached = slice(0, (block.experts - 2) * d)
    assert unreached.stop > 0
    np.testing.assert_array_equal(kept[:, unreached], by_weights[:, unreached])
    assert not (kept[:, unreached.stop :].values == by_weights[:, unreached.stop :].values).all()
    count = (block.experts - 2) * len(kept)
    assert f"weights in {count} experts that no token was routed to" in kept.made_from

    twin = flocking.griffin(model, 0.25)
    twin.generate(torch.tensor(TEXTS[:1]), max_new_tokens=1, do_sample=False)
    assert twin.report().unreached_experts == count
    if method == "static":
        ours = twin.selection[0].numpy()
        assert set(ours[ours < unreached.stop]) == set(np.flatnonzero(kept[0, unreached]))


@pytest.mark.parametrize("method", ["static", "global-local"])
def test_runs_of_one_block_keep_the_same_neurons(method: str) -> None:
    """A block that two layers share is cut once: its statistic is over both runs."""
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    kept = fixed_selection(model, None, method, TEXTS, 0.25, seed=3)
    assert (kept[0] == kept[1]).all()
    assert kept[0].sum() == 40
    if method == "static":
        reference = flocking.global_statistic(model, TEXTS, progress=False)
        twin = flocking.griffin(model, 0.25, method="static", reference=reference)
        twin.generate(torch.tensor(TEXTS[:1]), max_new_tokens=1, do_sample=False)
        assert np.flatnonzero(kept[0]).tolist() == twin.selection[0].tolist()
    masks_of(kept, layers_of(flocking.feedforwards(model)))  # as an export asks for them
