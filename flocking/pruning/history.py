"""The selections of a text, drawn up as an array that the analysis takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from flocking.pruning.compact import Compact


def drawn_up(history: list[tuple[int, list[Tensor]]], compacts: list[Compact]) -> xr.DataArray:
    """Selections by position, bool (position, [sequence,] layer, neuron).

    Parameters
    ----------
    history : list of (int, list of Tensor of int32, shape ([sequence,] k))
        Position, and the kept neurons of each compact block.
    compacts : list of Compact
    """
    rows = sorted((layer, number) for number, c in enumerate(compacts) for layer in c.layers)
    widths = [compacts[number].block.d_ff for _, number in rows]
    lead = history[0][1][0].shape[:-1]
    kept = np.zeros((len(history), *lead, len(rows), max(widths)), bool)
    for mask, (_, selections) in zip(kept, history, strict=True):
        for row, (_, number) in enumerate(rows):
            np.put_along_axis(mask[..., row, :], selections[number].numpy(), True, axis=-1)
    coords: dict[str, Any] = {
        "position": ("position", [place for place, _ in history], {"units": "tokens"}),
        "layer": [layer for layer, _ in rows],
        "d_ff": ("layer", widths),
    }
    dims = ("position", *(["sequence"] if lead else []), "layer", "neuron")
    if lead:
        coords["sequence"] = np.arange(lead[0])
    return xr.DataArray(kept, coords, dims, "selection", {"long_name": "selected neurons"})
