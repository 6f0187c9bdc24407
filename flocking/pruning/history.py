"""The selections of a text, drawn up as an array that the analysis takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from flocking.pruning.compact import Compact


def packed(compacts: list[Compact]) -> list[np.ndarray]:
    """What each compact block keeps just now, a bit a neuron: uint8 ([sequence,] d_ff / 8).

    Of a long text there are many of these: they are in the host's memory, where a bit takes a
    sixteenth of what indices of half of the neurons would. The device is asked once.
    """
    device = compacts[0].kept.device
    joined = torch.cat([c.kept.flatten().to(device) for c in compacts]).to("cpu", torch.int32)
    found = []
    for compact, part in zip(
        compacts, joined.split([c.kept.numel() for c in compacts]), strict=True
    ):
        indices = part.view(compact.kept.shape).numpy()
        mask = np.zeros((*indices.shape[:-1], compact.block.d_ff), bool)
        np.put_along_axis(mask, indices, True, axis=-1)
        found.append(np.packbits(mask, axis=-1))
    return found


def drawn_up(history: list[tuple[int, list[np.ndarray]]], compacts: list[Compact]) -> xr.DataArray:
    """Selections by position, bool (position, [sequence,] layer, neuron).

    Parameters
    ----------
    history : list of (int, list of ndarray)
        Position, and what :func:`packed` gave there.
    compacts : list of Compact
    """
    rows = sorted((layer, number) for number, c in enumerate(compacts) for layer in c.layers)
    widths = [compacts[number].block.d_ff for _, number in rows]
    lead = history[0][1][0].shape[:-1]
    kept = np.zeros((len(history), *lead, len(rows), max(widths)), bool)
    for mask, (_, selections) in zip(kept, history, strict=True):
        for row, (_, number) in enumerate(rows):
            d_ff = compacts[number].block.d_ff
            mask[..., row, :d_ff] = np.unpackbits(selections[number], axis=-1, count=d_ff)
    coords: dict[str, Any] = {
        "position": ("position", [place for place, _ in history], {"units": "tokens"}),
        "layer": [layer for layer, _ in rows],
        "d_ff": ("layer", widths),
    }
    dims = ("position", *(["sequence"] if lead else []), "layer", "neuron")
    if lead:
        coords["sequence"] = np.arange(lead[0])
    return xr.DataArray(kept, coords, dims, "selection", {"long_name": "selected neurons"})
