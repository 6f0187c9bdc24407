"""Which texts a static selection is made from: others, the same one, or the model's own.

Called as the experiments of :mod:`flocking.experiments.losses`, and scored as those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from flocking.experiments.intervals import exponential, perplexities, ratio
from flocking.experiments.twins import DENSITY, each_text, losses_of
from flocking.models import special_tokens_around
from flocking.pruning import global_statistic, require_prunable
from flocking.recording import record

_WINDOW = 16
_BATCH = 32  # texts that are written together
# By the name of a selection: its method and its reference.
SELECTIONS: dict[str, tuple[str, str | None]] = {
    "global-local-domain": ("global-local", "domain"),
    "global-local-sampled": ("global-local", "sampled"),
    "global-local": ("global-local", "others"),
    "static-domain": ("static", "domain"),
    "static-sampled": ("static", "sampled"),
    "static": ("static", "others"),
    "static-one": ("static", "one"),
    "GRIFFIN": ("topk", None),
    "random": ("random", None),
}
# Selections that differ in one thing, the second being what the first is compared with.
PAIRS = [
    ("static-domain", "static"),
    ("static-domain", "static-one"),
    ("static-sampled", "static"),
    ("global-local-domain", "global-local"),
    ("global-local-sampled", "global-local"),
    ("static-domain", "GRIFFIN"),
    ("static-sampled", "GRIFFIN"),
    ("global-local-domain", "GRIFFIN"),
    ("global-local-sampled", "GRIFFIN"),
    ("global-local", "GRIFFIN"),
]


def loss_by_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 1537,
    horizon: int = 256,
    sequences: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Perplexity by what a static or global-local selection is made from.

    A text's last tokens are scored after prompts of 17 and 257 tokens. "Others" are the beginnings
    of the other texts; "one", that of one of them, the next; "domain", that of the same text,
    which ends before the longest prompt begins: nothing that is scored, and no prompt, is in it.
    "Sampled" is what the model writes itself, :func:`flocking.global_statistic` without texts.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    texts : list of str
        Those with a ``name``, as of :func:`flocking.passages`, are labelled with it.
    tokens, horizon : int
        Of each text, and how many of them are scored, the last ones.
    sequences : int
        How many texts the model writes, of 256 tokens each.
    seed : int
        Of random selections, and of what the model writes.
    progress : bool
        Show progress on standard error.

    Returns
    -------
    xarray.Dataset
        At density 0.5: ``perplexity`` and ``relative``, the ratio to the full model's, both
        (interval, selection, prompt_length); ``over`` (interval, pair, prompt_length), the ratio
        of two selections' perplexities on the same texts, ``pair`` being such as
        "static-domain / static"; ``over_by_text`` (text, prompt_length) of the first pair.

    Raises
    ------
    ValueError
        If there are fewer than two texts, or they or `horizon` are too short.
    """
    if horizon < _WINDOW:
        raise ValueError(f"horizon={horizon}: give {_WINDOW} tokens or more, to be scored.")
    require_prunable(model)
    least = horizon + 2 * _WINDOW + 1
    ids, names = same_length(model, tokenizer, texts, tokens, _WINDOW, least=least)
    total, (opening, _) = len(ids[0]), special_tokens_around(tokenizer)
    lengths = [n + 1 for n in (16, 256) if n + _WINDOW + 1 + horizon <= total]
    start = total - horizon
    begin = start - lengths[-1]
    beginnings = [row[:begin] for row in ids]
    recording = record(model, beginnings, tokenizer=tokenizer, window=None, progress=progress)
    own = analysis.statistic(recording)
    others = analysis.statistic_of_others(own)
    drawn = global_statistic(
        model,
        tokenizer=tokenizer,
        sequences=sequences,
        seed=seed,
        batch_size=_BATCH,
        progress=progress,
    )

    def measure(number: int) -> xr.DataArray:
        references: dict[str | None, xr.DataArray | None] = {
            "others": others.isel(sequence=number),
            "one": own.isel(sequence=(number + 1) % len(ids)),
            "domain": own.isel(sequence=number),
            "sampled": drawn,
            None: None,
        }
        twins = _twins(references, seed + number)
        rows = prompts_before(ids[number], start, lengths, opening)
        parts = [losses_of(model, twins, [row], n) for row, n in zip(rows, lengths, strict=True)]
        return xr.concat(parts, dimension("prompt_length", lengths)).isel(sequence=0)

    losses = each_text(measure, names, progress).mean("distance")
    data = perplexities(losses).drop_vars("over_static").assign(_paired(losses))
    source = source_of(recording)
    counts = {"beginning": begin, "scored": horizon, "sequences": sequences}
    caption = _caption(data, source["model"], counts)
    return finished(
        data, source, names, ids, seed, caption, density=DENSITY, beginning=begin, horizon=horizon
    )


def _twins(
    references: dict[str | None, xr.DataArray | None], seed: int
) -> dict[str, dict[str, Any]]:
    """Arguments of :func:`flocking.griffin` for each of ``SELECTIONS``."""
    return {
        name: {
            "density": DENSITY,
            "method": method,
            "reference": references[which],
            "seed": seed,
        }
        for name, (method, which) in SELECTIONS.items()
    }


def _paired(losses: xr.DataArray) -> dict[str, xr.DataArray]:
    """Ratios of two selections' perplexities on the same texts."""
    differences = [
        losses.sel(selection=one, drop=True) - losses.sel(selection=other, drop=True)
        for one, other in PAIRS
    ]
    labels = [f"{one} / {other}" for one, other in PAIRS]
    over = exponential(bootstrap(xr.concat(differences, dimension("pair", labels))))
    over.attrs = ratio("ratio of perplexities on the same texts")
    by_text = exponential(differences[0]).rename(sequence="text")
    by_text.attrs = ratio(f"perplexity, {labels[0]}")
    return {"over": over.transpose("interval", "pair", ...), "over_by_text": by_text}


def _caption(data: xr.Dataset, name: str, counts: dict[str, int]) -> str:
    lengths = data.prompt_length.values
    perplexity = data.perplexity.sel(interval="estimate")
    absolute = (
        f"{label} {', '.join(f'{value:,.0f}' for value in perplexity.sel(selection=label).values)}"
        for label in perplexity.selection.values
    )
    ratios = (
        f"{label} {', '.join(said(data.over.sel(pair=label), length) for length in lengths)}"
        for label in data.pair.values
    )
    last = data.over_by_text.isel(prompt_length=-1)
    by_text = (f"{text} {value:.2f}" for text, value in last.sortby(last).to_series().items())
    return (
        f"Perplexity of {name} at density {DENSITY}, relative to the full model's, on the last "
        f"{counts['scored']} tokens of {data.sizes['text']} texts, by what static and global-local "
        "selections are made from; 95% bootstrap intervals over texts. Other texts: the first "
        f"{counts['beginning']:,} tokens of each of the others; one other text: of one alone; "
        f"domain: of the same text, none of them scored or in a prompt; sampled: "
        f"{counts['sequences']} texts of 256 tokens that the model wrote itself. "
        f"Random is chance. Absolute, after {' and '.join(map(str, lengths))} tokens: "
        f"{'; '.join(absolute)}. Ratios on the same texts: {'; '.join(ratios)}. "
        f"{data.pair.values[0]} by text, after {lengths[-1]}: {', '.join(by_text)}. A text's own "
        "beginning is nearer to it than another document of its domain would be."
    )


EXPERIMENTS: dict[str, Callable[..., xr.Dataset]] = {loss_by_reference.__name__: loss_by_reference}
