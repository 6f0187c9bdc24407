"""From a recording to a statistic, and from a statistic to the neurons that are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from flocking.analysis.metrics import named, need
from flocking.feedforward import FeedForward, dense, feedforwards, fused_rows, row_norms
from flocking.models import warn

Phase = Literal["prompt", "generation"]

# --------------------------------------------------------------------------------------
# Statistics


def statistic(
    recording: xr.Dataset,
    *,
    phase: Phase | None = None,
    start: int | None = None,
    stop: int | None = None,
    by: Literal["length", "window"] | None = None,
) -> xr.DataArray:
    """GRIFFIN's statistic over a range of tokens: ``s_j = sqrt(sum_t r_tj ** 2)``.

    The l2 norm over tokens of each neuron's relative activation (Dong, Chen and Chi 2024,
    arXiv 2404.01365, section 4.1), the first token included unless `start` leaves it out.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`.
    phase : {"prompt", "generation"}, optional
        The part of the text; all of it by default.
    start, stop : int, optional
        Range of tokens, from `start` up to but without `stop`, counted from the beginning of
        the phase; edges of windows. The whole phase by default.
    by : {"length", "window"}, optional
        Instead of one statistic for the range: "length", the series for ranges that begin
        at `start` and end with each window in turn (prompts of growing length), or "window",
        one for each window alone. Coordinates `start` and `stop` say which tokens.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer, [window,] neuron)
        Unitless. Coordinate ``tokens`` counts the real tokens that it sums over; where there
        are none, it is NaN.

    Raises
    ------
    ValueError
        If the recording lacks the phase, or `start` or `stop` is no edge of a window.

    Warns
    -----
    UserWarning
        If a sequence has no token in the range.
    """
    need(recording, "energy", "tokens")
    windows, edges = windows_of(recording, phase)
    first = 0 if start is None else edge_at("start", start, edges)
    last = len(windows) if stop is None else edge_at("stop", stop, edges)
    if first >= last:
        raise ValueError(f"start={start} and stop={stop} leave no token: give stop beyond start.")
    part = recording[["energy", "tokens"]].isel(window=windows[first:last])
    energy, tokens = part.energy.astype(np.float64), part.tokens
    present = tokens > 0
    if by is None:
        energy, tokens = energy.sum("window"), tokens.sum("window")
        present = tokens > 0
    elif by == "length":
        energy, tokens = energy.cumsum("window"), tokens.cumsum("window")
    elif by != "window":
        raise ValueError(f"by={by!r}: give 'length', 'window' or nothing.")
    if not bool((present if by is None else present.any("window")).all()):
        warn("A sequence has no token in this range: its statistic is NaN.")
    values = np.sqrt(energy).where(present).assign_coords(tokens=tokens)
    if by is not None:
        starts = edges[first:last] if by == "window" else [edges[first]] * (last - first)
        values = values.assign_coords(
            start=("window", starts), stop=("window", edges[first + 1 : last + 1])
        )
    values = values.transpose("sequence", "layer", ..., "neuron")
    return named(values, "statistic", "l2 norm of relative activations over tokens")


def windows_of(recording: xr.Dataset, phase: str | None) -> tuple[np.ndarray, list[int]]:
    """Numbers of the phase's windows, and the tokens at which they begin and the last ends."""
    phases = recording.phase.values
    members = {
        None: phases != "",
        "prompt": phases != "generation",
        "generation": phases == "generation",
    }
    if phase not in members:
        raise ValueError(f"phase={phase!r}: give 'prompt', 'generation' or nothing.")
    windows = np.flatnonzero(members[phase])
    if not len(windows):
        how = "record(..., max_new_tokens=...)" if phase == "generation" else "record"
        raise ValueError(f"the recording has no phase {phase!r}: make it with {how}.")
    starts = recording.start.values[windows].tolist()
    end = starts[-1] + int(recording.tokens.values[:, windows[-1]].max(initial=0))
    if phase is None and len({*phases} - {"first"}) > 1:
        starts = [np.nan] * len(starts)  # a generation is counted from its own beginning
    return windows, [*starts, end]


def edge_at(name: str, value: int, edges: list[int]) -> int:
    """Which of the edges a token is, or an error that says where the nearest are."""
    if np.isnan(edges[0]):
        raise ValueError(f"{name}={value} in a recording with a generation: give a phase as well.")
    if value not in edges:
        near = sorted(edges, key=lambda edge: abs(edge - value))[:2]
        raise ValueError(
            f"{name}={value} is no edge of a window: the nearest are at "
            f"{' and '.join(map(str, sorted(near)))}; or record with a smaller window."
        )
    return edges.index(value)


def statistic_of_others(values: xr.DataArray) -> xr.DataArray:
    """For each sequence, the static statistic that all the other sequences would give.

    The root of the mean over the other sequences of their energy per token: a selection
    made from it belongs to the model and not to the sequence.

    Parameters
    ----------
    values : xarray.DataArray, (sequence, ..., neuron)
        From :func:`statistic`, of two sequences or more.

    Returns
    -------
    xarray.DataArray, float64, like `values`
    """
    if values.sizes["sequence"] < 2:
        raise ValueError("there is one sequence and no other: record two or more.")
    energy = values**2 / values.tokens
    others = (energy.sum("sequence") - energy) / (energy.notnull().sum("sequence") - 1)
    return named(np.sqrt(others.clip(min=0)), "statistic", "statistic of the other sequences")


def weight_magnitude(model: PreTrainedModel) -> xr.DataArray:
    """Static statistic from the weights alone: product of each neuron's up and gate row norms.

    The baseline of Dong, Chen and Chi (2024, arXiv 2404.01365, section 5.1); the up row norm for
    blocks without a gate.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    xarray.DataArray, float64, (layer, neuron)
        Zero beyond the ``d_ff`` of narrower layers.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    """
    blocks = feedforwards(model)
    values = np.zeros((len(blocks), max(block.d_ff for block in blocks)))
    for row, block in zip(values, blocks, strict=True):
        row[: block.d_ff] = magnitude(block).cpu()
    coordinates = {
        "layer": [block.layer for block in blocks],
        "neuron": np.arange(values.shape[1]),
        "d_ff": ("layer", [block.d_ff for block in blocks]),
    }
    if any(block.kind == "experts" for block in blocks):
        coordinates["experts"] = ("layer", [block.experts for block in blocks])
    return named(
        xr.DataArray(values, coordinates, ("layer", "neuron")), "statistic", "weight magnitude"
    )


# --------------------------------------------------------------------------------------
# Selections


def select(values: xr.DataArray, density: float | Iterable[float] = 0.5) -> xr.DataArray:
    """The experts: per sequence and layer, the neurons with the largest statistic.

    ``k = floor(density * d_ff + 1e-9)`` neurons, ties to the lowest index, among each
    layer's own ``d_ff``; of a mixture of experts, among those of each.

    Parameters
    ----------
    values : xarray.DataArray, (..., neuron)
        A statistic, such as :func:`statistic` gives.
    density : float or iterable of float
        Fraction of neurons kept, in (0, 1]. Several give a leading dimension ``density``.

    Returns
    -------
    xarray.DataArray, bool, (..., neuron)
        Where the statistic is NaN, nothing is selected.

    Raises
    ------
    ValueError
        If a density is not in (0, 1], or keeps no neuron.
    """
    if "neuron" not in values.dims:
        raise ValueError(f"values has dimensions {values.dims}: give a statistic over neurons.")
    if np.ndim(density) or not isinstance(density, float | int | np.number):
        densities = xr.DataArray([float(d) for d in density], dims="density", name="density")
        each = [select(values, d) for d in densities.values]
        return xr.concat([e.drop_vars("density") for e in each], densities, coords="minimal")
    by_layer = values if "layer" in values.dims else values.expand_dims("layer")
    by_layer = by_layer.transpose("layer", ..., "neuron")
    widths = np.broadcast_to(
        values.d_ff if "d_ff" in values.coords else values.sizes["neuron"], len(by_layer)
    )
    mixtures = np.broadcast_to(values.experts if "experts" in values.coords else 1, len(by_layer))
    chosen = np.zeros(by_layer.shape, bool)
    for mask, layer, d_ff, experts in zip(
        chosen, by_layer.values, widths.tolist(), mixtures.tolist(), strict=True
    ):
        d_ff = min(d_ff, values.sizes["neuron"])
        known = torch.from_numpy(layer[..., :d_ff].astype(np.float64))
        absent = known.isnan().any(dim=-1, keepdim=True)
        k = expert_count(float(density), d_ff // experts)
        by_expert = known.nan_to_num().unflatten(-1, (experts, -1))
        mask[..., :d_ff] = top_k(by_expert, k).flatten(-2) & ~absent
    labelled = by_layer.copy(data=chosen)
    labelled = labelled.transpose(..., *values.dims)
    if "layer" not in values.dims:
        labelled = labelled[0]
    return (
        labelled.assign_coords(density=float(density))
        .rename("selection")
        .assign_attrs(long_name="selected neurons")
    )


def expert_count(density: float, d_ff: int) -> int:
    """Neurons kept at a density: ``floor(density * d_ff + 1e-9)``.

    Parameters
    ----------
    density : float
        Fraction to keep, in (0, 1].
    d_ff : int
        Neurons there are.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If `density` is not in (0, 1], or keeps no neuron at all.
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"density={density}: give the fraction of neurons to keep, above 0 and at most 1."
        )
    count = math.floor(density * d_ff + 1e-9)
    if count == 0:
        raise ValueError(f"density={density} keeps none of {d_ff} neurons: give {1 / d_ff:.2g} up.")
    return count


def top_k(statistic: Tensor, k: int) -> Tensor:
    """Mask of the `k` neurons with the largest statistic; ties go to the lowest index.

    Parameters
    ----------
    statistic : Tensor, shape (..., neuron)
        In any floating dtype, without NaN.
    k : int

    Returns
    -------
    Tensor of bool, shape (..., neuron)
        With `k` true values along the last axis.
    """
    lowest = statistic.kthvalue(statistic.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above, tied = statistic > lowest, statistic == lowest
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


@torch.no_grad()
def magnitude(block: FeedForward) -> Tensor:
    """Static statistic of a block's neurons: the product of their up and gate row norms.

    The baseline of Dong, Chen and Chi (2024, arXiv 2404.01365, section 5.1), which needs no
    text; for a plain block it is the up row norm alone.

    Returns
    -------
    Tensor of float32, shape (d_ff,)
        On the block's own device, in the weights' units (squared for gated blocks).
    """
    if block.kind == "experts":
        return row_norms(block.down).flatten()

    def norms_of(projection: torch.nn.Module) -> Tensor:
        return torch.linalg.vector_norm(dense(projection), dim=1)

    norms = norms_of(block.up)
    if block.kind == "plain":
        return norms
    if block.kind == "gated":
        return norms * norms_of(block.gate)
    neurons = torch.arange(block.d_ff, device=norms.device)
    both = norms[fused_rows(neurons, block.d_ff, block.interleaved)]
    return both.unflatten(0, (-1, 2) if block.interleaved else (2, -1)).prod(
        1 if block.interleaved else 0
    )
