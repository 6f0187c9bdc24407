"""What GRIFFIN would select from a recording, and how well that serves another part of it.

Selections are boolean DataArrays over neurons, statistics float64 ones: both keep their labels,
so that parts of a text, texts and models are compared by xarray's own broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import xarray as xr

from flocking.analysis.metrics import common_windows, named, need
from flocking.analysis.selection import edge_at, expert_count, select, statistic, windows_of


def jaccard(a: xr.DataArray, b: xr.DataArray, dim: str = "neuron") -> xr.DataArray:
    """Overlap of two selections: ``|A and B| / |A or B|``. See :func:`chance_jaccard`.

    Parameters
    ----------
    a, b : xarray.DataArray, bool, (..., neuron)
        Selections. Dimensions of the same name must have the same labels; the others are
        broadcast against each other.
    dim : str
        What is selected, if it is not neurons (``"routed_expert"``, say).

    Returns
    -------
    xarray.DataArray, float64
        Unitless, in [0, 1]; NaN where either of the two is empty.

    Raises
    ------
    ValueError
        If the labels differ along a dimension that both have.
    """
    for name, values in (("a", a), ("b", b)):
        if values.dtype != bool or dim not in values.dims:
            raise ValueError(
                f"{name} is no selection along {dim!r}: give what flocking.select returns, or a "
                "bool array and its dim."
            )
    a, b = xr.align(a, b, join="exact")
    with xr.set_options(keep_attrs=False):
        both = (a & b).sum(dim)
        sizes = a.sum(dim), b.sum(dim)
        values = both / (sizes[0] + sizes[1] - both).where((sizes[0] > 0) & (sizes[1] > 0))
    return named(values, "jaccard", "Jaccard overlap")


def chance_jaccard(density: float) -> float:
    """Overlap of two selections made at random: ``density / (2 - density)``.

    The ratio of expectations, ``d^2 / (2 d - d^2)``; the expectation of the ratio differs
    from it by less than ``1 / d_ff``.
    """
    expert_count(density, 1 << 62)  # refuses what is not in (0, 1]
    return density / (2 - density)


def captured_energy(
    selection: xr.DataArray, later: xr.DataArray, *, of: Literal["all", "oracle"] = "all"
) -> xr.DataArray:
    """Share of a range's energy that a selection keeps: ``sum_(j in S) E_j / sum_j E_j``.

    Its chance level is the density; with ``of="oracle"``, the density over the oracle's share.

    Parameters
    ----------
    selection : xarray.DataArray, bool, (..., neuron)
        From :func:`select`.
    later : xarray.DataArray, (..., neuron)
        :func:`statistic` of the range to be served, whose square is the energy.
    of : {"all", "oracle"}
        Divide by the energy of all neurons, or by what as many neurons chosen in hindsight, from
        `later` itself, would keep.

    Returns
    -------
    xarray.DataArray, float64
        Unitless, in [0, 1]; NaN where the selection is empty or there is no energy.
    """
    if selection.dtype != bool:
        raise ValueError("selection is no selection: give what flocking.select returns.")
    if of not in ("all", "oracle"):
        raise ValueError(f"of={of!r}: give 'all' or 'oracle'.")
    selection, later = xr.align(selection, later, join="exact")
    with xr.set_options(keep_attrs=False):
        energy = later**2
        count = selection.sum("neuron")
        kept = xr.dot(selection.astype(np.float64), energy.fillna(0), dim="neuron")
        total = energy.sum("neuron")
        if of == "oracle":
            # Descending sums over neurons: the k-th is the most that k neurons can keep.
            best = energy.copy(
                data=-np.sort(-energy.fillna(0).values, energy.get_axis_num("neuron"))
            )
            total = best.cumsum("neuron").isel(neuron=(count - 1).clip(min=0))
        values = kept / total.where((total > 0) & (count > 0))
    return named(values, "captured_energy", f"captured energy, of {of}")


# --------------------------------------------------------------------------------------
# Questions


def prompt_generation_overlap(
    recording: xr.Dataset, density: float | Iterable[float] = 0.5
) -> xr.DataArray:
    """Jaccard overlap of the experts that the prompt and the generation would choose.

    Parameters
    ----------
    recording : xarray.Dataset
        From ``flocking.record(..., max_new_tokens=...)``.
    density : float or iterable of float
        Fraction of neurons kept.

    Returns
    -------
    xarray.DataArray, float64, ([density,] sequence, layer)
        Chance level: :func:`chance_jaccard`.
    """
    prompt, generation = (statistic(recording, phase=p) for p in ("prompt", "generation"))
    return jaccard(select(prompt, density), select(generation, density))


def between_sequence_overlap(recording: xr.Dataset, density: float = 0.5) -> xr.Dataset:
    """Overlap of the experts of different sequences, beside that of one sequence's halves.

    The experts of the first half of each sequence against those of the second half of each:
    within a sequence and between two, from as many tokens (after a figure of Dong, Chen and
    Chi 2024, arXiv 2404.01365, section 3). The first token, and windows that not all
    sequences fill, are left out.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`, two sequences or more, of two windows or more.
    density : float
        Fraction of neurons kept.

    Returns
    -------
    xarray.Dataset
        ``within`` (sequence, layer): Jaccard of a sequence's own two halves.
        ``between`` (sequence, other, layer): of its first half and the other's second half;
        NaN where the other is itself. Chance level: :func:`chance_jaccard`.
    """
    need(recording, "energy", "tokens")
    windows = common_windows(recording)
    half = len(windows) // 2
    if half == 0:
        raise ValueError("one window cannot be halved: record with a smaller window.")
    chosen = []
    for part in (windows[:half], windows[half : 2 * half]):
        energy = recording.energy.isel(window=part).sum("window", dtype=np.float64)
        chosen.append(select(np.sqrt(energy), density))
    first, second = chosen
    overlap = xr.concat(
        [
            jaccard(
                first, second.sel(sequence=other).drop_vars(["sequence", "text"], errors="ignore")
            )
            for other in second.sequence.values
        ],
        xr.DataArray(second.sequence.values, dims="other", name="other"),
        coords="minimal",
    )
    same = overlap.sequence == overlap.other
    within = overlap.where(same).sum("other", min_count=1)
    between = overlap.where(~same).transpose("sequence", "other", "layer")
    return xr.Dataset(
        {
            "within": named(within, "within", "Jaccard overlap of a sequence's halves"),
            "between": named(between, "between", "Jaccard overlap between sequences"),
        }
    )


def drift(
    recording: xr.Dataset,
    density: float = 0.5,
    *,
    prompt_lengths: Iterable[int] | None = None,
) -> xr.Dataset:
    """How well the experts of a prompt serve what follows, by its length and the distance.

    Each text is cut in two at every prompt length: the experts of what lies before (the first
    token included) are held against each later window. All from one recorded pass.

    Parameters
    ----------
    recording : xarray.Dataset
        From ``flocking.record(..., window=16)``; its prompt phase is what is looked at.
    density : float
        Fraction of neurons kept.
    prompt_lengths : iterable of int, optional
        Tokens before the cut, edges of windows; all of them by default.

    Returns
    -------
    xarray.Dataset, float64, (sequence, layer, prompt_length, distance)
        ``jaccard`` with the experts that the later window itself would choose (few tokens choose
        noisily, so that this stays below 1 even without drift), ``captured_energy`` of the later
        window, and ``oracle``, the most that could have been captured in hindsight. ``distance``
        is from the cut to the later window's beginning, in tokens. NaN where a sequence ends
        before.
    """
    need(recording, "energy", "tokens")
    windows, edges = windows_of(recording, "prompt")
    part = recording.isel(window=windows)
    if len(windows) < 3:
        raise ValueError("drift needs a prompt of three windows: record with a smaller window.")
    width = edges[2] - edges[1]
    cuts = edges[1:-1] if prompt_lengths is None else list(prompt_lengths)
    counts = [edge_at("prompt_lengths", length, edges) for length in cuts]
    if not all(0 < count < len(windows) for count in counts):
        raise ValueError(f"prompt_lengths={cuts}: each must leave a prompt and a window after it.")
    sizes = part.sizes["sequence"], part.sizes["layer"], len(cuts), len(windows) - min(counts)
    result = {name: np.full(sizes, np.nan) for name in ("jaccard", "captured_energy", "oracle")}
    for number in range(part.sizes["sequence"]):  # one at a time, to bound the memory
        real = part.isel(sequence=[number])
        energy = real.energy[0].astype(np.float64)
        full = real.tokens.values[0] == width
        prompts = select(
            np.sqrt(energy.cumsum("window").isel(window=np.array(counts) - 1)), density
        )
        best = select(np.sqrt(energy), density)
        chosen, own = (
            m.transpose("layer", "window", "neuron").values.astype(np.float32)
            for m in (prompts, best)
        )
        energy = energy.transpose("layer", "window", "neuron").values
        total = energy.sum(-1)
        with np.errstate(invalid="ignore"):
            both = chosen @ own.swapaxes(1, 2)
            overlap = both / (2 * own.sum(-1).max(-1)[:, None, None] - both)
            kept = chosen.astype(np.float64) @ energy.swapaxes(1, 2) / total[:, None]
            oracle = (own * energy).sum(-1) / total
        for row, count in enumerate(counts):
            here = np.flatnonzero(full[count:])
            there = (number, slice(None), row, here)
            # (The index array comes first where numpy mixes it with a slice.)
            result["jaccard"][there] = overlap[:, row, count + here].T
            result["captured_energy"][there] = kept[:, row, count + here].T
            result["oracle"][there] = oracle[:, count + here].T
    dims = ("sequence", "layer", "prompt_length", "distance")
    texts = {
        "jaccard": "Jaccard overlap",
        "captured_energy": "captured energy",
        "oracle": "captured energy of the best in hindsight",
    }
    return xr.Dataset(
        {
            name: (dims, value, {"long_name": texts[name], "units": "1"})
            for name, value in result.items()
        },
        {
            "sequence": part.sequence,
            "layer": part.layer,
            "prompt_length": ("prompt_length", cuts, {"units": "tokens"}),
            "distance": ("distance", width * np.arange(sizes[3]), {"units": "tokens"}),
            "density": density,
        },
    )
