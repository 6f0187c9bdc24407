"""The runs behind GRIFFIN's figures: likelihoods of real text with the experts in force.

Experiments as those of :mod:`flocking.experiments`. Scored is the loss (negative log-likelihood,
nats per token) of a text's own tokens after a prompt, under the full model and under twins that
share one run of that prompt. The chance level is random experts; a control with random weights
has nothing to lose. Static experts, from the other texts alone, are the control of GRIFFIN's.

Whether GRIFFIN's advantage over them is that of most texts or of a few, averages do not say:
captions list it text by text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap, tails
from flocking.experiments.common import dimension, finished, said, same_length, source_of
from flocking.pruning import griffin, side_by_side
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
_OVER_STATIC = "GRIFFIN's perplexity over static's"
_DENSITY = 0.5
_WINDOW = 16
_EXCERPTS = 3
_GROUPINGS = 4  # ways in which the texts are put together into batches
_BIN = 64  # tokens over which losses by distance are averaged
# The methods whose order is in question: without what knows the scored text, and what knows none.
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
        Of random experts.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection, prompt_length); ``over_static`` (interval, prompt_length), GRIFFIN's
        to that of static experts; ``relative_far`` (interval, selection, prompt_length, distance)
        over 64 tokens around ``distance`` from the prompt's end, without the first one, which is
        computed in full; ``ageing`` (interval, prompt_length), GRIFFIN's ratio in the
        last 64 tokens to that in the first 64.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they or `horizon` are too short.
    """
    if horizon < _WINDOW:
        raise ValueError(f"horizon={horizon}: give {_WINDOW} tokens or more, to be scored.")
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW)
    total = len(ids[0])
    horizon = min(horizon // _WINDOW, (total - 1) // (2 * _WINDOW)) * _WINDOW
    lengths = [n + 1 for n in (16, 64, 256, 1024) if n + 1 + horizon <= total]
    recording = record(model, ids, tokenizer=tokenizer, window=_WINDOW, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))
    later = analysis.statistic(recording, start=total - horizon)
    wanted = ["hindsight", "global-local", "static", "GRIFFIN", "random"]

    def measure(number: int) -> xr.DataArray:
        references = others.isel(sequence=number), later.isel(sequence=number)
        twins = _twins(wanted, *references, seed=seed + number)
        prompts = [ids[number][total - horizon - length :] for length in lengths]
        parts = [_losses(model, twins, [row], n) for row, n in zip(prompts, lengths, strict=True)]
        return xr.concat(parts, dimension("prompt_length", lengths)).isel(sequence=0)

    losses = _each(measure, names, progress)
    step = min(_BIN, horizon)
    pruned = losses.where(losses.distance > 0)
    far = pruned.coarsen(distance=step, boundary="trim").mean()
    data = _perplexity(losses.mean("distance")).assign(relative_far=_perplexity(far).relative)
    excess = far.sel(selection="GRIFFIN") - far.sel(selection="full")
    ageing = excess.isel(distance=-1, drop=True) - excess.isel(distance=0, drop=True)
    data["ageing"] = np.exp(bootstrap(ageing))
    data.ageing.attrs = _ratio(f"GRIFFIN's ratio in the last {step} tokens to the first {step}")
    over, ages = (
        [f"{said(values, length)} after {length}" for length in lengths]
        for values in (data.over_static, data.ageing)
    )
    source = source_of(recording)
    caption = (
        f"Perplexity of {source['model']} at density {_DENSITY}, relative to the full model's, on "
        f"the same {horizon} tokens of {len(ids)} texts, after prompts of the tokens before them; "
        f"95% bootstrap bands over texts. Absolute, after {lengths[0]} tokens: "
        f"{_listed(data.perplexity.isel(prompt_length=0))}. "
        f"After {lengths[-1]}: {_listed(data.perplexity.isel(prompt_length=-1))}. Hindsight: the "
        "scored tokens' own experts; static: the other texts'; global-local: mean of the prompt's "
        f"and the other texts' ranks. GRIFFIN's over static's: {', '.join(over)}. Guessing would "
        f"give {_vocabulary(model):,}. Right: by distance, in {step} tokens each, their middle "
        "marked, without the first, which is computed in full. GRIFFIN's ratio in the last "
        f"{step} to that in the first {step}: {', '.join(ages)}."
    )
    return finished(data, source, names, ids, seed, caption, density=_DENSITY, horizon=horizon)


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
        density), and ``over_static`` (interval, density), GRIFFIN's to that of static experts.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
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
            for name, twin in _twins(wanted, reference, None, seed + number, density).items()
        }
        losses = _losses(model, twins, [ids[number]], prompt)[:, 0].mean("distance")
        parts = [
            losses.sel(selection=["full", *(f"{name} {density}" for name in wanted)])
            for density in DENSITIES
        ]
        parts = [part.assign_coords(selection=["full", *wanted]) for part in parts]
        return xr.concat(parts, dimension("density", DENSITIES))

    data = _perplexity(_each(measure, names, progress))
    source = source_of(recording)
    listed = (f"{d}: {_listed(data.perplexity.sel(density=d))}" for d in (0.5, 0.7, 0.9))
    over = (f"{said(data.over_static, d)} at {d}" for d in (0.3, 0.5, 0.7, 0.9))
    caption = (
        f"Perplexity of {source['model']}, relative to the full model's, on "
        f"{len(ids[0]) - prompt} tokens after prompts of {prompt}, by density, over {len(ids)} "
        "texts with 95% bootstrap bands. Absolute, at density "
        f"{'. At '.join(listed)}. Static: the other texts' experts; GRIFFIN's over static's: "
        f"{', '.join(over)}. Guessing would give {_vocabulary(model):,}. Right: the same, enlarged."
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
    """Perplexity by method, and whether the energy that experts capture predicts the loss.

    Parameters are those of :func:`loss_by_density`; `tokens` is the length of an excerpt, of
    which each text gives up to three.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection); ``excess`` and ``captured`` (text,
        excerpt, selection), the loss above the full model's, in nats per token, and the share of
        the scored tokens' energy in the full model that the experts keep, mean over layers;
        Spearman's rank correlation of the two (interval): ``between_methods`` on one excerpt,
        ``between_close_methods``, those without hindsight, random and magnitude, which differ
        most by construction, and ``between_excerpts`` under GRIFFIN; ``over_static_by_text``
        (text), GRIFFIN's perplexity to that of static experts.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    room = (tokens - 1) * _EXCERPTS + 1
    ids, names = same_length(model, tokenizer, texts, room, _WINDOW, least=65)
    count = max(1, min(_EXCERPTS, (len(ids[0]) - 1) // (tokens - 1)))
    step = (len(ids[0]) - 1) // count // _WINDOW * _WINDOW
    excerpts = [row[step * n : step * (n + 1) + 1] for row in ids for n in range(count)]
    prompt = _half(excerpts)
    recording = record(model, excerpts, tokenizer=tokenizer, window=_WINDOW, progress=progress)
    energy = analysis.statistic(recording) ** 2
    later = analysis.statistic(recording, start=prompt)
    text_of = np.arange(len(excerpts)) // count

    def measure_excerpt(number: int) -> xr.Dataset:
        # Static experts from the other texts, not from other excerpts of the same one.
        others = np.sqrt(energy.isel(sequence=text_of != text_of[number]).mean("sequence"))
        own = later.isel(sequence=number)
        twins = _twins(METHODS, others, own, seed + number)
        losses, captured = _losses_and_energy(model, twins, [excerpts[number]], prompt, own)
        return xr.Dataset({"loss": losses[:, 0].mean("distance"), "captured": captured})

    def measure(number: int) -> xr.Dataset:
        parts = [measure_excerpt(count * number + n) for n in range(count)]
        return xr.concat(parts, dimension("excerpt", list(range(count))))

    values = _each(measure, names, progress)
    excess, captured = values.loss - values.loss.sel(selection="full"), values.captured
    by_selection = {"input_core_dims": [["selection"], ["selection"]], "vectorize": True}
    within, close = (
        xr.apply_ufunc(
            _rank_correlation,
            captured.sel(selection=names),
            excess.sel(selection=names),
            **by_selection,
        )
        for names in (METHODS, _CLOSE)
    )
    under = [part.sel(selection="GRIFFIN") for part in (captured, excess)]
    by_text = excess.sel(selection="GRIFFIN") - excess.sel(selection="static")
    data = _perplexity(values.loss.mean("excerpt")).assign(
        excess=excess.rename(sequence="text"),
        captured=captured.rename(sequence="text"),
        between_methods=bootstrap(within.mean("excerpt")),
        between_close_methods=bootstrap(close.mean("excerpt")),
        between_excerpts=_between_excerpts(*under),
        over_static_by_text=np.exp(by_text.mean("excerpt")).rename(sequence="text"),
    )
    data.excess.attrs = {"long_name": "loss above the full model's", "units": "nat"}
    data.captured.attrs = {"long_name": "captured energy of the scored tokens", "units": "1"}
    data.over_static_by_text.attrs = _ratio(_OVER_STATIC)
    for name in ("methods", "close_methods", "excerpts"):
        long_name = f"rank correlation of captured energy and loss, between {name}"
        data[f"between_{name}"].attrs = {"long_name": long_name.replace("_", " "), "units": "1"}
    by_text = data.over_static_by_text.sortby(data.over_static_by_text)
    listed = (f"{name} {value:.2f}" for name, value in by_text.to_series().items())
    source = source_of(recording)
    caption = (
        f"{source['model']} at density {_DENSITY}: perplexity, relative to the full model's, on "
        f"{len(excerpts[0]) - prompt} tokens after prompts of {prompt}, {count} excerpts of each "
        f"of {len(ids)} texts, with 95% bootstrap intervals over texts. Absolute: "
        f"{_listed(data.perplexity)}; guessing would give {_vocabulary(model):,}. Hindsight: the "
        f"scored tokens' own experts. GRIFFIN's over static's: {said(data.over_static)}; by text "
        f"{', '.join(listed)}. Below: the loss above the full model's "
        "against the energy of the scored tokens that the experts capture (chance 0.5). Spearman's "
        f"rank correlation: {said(data.between_methods)} between the methods on one excerpt, "
        f"{said(data.between_close_methods)} without hindsight, random and magnitude; "
        f"{said(data.between_excerpts)} between the {len(excerpts)} excerpts under GRIFFIN alone."
    )
    return finished(data, source, names, excerpts, seed, caption, density=_DENSITY, prompt=prompt)


def loss_by_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity of GRIFFIN where the texts of a batch share their experts, by its size.

    Parameters are those of :func:`loss_by_density`; `seed` is also that of the batches.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection, batch_size), of the full model, GRIFFIN, and static experts, for all
        sizes that divide the number of texts. At 1 each text has its own experts, as with
        ``scope="sequence"``; only GRIFFIN's depend on the size. ``over_alone`` (interval,
        batch_size) is GRIFFIN's ratio to its own at size 1. Between 1 and all, each text is in
        four batches drawn at random; intervals are over texts, with these batches as they are.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they are too short.
    """
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW)
    prompt, count = _half(ids), len(ids)
    recording = record(model, ids, tokenizer=tokenizer, window=None, progress=progress)
    others = analysis.statistic_of_others(analysis.statistic(recording))
    random = np.random.default_rng(seed)
    twin = griffin(model, _DENSITY)

    def shared(size: int) -> xr.DataArray:
        values = np.zeros(count)
        groupings = _GROUPINGS if 1 < size < count else 1
        for _ in range(groupings):
            for batch in random.permutation(count).reshape(-1, size):
                rows = torch.tensor([ids[number] for number in batch])
                ((_, scored),) = side_by_side([twin], rows, prompt)
                values[batch] -= scored[:, prompt - 1 :].double().mean(dim=1).cpu().numpy()
        labels = {"selection": ["GRIFFIN"], "sequence": names}
        return xr.DataArray(values[None] / groupings, labels, ("selection", "sequence"))

    sizes = [size for size in range(1, count + 1) if count % size == 0]
    bar = tqdm(sizes, desc="scoring", unit="batch size", disable=not progress)
    losses = xr.concat([shared(size) for size in bar], dimension("batch_size", sizes))

    def alone(number: int) -> xr.DataArray:
        static = _twins(["static"], others.isel(sequence=number), None, seed)
        return _losses(model, static, [ids[number]], prompt)[:, 0].mean("distance")

    baselines = _each(alone, names, progress).expand_dims(batch_size=sizes)
    data = _perplexity(xr.concat([baselines, losses], "selection"))
    shares = losses.sel(selection="GRIFFIN", drop=True)
    data["over_alone"] = np.exp(bootstrap(shares - shares.sel(batch_size=1, drop=True)))
    data.over_alone.attrs = _ratio("GRIFFIN's perplexity over its own at batch size 1")
    griffins, full, static = (
        data.perplexity.sel(selection=name) for name in ("GRIFFIN", "full", "static")
    )
    source = source_of(recording)
    listed = (f"{size}: {said(griffins, size, 0)}" for size in sizes)
    alone = (f"{said(data.over_alone, size)} in batches of {size}" for size in sizes[1:])
    caption = (
        f"Perplexity of {source['model']} under GRIFFIN at density {_DENSITY}, relative to the "
        f"full model's, on {len(ids[0]) - prompt} tokens after prompts of {prompt}, where the "
        f"texts of a batch share their experts; {count} texts, with 95% bootstrap bands. "
        f"Absolute, by batch size: {'; '.join(listed)}; full "
        f"{said(full[:, 0], digits=0)}, static (the other texts' experts) "
        f"{said(static[:, 0], digits=0)}. Sharing over having one's own, in {_GROUPINGS} ways to "
        f"make up the smaller batches: {', '.join(alone)}. At batch size 1 each text has its own "
        'experts, as with scope="sequence" at any size.'
    )
    return finished(data, source, names, ids, seed, caption, density=_DENSITY, prompt=prompt)


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {
    function.__name__: function
    for function in (loss_by_prompt, loss_by_density, loss_by_method, loss_by_batch)
}


def _twins(
    names: Iterable[str],
    others: xr.DataArray | None,
    later: xr.DataArray | None,
    seed: int,
    density: float = _DENSITY,
) -> dict[str, dict[str, Any]]:
    """What griffin is to be given for each of the figures' names."""
    meant = {
        "GRIFFIN": ("topk", None),
        "hindsight": ("static", later),
        "static": ("static", others),
        "global-local": ("global-local", others),
    }
    options = {}
    for name in names:
        method, reference = meant.get(name, (name, None))
        options[name] = {
            "density": density,
            "method": method,
            "reference": reference,
            "seed": seed,
        }
    return options


def _losses(
    model: PreTrainedModel,
    twins: dict[str, dict[str, Any]],
    ids: list[list[int]],
    prompt: int,
    look: Callable[[PreTrainedModel], None] = lambda twin: None,
) -> xr.DataArray:
    """Loss of each token after the prompt, (selection, sequence, distance); the full model first.

    Each twin is made, used, shown to `look` and forgotten in turn, so that memory holds one.
    """
    made = (griffin(model, **options) for options in twins.values())
    losses = []
    for subject, values in side_by_side(chain(made, [model]), torch.tensor(ids), prompt):
        losses.append(-values[:, prompt - 1 :].double().cpu())
        look(subject)
    values = torch.stack([losses[-1], *losses[:-1]])
    labels = {"selection": ["full", *twins], "distance": np.arange(values.shape[-1])}
    return xr.DataArray(values.numpy(), labels, ("selection", "sequence", "distance"))


def _losses_and_energy(
    model: PreTrainedModel,
    twins: dict[str, dict[str, Any]],
    ids: list[list[int]],
    prompt: int,
    later: xr.DataArray,
) -> tuple[xr.DataArray, xr.DataArray]:
    """Losses, and the share of later tokens' energy that the experts keep, mean over layers."""
    masks = []

    def look(subject: PreTrainedModel) -> None:
        mask = xr.full_like(later, subject is model, dtype=bool)
        for layer, experts in getattr(subject, "selection", {}).items():
            mask.loc[{"layer": layer, "neuron": experts.numpy()}] = True
        masks.append(mask)

    losses = _losses(model, twins, ids, prompt, look)
    masks = xr.concat([masks[-1], *masks[:-1]], dimension("selection", ["full", *twins]))
    captured = analysis.captured_energy(masks, later).mean("layer").reset_coords(drop=True)
    return losses, captured


def _each(
    measure: Callable[[int], xr.DataArray | xr.Dataset], names: list[str], progress: bool
) -> xr.DataArray | xr.Dataset:
    """The measurement on each text, with progress."""
    numbers = tqdm(range(len(names)), desc="scoring", unit="text", disable=not progress)
    return xr.concat([measure(number) for number in numbers], dimension("sequence", names))


def _perplexity(losses: xr.DataArray) -> xr.Dataset:
    """Of all texts together: intervals of mean losses, exponentiated.

    Those of ratios, to the full model's and of GRIFFIN's to static's, are of the differences
    within each text.
    """
    excess = losses - losses.sel(selection="full")
    against = losses.sel(selection="GRIFFIN", drop=True) - losses.sel(selection="static", drop=True)
    each = xr.Dataset({"perplexity": losses, "relative": excess, "over_static": against})
    data = np.exp(bootstrap(each))
    data.over_static.attrs = _ratio(_OVER_STATIC)
    data.relative.attrs = _ratio("perplexity, relative to the full model's")
    data.perplexity.attrs = {"long_name": "perplexity", "units": "1"}
    return data.transpose("interval", "selection", ...)


def _ratio(long_name: str) -> dict[str, str]:
    return {"long_name": long_name, "units": "1"}


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; NaN where one of the two does not vary."""
    x, y = np.ravel(x), np.ravel(y)
    return spearmanr(x, y).statistic if np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan


def _between_excerpts(x: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """Rank correlation over all (text, excerpt); texts are drawn for the interval."""
    x, y = (values.transpose("sequence", "excerpt").values for values in (x, y))
    draws = np.random.default_rng(0).integers(len(x), size=(2000, len(x)))
    drawn = [_rank_correlation(x[draw], y[draw]) for draw in draws]
    low, high = np.nanquantile(drawn, tails(len(x)))
    values = [_rank_correlation(x, y), low, high]
    return xr.DataArray(values, {"interval": ["estimate", "low", "high"]}, ("interval",))


def _half(ids: list[list[int]]) -> int:
    """Tokens of the prompt: the first, and windows that make up half of the others."""
    return 1 + (len(ids[0]) - 1) // (2 * _WINDOW) * _WINDOW


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _listed(perplexity: xr.DataArray) -> str:
    """By method, in one line."""
    return ", ".join(f"{name} {said(perplexity, name, 0)}" for name in perplexity.selection.values)
