"""How well a prompt's selection serves what follows."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

from flocking import analysis
from flocking.drawing import BLUE, CONTROL, HINDSIGHT, band, guide, is_dark, known
from flocking.plotting.given import (
    above,
    density_for,
    is_recording,
    leaving_no_figure,
    listed,
    refuse_other_density,
    results,
    several,
    small,
    summary,
)
from flocking.recording import PROMPT, canonical

_MOST = 4  # prompt lengths that are told apart by shade and marker


@leaving_no_figure
def drift(
    data: xr.Dataset,
    density: float | Iterable[float] | None = None,
    *,
    prompt_lengths: Iterable[int] | None = None,
    control: xr.Dataset | None = None,
    axes: Iterable[Axes] | None = None,
) -> np.ndarray:
    """Draw how a prompt's selection serves the text that follows, by distance from its end.

    Parameters
    ----------
    data : xarray.Dataset
        A recording with windows, as of ``record(..., window=16)``; or results: what
        :func:`flocking.drift` returns, or its mean over sequences and layers.
    density : float or iterable of float
        Fraction of neurons kept in a recording, or one for each layer; 0.5 by default, or that of
        results which a recording is drawn beside. Results have theirs already.
    prompt_lengths : iterable of int, optional
        Tokens of the prompt, edges of windows: at most four. By default up to four, from the
        shortest to one of half the text.
    control : xarray.Dataset, optional
        The same of random weights, as which it is drawn; after the longest prompt.
    axes : iterable of matplotlib.axes.Axes, optional
        Two to draw on. By default those of a new figure, one below the other.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, (2,)
        Captured energy, and the Jaccard overlap with what each later window would select itself;
        their figure is ``axes[0].figure``. Lines are means over layers and sequences, stronger
        after longer prompts, with 95% bootstrap bands if there are several sequences. "Best in
        hindsight" is the most of the energy of `data` that any selection of this size could
        capture, after the longest prompt. It does not bound the control, which may lie above it.
        Dotted: chance, its mean over layers where densities differ.

    Raises
    ------
    TypeError
        If `data` or `control` is neither a recording nor a Dataset of results, `prompt_lengths` are
        no numbers, or `axes` are none.
    ValueError
        If there are fewer than three windows of prompt, a length is not the edge of a window or
        not among those of results, more than four are given, the control is of another density, or
        there are not two axes.

    Examples
    --------
    >>> texts = flocking.passages()[:2]
    >>> recording = flocking.record(model, texts, window=16, max_tokens=129, progress=False)
    >>> axes = flocking.plot.drift(recording, prompt_lengths=[17, 65])
    >>> axes[0].get_legend_handles_labels()[1]
    ['best in hindsight', 'prompt of 17', 'prompt of 65', 'chance']
    """
    wanted = _lengths(prompt_lengths)
    density = density_for(density, data, control)
    panels = several(axes, 2, (6.4, 5.2))
    found = _drifts(data, density, wanted)
    lengths = np.atleast_1d(found.prompt_length.values).tolist()
    if len(lengths) > _MOST:
        raise ValueError(
            f"data has {len(lengths)} prompt lengths: draw at most {_MOST}, as in "
            f"prompt_lengths={lengths[:2]}."
        )
    other = None
    if control is not None:
        told = "prompt_length" in found.coords and (
            is_recording(control) or "prompt_length" in getattr(control, "coords", ())
        )
        other = _drifts(control, density, lengths[-1:] if told else None, "control")
        refuse_other_density(found, other)
    energy, overlaps = panels
    if "oracle" in found:
        band(_far(found["oracle"].isel(prompt_length=-1)), energy, **HINDSIGHT)
    palette = sns.dark_palette if is_dark(energy) else sns.light_palette
    shades = palette(BLUE, len(lengths) + 1)[1:]
    for number, (length, shade, marker) in enumerate(zip(lengths, shades, "os^D", strict=False)):
        style = {"color": shade, "marker": marker, "ms": small(), "label": f"prompt of {length:g}"}
        for ax, name in ((energy, "captured_energy"), (overlaps, "jaccard")):
            band(_far(found[name].isel(prompt_length=number)), ax, **style)
    if other is not None:
        for ax, name in ((energy, "captured_energy"), (overlaps, "jaccard")):
            band(_far(other[name].isel(prompt_length=-1)), ax, **CONTROL)
    if (kept := found.coords.get("density")) is not None and kept.dims in ((), ("layer",)):
        by_layer = np.atleast_1d(kept.values)
        guide(float(by_layer.mean()), energy)
        guide(float(np.mean(analysis.chance_jaccard(by_layer))), overlaps)
    energy.set_ylabel("captured energy")
    overlaps.set_ylabel("Jaccard overlap")
    overlaps.set_xlabel("tokens after the prompt")
    if axes is None:
        above(energy, ncols=2)
    return panels


def _lengths(given: object) -> list[Any] | None:
    """Prompt lengths that were asked for, each once."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"prompt_lengths={given!r}: give a list of numbers, as in [17].")
    lengths = list(given)
    for length in lengths:
        if isinstance(length, bool | np.bool_) or not isinstance(length, Real):
            raise TypeError(f"prompt_lengths={lengths}: {length!r} is not a number of tokens.")
    if not 0 < len({*lengths}) <= _MOST:
        raise ValueError(f"prompt_lengths={lengths}: give one to {_MOST} numbers of tokens.")
    return sorted({*lengths})


def _drifts(
    data: object, density: float | Iterable[float], lengths: list[Any] | None, name: str = "data"
) -> xr.Dataset:
    """Results of :func:`flocking.drift` along prompt lengths, the shortest first."""

    def measured(recording: xr.Dataset) -> xr.Dataset:
        cuts = _cuts(recording) if lengths is None else lengths
        if name == "control" and lengths is not None:
            _refuse_shorter(recording, lengths)
        return analysis.drift(recording, density, prompt_lengths=cuts)

    found = results(data, measured, "captured_energy", "jaccard", of=name)
    if "distance" not in found.dims:
        raise ValueError(f"{name} has no dimension 'distance': give what flocking.drift returns.")
    if "prompt_length" not in found.dims:
        found = found.expand_dims("prompt_length")
    known_lengths = found["prompt_length"].values.tolist()
    if lengths is not None and (unknown := [n for n in lengths if n not in known_lengths]):
        raise ValueError(
            f"prompt_lengths={lengths}: {unknown[0]!r} is not among those of {name} "
            f"({listed(known_lengths)})."
        )
    if lengths is not None:
        found = found.isel(prompt_length=[known_lengths.index(n) for n in lengths])
    if not found.sizes["prompt_length"]:
        raise ValueError(f"there is no prompt length to draw: {name} has none left.")
    return found.isel(prompt_length=np.argsort(found["prompt_length"].values, kind="stable"))


def _refuse_shorter(control: xr.Dataset, lengths: list[Any]) -> None:
    """Refuse a control without a window that begins where the longest prompt of the model ends."""
    starts = canonical(control, "energy", "start").recording.start.values
    if lengths[-1] not in starts:
        raise ValueError(
            f"control has no window that begins after {lengths[-1]} tokens, where the model's "
            "longest prompt ends: record both on the same texts, with the same windows."
        )


def _cuts(recording: xr.Dataset) -> list[int] | None:
    """Up to four prompt lengths that leave half of the prompt phase, each some times longer."""
    whole = canonical(recording, "energy", "tokens", "start").recording
    starts = whole.start.values[whole.phase.values == PROMPT]
    early = starts[1 : 1 + max(1, len(starts) // 2)]
    if not len(early):
        return None  # too few windows, as the measure says
    places = np.geomspace(1, len(early), _MOST).round().astype(int) - 1
    return [int(start) for start in early[np.unique(places)]]


def _far(values: xr.DataArray) -> xr.DataArray:
    """Along distances, over layers and sequences, without those that no text reaches."""
    if "layer" in values.dims:
        values = values.mean("layer")
    return known(summary(values, "distance"))
