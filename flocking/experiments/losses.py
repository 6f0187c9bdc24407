"""Experiments on GRIFFIN: likelihoods of real text with the kept neurons alone.

They are called as those of :mod:`flocking.experiments.activations`. Scored is the loss (negative
log-likelihood, nats per token) of a text's tokens after a prompt, under the full model and under
twins that share one run of that prompt. The chance level is a random selection; a control with
random weights has nothing to lose. The control of GRIFFIN's selection is the static one, from the
other texts alone.

Averages do not say whether GRIFFIN's advantage over it is that of most texts or of a few:
captions list it text by text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap
from flocking.experiments.common import (
    dimension,
    finished,
    prompts_before,
    said,
    same_excerpts,
    same_length,
    source_of,
)
from flocking.experiments.intervals import (
    OVER_STATIC,
    between_excerpts,
    by_name,
    exponential,
    perplexities,
    rank_correlation,
    ratio,
)
from flocking.experiments.twins import (
    DENSITY,
    each_text,
    losses_and_energy,
    losses_of,
    twins_of,
)
from flocking.models import special_tokens_around
from flocking.pruning import griffin, require_prunable, side_by_side
from flocking.recording import record

DENSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
METHODS = [
    "hindsight",
    "global-local",
    "static",
    "GRIFFIN",
    "half-sampled",
    "sampled",
    "random",
    "magnitude",
]
_WINDOW = 16
_EXCERPTS = 3
_GROUPINGS = 4  # ways in which the texts are put together into batches
_BIN = 64  # tokens over which losses by distance are averaged
# The methods whose order is in question: without the one that knows the scored text, and those
# that know no text.
_CLOSE = [name for name in METHODS if name not in ("hindsight", "random", "magnitude")]


def loss_by_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 1409,
    horizon: int = 320,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity of the same tokens after prompts of growing length, and by distance.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens, horizon : int
        Of each text, and how many of them are scored, in whole windows of 16: the last, after a
        prompt of the 17, 65, 257, ... tokens that stand before them. At most half are scored.
    seed : int
        Of random selections.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection, prompt_length); ``over_static`` (interval, prompt_length), GRIFFIN's
        to that of the static selection; ``relative_far`` (interval, selection, prompt_length,
        distance) over 64 tokens around ``distance`` from the prompt's end, without the first one,
        which is computed in full; ``ageing`` (interval, prompt_length), GRIFFIN's ratio in the
        last 64 tokens to that in the first 64, NaN where fewer than 128 are scored.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they or `horizon` are too short.
    """
    if horizon < _WINDOW:
        raise ValueError(f"horizon={horizon}: give {_WINDOW} tokens or more, to be scored.")
    require_prunable(model)
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW)
    total, (opening, _) = len(ids[0]), special_tokens_around(tokenizer)
    horizon = min(horizon // _WINDOW, (total - 1) // (2 * _WINDOW)) * _WINDOW
    lengths = [n + 1 for n in (16, 64, 256, 1024) if n + 1 + horizon <= total]
    recording = record(model, ids, tokenizer=tokenizer, window=_WINDOW, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))
    later = analysis.statistic(recording, start=total - horizon)
    wanted = ["hindsight", "global-local", "static", "GRIFFIN", "random"]

    def measure(number: int) -> xr.DataArray:
        references = others.isel(sequence=number), later.isel(sequence=number)
        twins = twins_of(wanted, *references, seed=seed + number)
        rows = prompts_before(ids[number], total - horizon, lengths, opening)
        parts = [losses_of(model, twins, [row], n) for row, n in zip(rows, lengths, strict=True)]
        return xr.concat(parts, dimension("prompt_length", lengths)).isel(sequence=0)

    losses = each_text(measure, names, progress)
    step = min(_BIN, horizon)
    data = perplexities(losses.mean("distance")).assign(_by_distance(losses, step))
    source = source_of(recording)
    caption = _caption_by_prompt(data, source["model"], len(ids), horizon, step, _vocabulary(model))
    return finished(data, source, names, ids, seed, caption, density=DENSITY, horizon=horizon)


def _by_distance(losses: xr.DataArray, step: int) -> dict[str, xr.DataArray]:
    """Ratios by distance from the prompt's end, and how GRIFFIN's ages."""
    pruned = losses.where(losses.distance > 0)
    far = pruned.coarsen(distance=step, boundary="trim").mean()
    excess = pruned.sel(selection="GRIFFIN") - pruned.sel(selection="full")
    first, last = (
        excess.isel(distance=part).mean("distance") for part in (slice(step), slice(-step, None))
    )
    ageing = exponential(bootstrap(last - first))
    if losses.sizes["distance"] < 2 * step:  # they have tokens in common
        ageing = xr.full_like(ageing, np.nan)
    ageing.attrs = ratio(f"GRIFFIN's ratio in the last {step} tokens to the first {step}")
    return {"relative_far": perplexities(far).relative, "ageing": ageing}


def _caption_by_prompt(
    data: xr.Dataset, name: str, count: int, horizon: int, step: int, vocabulary: int
) -> str:
    lengths = data.prompt_length.values
    over, ages = (
        ", ".join(f"{said(values, length)} after {length}" for length in lengths)
        for values in (data.over_static, data.ageing)
    )
    aged = f" GRIFFIN's ratio in the last {step} to that in the first {step}: {ages}."
    return (
        f"Perplexity of {name} at density {DENSITY}, relative to the full model's, on "
        f"the same {horizon} tokens of {count} texts, after prompts of the tokens before them; "
        f"95% bootstrap bands over texts. Absolute, after {lengths[0]} tokens: "
        f"{by_name(data.perplexity.isel(prompt_length=0))}. "
        f"After {lengths[-1]}: {by_name(data.perplexity.isel(prompt_length=-1))}. Hindsight: "
        "selected from the scored tokens; static: from the other texts; global-local: by the mean "
        f"of the prompt's and the other texts' ranks. GRIFFIN's over static's: {over}. "
        f"Guessing would give {vocabulary:,}. Right: by distance, in {step} tokens each, their "
        f"middle marked, without the first, which is computed in full."
        f"{aged if data.ageing.notnull().all() else ''}"
    )


def loss_by_density(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity at densities from 0.1 to 1.

    Parameters are those of :func:`loss_by_prompt`; the first half of `tokens` is the prompt.

    Returns
    -------
    xarray.Dataset
        ``perplexity`` and ``relative``, the ratio to the full model's, both (interval, selection,
        density), and ``over_static`` (interval, density), GRIFFIN's to that of the static
        selection.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    require_prunable(model)
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW)
    prompt = _half(ids)
    recording = record(model, ids, tokenizer=tokenizer, window=None, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))

    wanted = ["static", "GRIFFIN", "random"]

    def measure(number: int) -> xr.DataArray:
        reference = others.isel(sequence=number)
        twins = {
            f"{name} {density}": twin
            for density in DENSITIES
            for name, twin in twins_of(wanted, reference, None, seed + number, density).items()
        }
        losses = losses_of(model, twins, [ids[number]], prompt)[:, 0].mean("distance")
        parts = [
            losses.sel(selection=["full", *(f"{name} {density}" for name in wanted)])
            for density in DENSITIES
        ]
        parts = [part.assign_coords(selection=["full", *wanted]) for part in parts]
        return xr.concat(parts, dimension("density", DENSITIES))

    data = perplexities(each_text(measure, names, progress))
    source = source_of(recording)
    absolute = (f"{d}: {by_name(data.perplexity.sel(density=d))}" for d in (0.5, 0.7, 0.9))
    over = (f"{said(data.over_static, d)} at {d}" for d in (0.3, 0.5, 0.7, 0.9))
    caption = (
        f"Perplexity of {source['model']}, relative to the full model's, on "
        f"{len(ids[0]) - prompt} tokens after prompts of {prompt}, by density, over {len(ids)} "
        "texts with 95% bootstrap bands. Absolute, at density "
        f"{'. At '.join(absolute)}. Static: from the other texts; GRIFFIN's over static's: "
        f"{', '.join(over)}. Guessing would give {_vocabulary(model):,}. Right: that ratio."
    )
    return finished(data, source, names, ids, seed, caption, prompt=prompt)


def loss_by_method(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity by method, and whether the energy that kept neurons capture predicts the loss.

    Parameters are those of :func:`loss_by_density`; `tokens` is the length of an excerpt, of
    which each text gives up to three.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection); ``excess`` and ``captured`` (text,
        excerpt, selection), the loss above the full model's, in nats per token, and the share of
        the scored tokens' energy in the full model that the kept neurons have, mean over layers;
        Spearman's rank correlation of the two (interval): ``between_methods`` on one excerpt,
        ``between_close_methods``, those without hindsight, random and magnitude, which differ
        most by construction, and ``between_excerpts`` under GRIFFIN; ``over_static_by_text``
        (text), GRIFFIN's perplexity to that of the static selection.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    require_prunable(model)
    excerpts, names, count = same_excerpts(
        model, tokenizer, texts, tokens, _WINDOW, most=_EXCERPTS, least=65
    )
    prompt = _half(excerpts)
    recording = record(model, excerpts, tokenizer=tokenizer, window=_WINDOW, progress=progress)
    energy = analysis.statistic(recording) ** 2
    later = analysis.statistic(recording, start=prompt)
    text_of = np.arange(len(excerpts)) // count

    def measure_excerpt(number: int) -> xr.Dataset:
        # The static selection is from the other texts, not from other excerpts of the same one.
        others = np.sqrt(energy.isel(sequence=text_of != text_of[number]).mean("sequence"))
        own = later.isel(sequence=number)
        twins = twins_of(METHODS, others, own, seed + number)
        losses, captured = losses_and_energy(model, twins, [excerpts[number]], prompt, own)
        return xr.Dataset({"loss": losses[:, 0].mean("distance"), "captured": captured})

    def measure(number: int) -> xr.Dataset:
        parts = [measure_excerpt(count * number + n) for n in range(count)]
        return xr.concat(parts, dimension("excerpt", list(range(count))))

    data = _against_energy(each_text(measure, names, progress))
    source = source_of(recording)
    tokens_of = {"prompt": prompt, "scored": len(excerpts[0]) - prompt}
    caption = _caption_by_method(data, source["model"], tokens_of, _vocabulary(model))
    return finished(data, source, names, excerpts, seed, caption, density=DENSITY, prompt=prompt)


def _against_energy(values: xr.Dataset) -> xr.Dataset:
    """Perplexities, and how losses and captured energy, by text and excerpt, are correlated."""
    excess, captured = values.loss - values.loss.sel(selection="full"), values.captured
    by_selection = {"input_core_dims": [["selection"], ["selection"]], "vectorize": True}
    within, close = (
        xr.apply_ufunc(
            rank_correlation,
            captured.sel(selection=names),
            excess.sel(selection=names),
            **by_selection,
        )
        for names in (METHODS, _CLOSE)
    )
    under = [part.sel(selection="GRIFFIN") for part in (captured, excess)]
    by_text = excess.sel(selection="GRIFFIN") - excess.sel(selection="static")
    data = perplexities(values.loss.mean("excerpt")).assign(
        excess=excess.rename(sequence="text"),
        captured=captured.rename(sequence="text"),
        between_methods=bootstrap(within.mean("excerpt")),
        between_close_methods=bootstrap(close.mean("excerpt")),
        between_excerpts=between_excerpts(*under),
        over_static_by_text=np.exp(by_text.mean("excerpt")).rename(sequence="text"),
    )
    data.excess.attrs = {"long_name": "loss above the full model's", "units": "nat"}
    data.captured.attrs = {"long_name": "captured energy of the scored tokens", "units": "1"}
    data.over_static_by_text.attrs = ratio(OVER_STATIC)
    for name in ("methods", "close_methods", "excerpts"):
        long_name = f"rank correlation of captured energy and loss, between {name}"
        data[f"between_{name}"].attrs = {"long_name": long_name.replace("_", " "), "units": "1"}
    return data


def _caption_by_method(data: xr.Dataset, name: str, tokens: dict[str, int], vocabulary: int) -> str:
    by_text = data.over_static_by_text.sortby(data.over_static_by_text)
    listed = (f"{name} {value:.2f}" for name, value in by_text.to_series().items())
    texts, excerpts = data.sizes["text"], data.sizes["excerpt"]
    return (
        f"{name} at density {DENSITY}: perplexity, relative to the full model's, on "
        f"{tokens['scored']} tokens after prompts of {tokens['prompt']}, {excerpts} excerpts of "
        f"each of {texts} texts, with 95% bootstrap intervals over texts. Absolute: "
        f"{by_name(data.perplexity)}; guessing would give {vocabulary:,}. Hindsight: selected from "
        f"the scored tokens. GRIFFIN's over static's: {said(data.over_static)}; by text "
        f"{', '.join(listed)}. Below: the loss above the full model's "
        "against the energy of the scored tokens that the kept neurons capture (chance 0.5). "
        f"Spearman's rank correlation: {said(data.between_methods)} between the methods on one "
        f"excerpt, {said(data.between_close_methods)} without hindsight, random and magnitude; "
        f"{said(data.between_excerpts)} between the {texts * excerpts} excerpts under GRIFFIN "
        "alone."
    )


def loss_by_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity of GRIFFIN where the texts of a batch share one selection, by batch size.

    Parameters are those of :func:`loss_by_density`; `seed` is also that of the batches.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection, batch_size), of the full model, GRIFFIN, and the static selection,
        for all sizes that divide the number of texts. At 1 each text has its own selection, as with
        ``scope="sequence"``; only GRIFFIN's depends on the size. ``over_alone`` (interval,
        batch_size) is GRIFFIN's ratio to its own at size 1. Between 1 and all, each text is in
        four batches drawn at random; intervals are over texts, with these batches as they are.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    require_prunable(model)
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW)
    prompt, count = _half(ids), len(ids)
    recording = record(model, ids, tokenizer=tokenizer, window=None, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))
    random = np.random.default_rng(seed)
    twin = griffin(model, DENSITY)

    def shared(size: int) -> xr.DataArray:
        values = np.zeros(count)
        groupings = _GROUPINGS if 1 < size < count else 1
        for _ in range(groupings):
            for batch in random.permutation(count).reshape(-1, size):
                rows = torch.tensor([ids[number] for number in batch], device="cpu")
                ((_, scored),) = side_by_side([twin], rows, prompt)
                values[batch] -= scored[:, prompt - 1 :].double().mean(dim=1).cpu().numpy()
        labels = {"selection": ["GRIFFIN"], "sequence": names}
        return xr.DataArray(values[None] / groupings, labels, ("selection", "sequence"))

    sizes = [size for size in range(1, count + 1) if count % size == 0]
    bar = tqdm(sizes, desc="scoring", unit="batch size", disable=not progress)
    losses = xr.concat([shared(size) for size in bar], dimension("batch_size", sizes))

    def alone(number: int) -> xr.DataArray:
        static = twins_of(["static"], others.isel(sequence=number), None, seed)
        return losses_of(model, static, [ids[number]], prompt)[:, 0].mean("distance")

    baselines = each_text(alone, names, progress).expand_dims(batch_size=sizes)
    data = perplexities(xr.concat([baselines, losses], "selection"))
    shares = losses.sel(selection="GRIFFIN", drop=True)
    data["over_alone"] = np.exp(bootstrap(shares - shares.sel(batch_size=1, drop=True)))
    data.over_alone.attrs = ratio("GRIFFIN's perplexity over its own at batch size 1")
    source = source_of(recording)
    tokens_of = {"prompt": prompt, "scored": len(ids[0]) - prompt}
    caption = _caption_by_batch(data, source["model"], count, tokens_of)
    return finished(data, source, names, ids, seed, caption, density=DENSITY, prompt=prompt)


def _caption_by_batch(data: xr.Dataset, name: str, count: int, tokens: dict[str, int]) -> str:
    griffins, full, static = (
        data.perplexity.sel(selection=name) for name in ("GRIFFIN", "full", "static")
    )
    sizes = data.batch_size.values
    absolute = (f"{size}: {said(griffins, size, 0)}" for size in sizes)
    alone = (f"{said(data.over_alone, size)} in batches of {size}" for size in sizes[1:])
    return (
        f"Perplexity of {name} under GRIFFIN at density {DENSITY}, relative to the "
        f"full model's, on {tokens['scored']} tokens after prompts of {tokens['prompt']}, where "
        f"the texts of a batch share one selection; {count} texts, with 95% bootstrap bands. "
        f"Absolute, by batch size: {'; '.join(absolute)}; full "
        f"{said(full[:, 0], digits=0)}, static (from the other texts) "
        f"{said(static[:, 0], digits=0)}. Sharing over having one's own, in {_GROUPINGS} ways to "
        f"make up the smaller batches: {', '.join(alone)}. At batch size 1 each text has its own "
        'selection, as with scope="sequence" at any size.'
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {
    function.__name__: function
    for function in (loss_by_prompt, loss_by_density, loss_by_method, loss_by_batch)
}


def _half(ids: list[list[int]]) -> int:
    """Tokens of the prompt: the first, and windows that make up half of the others."""
    return 1 + (len(ids[0]) - 1) // (2 * _WINDOW) * _WINDOW


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
