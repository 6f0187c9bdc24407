"""From a recording to a statistic, and from a statistic to a selection of neurons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from flocking.analysis.chunks import by_chunk, is_chunked, measure
from flocking.analysis.densities import (
    densities_in_words,
    density_by_layer,
    kept_count,
    several_densities,
)
from flocking.analysis.labels import checked
from flocking.analysis.metrics import named
from flocking.analysis.provenance import made_of, said_by
from flocking.analysis.ranges import edge_at, refuse_gaps, windows_of
from flocking.feedforward import FeedForward, dense, feedforwards, fused_rows, row_norms
from flocking.models import any_tensor_of, warn
from flocking.recording import coordinates_of

Phase = Literal["prompt", "generation"]

# --------------------------------------------------------------------------------------
# Statistics


@measure("energy", "tokens", "start")
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
        the phase. Both must be edges of windows, and all windows between them must be there. The
        whole phase by default.
    by : {"length", "window"}, optional
        Several statistics instead of one for the range: "length" for ranges that begin at
        `start` and end with each window in turn (prompts of growing length), "window" for each
        window alone. Coordinates ``start`` and ``stop`` say which tokens.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer, [window,] neuron)
        Unitless; NaN without tokens. Coordinate ``tokens`` counts the real tokens that it sums
        over.

    Raises
    ------
    TypeError
        If `recording` is not a recording.
    ValueError
        If the recording lacks the phase or windows of the range, or `start` or `stop` is not an
        edge of a window.

    Warns
    -----
    UserWarning
        If a sequence has no token in the range.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> flocking.statistic(recording, phase="prompt").dims
    ('sequence', 'layer', 'neuron')
    >>> flocking.statistic(recording, start=1, stop=129).tokens.values.tolist()
    [128, 128]
    >>> flocking.statistic(recording, by="length").stop.values[:4].tolist()
    [1, 65, 129, 193]
    """
    windows, starts, stops = windows_of(recording, phase)
    first = 0 if start is None else edge_at("start", start, [*starts, stops[-1]])
    last = len(windows) if stop is None else edge_at("stop", stop, [starts[0], *stops])
    if first >= last:
        raise ValueError(f"start={start} and stop={stop} leave no token: give stop beyond start.")
    if start is not None or stop is not None or by == "length":
        refuse_gaps(recording, windows[first:last])
    part = recording[["energy", "tokens"]].isel(window=windows[first:last])
    energy, tokens = part.energy.astype(np.float64), part.tokens
    present = tokens > 0
    if by is None:
        energy, tokens = energy.sum("window", skipna=False), tokens.sum("window")
        present = tokens > 0
    elif by == "length":
        energy, tokens = energy.cumsum("window", skipna=False), tokens.cumsum("window")
    elif by != "window":
        raise ValueError(f"by={by!r}: give 'length', 'window' or nothing.")
    if not bool((present if by is None else present.any("window")).all()):
        warn("A sequence has no token in this range: its statistic is NaN.")
    values = np.sqrt(energy).where(present).assign_coords(tokens=tokens)
    if by is not None:
        begins = starts[first:last] if by == "window" else [starts[first]] * (last - first)
        values = values.assign_coords(start=("window", begins), stop=("window", stops[first:last]))
    values = values.transpose("sequence", "layer", ..., "neuron")
    part_of = f"the {phase}" if phase else "all"
    made_from = f"GRIFFIN's statistic of recorded text, over {part_of} of its tokens"
    if start is not None or stop is not None or by is not None:
        made_from += f" (start={start}, stop={stop}, by={by})"
    values = named(values, "statistic", "l2 norm of relative activations over tokens")
    return made_of(values, made_from)


def statistic_of_others(values: xr.DataArray) -> xr.DataArray:
    """Static statistic for each sequence, from all the other sequences.

    The root of the mean over the other sequences of their energy per token. A selection made from
    it says something about the model and nothing about the sequence. Values in chunks are read once
    when this is called, for the sum over all sequences.

    Parameters
    ----------
    values : xarray.DataArray, (sequence, ..., neuron)
        From :func:`statistic`, of two sequences or more.

    Returns
    -------
    xarray.DataArray, float64, like `values`

    Raises
    ------
    TypeError
        If `values` is not a DataArray.
    ValueError
        If there is one sequence only, a part of the neurons, or no coordinate ``tokens``.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:3], progress=False)
    >>> static = flocking.statistic_of_others(flocking.statistic(recording))
    >>> flocking.select(static, density=0.5).dims
    ('sequence', 'layer', 'neuron')
    """
    values = checked("values", values)
    if values.sizes.get("sequence", 1) < 2:
        raise ValueError(
            f"expected two sequences or more, got {values.sizes.get('sequence', 1)}: record "
            "several texts."
        )
    if "tokens" not in values.coords:
        raise ValueError("values has no coordinate 'tokens': give what flocking.statistic returns.")
    energy = values**2 / values.tokens
    # In memory, since chunks would wait there for the sum over all of them.
    total, number = energy.sum("sequence"), energy.notnull().sum("sequence")
    if is_chunked(values):
        both = xr.Dataset({"total": total, "number": number}).compute()
        total, number = both.total, both.number
    others = (total - energy) / (number - 1)
    others = np.sqrt(others.clip(min=0)).transpose(*values.dims)
    made_from = f"static statistic of {values.sizes['sequence'] - 1} other texts"
    others = named(others, "statistic", "statistic of the other sequences")
    return made_of(others, made_from)


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
    ValueError
        If their weights are not all that they multiply with: adapters, or packed weights with
        scales beside them.

    Examples
    --------
    >>> static = flocking.weight_magnitude(model)
    >>> static.dims, static.shape
    (('layer', 'neuron'), (2, 64))
    """
    blocks = feedforwards(model)
    values = np.zeros((len(blocks), max(block.d_ff for block in blocks)))
    for row, block in zip(values, blocks, strict=True):
        row[: block.d_ff] = magnitude(block).cpu()
    result = xr.DataArray(values, {"neuron": np.arange(values.shape[1])}, ("layer", "neuron"))
    by_layer = {name: ("layer", each) for name, each in coordinates_of(blocks).items()}
    result = named(result.assign_coords(by_layer), "statistic", "weight magnitude")
    return made_of(result, "norms of the weights (magnitude), without any text")


# --------------------------------------------------------------------------------------
# Selections


def select(
    values: xr.DataArray,
    density: float | Iterable[float] = 0.5,
    *,
    densities: Iterable[float] | None = None,
) -> xr.DataArray:
    """Select the neurons to keep: those with the largest statistic, per sequence and layer.

    ``k = floor(density * d_ff + 1e-9)`` neurons of each layer's ``d_ff``, ties to the lowest index.
    In a mixture of experts, as many of each expert: of one that no token was routed to, the first
    ones, since its statistic is 0. (:func:`flocking.griffin` keeps those with the largest weights.)

    Parameters
    ----------
    values : xarray.DataArray, (..., neuron)
        A statistic, such as :func:`statistic` gives.
    density : float or iterable of float
        Fraction of neurons kept, in (0, 1]; or one for each layer of `values`, in order, or by
        label from what names its layers (a DataArray along ``layer``, a Series, a dict).
    densities : iterable of float, optional
        Several densities to compare, instead of `density`, each for all layers. The result has
        them along a leading dimension ``density``.

    Returns
    -------
    xarray.DataArray, bool, ([density,] ..., neuron)
        True for kept neurons. Where the statistic is NaN, nothing is selected. Coordinate
        ``density`` is the fraction kept, by layer where it differs. Attribute ``made_from`` says
        in words what they were selected by.

    Raises
    ------
    TypeError
        If `values` is not a DataArray.
    ValueError
        If a density is not in (0, 1], or keeps no neuron; if there are as many as neither one
        nor the layers, or they are of other layers; if `values` has a part of the neurons.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> kept = flocking.select(flocking.statistic(recording), density=0.5)
    >>> kept.dims, kept.sum("neuron").values.tolist()
    (('sequence', 'layer', 'neuron'), [[32, 32], [32, 32]])

    One density for each layer, and several to compare:

    >>> kept = flocking.select(flocking.statistic(recording), density=[0.25, 0.5])
    >>> kept.sum("neuron").values.tolist()
    [[16, 32], [16, 32]]
    >>> flocking.select(flocking.statistic(recording), densities=[0.25, 0.5, 0.75]).dims
    ('density', 'sequence', 'layer', 'neuron')
    """
    values = checked("values", values)
    if densities is not None:
        swept = xr.DataArray(several_densities(densities), dims="density", name="density")
        each = [select(values, d).drop_vars("density") for d in swept.values.tolist()]
        # (Each of them may be taken out: no density is named, which is that of the mask.)
        return made_of(xr.concat(each, swept, coords="minimal"), _told(values))
    by_layer = values if "layer" in values.dims else values.expand_dims("layer")
    by_layer = by_layer.transpose("layer", ..., "neuron")
    layers = len(by_layer)
    shares = density_by_layer(density, layers, _labels(values))
    kept = by_chunk(
        kept_neurons,
        by_layer.variable,
        *by_layer_of(by_layer, shares),
        inner=[["neuron"], [], [], []],
        outer=["neuron"],
        sizes={},
        dtype=bool,
    ).data
    labelled = by_layer.copy(data=kept)
    if "layer" not in values.dims:
        labelled = labelled[0]
    labelled = labelled.transpose(*(dim for dim in values.dims if dim != "neuron"), "neuron")
    labelled = labelled.assign_coords(
        density=shares[0] if len({*shares}) == 1 else ("layer", shares)
    )
    labelled = labelled.rename("selection").assign_attrs(long_name="selected neurons")
    return made_of(labelled, f"{_told(values)}, {densities_in_words(shares)}")


def _told(values: xr.DataArray) -> str:
    """What neurons were selected by, in words."""
    by = said_by(values) or values.attrs.get("long_name") or "a statistic"
    return f"{by}; those with the largest"


def _labels(values: xr.DataArray) -> list[Any] | None:
    """The layers' labels, if they have any."""
    return np.atleast_1d(values["layer"].values).tolist() if "layer" in values.coords else None


def by_layer_of(values: xr.DataArray | xr.Dataset, shares: list[float]) -> list[xr.Variable]:
    """Density, d_ff and number of experts of each layer, which are checked.

    Raises
    ------
    ValueError
        If a density is not in (0, 1], or keeps no neuron.
    """
    count = len(shares)
    width: Any = values["d_ff"] if "d_ff" in values.coords else values.sizes["neuron"]
    widths = np.broadcast_to(width, count).astype(int)
    mixtures = np.broadcast_to(values["experts"] if "experts" in values.coords else 1, count)
    for share, d_ff, experts in zip(shares, widths, mixtures.astype(int), strict=True):
        kept_count(share, d_ff // experts)
    return [xr.Variable("layer", each) for each in (shares, widths, mixtures.astype(int))]


def kept_neurons(
    values: np.ndarray, shares: np.ndarray, widths: np.ndarray, experts: np.ndarray
) -> np.ndarray:
    """Mask of the neurons with the largest statistic, (layer, ..., neuron).

    Parameters
    ----------
    values : ndarray, (layer, ..., neuron)
    shares, widths, experts : ndarray
        Density, d_ff and number of experts of each layer.
    """
    kept = np.zeros(values.shape, bool)
    by_layer = (each.ravel() for each in (shares, widths, experts))
    for mask, layer, share, d_ff, mixture in zip(kept, values, *by_layer, strict=True):
        mask[..., :d_ff] = _largest(layer[..., :d_ff], float(share), int(mixture))
    return kept


def reached(values: np.ndarray, widths: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Mask of the neurons of experts with any energy, (layer, ..., neuron).

    Of an expert that no token was routed to, the statistic says nothing. A dense block is one
    expert.

    Parameters
    ----------
    values : ndarray, (layer, ..., neuron)
        A statistic or energies.
    widths, experts : ndarray
        d_ff and number of experts of each layer.
    """
    found = np.zeros(values.shape, bool)
    for mask, layer, d_ff, mixture in zip(
        found, values, widths.ravel(), experts.ravel(), strict=True
    ):
        by_expert = layer[..., :d_ff].reshape(*layer.shape[:-1], int(mixture), -1)
        any_of = (by_expert != 0).any(axis=-1, keepdims=True)  # (NaN too)
        mask[..., :d_ff] = np.broadcast_to(any_of, by_expert.shape).reshape(*layer.shape[:-1], -1)
    return found


def where_reached(values: xr.DataArray) -> xr.DataArray:
    """Which neurons of a statistic are of experts that had any token; all of a dense block.

    Parameters
    ----------
    values : xarray.DataArray, (..., layer, neuron)
        A statistic or energies, with coordinates ``d_ff`` and ``experts`` if layers differ.
    """
    widths = values.coords.get("d_ff", xr.DataArray(values.sizes["neuron"]))
    mixtures = values.coords.get("experts", xr.DataArray(1))
    by_layer = values.transpose("layer", ..., "neuron")
    of_layers = [
        xr.Variable("layer", np.broadcast_to(each.values, by_layer.sizes["layer"]).astype(int))
        for each in (widths, mixtures)
    ]
    found = by_chunk(
        reached,
        by_layer.variable,
        *of_layers,
        inner=[["neuron"], [], []],
        outer=["neuron"],
        sizes={},
        dtype=bool,
    )
    return by_layer.copy(data=found.data).transpose(*values.dims)


def _largest(values: np.ndarray, density: float, experts: int) -> np.ndarray:
    """Mask of one layer's kept neurons, (..., neuron); none where the statistic is NaN."""
    statistic = torch.from_numpy(values.astype(np.float64))
    absent = statistic.isnan().any(dim=-1, keepdim=True)
    by_expert = statistic.nan_to_num().unflatten(-1, (experts, -1))
    count = kept_count(density, by_expert.shape[-1])
    return (top_k(by_expert, count).flatten(-2) & ~absent).numpy()


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


def _refuse_hidden(block: FeedForward, projection: torch.nn.Module | None) -> None:
    """Refuse a projection whose weight is not what it multiplies with."""
    assert projection is not None
    what = ""
    if hasattr(projection, "base_layer"):
        what = "has an adapter: merge it into the weights (merge_and_unload)"
    else:
        weight = any_tensor_of(projection, "down_proj" if block.kind == "experts" else "weight")
        is_plain = weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if not is_plain and not is_traceable_wrapper_subclass(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            what = f"is packed in {dtype}, with scales beside it: load the model unquantised"
    if what:
        raise ValueError(
            f"{block.path}: the magnitude of its weights cannot be told, since a projection {what}."
        )


@torch.no_grad()
def magnitude(block: FeedForward) -> Tensor:
    """Static statistic of a block's neurons: the product of their up and gate row norms.

    The baseline of Dong, Chen and Chi (2024, arXiv 2404.01365, section 5.1), which needs no text.
    For a plain block it is the up row norm alone.

    Returns
    -------
    Tensor of float32, shape (d_ff,)
        On the block's device, in the weights' units (squared for gated blocks).
    """
    for projection in {block.up, block.gate, block.down} - {None}:
        _refuse_hidden(block, projection)
    if block.kind == "experts":
        return row_norms(block.down).flatten()

    def norms_of(projection: torch.nn.Module) -> Tensor:
        return torch.linalg.vector_norm(dense(projection), dim=1)

    norms = norms_of(block.up)
    if block.gate is None:
        return norms
    if block.kind == "gated":
        return norms * norms_of(block.gate)
    neurons = torch.arange(block.d_ff, device=norms.device)
    both = norms[fused_rows(neurons, block.d_ff, block.interleaved)]
    return both.unflatten(0, (-1, 2) if block.interleaved else (2, -1)).prod(
        1 if block.interleaved else 0
    )
