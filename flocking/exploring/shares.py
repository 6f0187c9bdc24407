"""What each neuron adds to a text's specificity."""

from __future__ import annotations

import numpy as np
import xarray as xr

from flocking.analysis import common_windows


def specific(recording: xr.Dataset, layer: int) -> np.ndarray:
    """Each neuron's part of the specificity of each text, its mean over the other texts.

    :func:`flocking.specificity` is ``(C - B) / (1 - B)``, and C and B are sums over neurons: of
    ``(M_j ** 2 - E_j) / (T (T - 1))``, for the mean of both texts, and of ``M_j M'_j / (T T')``.
    So the parts add up to the specificity. A part is large where a neuron is stronger in one text
    than in the others, whichever it is.

    Parameters
    ----------
    recording : xarray.Dataset
        In its canonical form, with ``mass``, ``energy`` and ``norm``.
    layer : int
        Its number.

    Returns
    -------
    ndarray of float64, (sequence, neuron)
        NaN for a text with fewer than two tokens.

    Raises
    ------
    ValueError
        If there is only one sequence, or one is shorter than the first window.
    """
    part = recording.isel(window=common_windows(recording), layer=layer)
    mass, energy = (
        part[name].sum("window", dtype=np.float64, skipna=False).transpose("sequence", ...).values
        for name in ("mass", "energy")
    )
    inside = part.token_window.isin(part.window) & (part.norm > 0)
    count = inside.sum("token").values.astype(np.float64)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        within = (mass**2 - energy) / (count * (count - 1))
        mean = mass / count
        weight = 1 / (1 - mean @ mean.T) / (len(mean) - 1)
        np.fill_diagonal(weight, 0)
        both = within * weight.sum(1, keepdims=True) + weight @ within
        return both / 2 - mean * (weight @ mean)
