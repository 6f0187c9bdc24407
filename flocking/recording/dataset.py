"""A recording as a labelled Dataset: the one place that knows its dimensions and coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flocking.feedforward import FeedForward

if TYPE_CHECKING:
    from flocking.recording.recorder import _Recorder


def label(
    recorder: _Recorder,
    sequences: list[Tensor],
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> xr.Dataset:
    """The arrays as a Dataset with the design's dimensions and coordinates."""
    blocks, layout, arrays = recorder.blocks, recorder.layout, recorder.arrays
    moments = ("sequence", "layer", "window", "neuron")
    variables = {
        name: (moments, arrays[name], {"long_name": text, "units": "1"})
        for name, text in (
            ("energy", "sum of squared relative activations"),
            ("mass", "sum of relative activations"),
            ("rank", "sum of standardised ranks"),
        )
        if name in arrays
    }
    per_token = ("sequence", "layer", "token")
    variables["norm"] = (per_token, arrays["norm"], {"long_name": "l2 norm of the activations"})
    variables["l1"] = (
        per_token,
        arrays["l1"],
        {"long_name": "l1 norm of the relative activations", "units": "1"},
    )
    window = layout.window.numpy()
    counts = np.stack([np.bincount(row[row >= 0], minlength=len(layout.phase)) for row in window])
    variables["tokens"] = (("sequence", "window"), counts, {"long_name": "tokens in the window"})

    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).numpy()
    words = {-1: ""}
    if tokenizer is not None:
        words |= {i: tokenizer.decode([i]) for i in np.unique(ids).tolist() if i >= 0}
    token_text = [[words.get(i, "") for i in row] for row in ids.tolist()]
    coordinates = {
        "sequence": np.arange(len(sequences)),
        "layer": [block.layer for block in blocks],
        "window": np.arange(len(layout.phase)),
        "neuron": np.arange(arrays["energy"].shape[-1]),
        "token": np.arange(ids.shape[1]),
        "text": ("sequence", np.array(texts, dtype=object)),
        "module": ("layer", np.array([block.path for block in blocks], dtype=str)),
        "d_ff": ("layer", [block.d_ff for block in blocks]),
        "phase": ("window", np.array(layout.phase, dtype=str)),
        "start": ("window", layout.start, {"units": "tokens"}),
        "token_id": (("sequence", "token"), ids),
        "token_text": (("sequence", "token"), np.array(token_text, dtype=object)),
        "token_window": (("sequence", "token"), window),
    }
    if "routed" in arrays:
        variables["routed"] = (
            ("sequence", "layer", "window", "routed_expert"),
            arrays["routed"],
            {"long_name": "tokens routed to the expert"},
        )
        coordinates["experts"] = ("layer", [block.experts for block in blocks])
        coordinates["expert"] = (("layer", "neuron"), _expert_of_neurons(blocks))
    if recorder.raw:
        numbers = [block.layer for block in recorder.raw]
        dim = "layer" if recorder.raw == blocks else "relative_layer"
        if dim == "relative_layer":
            coordinates[dim] = numbers
        variables["relative"] = (
            ("sequence", dim, "token", "neuron"),
            arrays["relative"],
            {"long_name": "relative activation", "units": "1"},
        )
    return xr.Dataset(variables, coordinates)


def _expert_of_neurons(blocks: list[FeedForward]) -> np.ndarray:
    """(layer, neuron): the expert that each neuron belongs to, -1 where there are none."""
    whose = np.full((len(blocks), max(block.d_ff for block in blocks)), -1, np.int32)
    for row, block in zip(whose, blocks, strict=True):
        if block.kind == "experts":
            row[: block.d_ff] = np.arange(block.d_ff) // (block.d_ff // block.experts)
    return whose
