"""The static statistic of a model: which neurons matter over many texts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.metrics import named
from flocking.overlap import statistic
from flocking.recording import record


def global_statistic(
    model: PreTrainedModel,
    texts: str | Iterable[str] | Iterable[Iterable[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> xr.DataArray:
    """The statistic that texts have in common: root of the mean over them of energy per token.

    What a static selection ("static" in :func:`flocking.griffin`) is made from, and the global
    part of global-local selection (which GLASS, arXiv 2508.14302, takes from the model itself).

    Parameters
    ----------
    model : transformers.PreTrainedModel
    texts : str, list of str or list of list of int
        A calibration set; other texts than those that are then evaluated.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for text, not for token ids.
    batch_size : int
        Texts in one forward pass.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.DataArray, float64, (layer, neuron)
        Unitless; every text counts the same, however long.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    """
    recording = record(
        model, texts, tokenizer=tokenizer, window=None, batch_size=batch_size, progress=progress
    )
    energy = statistic(recording)
    per_token = energy**2 / energy.tokens
    values = np.sqrt(per_token.mean("sequence"))
    return named(values, "statistic", "statistic over a calibration set")
