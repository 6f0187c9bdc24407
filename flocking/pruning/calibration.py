"""The static statistic of a model: which neurons matter over many texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import named, statistic
from flocking.models import Text
from flocking.recording import record
from flocking.texts import expanded, passages, read_text, why_no_file


def global_statistic(
    model: PreTrainedModel,
    texts: Text,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> xr.DataArray:
    """A statistic over many texts: the root of the mean over texts of energy per token.

    The methods "static" and "global-local" of :func:`flocking.griffin` need it. (For the latter,
    GLASS, arXiv 2508.14302, takes this part from the model itself.)

    Parameters
    ----------
    model : transformers.PreTrainedModel
    texts : str, list of str or list of list of int
        A calibration set; other texts than those that are then evaluated.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    max_tokens : int or None
        Read at most this many tokens of each text, the first ones.
    batch_size : int
        Texts in one forward pass.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.DataArray, float64, (layer, neuron)
        Unitless; every text counts the same, whatever its length.

    Raises
    ------
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.
    TypeError, ValueError
        As :func:`flocking.record` raises them.

    Examples
    --------
    >>> texts = [text[:500] for text in flocking.passages()]
    >>> reference = flocking.global_statistic(
    ...     model, texts, tokenizer=tokenizer, progress=False
    ... )
    >>> reference.dims, reference.shape
    (('layer', 'neuron'), (2, 64))
    >>> pruned = flocking.griffin(model, method="static", reference=reference)
    """
    recording = record(
        model,
        texts,
        tokenizer=tokenizer,
        window=None,
        max_tokens=max_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    energy = statistic(recording)
    per_token = energy**2 / energy.tokens
    values = np.sqrt(per_token.mean("sequence"))
    return named(values, "statistic", "statistic over a calibration set")


def calibration_texts(source: str | Path | Sequence[str] | None = None) -> list[str]:
    """Texts to make a static statistic from.

    Parameters
    ----------
    source : path or list of str, optional
        A text file in UTF-8, a folder of ``.txt`` files with one text each, or the texts
        themselves; by default the packaged passages.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If there is no such file, there is no text in it, or it is not text.
    """
    if source is None:
        return list(passages())
    if not isinstance(source, str | Path):
        texts = list(source)
    else:
        path = expanded(Path(source))
        why = why_no_file(path)
        if why and why != "is a folder":
            raise ValueError(f"calibration: {path} {why}: give a text file or a folder.")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = [read_text(file) for file in files]
    if not any(texts):
        raise ValueError(f"calibration: there is no text in {source}: give some .txt files.")
    return texts
