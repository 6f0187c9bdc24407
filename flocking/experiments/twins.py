"""Twins of the models in the figures, and losses of texts under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flocking import analysis
from flocking.experiments.common import dimension
from flocking.pruning import griffin, side_by_side

_T = TypeVar("_T", xr.DataArray, xr.Dataset)

DENSITY = 0.5


def twins_of(
    names: Iterable[str],
    others: xr.DataArray | None,
    later: xr.DataArray | None,
    seed: int,
    density: float = DENSITY,
) -> dict[str, dict[str, Any]]:
    """Arguments of :func:`flocking.griffin` for selections, by their names in the figures."""
    meant = {
        "GRIFFIN": ("topk", None),
        "hindsight": ("static", later),
        "static": ("static", others),
        "global-local": ("global-local", others),
    }
    options = {}
    for name in names:
        method, reference = meant.get(name, (name, None))
        options[name] = {
            "density": density,
            "method": method,
            "reference": reference,
            "seed": seed,
        }
    return options


def losses_of(
    model: PreTrainedModel,
    twins: dict[str, dict[str, Any]],
    ids: list[list[int]],
    prompt: int,
    look: Callable[[PreTrainedModel], None] = lambda twin: None,
) -> xr.DataArray:
    """Loss of each token after the prompt, (selection, sequence, distance); the full model first.

    Twins are made, used, shown to `look` and forgotten one after the other, so that memory holds
    one at a time.
    """
    made = (griffin(model, **options) for options in twins.values())
    losses = []
    for subject, values in side_by_side(
        chain(made, [model]), torch.tensor(ids, device="cpu"), prompt
    ):
        losses.append(-values[:, prompt - 1 :].double().cpu())
        look(subject)
    values = torch.stack([losses[-1], *losses[:-1]])
    labels = {"selection": ["full", *twins], "distance": np.arange(values.shape[-1])}
    return xr.DataArray(values.numpy(), labels, ("selection", "sequence", "distance"))


def losses_and_energy(
    model: PreTrainedModel,
    twins: dict[str, dict[str, Any]],
    ids: list[list[int]],
    prompt: int,
    later: xr.DataArray,
) -> tuple[xr.DataArray, xr.DataArray]:
    """Losses, and the share of later tokens' energy in kept neurons, mean over layers."""
    masks = []

    def look(subject: PreTrainedModel) -> None:
        mask = xr.full_like(later, subject is model, dtype=bool)
        for layer, neurons in getattr(subject, "selection", {}).items():
            mask.loc[{"layer": layer, "neuron": neurons.numpy()}] = True
        masks.append(mask)

    losses = losses_of(model, twins, ids, prompt, look)
    kept = xr.concat([masks[-1], *masks[:-1]], dimension("selection", ["full", *twins]))
    captured = analysis.captured_energy(kept, later).mean("layer").reset_coords(drop=True)
    return losses, captured


def each_text(measure: Callable[[int], _T], names: list[str], progress: bool) -> _T:
    """The measurement on each text, with progress."""
    numbers = tqdm(range(len(names)), desc="scoring", unit="text", disable=not progress)
    return xr.concat([measure(number) for number in numbers], dimension("sequence", names))
