"""Densities from a budget: harm is what masked weights do, and greedy is the best choice."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import build, expected_selection, generate, hooks_of, proved, random_ids, tokens

import flocking
from flocking.analysis import kept_count
from flocking.models import tokenize
from flocking.pruning import layer_harms, spread

SIZES = {"prompt_length": 20, "continuation_length": 9}


def allocate(model: tf.PreTrainedModel, texts: object, *args: object, **more: object):
    return flocking.allocate(model, texts, *args, **SIZES | {"progress": False} | more)


def harms_of(model: tf.PreTrainedModel, texts: list[list[int]]) -> xr.DataArray:
    return layer_harms(model, tokenize(model, texts), **SIZES, progress=False)


def without(model: tf.PreTrainedModel, layer: int, kept: np.ndarray) -> tf.PreTrainedModel:
    """A copy whose down-projection of one layer has zeros for all but the kept neurons."""
    pruned = copy.deepcopy(model)
    block = flocking.feedforwards(pruned)[layer]
    mask = torch.from_numpy(kept).float()
    with torch.no_grad():
        weight = block.weight
        if block.kind == "experts":
            mask = mask.view(block.experts, -1)
            mask = mask[:, :, None] if weight.shape[1] == mask.shape[1] else mask[:, None, :]
        elif weight.shape[0] == len(mask):
            mask = mask[:, None]
        weight.mul_(mask)
    return pruned


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "mixtral", "gpt_oss"])
def test_harm_is_what_zeroed_weights_do(name: str) -> None:
    model = proved(name)
    (row,) = random_ids(29)
    ids = torch.tensor([row])
    measured = harms_of(model, [row])
    assert measured.dims == ("sequence", "layer", "measured")
    assert (measured.sel(measured=1) == 0).all()
    with torch.no_grad():
        past = model(ids[:, :20], use_cache=True).past_key_values
        full = model(ids[:, 20:28], past_key_values=copy.deepcopy(past)).logits
        p = full.double().softmax(-1)
        for density in (0.0, 0.25, 0.75):
            kept = np.zeros((2, flocking.feedforwards(model)[0].d_ff), bool)
            if density:
                kept = expected_selection(model, ids[:, :20], density)[0]
            for layer in (0, 1):
                pruned = without(model, layer, kept[layer])
                logits = pruned(ids[:, 20:28], past_key_values=copy.deepcopy(past)).logits
                q = logits.double().softmax(-1)
                expected = (p * (p.log() - q.log())).sum(-1).mean().item()
                got = measured.sel(layer=layer, measured=density).item()
                assert got == pytest.approx(expected, rel=1e-3, abs=1e-7)
                assert got > 1e-4


def test_total_is_that_of_one_density(generating: tf.PreTrainedModel) -> None:
    texts = random_ids(29, 33)
    blocks = flocking.feedforwards(generating)
    for density, floor in ((0.5, None), (0.33, 0.3), (0.8, 0.05)):
        found = allocate(generating, texts, density, floor=floor)
        each = [b.d_ff // b.experts for b in blocks]
        kept = [kept_count(share, d) for share, d in zip(found.values, each, strict=True)]
        assert sum(kept) == sum(kept_count(density, d) for d in each)
        assert (found.values * each == kept).all()
        assert min(kept) >= kept_count(floor or 0.9 * density, each[0])
        twin = flocking.griffin(generating, density=found)
        generate(twin, tokens(24), 2)
        selected = [len(twin.selection[b.layer]) for b in blocks]
        assert selected == [k * b.experts for k, b in zip(kept, blocks, strict=True)]


def test_says_what_it_is(llama: tf.PreTrainedModel) -> None:
    found = allocate(llama, random_ids(29))
    assert (found.name, found.dims, found.dtype) == ("density", ("layer",), np.float64)
    assert found.layer.values.tolist() == [0, 1]
    assert found.d_ff.values.tolist() == [160, 160]
    measured = harms_of(llama, random_ids(29))[0]
    for layer in (0, 1):
        at = np.interp(found[layer], measured.measured, np.sqrt(measured[layer])) ** 2
        assert found.harm[layer].item() == pytest.approx(at, rel=1e-12)


def test_all_neurons_are_all_ones(llama: tf.PreTrainedModel) -> None:
    found = allocate(llama, random_ids(29), 1)
    assert found.values.tolist() == [1, 1]
    assert found.harm.values.tolist() == [0, 0]


def curves(rows: list[list[float]], width: int) -> xr.DataArray:
    labels = {"d_ff": ("layer", [width] * len(rows)), "measured": [0, 0.25, 0.5, 0.75, 1]}
    return xr.DataArray(rows, labels, ("layer", "measured"), "harm")


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_best_of_all_combinations(seed: int) -> None:
    """Of convex curves: three layers of four neurons, each of which keeps 1 to 4."""
    random = np.random.default_rng(seed)
    rises = np.sort(random.exponential(size=(3, 4)) * random.exponential(size=(3, 1)), axis=1)
    rows = np.hstack([np.cumsum(rises, axis=1)[:, ::-1], np.zeros((3, 1))])
    for total in range(3, 13):
        found = spread(curves(rows.tolist(), 4), total / 12, 0.25)
        kept = np.rint(found.values * 4).astype(int)
        uniform = 3 * (total // 3)  # as many as one density for all would keep
        assert kept.sum() == uniform
        combinations = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == uniform]
        best = min(sum(rows[n, k] for n, k in enumerate(c)) for c in combinations)
        assert sum(rows[n, k] for n, k in enumerate(kept)) == pytest.approx(best)
        assert found.harm.sum().item() == pytest.approx(best)


def test_noise_in_a_curve_is_no_gain() -> None:
    """Where fewer neurons seem to be less harmful, they count as equally harmful."""
    found = spread(curves([[0.2, 0.3, 0.4, 0.2, 0], [9, 7, 5, 3, 0]], 100), 0.5, 0.1)
    assert found.values.tolist() == [0.1, 0.9]
    assert found.harm[0].item() == pytest.approx(0.4)


def test_layers_of_different_widths_share_one_total(llama: tf.PreTrainedModel) -> None:
    mlp = llama.model.layers[0].mlp
    for name, sizes in {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}.items():
        setattr(mlp, name, torch.nn.Linear(*sizes, bias=False))
    found = allocate(llama, random_ids(29), 0.4)
    kept = found.values * [96, 160]
    np.testing.assert_allclose(kept, np.rint(kept), atol=1e-9)
    assert kept.sum() == kept_count(0.4, 96) + kept_count(0.4, 160)
    flocking.griffin(llama, density=found)


def test_a_block_that_runs_twice_counts_once(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp = llama.model.layers[0].mlp
    found = allocate(llama, random_ids(29), 0.5)
    assert (found.layer.values.tolist(), found.values.tolist()) == ([0], [0.5])
    flocking.griffin(llama, density=found)
    (row,) = random_ids(29)
    ids = torch.tensor([row])
    with torch.no_grad():
        past = llama(ids[:, :20], use_cache=True).past_key_values
        full = llama(ids[:, 20:28], past_key_values=copy.deepcopy(past)).logits
        llama.model.layers[0].mlp.down_proj.weight.zero_()
        none = llama(ids[:, 20:28], past_key_values=copy.deepcopy(past)).logits
    p, q = (logits.double().log_softmax(-1) for logits in (full, none))
    fresh = build("llama")
    fresh.model.layers[1].mlp = fresh.model.layers[0].mlp
    got = harms_of(fresh, [row]).sel(layer=0, measured=0).item()
    assert got == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_texts_together_are_the_mean_of_texts_alone(llama: tf.PreTrainedModel) -> None:
    texts = random_ids(29, 40, 31)
    together = harms_of(llama, texts)
    for number, row in enumerate(texts):
        np.testing.assert_array_equal(together[number], harms_of(llama, [row])[0])
    found = allocate(llama, texts)
    xr.testing.assert_identical(found, spread(together.mean("sequence"), 0.5, 0.45))
    xr.testing.assert_identical(found, allocate(llama, [row[:29] for row in texts]))


def test_model_stays_as_it_was(generating: tf.PreTrainedModel) -> None:
    generating.train()
    before = {name: value.clone() for name, value in generating.state_dict().items()}
    hooks, state, config = hooks_of(generating), torch.get_rng_state(), str(generating.config)
    allocate(generating, random_ids(29))
    assert hooks_of(generating) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert str(generating.config) == config
    assert all(module.training for module in generating.modules())
    for name, value in generating.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("bad", [0, -0.5, 1.5, float("nan")])
def test_refuses_what_is_no_density(llama: tf.PreTrainedModel, bad: float) -> None:
    with pytest.raises(ValueError, match=r"^density=.*above 0 and at most 1\.$"):
        allocate(llama, random_ids(29), bad)
    with pytest.raises(ValueError, match=r"^floor=.*above 0 and at most density, 0\.5\.$"):
        allocate(llama, random_ids(29), 0.5, floor=bad)


@pytest.mark.parametrize("bad", ["0.5", [0.5, 0.5], None, True])
def test_refuses_what_is_no_number(llama: tf.PreTrainedModel, bad: object) -> None:
    with pytest.raises(TypeError, match=r"^density=.*: give one number"):
        allocate(llama, random_ids(29), bad)
    if bad is not None:
        with pytest.raises(TypeError, match=r"^floor=.*: give one number"):
            allocate(llama, random_ids(29), 0.5, floor=bad)


def test_refuses_what_leaves_a_layer_without_a_neuron(llama: tf.PreTrainedModel) -> None:
    texts = random_ids(29)
    with pytest.raises(ValueError, match=r"density=0\.001 keeps none of 160 neurons"):
        allocate(llama, texts, 0.001)
    with pytest.raises(ValueError, match=r"^floor=0\.7.*at most density, 0\.5"):
        allocate(llama, texts, 0.5, floor=0.7)
    with pytest.raises(ValueError, match=r"^floor: density=0\.001 keeps none of 160 neurons"):
        allocate(llama, texts, 0.5, floor=0.001)
    with pytest.raises(ValueError, match="keeps none of 40 neurons"):  # of each expert
        allocate(proved("mixtral"), texts, 0.02)
    # The default floor is never below one neuron, where the budget has one for each layer.
    assert (allocate(llama, texts, 1 / 160).values == 1 / 160).all()


def test_refuses_other_models_and_texts(llama: tf.PreTrainedModel) -> None:
    texts = random_ids(29)
    with pytest.raises(ValueError, match="twin already"):
        allocate(flocking.griffin(llama), texts)
    with pytest.raises(TypeError, match="model is a str: load it first"):
        allocate("llama", texts)
    with pytest.raises(ValueError, match=r"expected 29 tokens or more, got 28 in text 1: give"):
        allocate(llama, random_ids(29, 28))
    with pytest.raises(ValueError, match="tokenizer"):
        allocate(llama, ["birds of a feather"])
    with pytest.raises(ValueError, match="prompt_length=0"):
        allocate(llama, texts, prompt_length=0)
    with pytest.raises(ValueError, match="continuation_length=1"):
        allocate(llama, texts, continuation_length=1)
    with pytest.raises(ValueError, match="256"):  # the model's context
        allocate(llama, random_ids(300), prompt_length=250, continuation_length=20)
    with pytest.raises(ValueError, match="decoder-only"):
        allocate(proved("bert"), texts)


def test_refuses_an_output_that_is_not_finite(llama: tf.PreTrainedModel) -> None:
    flocking.feedforwards(llama)
    llama.lm_head.weight.data[5] = torch.inf
    with pytest.raises(ValueError, match=r"^the model's output is not finite in text 0"):
        allocate(llama, random_ids(29))


def test_refuses_an_output_that_is_not_finite_when_a_layer_is_pruned(
    llama: tf.PreTrainedModel,
) -> None:
    """Of the full model, it is."""
    llama.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output * torch.inf if (args[0] == 0).any() else None
    )
    why = r"^the model's output is not finite in text 0, with layer 1 pruned: no harm can be"
    with pytest.raises(ValueError, match=why):
        harms_of(llama, random_ids(29))


def test_a_model_that_is_trained_with_checkpointing() -> None:
    """No gradient is taken, so that blocks do not run again for one."""
    model = build("llama")
    texts = random_ids(24, seed=1)
    options = {"prompt_length": 16, "continuation_length": 8, "progress": False}
    expected = flocking.allocate(model, texts, **options)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()  # (as older versions call it)
    got = flocking.allocate(model.train(), texts, **options)
    np.testing.assert_allclose(got, expected)
