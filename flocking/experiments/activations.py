"""Experiments on activations: each runs a model and its control, and returns what is plotted.

An experiment takes a model, its tokenizer and texts, and returns a small Dataset: the numbers
that its figure shows, with intervals from a bootstrap over texts (dimension ``interval``), the
same for the control (dimension ``weights``), and attributes that say where they come from, the
caption among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from scipy.stats import f_oneway
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking import analysis
from flocking.analysis import bootstrap
from flocking.experiments.common import (
    WEIGHTS,
    against_control,
    counted,
    dimension,
    finished,
    said,
    same_excerpts,
    same_length,
    source_of,
)
from flocking.feedforward import feedforwards
from flocking.models import context, control, warn
from flocking.recording import record

DENSITIES = [0.1, 0.25, 0.5, 0.75, 0.9]
_DENSITY = 0.5
_EXCERPTS = 3
_HORIZON = 256  # tokens after the prompt that drift against its length is measured over
_FAR = 64  # tokens that drift against the distance is averaged over


def heatmaps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 129,
    neurons: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Relative activations of the first two texts at one layer, trained and control.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens, neurons : int
        How many are shown, from the first on; the first token is left out.
    seed : int
        Of the control's weights.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        ``relative`` (weights, sequence, token, neuron), ``score`` (weights, sequence).
    """
    blocks = [*feedforwards(model)]
    block = blocks[2 * len(blocks) // 3]  # where most models flock clearly
    layer, neurons = block.layer, min(neurons, block.d_ff)
    ids, names = same_length(model, tokenizer, texts[:2], tokens, 16)

    def measure(recording: xr.Dataset) -> xr.Dataset:
        relative = recording.relative
        # (Where the model has no other layer, there is no second dimension of layers.)
        (dim,) = {"relative_layer", "layer"} & {*relative.dims}
        shown = relative.sel({dim: layer}).astype(np.float32)
        shown = shown.isel(token=slice(1, None), neuron=slice(neurons)).drop_vars(
            [dim, "token_id", "token_text", "token_window", "text", "module"], errors="ignore"
        )
        score = analysis.flocking_score(recording).sel(layer=layer)
        return xr.Dataset(
            {"relative": shown, "score": score.drop_vars(["text", "module", "layer"])}
        )

    data, source = against_control(
        model, tokenizer, ids, names, seed, progress, measure, window=16, relative=[layer]
    )
    score = data.score.mean("sequence")
    caption = (
        f"Relative activations in layer {layer} of {source['model']}, {data.sizes['neuron']} of "
        f"{data.d_ff.item()} neurons: vertical streaks are neurons "
        f"that flock. Flocking score, here over {len(ids[0]) - 1} tokens (chance 0): model "
        f"{score[0]:.2f}, random weights {score[1]:.2f}."
    )
    return finished(data, source, names, ids, seed, caption, layer=layer)


def scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Flocking score, rank consistency and effective neurons by layer.

    Parameters are those of :func:`heatmaps`.

    Returns
    -------
    xarray.Dataset
        ``flocking_score``, ``rank_consistency``, ``effective_neurons`` (interval, weights,
        layer), and ``d_ff`` (layer).
    """
    ids, names = same_length(model, tokenizer, texts, tokens, 16)

    def measure(recording: xr.Dataset) -> xr.Dataset:
        functions = (analysis.flocking_score, analysis.rank_consistency, analysis.effective_neurons)
        return xr.Dataset({function.__name__: function(recording) for function in functions})

    values, source = against_control(
        model, tokenizer, ids, names, seed, progress, measure, window=None, ranks=True
    )
    data = bootstrap(values).assign(d_ff=values.d_ff)
    mean = bootstrap(values.mean("layer"))
    trained = data.sel(weights="trained", interval="estimate")
    top = int(np.argmax(trained.flocking_score.values))
    caption = (
        f"Flocking of {source['model']} by layer, mean over {counted(ids)} with 95% "
        "bootstrap bands. Score over all layers: model "
        f"{said(mean.flocking_score, 'trained')}, random weights "
        f"{said(mean.flocking_score, 'control')}; rank consistency "
        f"{said(mean.rank_consistency, 'trained')} and {said(mean.rank_consistency, 'control')}. "
        f"The highest score is layer {int(data.layer[top])}'s: "
        f"{trained.flocking_score[top]:.2f}, with {trained.effective_neurons[top]:.0f} effective "
        f"neurons of {int(data.d_ff[top])} and rank consistency "
        f"{trained.rank_consistency[top]:.2f}."
    )
    return finished(data.drop_vars("module"), source, names, ids, seed, caption)


def sequence_overlap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Overlap of selections within a sequence and between two, and specificity, by layer.

    Parameters are those of :func:`heatmaps`. Raw activations of all layers are in memory meanwhile
    (566 MB for the embedded model and the packaged passages).

    Returns
    -------
    xarray.Dataset
        ``within``, ``between`` (Jaccard at density 0.5), ``specificity``, ``different_tokens``
        (specificity without pairs of identical tokens), all (interval, weights, layer).
    """
    ids, names = same_length(model, tokenizer, texts, tokens, 128, least=129)  # two halves

    def measure(recording: xr.Dataset) -> xr.Dataset:
        values = analysis.between_sequence_overlap(recording, _DENSITY)
        different = analysis.specificity(recording, different_tokens=True)
        return values.assign(
            specificity=analysis.specificity(recording), different_tokens=different
        ).drop_vars(["text", "module", "d_ff"], errors="ignore")

    values, source = against_control(
        model, tokenizer, ids, names, seed, progress, measure, window=64, relative=True
    )
    data, mean = bootstrap(values), bootstrap(values.mean("layer"))
    chance = analysis.chance_jaccard(_DENSITY)
    caption = (
        f"Kept neurons of {source['model']} at density {_DENSITY}: Jaccard overlap of the two "
        "halves of one text, and of one text's first half with another's second, over "
        f"{counted(ids)} with 95% bootstrap bands. Over all layers: model "
        f"{said(mean.within, 'trained')} within, {said(mean.between, 'trained')} between; random "
        f"weights {said(mean.within, 'control')} and {said(mean.between, 'control')}; chance "
        f"{chance:.2f}. Specificity: model {said(mean.specificity, 'trained')} "
        f"({said(mean.different_tokens, 'trained')} without pairs of identical tokens), random "
        f"weights {said(mean.specificity, 'control')}."
    )
    return finished(data, source, names, ids, seed, caption, chance=chance, density=_DENSITY)


def generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 257,
    new_tokens: int = 257,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Overlap and captured energy of the prompt's kept neurons in the generation.

    By layer and density, over greedily generated text. The control reads the same tokens, those
    that the trained model generated. Other parameters are those of :func:`heatmaps`.

    Parameters
    ----------
    tokens : int
        Tokens of each prompt; fewer where the model's context has no room for them.
    new_tokens : int
        Tokens generated after it; the last of them is not run. Where the context has no room for
        both, as many as are left, but not less than half of the context.

    Returns
    -------
    xarray.Dataset
        ``jaccard`` (interval, density, weights, layer) of the prompt's and the generation's kept
        neurons; ``captured`` (interval, density, selection, layer), the share of the generation's
        energy that a selection keeps, by "GRIFFIN", "hindsight" (the oracle), "other texts"
        (static: mean energy of the other prompts), "magnitude" (static: weights)
        and "GRIFFIN, control"; each also averaged over layers, as ``*_mean``.
    """
    new_tokens = _that_fit(model, tokens, new_tokens)
    ids, names = same_length(model, tokenizer, texts, tokens, 64, room=new_tokens, least=65)
    untrained = control(model, seed)  # (it may refuse the seed, and the next the weights)
    magnitude = analysis.weight_magnitude(model)
    options = {"tokenizer": tokenizer, "window": 64, "progress": progress}
    recording = record(model, ids, max_new_tokens=new_tokens, **options)
    replayed = [row[row >= 0].tolist() for row in recording.token_id.values]
    # A prompt is its first token and whole windows, so that the windows are the same ones.
    random = record(untrained, replayed, **options)
    random = random.assign_coords(
        {name: recording[name] for name in ("phase", "start", "prompt_tokens")}
    )

    def measure(recording: xr.Dataset, weights: str) -> xr.Dataset:
        recording = recording.assign_coords(sequence=names)
        captured = _captured_later(recording, magnitude if weights == "trained" else None)
        jaccard = analysis.prompt_generation_overlap(recording, densities=DENSITIES)
        return xr.Dataset({"jaccard": jaccard, "captured": captured}).drop_vars(
            ["text", "module", "tokens", "d_ff"], errors="ignore"
        )

    parts = [measure(recording, "trained"), measure(random, "control")]
    values = xr.Dataset(
        {
            "jaccard": xr.concat([part.jaccard for part in parts], dimension("weights", WEIGHTS)),
            "captured": xr.concat([part.captured for part in parts], "selection"),
        }
    )
    means = values.mean("layer").rename(jaccard="jaccard_mean", captured="captured_mean")
    data = bootstrap(values.merge(means))
    chance = [analysis.chance_jaccard(density) for density in DENSITIES]
    data = data.assign(chance=("density", chance))
    source = source_of(recording)
    generated = [row[len(prompt) :] for row, prompt in zip(replayed, ids, strict=True)]
    caption = _caption_of_generation(data, source["model"], ids, generated)
    return finished(data, source, names, ids, seed, caption, new_tokens=new_tokens)


def _that_fit(model: PreTrainedModel, tokens: int, new_tokens: int) -> int:
    """How many new tokens the context has room for after a prompt, or at least half of it."""
    limit = context(model)
    room = max(limit // 2, limit - tokens) if limit else new_tokens
    if room < new_tokens:
        warn(
            f"{room} tokens are generated instead of {new_tokens}: the model's context is {limit}, "
            f"and prompts of {tokens} were asked for."
        )
    return min(room, new_tokens)


def _captured_later(recording: xr.Dataset, magnitude: xr.DataArray | None) -> xr.DataArray:
    """Energy of the generation that selections capture; of the control, GRIFFIN's alone."""
    prompt = analysis.statistic(recording, phase="prompt")
    later = analysis.statistic(recording, phase="generation")
    if magnitude is None:
        selections = {"GRIFFIN, control": prompt}
    else:
        selections = {"GRIFFIN": prompt}
        selections["hindsight"] = later
        selections["other texts"] = analysis.statistic_of_others(prompt)
        selections["magnitude"] = magnitude
    return xr.concat(
        [
            analysis.captured_energy(analysis.select(values, densities=DENSITIES), later)
            for values in selections.values()
        ],
        dimension("selection", list(selections)),
        coords="minimal",
        compat="override",
    )


def _caption_of_generation(
    data: xr.Dataset, name: str, ids: list[list[int]], generated: list[list[int]]
) -> str:
    here = data.sel(density=_DENSITY)
    share = here.captured_mean
    new = np.mean([len(row) for row in generated])
    repeated = np.mean([_repeated(row) for row in generated if row])
    return (
        f"Neurons selected from prompts of {len(ids[0])} tokens, compared with {new:.0f} "
        f"tokens (mean) that {name} generated greedily, over {len(ids)} texts with 95% "
        f"bootstrap bands. Density {_DENSITY}, over all layers: overlap of the prompt's and the "
        f"generation's selections {said(here.jaccard_mean, 'trained')} (random weights on the same "
        f"tokens {said(here.jaccard_mean, 'control')}, chance {float(here.chance):.2f}); captured "
        f"energy: GRIFFIN {said(share, 'GRIFFIN')}, hindsight {said(share, 'hindsight')}, other "
        f"texts {said(share, 'other texts')}, magnitude {said(share, 'magnitude')}, chance "
        f"{_DENSITY}. Of the generated 8-grams, {repeated:.0%} had been generated before "
        "in the same text."
    )


def drift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 1537,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Overlap and captured energy against prompt length and distance, over real text.

    Parameters are those of :func:`heatmaps`. From one pass over each text with windows of 16
    tokens, cut in two after 17, 33, 65, ... tokens.

    Returns
    -------
    xarray.Dataset
        Means over layers, at density 0.5. ``jaccard``, ``captured``, ``hindsight`` and
        ``other_texts`` (the static choice), all (interval, weights, prompt_length), over the 256
        tokens after the prompt; ``jaccard_far`` and so on (interval, weights, cut, distance), by
        distance from the prompt's end, in steps of 64 tokens.
    """
    ids, names = same_length(model, tokenizer, texts, tokens, 16, least=17 + _FAR)
    total = len(ids[0])
    horizon = min(_HORIZON, (total - 1) // 32 * 16)
    lengths = [n + 1 for n in (16, 32, 64, 128, 256, 512, 1024) if n + 1 + horizon <= total]
    seen = [length for length in lengths if length + _FAR <= total]
    cuts = [length for length in (65, 257, 1025) if length in seen] or seen[-1:]

    def measure(recording: xr.Dataset) -> xr.Dataset:
        drifts = analysis.drift(recording, _DENSITY, prompt_lengths=lengths)
        drifts = drifts.assign(other_texts=_of_others(recording, drifts)).mean("layer")
        drifts = drifts.rename(captured_energy="captured", oracle="hindsight")
        near = drifts.sel(distance=slice(0, horizon - 1)).mean("distance")
        far = drifts.sel(prompt_length=cuts).rename(prompt_length="cut")
        far = far.coarsen(distance=_FAR // 16, boundary="trim", coord_func="min").mean()
        # Where a text ends, a mean over four windows is one of fewer: leave it out.
        far = far.where(far.distance + far.cut + _FAR <= total)
        return near.merge(far.rename({name: f"{name}_far" for name in far}), compat="override")

    values, source = against_control(
        model, tokenizer, ids, names, seed, progress, measure, window=16
    )
    data = bootstrap(values)
    chance = analysis.chance_jaccard(_DENSITY)

    def ends(name: str, weights: str = "trained") -> str:
        values = data[name]
        return " to ".join(said(values.isel(prompt_length=at), weights) for at in (0, -1))

    caption = (
        f"Neurons of {source['model']} kept at density {_DENSITY}, selected from a text's start, "
        f"on what follows; mean over layers and {counted(ids)}, with 95% bootstrap bands. Left: "
        f"the {horizon} tokens after prompts of {lengths[0]} to {lengths[-1]} tokens; captured "
        f"energy from {ends('captured')} (random weights {ends('captured', 'control')}); after the "
        f"longest, hindsight has {said(data.hindsight.isel(prompt_length=-1), 'trained')} and a "
        f"static choice from the other texts "
        f"{said(data.other_texts.isel(prompt_length=-1), 'trained')}. Overlap is with what each "
        f"16-token window would select itself: {ends('jaccard')}; chance {chance:.2f}. Right: "
        "by distance from the prompt's end; random weights after the longest prompt."
    )
    return finished(
        data, source, names, ids, seed, caption, chance=chance, density=_DENSITY, horizon=horizon
    )


def text_kinds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 513,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Effective neurons by layer and text, from up to three excerpts of each.

    Parameters are those of :func:`heatmaps`; `tokens` is the length of an excerpt.

    Returns
    -------
    xarray.Dataset
        ``effective_neurons`` (weights, text, layer), mean over excerpts; ``over_layers``
        (interval, weights, text), the mean over layers: of all excerpts, and the lowest and the
        highest excerpt.
    """
    excerpts, names, count = same_excerpts(
        model, tokenizer, texts, tokens, 16, most=_EXCERPTS, least=33
    )

    def measure(recording: xr.Dataset) -> xr.Dataset:
        values = analysis.effective_neurons(recording)
        shape = (len(names), count, values.sizes["layer"])
        coordinates = {"text": names, "layer": values.layer.values}
        folded = xr.DataArray(
            values.values.reshape(shape), coordinates, ("text", "excerpt", "layer")
        )
        return xr.Dataset({"effective_neurons": folded})

    labels = list(range(len(excerpts)))
    values, source = against_control(
        model, tokenizer, excerpts, labels, seed, progress, measure, window=None
    )
    widths = [block.d_ff for block in feedforwards(model)]
    d_ff = round(sum(widths) / len(widths))  # a mean over layers, as the effective neurons are
    by_excerpt = values.effective_neurons.mean("layer")
    summary = [getattr(by_excerpt, name)("excerpt") for name in ("mean", "min", "max")]
    data = xr.Dataset(
        {
            "effective_neurons": values.effective_neurons.mean("excerpt"),
            "over_layers": xr.concat(
                summary, dimension("interval", ["estimate", "low", "high"]), coords="minimal"
            ),
        }
    )
    overall = bootstrap(by_excerpt.mean("excerpt").rename(text="sequence"))
    trained = data.over_layers.sel(weights="trained", interval="estimate")
    caption = (
        f"Effective neurons of {source['model']} (participation ratio of the energy) by layer and "
        f"text, {count} excerpts of {len(excerpts[0])} tokens each; right: mean over layers, with "
        f"the lowest and the highest excerpt. All texts: model {said(overall, 'trained', 0)} of "
        f"{d_ff} neurons, random weights {said(overall, 'control', 0)}; "
        f"{trained.text.values[np.argmin(trained.values)]} has the fewest "
        f"({float(trained.min()):.0f}), {trained.text.values[np.argmax(trained.values)]} the most "
        f"({float(trained.max()):.0f})."
    )
    if count > 1 and len(names) > 1:
        test = f_oneway(*np.log(by_excerpt.sel(weights="trained").values))
        caption += (
            f" Texts against excerpts of one text, model: F({len(names) - 1}, "
            f"{len(names) * (count - 1)}) = {test.statistic:.1f}, p = {test.pvalue:.2g}."
        )
    return finished(data, source, names, excerpts, seed, caption, d_ff=d_ff)


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {
    function.__name__: function
    for function in (heatmaps, scores, sequence_overlap, generation, drift, text_kinds)
}


def _of_others(recording: xr.Dataset, drifts: xr.Dataset) -> xr.DataArray:
    """Captured energy of the static choice from other texts, with the dimensions of `drifts`."""
    others = analysis.statistic_of_others(analysis.statistic(recording))
    kept = analysis.captured_energy(
        analysis.select(others, _DENSITY), analysis.statistic(recording, by="window")
    )
    width = int(drifts.distance[1])
    by_cut = []
    for length in drifts.prompt_length.values:
        after = kept.isel(window=slice(1 + (length - 1) // width, None)).transpose(
            "sequence", "layer", "window"
        )
        by_cut.append(
            xr.DataArray(
                after.values,
                {d: after[d].values for d in ("sequence", "layer")}
                | {"distance": width * np.arange(after.sizes["window"])},
                ("sequence", "layer", "distance"),
            )
        )
    return xr.concat(by_cut, drifts.prompt_length, join="outer")


def _repeated(ids: list[int], n: int = 8) -> float:
    """Share of the n-grams that occurred before."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
