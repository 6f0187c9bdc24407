"""Measures by layer, with chance and a control beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from flocking import analysis
from flocking.drawing import (
    CHANCE,
    LEVEL,
    MODEL,
    against,
    band,
    by_layer,
    guide,
    in_order,
    level,
    logarithmic,
    shown,
)
from flocking.plotting.given import (
    above,
    check_ax,
    compared,
    density_for,
    free,
    is_recording,
    leaving_no_figure,
    name_lines,
    refuse_empty,
    refuse_other_density,
    refuse_shared_heights,
    results,
    several,
    small,
    summary,
)
from flocking.recording import GENERATION

_SCORES = {
    "flocking_score": "flocking score",
    "rank_consistency": "rank consistency",
    "effective_neurons": "effective neurons",
}
_OVERLAPS = {  # label and marker
    "within": ("within a text", None),
    "between": ("between two texts", "o"),
    "jaccard": ("two selections", "^"),
}
_OF_GENERATION = "prompt and generation"
_MEASURES = {"jaccard", "between_sequence_overlap", "prompt_generation_overlap"}
_EQUAL = "all equal ($d_{ff}$)"
_NO_RANKS = "no ranks in the recording:\nmake it with record(..., ranks=True)"


@leaving_no_figure
def scores(
    data: xr.Dataset,
    *,
    control: xr.Dataset | None = None,
    axes: Iterable[Axes] | None = None,
) -> np.ndarray:
    """Draw flocking score, rank consistency and effective neurons, by layer.

    A score says little without what it is compared with: chance is 0 in the first two panels, and
    `control` is a network with random weights on the same texts, which often scores higher. Few
    effective neurons alone give a high score; rank consistency does not depend on how large they
    are.

    Parameters
    ----------
    data : xarray.Dataset
        A recording (made with ``ranks=True`` for rank consistency); or results:
        ``flocking_score``, ``effective_neurons`` and, if there are any, ``rank_consistency``, as
        the functions of these names return them, or averaged over sequences, as
        :func:`flocking.bootstrap` does.
    control : xarray.Dataset, optional
        The same of random weights, as which it is drawn: a recording of ``flocking.control(model)``
        on the same texts.
    axes : iterable of matplotlib.axes.Axes, optional
        Three to draw on. By default those of a new figure, one below the other.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, (3,)
        Flocking score, rank consistency and effective neurons; their figure is
        ``axes[0].figure``. Lines are means over sequences, with 95% bootstrap bands if there are
        several. Without ranks, the second panel says how to record them. The thin line in the
        third is ``d_ff``, where all neurons would have the same energy.

    Raises
    ------
    TypeError
        If `data` or `control` is neither a recording nor a Dataset of results, or `axes` are none.
    ValueError
        If results are missing; if there are not three axes, or they share their y axis.

    Examples
    --------
    >>> texts = flocking.passages()[:3]
    >>> recording = flocking.record(model, texts, ranks=True, max_tokens=64, progress=False)
    >>> random = flocking.control(model)
    >>> control = flocking.record(
    ...     random, texts, tokenizer=tokenizer, ranks=True, max_tokens=64, progress=False
    ... )
    >>> axes = flocking.plot.scores(recording, control=control)
    >>> [ax.get_ylabel() for ax in axes]
    ['flocking score', 'rank consistency', 'effective neurons']
    >>> axes[0].figure.savefig("scores.png")
    """
    panels = several(axes, len(_SCORES), (6.4, 6.4))
    refuse_shared_heights(panels)
    drawn = [
        (results(given, _scores_of, "flocking_score", "effective_neurons", of=name), style)
        for name, given, style in compared(data, control)
    ]
    for found, style in drawn:
        for ax, name in zip(panels, _SCORES, strict=True):
            if name in found:
                band(summary(found[name], "layer"), ax, **style)
        if style is MODEL:
            _draw_levels(panels, found)
    _draw_ranks_level(panels[1], [found for found, _ in drawn])
    for ax, label in zip(panels, _SCORES.values(), strict=True):
        ax.set_ylabel(label)
    logarithmic(panels[2], panels[2].yaxis)
    by_layer(panels)
    for ax in panels[:-1]:
        if _is_above(ax, panels[-1]):
            ax.set_xlabel("")
    if axes is None:
        above(panels[0])
        panels[2].legend(*_only(panels[2], _EQUAL), frameon=False)
    return panels


def _is_above(ax: Axes, other: Axes) -> bool:
    """Whether axes stand above others whose labels of the x axis are theirs, too."""
    places = ax.get_subplotspec(), other.get_subplotspec()
    if None in places or not ax.get_shared_x_axes().joined(ax, other):
        return False
    upper, lower = (place.colspan for place in places if place is not None)
    return upper == lower


def _scores_of(recording: xr.Dataset) -> xr.Dataset:
    functions = [analysis.flocking_score, analysis.effective_neurons]
    functions += [analysis.rank_consistency] if "rank" in recording else []
    return xr.Dataset({function.__name__: function(recording) for function in functions})


def _draw_levels(panels: np.ndarray, found: xr.Dataset) -> None:
    """Chance where there is one, and what the number of effective neurons can be."""
    guide(0, panels[0])
    if "d_ff" in found.coords:
        widths = found.d_ff if "layer" in found.d_ff.dims else found.d_ff.expand_dims("layer")
        layers = widths.layer.values if "layer" in widths.coords else np.arange(len(widths))
        order = in_order(layers)
        if len({*widths.values.tolist()}) == 1:
            level(int(widths[0]), panels[2], _EQUAL)
        else:
            look = {**against(panels[2], LEVEL), "label": _EQUAL, "drawstyle": "steps-mid"}
            panels[2].plot(layers[order], widths[order], **look)


def _draw_ranks_level(ax: Axes, drawn: list[xr.Dataset]) -> None:
    """Chance of rank consistency, and in which of what is drawn it is missing."""
    names = zip(("data", "control"), drawn, strict=False)
    lacking = [name for name, found in names if "rank_consistency" not in found]
    if len(lacking) < len(drawn):
        guide(0, ax)
    else:
        ax.set_yticks([])
    if lacking:
        which = "" if len(lacking) == len(drawn) else f"{lacking[0]}: "
        told = which + _NO_RANKS
        ax.text(0.5, 0.5, told, transform=ax.transAxes, ha="center", va="center")


def _only(ax: Axes, label: str) -> tuple[list[Any], list[str]]:
    """One entry for a legend."""
    entries = zip(*ax.get_legend_handles_labels(), strict=True)
    found = [(handle, text) for handle, text in entries if text == label]
    return [handle for handle, _ in found], [text for _, text in found]


@leaving_no_figure
def overlap(
    data: xr.Dataset | xr.DataArray,
    density: float | Iterable[float] | None = None,
    *,
    control: xr.Dataset | xr.DataArray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how much selections overlap within a text and between two, by layer.

    Parameters
    ----------
    data : xarray.Dataset or xarray.DataArray
        A recording, of two texts or more, or with a generation; or results: what
        :func:`flocking.between_sequence_overlap`, :func:`flocking.prompt_generation_overlap` or
        :func:`flocking.jaccard` returns, or its mean over sequences, as of
        :func:`flocking.bootstrap`.
    density : float or iterable of float
        Fraction of neurons kept in a recording, or one for each layer; 0.5 by default, or that of
        results which a recording is drawn beside. Results have theirs already.
    control : xarray.Dataset or xarray.DataArray, optional
        The same of random weights, as which it is drawn: a recording of ``flocking.control(model)``
        on the same texts.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes if they are empty, or those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Lines are Jaccard overlaps, means over sequences with 95% bootstrap bands if there are
        several: of the two halves of one text, and of one text's first half and another's second,
        if there are several texts of two windows or more; of the prompt's and the generation's
        selections, if there is a generation. The dotted line is chance.

    Raises
    ------
    TypeError
        If `data` or `control` is neither a recording nor results, or `ax` no axes.
    ValueError
        If there is no generation, and one text only or texts shorter than two windows; if results
        are no overlaps, or of another density than is given; or if the control is of another one.

    Examples
    --------
    >>> texts = flocking.passages()[:3]
    >>> recording = flocking.record(model, texts, window=16, max_tokens=65, progress=False)
    >>> ax = flocking.plot.overlap(recording)
    >>> ax.get_legend_handles_labels()[1]
    ['within a text', 'between two texts', 'chance']

    Of results, and of one's own:

    >>> halves = [flocking.statistic(recording, stop=33), flocking.statistic(recording, start=33)]
    >>> early, late = (flocking.select(half, density=0.25) for half in halves)
    >>> ax = flocking.plot.overlap(flocking.jaccard(early, late))
    """
    check_ax(ax)
    density = density_for(density, data, control)
    drawn = [
        (_overlaps(given, density, name), style) for name, given, style in compared(data, control)
    ]
    if len(drawn) == 2:
        refuse_other_density(drawn[0][0], drawn[1][0])
    ax = free(ax)
    for found, style in drawn:
        suffix = "" if control is None else f", {style['label'].partition(' (')[0]}"
        for name, values in found.items():
            label, marker = _OVERLAPS.get(str(name), (shown(str(name)), None))
            if _OF_GENERATION in values.attrs.get("long_name", ""):
                label = _OF_GENERATION
            look = {**style, "label": f"{label}{suffix}", "marker": marker, "ms": small()}
            band(summary(values, "layer"), ax, **look)
        if style is MODEL:
            _draw_chance(ax, found)
    ax.set(ylabel="Jaccard overlap", ylim=(0, 1))
    by_layer([ax])
    name_lines(ax)
    return ax


def _overlaps(data: object, density: float | Iterable[float], of: str) -> xr.Dataset:
    """Overlaps by name, from a recording or as given; `of` is the name of the argument."""
    if isinstance(data, xr.DataArray):
        return _refuse_others(data.to_dataset(name=data.name or "jaccard"), of)
    if not is_recording(data):
        found = results(data, analysis.between_sequence_overlap, of=of)
        known = [name for name in found if name in _OVERLAPS] or [*found]
        return _refuse_others(found[known], of)
    refuse_empty(data)
    parts = xr.Dataset()
    generated = GENERATION in np.atleast_1d(data.phase.values)
    if data.sizes.get("sequence", 1) > 1 or not generated:
        try:
            parts = analysis.between_sequence_overlap(data, density)
        except ValueError:  # texts too short; of anything else, the generation's overlap says so
            if not generated:
                raise
    if generated:
        parts["jaccard"] = analysis.prompt_generation_overlap(data, density)
    return parts


def _refuse_others(found: xr.Dataset, of: str) -> xr.Dataset:
    """Results, which must be overlaps: fractions, and of no other measure."""
    if not found.data_vars:
        raise ValueError(
            f"{of} has no overlaps: give a recording, or what flocking.jaccard returns."
        )
    for name, values in found.items():
        told = str(values.attrs.get("long_name", "overlap"))
        # (Bounds of an interval over few texts may lie outside.)
        estimates = values.sel(interval="estimate") if "interval" in values.dims else values
        other = name in {*analysis.__all__} - _MEASURES or "overlap" not in told
        if (
            other
            or values.dtype.kind not in "fiu"
            or bool(((estimates < 0) | (estimates > 1)).any())
        ):
            raise ValueError(
                f"{of} has {str(name)!r}, which is no overlap of selections, from 0 to 1: give "
                "what flocking.jaccard or flocking.between_sequence_overlap returns."
            )
    return found


def _draw_chance(ax: Axes, found: xr.Dataset) -> None:
    """Chance, if it is known at which density selections were made."""
    density = found.coords.get("density")
    if density is None:
        return
    if density.ndim == 0:
        guide(analysis.chance_jaccard(density.item()), ax)
    elif density.dims == ("layer",):
        order = in_order(found.layer.values)
        levels = analysis.chance_jaccard(density.values[order])
        ax.plot(found.layer.values[order], levels, **against(ax, CHANCE), label="chance")
