"""Overlaps of selections at several densities, within a text and between two, by layer.

After a figure of Dong, Chen and Chi (2024, arXiv 2404.01365, section 3). Called as the experiments
of :mod:`flocking.experiments.activations`, of which ``sequence_overlap`` has one density, and
``generation`` several, of what the model writes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap
from flocking.experiments.common import (
    against_control,
    counted,
    dimension,
    finished,
    said,
    same_length,
)

DENSITIES = [0.1, 0.25, 0.5, 0.75]
OVERLAPS = ("within", "between")


def overlap_by_density(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Overlap of selections at several densities, of a text's prompt with what follows it.

    The prompt is the first half of a text after its first token. What follows is its second half,
    or another text's.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens : int
        Of each text, from the first on.
    seed : int
        Of the control's weights.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        ``within`` and ``between`` (interval, density, weights, layer): Jaccard overlap of the
        prompt's selection with that of what follows in the same text, and in another; ``gap``:
        their difference, paired. ``within_above_chance`` and ``between_above_chance``: the same on
        the scale (J - J0) / (1 - J0), on which chance is 0 and 1 is identical at each density.
        Means over layers are ``*_mean`` (interval, density, weights). ``chance`` (density): J0.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    ids, names = same_length(model, tokenizer, texts, tokens, 128, least=129)  # two halves

    def measure(recording: xr.Dataset) -> xr.Dataset:
        parts = [analysis.between_sequence_overlap(recording, density) for density in DENSITIES]
        return xr.concat(
            [part.drop_vars(["text", "module", "d_ff"], errors="ignore") for part in parts],
            dimension("density", DENSITIES),
        )

    values, source = against_control(
        model, tokenizer, ids, names, seed, progress, measure, window=64
    )
    data = _with_intervals(values)
    caption = _caption(data, source["model"], ids)
    return finished(data, source, names, ids, seed, caption)


def _with_intervals(values: xr.Dataset) -> xr.Dataset:
    """All overlaps, also above chance, by layer and over all layers, with intervals over texts."""
    own = values.within
    gap = (own + own.rename(sequence="other")) / 2 - values.between  # as specificity is
    values = values.assign(gap=gap)
    means = values.mean("layer")
    data = bootstrap(values.merge(means.rename({name: f"{name}_mean" for name in means})))
    chance = xr.DataArray(analysis.chance_jaccard(DENSITIES), {"density": DENSITIES}, ("density",))
    for name in OVERLAPS:
        data[f"{name}_above_chance"] = _above(data[name], chance)
        data[f"{name}_above_chance_mean"] = _above(data[f"{name}_mean"], chance)
    for label, variable in data.items():
        scale = ", chance 0" if "above_chance" in str(label) else ""
        variable.attrs = {"long_name": f"Jaccard overlap{scale}", "units": "1"}
    for name in ("gap", "gap_mean"):
        data[name].attrs["long_name"] = "overlap within a text minus that between two"
    return data.assign(chance=chance).transpose("interval", "density", "weights", "layer")


def _above(overlap: xr.DataArray, chance: xr.DataArray) -> xr.DataArray:
    """On the scale where chance is 0 and identical selections are 1."""
    return (overlap - chance) / (1 - chance)


def _caption(data: xr.Dataset, name: str, ids: list[list[int]]) -> str:
    def at(density: float) -> str:
        here = data.sel(density=density)
        model, control = (
            f"{said(here.within_mean, weights)} within a text, {said(here.between_mean, weights)} "
            f"between two, difference {said(here.gap_mean, weights)}"
            for weights in data.weights.values
        )
        chance = float(here.chance)
        return f"At {density} (chance {chance:.2f}), model {model}; random weights {control}."

    def above(weights: str) -> str:
        values = data.between_above_chance_mean.sel(weights=weights)
        return ", ".join(said(values, density) for density in values.density.values)

    half = (len(ids[0]) - 1) // 2
    return (
        f"Overlap (Jaccard) of the neurons that {name} keeps for the first {half} tokens of a text "
        f"with those that it keeps for the {half} that follow, in the same text or in another, at "
        f"densities {', '.join(map(str, data.density.values))}; {counted(ids)}, the first token "
        "left out, with 95% bootstrap bands. Means over layers. "
        f"{' '.join(at(density) for density in data.density.values)} Chance, density / (2 - "
        "density), grows with density: on the scale where it is 0, and 1 is identical, the "
        f"overlaps between two texts are, by density, model {above('trained')}; random weights "
        f"{above('control')}."
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {
    overlap_by_density.__name__: overlap_by_density
}
