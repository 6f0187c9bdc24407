"""An experiment on densities by layer: whether allocated ones lose less than one for all.

It is called as those of :mod:`flocking.experiments.activations`. What each layer keeps is decided
on the other texts, and scored on the one that is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import pruning
from flocking.analysis import bootstrap, select, statistic
from flocking.experiments.common import dimension, finished, said, same_length, source_of
from flocking.experiments.twins import each_text, losses_of
from flocking.feedforward import FeedForward, dense, observe
from flocking.models import forward, tokenize, undisturbed
from flocking.recording import record

DENSITIES = [0.3, 0.5, 0.8]
ALLOCATIONS = [
    "one for all",
    "allocated",
    "first layer",
    "lower floor",
    "by block error",
    "shuffled",
]
_WINDOW = 16


def loss_by_allocation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 385,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Loss under GRIFFIN with one density for all layers, and with allocated ones, by density.

    Parameters are those of :func:`flocking.experiments.losses.loss_by_prompt`; the first two
    thirds of `tokens` are the prompt, and harms are measured on a quarter of the rest. `seed` is
    that of the shuffled densities.

    Returns
    -------
    xarray.Dataset
        ``excess`` (interval, allocation, density), the loss above the full model's, in nats a
        token, without the first token after the prompt, which is computed in full;
        ``over_one`` (interval, allocation, density), the differences from one density for all, on
        the same texts; ``share`` (interval, allocation, density, layer), the densities. The
        allocations: "allocated" as :func:`flocking.allocate` does; "first layer", as if the first
        layer alone mattered; "lower floor", as allocated, but with a floor of half of the
        density; "by block error", by the relative squared error of each block's output instead of
        the model's divergence; "shuffled", the allocated densities in random order, the chance
        level.

    Raises
    ------
    ValueError
        If there are fewer than two texts, they are too short, or the model has mixtures of experts.
    """
    pruning.require_prunable(model)
    _refuse_mixtures(model)
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW, least=1 + 3 * _WINDOW)
    prompt = 1 + (len(ids[0]) - 1) * 2 // (3 * _WINDOW) * _WINDOW
    recording = record(model, ids, tokenizer=tokenizer, window=_WINDOW, progress=progress)
    statistics = statistic(recording, stop=prompt)
    sizes = {"prompt_length": prompt, "continuation_length": (len(ids[0]) - prompt) // 4}
    harms = {
        "allocated": pruning.layer_harms(model, tokenize(model, ids), **sizes, progress=progress),
        "by block error": _block_errors(model, ids, prompt, statistics, progress),
    }
    harms["first layer"] = _first_alone(harms["allocated"])
    random = np.random.default_rng(seed)

    def measure(number: int) -> xr.Dataset:
        others = np.arange(len(ids)) != number
        means = {name: each.isel(sequence=others).mean("sequence") for name, each in harms.items()}
        parts = [_scored(model, ids[number], prompt, means, d, random) for d in DENSITIES]
        return xr.concat(parts, dimension("density", DENSITIES))

    values = each_text(measure, names, progress)
    data = bootstrap(
        values.assign(over_one=values.excess - values.excess.isel(allocation=0, drop=True))
    )
    assert isinstance(data, xr.Dataset)
    data = data.transpose("interval", "allocation", "density", "layer")
    for name, about in _ABOUT.items():
        data[name].attrs = about
    source = source_of(recording)
    caption = _caption(data, source["model"], len(ids), prompt, len(ids[0]) - prompt)
    return finished(data, source, names, ids, seed, caption, prompt=prompt)


_ABOUT = {
    "excess": {"long_name": "loss above the full model's", "units": "nat"},
    "over_one": {"long_name": "loss above that with one density for all", "units": "nat"},
    "share": {"long_name": "density of a layer", "units": "1"},
}


def _scored(
    model: PreTrainedModel,
    ids: list[int],
    prompt: int,
    harms: dict[str, xr.DataArray],
    density: float,
    random: np.random.Generator,
) -> xr.Dataset:
    """Loss above the full model's, and densities by layer, of one text under each allocation."""
    found = {name: pruning.spread(each, density) for name, each in harms.items()}
    allocated = found["allocated"]
    found["lower floor"] = pruning.spread(harms["allocated"], density, density / 2)
    found["one for all"] = xr.full_like(allocated, density)
    found["shuffled"] = allocated.copy(data=random.permutation(allocated.values))
    twins = {name: {"density": found[name].values} for name in ALLOCATIONS}
    losses = losses_of(model, twins, [ids], prompt)[:, 0].isel(distance=slice(1, None))
    mean = losses.mean("distance")
    excess = (mean.sel(selection=ALLOCATIONS) - mean.sel(selection="full", drop=True)).rename(
        selection="allocation"
    )
    shares = [found[name].reset_coords(drop=True) for name in ALLOCATIONS]
    return xr.Dataset(
        {"excess": excess, "share": xr.concat(shares, dimension("allocation", ALLOCATIONS))}
    )


def _refuse_mixtures(model: PreTrainedModel) -> None:
    """The outputs of a mixture's experts are weighted by its router, which is not recorded."""
    for block in pruning.first_runs(model):
        if block.kind == "experts":
            raise ValueError(
                f"layer {block.layer} is a mixture of experts, whose output's error this "
                "experiment does not know: give a dense model, or leave this figure out."
            )


def _block_errors(
    model: PreTrainedModel,
    ids: list[list[int]],
    prompt: int,
    statistics: xr.DataArray,
    progress: bool,
) -> xr.DataArray:
    """Squared error of each FF block's output after a prompt, relative to the output's square.

    From one pass over each text, with what `statistics` of the prompts, (sequence, layer,
    neuron), select; otherwise as :func:`flocking.pruning.layer_harms`. Biases are left out.
    """
    blocks = pruning.first_runs(model)
    rows = {block.layer: row for row, block in enumerate(blocks)}
    kept = select(statistics, densities=pruning.MEASURED[1:])
    errors = xr.zeros_like(statistics.sel(layer=list(rows)).isel(neuron=0, drop=True), float)
    errors = errors.expand_dims(measured=[*pruning.MEASURED, 1.0], axis=-1).copy()

    def look(number: int, block: FeedForward, z: Tensor) -> None:
        if block.layer not in rows:
            return
        masks = kept.sel(layer=block.layer).isel(sequence=number).values[:, : block.d_ff]
        removed = torch.from_numpy(~np.vstack([np.zeros_like(masks[:1]), masks])).to(z)
        later = z.reshape(-1, block.d_ff)[prompt:]
        weight = dense(block.down).to(z)
        squares = ((later * removed[:, None]) @ weight.T).double().square().sum(dim=(1, 2))
        errors[number, rows[block.layer], :-1] = (squares / squares[0]).cpu().numpy()

    for number, row in enumerate(tqdm(ids, desc="measuring", unit="text", disable=not progress)):
        with undisturbed(model, seed=0), observe(model, partial(look, number)):
            tokens = torch.tensor([row], device="cpu")
            forward(model, tokens, torch.ones_like(tokens))
    return errors


def _first_alone(harms: xr.DataArray) -> xr.DataArray:
    """Harms that only the first layer's neurons do; the others share what it leaves evenly."""
    weight = xr.DataArray(np.where(np.arange(harms.sizes["layer"]) == 0, 1e6, 1.0), dims="layer")
    return xr.zeros_like(harms) + weight * (1 - harms.measured) ** 2


def _caption(data: xr.Dataset, name: str, texts: int, prompt: int, scored: int) -> str:
    def differences(allocation: str) -> str:
        values = data.over_one.sel(allocation=allocation)
        return ", ".join(f"{said(values, density)} at {density}" for density in DENSITIES)

    first, *others = ALLOCATIONS
    told = "; ".join(f"{allocation} {differences(allocation)}" for allocation in others)
    absolute = data.excess.sel(allocation=first)
    return (
        f"Loss of {name} under GRIFFIN above the full model's, in nats a token, on the "
        f"{scored - 1} pruned of {scored} tokens after prompts of {prompt}, by density of all "
        f"layers together; {texts} texts with 95% bootstrap bands, each with densities allocated "
        "on the other texts. With one density for all: "
        f"{', '.join(f'{said(absolute, density)} at {density}' for density in DENSITIES)}. "
        "Differences from it on the same texts (above): "
        f"{told}. Allocated: by the divergence "
        "of the model's output where one layer alone is pruned, as flocking.allocate, no layer "
        "below 0.9 times the density; first layer: as much of it as that allows, the others the "
        "same; lower floor: as allocated, but down to half of the density; by block error: by the "
        "relative squared error of the block's output; shuffled: the allocated densities in "
        "random order (chance). Below: the allocated densities, mean "
        "over texts, with bands."
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {
    function.__name__: function for function in (loss_by_allocation,)
}
