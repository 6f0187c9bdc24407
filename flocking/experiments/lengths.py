"""A grid of losses: prompts of growing length, and the tokens after them up to growing distances.

After a figure of Dong, Chen and Chi (2024, arXiv 2404.01365), which has the lengths of prompt and
generation along its sides. Called and scored as the experiments of
:mod:`flocking.experiments.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap
from flocking.experiments.common import (
    dimension,
    finished,
    prompts_before,
    said,
    same_length,
    source_of,
)
from flocking.experiments.distances import predictions_of
from flocking.experiments.intervals import by_name, exponential, perplexities, ratio
from flocking.experiments.twins import DENSITY, each_text, twins_of
from flocking.models import special_tokens_around
from flocking.pruning import require_prunable
from flocking.recording import record

PROMPTS = [17, 65, 257, 1025]
HORIZONS = [16, 64, 256, 512]
SELECTIONS = ["global-local", "static", "GRIFFIN", "random"]
_WINDOW = 16


def loss_by_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 1537,
    horizon: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Loss, agreement and divergence by length of the prompt and of what is scored after it.

    What is scored begins at the same token of a text after all prompts, which are the 17, 65, 257,
    ... tokens that stand before it, and ends after 16, 64, 256, ... tokens. So numbers after
    different prompts are of the same tokens, and those of a longer horizon are of the same tokens
    and more. The first token is left out: it is computed in full, whatever is selected, and would
    make short horizons look better.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens, horizon : int
        Of each text, and the longest of ``HORIZONS`` that is scored, its last tokens; at most half
        of them.
    seed : int
        Of random selections.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        At density 0.5, the first four (interval, selection, prompt_length, horizon):
        ``perplexity``; ``relative``, its ratio to the full model's on the same tokens;
        ``agreement``, the share of tokens whose likeliest prediction is the full model's;
        ``divergence``, the Kullback-Leibler divergence from its prediction, in nats; and
        ``over_static`` (interval, prompt_length, horizon), GRIFFIN's perplexity to that of the
        static selection. ``by_prompt`` (interval, selection, horizon): the ratio to the full
        model's after the longest prompt, to that after the shortest. ``by_horizon`` (interval,
        selection, prompt_length): that over the longest horizon, to that over the shortest.
        ``divergence_by_prompt`` and ``divergence_by_horizon``: the same of the divergence, as
        differences in nats.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they or `horizon` are too short.
    """
    if horizon < HORIZONS[0]:
        raise ValueError(f"horizon={horizon}: give {HORIZONS[0]} tokens or more, to be scored.")
    require_prunable(model)
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW)
    total, (opening, _) = len(ids[0]), special_tokens_around(tokenizer)
    horizons = [n for n in HORIZONS if n <= min(horizon, (total - 1) // 2)]
    lengths = [n for n in PROMPTS if n + horizons[-1] <= total]
    recording = record(model, ids, tokenizer=tokenizer, window=None, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))

    def measure(number: int) -> xr.Dataset:
        twins = twins_of(SELECTIONS, others.isel(sequence=number), None, seed + number)
        rows = prompts_before(ids[number], total - horizons[-1], lengths, opening)
        parts = [
            predictions_of(model, twins, torch.tensor([row], device="cpu"), length)
            for row, length in zip(rows, lengths, strict=True)
        ]
        return _up_to(xr.concat(parts, dimension("prompt_length", lengths)), horizons)

    data = _with_intervals(each_text(measure, names, progress))
    source = source_of(recording)
    caption = _caption(data, source["model"], len(ids))
    return finished(data, source, names, ids, seed, caption, density=DENSITY)


def _up_to(values: xr.Dataset, horizons: list[int]) -> xr.Dataset:
    """Means over the tokens of each horizon, without the first token."""
    parts = [values.sel(distance=slice(1, length - 1)).mean("distance") for length in horizons]
    return xr.concat(parts, dimension("horizon", horizons))


def _with_intervals(values: xr.Dataset) -> xr.Dataset:
    """All numbers with intervals over texts, of ratios on the same texts."""
    data = perplexities(values.loss)
    data = data.merge(bootstrap(values[["agreement", "divergence"]]))
    excess = values.loss - values.loss.sel(selection="full", drop=True)
    for dim, name in (("prompt_length", "by_prompt"), ("horizon", "by_horizon")):
        data[name] = exponential(bootstrap(_change(excess, dim)))
        data[name].attrs = ratio(f"ratio at the longest {dim} to that at the shortest")
        data[f"divergence_{name}"] = bootstrap(_change(values.divergence, dim))
        told = f"divergence at the longest {dim} minus that at the shortest"
        data[f"divergence_{name}"].attrs = {"long_name": told, "units": "nat"}
    data.agreement.attrs = ratio("predictions that are the full model's")
    data.divergence.attrs = {"long_name": "divergence from the full model", "units": "nat"}
    return data.transpose("interval", "selection", "prompt_length", "horizon")


def _change(values: xr.DataArray, dim: str) -> xr.DataArray:
    """From the shortest to the longest."""
    return values.isel({dim: -1}, drop=True) - values.isel({dim: 0}, drop=True)


def _caption(data: xr.Dataset, name: str, count: int) -> str:
    lengths, horizons = data.prompt_length.values, data.horizon.values
    corners = [
        f"after {length}, over {horizon}, {by_name(data.perplexity.isel(at))}"
        for at, length, horizon in (
            ({"prompt_length": 0, "horizon": -1}, lengths[0], horizons[-1]),
            ({"prompt_length": -1, "horizon": -1}, lengths[-1], horizons[-1]),
        )
    ]

    def each(variable: str, label: str) -> str:
        values = data[variable].sel(selection=label)
        (dim,) = {"prompt_length", "horizon"} & {*values.dims}
        return ", ".join(f"{at}: {said(values, at)}" for at in values[dim].values)

    def divergences(label: str) -> str:
        values = data.divergence.sel(selection=label, horizon=horizons[-1])
        return f"{label} {', '.join(f'{at}: {said(values, at)}' for at in lengths)}"

    def changes(variable: str) -> str:
        return "; ".join(f"{label} {each(variable, label)}" for label in ("GRIFFIN", "static"))

    return (
        f"{name} at density {DENSITY} on {count} texts, after prompts of "
        f"{', '.join(map(str, lengths))} tokens, over the next {', '.join(map(str, horizons))}, "
        "which begin at the same token of a text after all prompts; without the first, which is "
        "computed in full. Times the full model's perplexity on the same tokens; GRIFFIN over "
        "static, where numbers in bold differ from 1 by their own 95% bootstrap interval over "
        "texts; and how many of GRIFFIN's predictions are the full model's. Static: from the other "
        "texts; global-local: by the mean of the prompt's and the other texts' ranks. Absolute "
        f"perplexity: {'; '.join(corners)}. The ratio to the full model's after {lengths[-1]} "
        f"tokens to that after {lengths[0]}, by horizon: {changes('by_prompt')}. Over "
        f"{horizons[-1]} tokens to that over {horizons[0]}, by prompt: {changes('by_horizon')}. "
        f"Divergence from the full model over {horizons[-1]} tokens, in nats: "
        f"{'; '.join(map(divergences, ('GRIFFIN', 'static')))}; minus that over {horizons[0]}: "
        f"{changes('divergence_by_horizon')}."
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {loss_by_lengths.__name__: loss_by_lengths}
