"""How well a prompt's selection serves the text that follows it, by the length of the prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import xarray as xr

from flocking.analysis.chunks import by_chunk, measure
from flocking.analysis.densities import density_by_layer
from flocking.analysis.overlap import overlap_of_all
from flocking.analysis.ranges import edge_at, refuse_gaps, windows_of
from flocking.analysis.selection import by_layer_of, kept_neurons, reached
from flocking.recording import FIRST, PROMPT

_DRIFT_DIMS = ("sequence", "layer", "prompt_length", "distance")
_DRIFT = {
    "jaccard": "Jaccard overlap",
    "captured_energy": "captured energy",
    "oracle": "captured energy of the best in hindsight",
}


@measure("energy", "tokens", "start")
def drift(
    recording: xr.Dataset,
    density: float | Iterable[float] = 0.5,
    *,
    prompt_lengths: Iterable[int] | None = None,
) -> xr.Dataset:
    """How well a prompt's selection serves the text that follows, by prompt length and distance.

    Each text is cut in two at every prompt length. The selection from the part before the cut (the
    first token included) is compared with each later window. All from one recorded pass.

    Parameters
    ----------
    recording : xarray.Dataset
        From ``flocking.record(..., window=16)``, say. Only its prompt phase is used.
    density : float or iterable of float
        Fraction of neurons kept, or one for each layer.
    prompt_lengths : iterable of int, optional
        Tokens before the cut, edges of windows; all of them by default.

    Returns
    -------
    xarray.Dataset, float64, (sequence, layer, prompt_length, distance)
        ``jaccard`` with the selection from the later window itself (which is noisy, since it is
        made from few tokens, so that this stays below 1 even without drift), where experts of a
        mixture that had no token before the cut or in the window are left out; ``captured_energy``
        of the later window; and ``oracle``, the most that a selection made in hindsight could
        capture. ``distance`` is from the cut to the start of the later window, in tokens. NaN
        after the end of a sequence, and where its last window is not full.

    Raises
    ------
    TypeError
        If `recording` is not a recording, `density` is neither a number nor several, or
        `prompt_lengths` is not a list of numbers.
    ValueError
        If `recording` has a part of the neurons, no energy or no prompt, lacks the window of the
        first token or one between two others, or has fewer than three windows of prompt; if a
        density is not in (0, 1] or keeps no neuron, or there are as many as neither one nor the
        layers, or they are of other layers; if there is no prompt length, or one is not the edge of
        a window or leaves no prompt or no window after it.

    Examples
    --------
    >>> texts = [passage[:400] for passage in flocking.passages()[:2]]
    >>> recording = flocking.record(model, texts, window=16, progress=False)
    >>> values = flocking.drift(recording, density=0.5, prompt_lengths=[17, 33])
    >>> list(values)
    ['jaccard', 'captured_energy', 'oracle']
    >>> values.jaccard.dims
    ('sequence', 'layer', 'prompt_length', 'distance')
    >>> values.distance.values[:3].tolist()
    [0, 16, 32]
    """
    windows, starts, stops = windows_of(recording, PROMPT)
    edges = [*starts, stops[-1]]
    if recording.phase.values[windows[0]] != FIRST:
        raise ValueError(
            "the recording's window of the first token is missing: give drift all windows."
        )
    refuse_gaps(recording, windows)
    if len(windows) < 3:
        raise ValueError(
            f"expected three windows of prompt or more, got {len(windows)}: record with a smaller "
            "window."
        )
    part = recording.isel(window=windows)
    width = edges[2] - edges[1]
    if prompt_lengths is not None and not isinstance(prompt_lengths, Iterable):
        raise TypeError(f"prompt_lengths={prompt_lengths!r}: give a list of numbers, as in [17].")
    cuts = edges[1:-1] if prompt_lengths is None else list(prompt_lengths)
    counts = [edge_at("prompt_lengths", length, edges) for length in cuts]
    if not counts or not all(0 < count < len(windows) for count in counts):
        raise ValueError(f"prompt_lengths={cuts}: each must leave a prompt and a window after it.")
    by_layer = density_by_layer(density, part.sizes["layer"], part.layer.values.tolist())
    distances = len(windows) - min(counts)
    result = by_chunk(
        functools.partial(_drift, counts=counts),
        part.energy.variable,
        xr.Variable(("sequence", "window"), part.tokens.values == width),
        *by_layer_of(part, by_layer),
        inner=[["window", "neuron"], ["window"], [], [], []],
        outer=["measure", "prompt_length", "distance"],
        sizes={"measure": len(_DRIFT), "prompt_length": len(cuts), "distance": distances},
        dtype=np.float64,
    )
    return xr.Dataset(
        {
            name: (_DRIFT_DIMS, result.isel(measure=n).data, {"long_name": text, "units": "1"})
            for n, (name, text) in enumerate(_DRIFT.items())
        },
        {
            "sequence": part.sequence,
            "layer": part.layer,
            "prompt_length": ("prompt_length", cuts, {"units": "tokens"}),
            "distance": ("distance", width * np.arange(distances), {"units": "tokens"}),
            "density": by_layer[0] if len({*by_layer}) == 1 else ("layer", by_layer),
        },
    )


def _drift(
    energy: np.ndarray,
    full: np.ndarray,
    *of_layers: np.ndarray,
    counts: list[int],
) -> np.ndarray:
    """The measures of drift, (sequence, layer, measure, cut, distance); NaN where there is none.

    Parameters
    ----------
    energy : ndarray, (sequence, layer, window, neuron)
    full : ndarray of bool, (sequence, 1, window)
        Windows that have all their tokens.
    *of_layers : ndarray, (layer,)
        Density, d_ff and number of experts of each layer.
    counts : list of int
        Windows before each cut.
    """
    windows = energy.shape[2]
    sizes = len(_DRIFT), len(counts), windows - min(counts)
    result = np.full((*energy.shape[:2], *sizes), np.nan)
    for number, values in enumerate(energy):  # one sequence at a time, to limit the memory
        measures = _serving(values.astype(np.float64), counts, *of_layers)
        for row, count in enumerate(counts):
            here = np.flatnonzero(full[number, 0, count:])
            for measure_number, found in enumerate(measures):
                result[number, :, measure_number, row, here] = found[:, row, count + here].T
    return result


def _serving(
    energy: np.ndarray, counts: list[int], *of_layers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The measures of drift for one sequence, each (layer, cut, window), as `_DRIFT` has them.

    Parameters
    ----------
    energy : ndarray of float64, (layer, window, neuron)
    counts : list of int
        Windows before each cut.
    *of_layers : ndarray, (layer,)
        Density, d_ff and number of experts of each layer.
    """
    prompts = np.nancumsum(energy, axis=1)[:, np.array(counts) - 1]
    chosen, own = (kept_neurons(values**0.5, *of_layers) for values in (prompts, energy))
    parts = (reached(values, *of_layers[1:]) for values in (prompts, energy))
    overlap = overlap_of_all(chosen, next(parts), own, next(parts))
    total = energy.sum(-1)
    with np.errstate(invalid="ignore"):
        kept = chosen.astype(np.float64) @ energy.swapaxes(1, 2) / total[:, None]
        oracle = (own * energy).sum(-1) / total
    return overlap, kept, np.broadcast_to(oracle[:, None], kept.shape)
