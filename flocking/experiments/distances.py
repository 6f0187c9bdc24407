"""What refreshed selections save: losses by distance from the prompt.

Called and scored as the experiments of :mod:`flocking.experiments.losses`. Here neurons are
selected once, from the prompt, or anew while the text goes on (``refresh`` of
:func:`flocking.griffin`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap, bounds
from flocking.experiments.common import (
    dimension,
    finished,
    prompts_before,
    said,
    same_length,
    source_of,
)
from flocking.experiments.intervals import by_name, perplexities, ratio
from flocking.experiments.twins import DENSITY, each_text
from flocking.feedforward import FeedForward
from flocking.models import special_tokens_around
from flocking.pruning import (
    compare_predictions,
    griffin,
    logits_side_by_side,
    require_prunable,
)
from flocking.recording import record

EVERY = [16, 64, 256]
_STEP = 64  # tokens that are averaged over; also after how many hindsight selects anew
_PROMPTS = [17, 257]


def loss_by_distance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 769,
    horizon: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Loss, agreement and divergence of the same tokens, where neurons are selected anew.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens, horizon : int
        Of each text, and how many of them are scored: the last, after a prompt of the 17 and of
        the 257 tokens that stand before them.
    seed : int
        Not used: nothing is drawn. (All experiments have it.)
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        At density 0.5, over 64 tokens around ``distance`` from the prompt's end: ``relative``,
        the ratio of the perplexity to the full model's, ``agreement``, the share of tokens whose
        likeliest prediction is the full model's, and ``divergence``, the Kullback-Leibler
        divergence from the full model's prediction in nats, all (interval, selection,
        prompt_length, distance). ``perplexity`` (interval, selection, prompt_length) of all
        scored tokens. ``remaining`` (interval, selection, prompt_length): in the second half of
        the scored tokens, the loss above the full model's, as a share of that of neurons chosen
        once.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they or `horizon` are too short.
    """
    if horizon < 2 * _STEP:
        raise ValueError(f"horizon={horizon}: give {2 * _STEP} tokens or more, to be scored.")
    require_prunable(model)
    ids, names = same_length(model, tokenizer, texts, tokens, 16, least=17 + 2 * _STEP)
    total, (opening, _) = len(ids[0]), special_tokens_around(tokenizer)
    horizon = min(horizon, total - _PROMPTS[0]) // _STEP * _STEP
    lengths = [length for length in _PROMPTS if length + horizon <= total]
    recording = record(model, ids, tokenizer=tokenizer, window=16, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))
    starts = range(total - horizon, total, _STEP)
    ahead = xr.concat(
        [analysis.statistic(recording, start=start, stop=start + _STEP) for start in starts],
        dimension("position", list(starts)),
    )

    def measure(number: int) -> xr.Dataset:
        static, own = others.isel(sequence=number), ahead.isel(sequence=number)
        rows = prompts_before(ids[number], total - horizon, lengths, opening)
        parts = [
            _measured(model, torch.tensor([row], device="cpu"), length, static, own)
            for row, length in zip(rows, lengths, strict=True)
        ]
        return xr.concat(parts, dimension("prompt_length", lengths))

    values = each_text(measure, names, progress)
    data = _averaged(values)
    source = source_of(recording)
    caption = _caption(data, source["model"], len(ids), horizon)
    return finished(data, source, names, ids, seed, caption, density=DENSITY, horizon=horizon)


def _measured(
    model: PreTrainedModel, ids: Tensor, prompt: int, static: xr.DataArray, ahead: xr.DataArray
) -> xr.Dataset:
    """Of one text: ``loss``, ``agreement`` and ``divergence``, (selection, distance)."""
    twins: dict[str, dict[str, Any]] = {
        "GRIFFIN": {},
        **{f"every {n}": {"refresh": n} for n in EVERY},
        "static": {"method": "static", "reference": static},
        "hindsight 64": {"method": _in_hindsight(ahead), "refresh": _STEP},
    }
    options = {name: {"density": DENSITY, **each} for name, each in twins.items()}
    return predictions_of(model, options, ids, prompt)


def predictions_of(
    model: PreTrainedModel, twins: dict[str, dict[str, Any]], ids: Tensor, prompt: int
) -> xr.Dataset:
    """What twins predict of one text after its prompt, compared with the full model's predictions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The full model.
    twins : dict
        Arguments of :func:`flocking.griffin`, by the twins' names. Twins are made, used and
        forgotten one after the other.
    ids : Tensor of int64, shape (1, token)
    prompt : int
        Tokens that are run in full, once for all.

    Returns
    -------
    xarray.Dataset, float64
        ``loss`` of each token after the prompt, in nats, ``agreement``, 1 where the likeliest
        prediction is the full model's and 0 elsewhere, and ``divergence``, the Kullback-Leibler
        divergence from the full model's prediction, in nats; all (selection, distance), the full
        model first. The prediction at distance 0 is the full model's under all of them.
    """
    made = (griffin(model, **options) for options in twins.values())
    found = logits_side_by_side(itertools.chain([model], made), ids, prompt)
    whole, rows = None, []
    for _, logits in found:
        whole = logits[0] if whole is None else whole
        rows.append(compare_predictions(whole, logits[0], ids[0, prompt:]))
    columns = {
        "loss": [-row.log_likelihood for row in rows],
        "agreement": [row.agrees for row in rows],
        "divergence": [row.divergence for row in rows],
    }
    labels = {"selection": ["full", *twins], "distance": np.arange(ids.shape[1] - prompt)}
    return xr.Dataset(
        {name: (("selection", "distance"), np.stack(each)) for name, each in columns.items()},
        labels,
    )


def _in_hindsight(ahead: xr.DataArray) -> Callable[..., Tensor]:
    """A method that selects, each time it is asked, from the next statistic (position, ...)."""
    asked: dict[int, int] = {}

    def method(statistic: Tensor, k: int, block: FeedForward, generator: object) -> Tensor:
        number = asked[block.layer] = asked.get(block.layer, -1) + 1
        # (A refresh at the very end is for tokens that are not scored.)
        place = min(number, ahead.sizes["position"] - 1)
        values = ahead.sel(layer=block.layer).isel(position=place).values[: block.d_ff]
        return torch.from_numpy(values.copy()).to(statistic).view_as(statistic)

    return method


def _averaged(values: xr.Dataset) -> xr.Dataset:
    """Intervals over texts, by distance and in the second half."""
    # The first token is the full model's whatever is selected.
    far = values.where(values.distance > 0).coarsen(distance=_STEP).mean()
    data = bootstrap(far[["agreement", "divergence"]])
    assert isinstance(data, xr.Dataset)
    data["relative"] = perplexities(far.loss).relative
    data["perplexity"] = perplexities(values.loss.mean("distance")).perplexity
    excess = values.loss - values.loss.sel(selection="full")
    late = excess.isel(distance=slice(values.sizes["distance"] // 2, None))
    data["remaining"] = _share(late.mean("distance"), "GRIFFIN")
    data.agreement.attrs = ratio("predictions that are the full model's")
    data.divergence.attrs = {"long_name": "divergence from the full model", "units": "nat"}
    return data.transpose("interval", "selection", "prompt_length", ...)


def _share(excess: xr.DataArray, whole: str, resamples: int = 2000) -> xr.DataArray:
    """Mean over texts, as a share of that of one selection, with intervals.

    Texts are drawn with replacement for both together, with intervals as of
    :func:`flocking.bootstrap`.
    """
    count = excess.sizes["sequence"]
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    means = excess.isel(sequence=xr.DataArray(drawn, dims=("draw", "text"))).mean("text")
    shares = means / means.sel(selection=whole)
    estimate = excess.mean("sequence")
    estimate = (estimate / estimate.sel(selection=whole)).reset_coords(drop=True)
    each = shares.transpose("draw", *estimate.dims).values
    low, high = bounds(estimate.values, each, count)
    parts = [estimate, estimate.copy(data=low), estimate.copy(data=high)]
    values = xr.concat(parts, dimension("interval", ["estimate", "low", "high"]))
    return values.assign_attrs(ratio("loss in the second half, as a share of GRIFFIN's"))


def _caption(data: xr.Dataset, name: str, count: int, horizon: int) -> str:
    shares = []
    for length in data.prompt_length.values:
        here = data.remaining.sel(prompt_length=length).drop_sel(selection=["full", "GRIFFIN"])
        each = (f"{label} {said(here, label)}" for label in here.selection.values)
        shares.append(f"after {length}, {', '.join(each)}")
    absolute = by_name(data.perplexity.isel(prompt_length=0))
    return (
        f"{name} at density {DENSITY} on the same {horizon} tokens of {count} texts, after prompts "
        f"of the {' and '.join(map(str, data.prompt_length.values))} tokens before them: "
        "perplexity relative to the full model's, and how many of its predictions are the full "
        f"model's, by distance, in {_STEP} tokens each, without the first, which is computed in "
        "full; 95% bootstrap bands over texts. GRIFFIN: neurons chosen once, from the prompt. "
        "Anew every N: the full model reads the last N tokens again, and neurons are selected "
        "from all so far. Hindsight: the same, from the next 64 tokens. Static: once, from the "
        f"other texts. Absolute perplexity, after {data.prompt_length.values[0]} tokens: "
        f"{absolute}. Loss above the full model's beyond {horizon // 2} tokens, as a share of "
        f"GRIFFIN's: {'; '.join(shares)}."
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {"loss_by_distance": loss_by_distance}
