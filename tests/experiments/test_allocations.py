"""The experiment on densities by layer, compared with the public functions called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flocking
from flocking import analysis
from flocking.experiments import allocations
from flocking.experiments.allocations import ALLOCATIONS, DENSITIES, EXPERIMENTS


@pytest.fixture(scope="module")
def data(subject: tuple):
    return EXPERIMENTS["loss_by_allocation"](*subject, tokens=97, progress=False)


@pytest.fixture(scope="module")
def rows(subject: tuple) -> list[list[int]]:
    _, tokenizer, texts = subject
    return [tokenizer(text)["input_ids"][:97] for text in texts]


def excess(model, row: list[int], density: object) -> float:
    sizes = {"prompt_length": 65, "continuation_length": 32, "progress": False}
    pruned, full = (
        flocking.perplexity(each, [row], **sizes).log_likelihood.values[0, 1:].mean()
        for each in (flocking.griffin(model, density), model)
    )
    return full - pruned


def test_each_text_has_densities_from_the_others(subject: tuple, data, rows) -> None:
    model = subject[0]
    assert data.attrs["prompt"] == 65
    sizes = {"prompt_length": 65, "continuation_length": 8, "progress": False}
    for density in (0.3, 0.8):
        found = [
            flocking.allocate(model, rows[:n] + rows[n + 1 :], density, **sizes)
            for n in range(len(rows))
        ]
        here = data.sel(density=density, interval="estimate")
        np.testing.assert_allclose(here.share.sel(allocation="allocated"), np.mean(found, axis=0))
        allocated = [excess(model, row, own) for row, own in zip(rows, found, strict=True)]
        uniform = [excess(model, row, density) for row in rows]
        got = here.excess.sel(allocation="allocated").item()
        assert got == pytest.approx(np.mean(allocated), rel=1e-4)
        got = here.excess.sel(allocation="one for all").item()
        assert got == pytest.approx(np.mean(uniform), rel=1e-4)
        got = here.over_one.sel(allocation="allocated").item()
        assert got == pytest.approx(np.mean(allocated) - np.mean(uniform), abs=1e-7)


def test_allocations_have_the_same_total(data) -> None:
    shares = data.share.sel(interval="estimate")
    kept = [analysis.kept_count(density, 160) / 160 for density in DENSITIES]
    for name in ALLOCATIONS[1:]:
        np.testing.assert_allclose(shares.sel(allocation=name).mean("layer"), kept)
    uniform = shares.sel(allocation="one for all")
    np.testing.assert_allclose(uniform, np.repeat([DENSITIES], 2, axis=0).T)


def test_block_errors_are_those_of_outputs(subject: tuple, rows) -> None:
    """Against the outputs of the blocks themselves, whose neurons are zeroed by a bare hook."""
    model = subject[0]
    recording = flocking.record(model, rows, window=16, progress=False)
    prompts = flocking.statistic(recording, stop=65)
    got = allocations._block_errors(model, rows, 65, prompts, False)
    kept = flocking.select(prompts, 0.25)
    for layer, block in enumerate(flocking.feedforwards(model)):
        seen: list[torch.Tensor] = []
        hook = block.down.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))  # noqa: B023
        with torch.no_grad():
            model(torch.tensor([rows[1]]))
            hook.remove()
            z, whole = (each[0, 65:] for each in seen)
            pruned = block.down(z * torch.from_numpy(kept.values[1, layer]))
        expected = (whole - pruned).square().sum() / whole.square().sum()
        assert got[1, layer].sel(measured=0.25).item() == pytest.approx(expected.item(), rel=1e-4)
        assert got[1, layer].sel(measured=[0, 1]).values.tolist() == [1, 0]
