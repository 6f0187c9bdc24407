"""Densities from a budget: how many neurons each layer keeps, by what pruning it alone costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import kept_count, named
from flocking.feedforward import FeedForward, feedforwards, observe
from flocking.models import Prompts, Text, require_model, tokenize
from flocking.pruning.build import require_prunable
from flocking.pruning.methods import METHODS
from flocking.pruning.parts import beginning, rest
from flocking.pruning.prompt import Reader
from flocking.pruning.scoring import refuse_unscorable
from flocking.pruning.selector import Selector
from flocking.recording import coordinates_of, whole_number

MEASURED = [0.0, 0.25, 0.5, 0.75]  # densities at which a layer's harm is measured; 0 at 1
_FLOOR = 0.9  # of the density of all: lowest density of a layer, by default
_ABOUT = {"long_name": "divergence of the output with one layer pruned", "units": "nat"}
_STEPS = 64  # in which a layer goes from all of its neurons to none


def allocate(
    model: PreTrainedModel,
    texts: Text,
    density: float = 0.5,
    *,
    floor: float | None = None,
    prompt_length: int = 256,
    continuation_length: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> xr.DataArray:
    """One density for each layer, with as many kept neurons in total as with one for all.

    A layer's harm at a density is the Kullback-Leibler divergence of the model's next-token
    distribution from that of the model in which this layer alone is pruned, in the continuation
    of a text, with the neurons that GRIFFIN selects from the text's prompt. It is measured with
    0, 25, 50 and 75% of a layer's neurons, averaged over tokens and texts, and its root is
    interpolated between these. From all neurons, steps of 1/64 of a layer's neurons are then
    removed where that costs least, until the total is met: greedily, as TEAL does with the
    projections inside of a block (Liu et al. 2024, arXiv 2408.14690).

    On the embedded model the loss of held-out texts is lower than with one density for all, by
    0.26 nats a token [0.18, 0.34] of 1.01 at density 0.5 (``figures/loss_by_allocation.json``).
    Most of that comes from the first layer; the error of each block's own output, and a floor of
    half of the density, do not do.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model that :func:`flocking.griffin` can prune, not a twin.
    texts : str, list of str or list of list of int
        A calibration set, of texts like those that are to be generated, but not the same. Of
        each, the first ``prompt_length + continuation_length`` tokens are read.
    density : float
        Fraction of all FF neurons to keep, in (0, 1].
    floor : float, optional
        Lowest density of a layer; by default 0.9 times `density`, and one neuron at least. Layers
        that are harmless when pruned alone are not so together.
    prompt_length, continuation_length : int
        In tokens.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        For text; by default the one in the model's folder.
    progress : bool
        Show progress on standard error. For each text, the model runs four times for each of its
        layers over the continuation.

    Returns
    -------
    xarray.DataArray, float64, (layer,)
        Densities, to be given to :func:`flocking.griffin`. The total is that of `density` for all
        layers: neurons count the same, whatever their layer's width. (With mixtures of experts,
        whose experts all keep equally many, it may be less by a few.) Coordinates ``d_ff``;
        ``experts`` if there are mixtures; and ``harm``, in nats a token, interpolated at this
        density. A block that runs several times in a forward pass is one layer, its first.

    Raises
    ------
    ValueError
        If `density` is not in (0, 1], or keeps no neuron of some layer; if `floor` is not above 0
        or is above `density`; if a text is too short or does not fit the model's context; or
        as :func:`flocking.griffin` raises it, for a twin among others.
    TypeError
        If `density` or `floor` is not a number, `texts` has none of the forms that
        :func:`flocking.record` takes, or `tokenizer` is none.
    UnsupportedModelError
        If the model's FF blocks cannot be located and proved.

    Examples
    --------
    >>> densities = flocking.allocate(
    ...     model,
    ...     flocking.passages()[:2],
    ...     density=0.5,
    ...     prompt_length=32,
    ...     continuation_length=16,
    ...     tokenizer=tokenizer,
    ...     progress=False,
    ... )
    >>> densities.dims, densities.mean().item()
    (('layer',), 0.5)
    >>> pruned = flocking.griffin(model, density=densities)
    """
    model = require_model(model)
    _check_densities(density, floor)
    whole_number("prompt_length", prompt_length, 1)
    whole_number("continuation_length", continuation_length, 2)
    require_prunable(model)
    for block in first_runs(model):
        kept_count(density, block.d_ff // block.experts)
        _lowest(density, floor, block.d_ff // block.experts)
    measured = layer_harms(
        model,
        tokenize(model, texts, tokenizer),
        prompt_length=prompt_length,
        continuation_length=continuation_length,
        progress=progress,
    )
    return spread(measured.mean("sequence"), density, floor)


def _check_densities(density: object, floor: object) -> None:
    """Refuse what is no density, and a floor that is above it."""
    for name, value in {"density": density, "floor": 0.0 if floor is None else floor}.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{name}={value!r}: give one number, above 0 and at most 1.")
    if not 0 < density <= 1:  # type: ignore[operator] # numbers, by now
        raise ValueError(
            f"density={density}: give the fraction of all neurons to keep, above 0 and at most 1."
        )
    if floor is not None and not 0 < floor <= density:  # type: ignore[operator]
        raise ValueError(
            f"floor={floor}: give the lowest density of a layer, above 0 and at most density, "
            f"{density}."
        )


def _lowest(density: float, floor: float | None, width: int) -> int:
    """Least number of neurons that a layer of `width` keeps."""
    if floor is None:
        return max(1, int(_FLOOR * density * width + 1e-9))
    try:
        return kept_count(floor, width)
    except ValueError as problem:
        raise ValueError(f"floor: {problem}") from problem


def first_runs(model: PreTrainedModel) -> list[FeedForward]:
    """The model's blocks, each once: what :func:`flocking.griffin` takes a density for."""
    return [block for block in feedforwards(model) if block.call == 0]


# --------------------------------------------------------------------------------------
# Harm


def layer_harms(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    prompt_length: int,
    continuation_length: int,
    progress: bool = True,
) -> xr.DataArray:
    """Divergence of the model's output where one layer alone is pruned, for each in turn.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that can be pruned.
    prompts : Prompts
        Tokenized texts.
    prompt_length, continuation_length, progress
        As of :func:`allocate`.

    Returns
    -------
    xarray.DataArray, float64, (sequence, layer, measured)
        Mean over the continuation's tokens but the first, whose distribution is the prompt's, in
        nats a token; at the densities ``measured``, which end with 1.

    Raises
    ------
    ValueError
        If a text is too short or does not fit the model's context, or its output is not finite.
    """
    length = prompt_length + continuation_length
    for number, row in enumerate(prompts.ids):
        if len(row) < length:
            raise ValueError(
                f"expected {length} tokens or more, got {len(row)} in text {number}: give longer "
                "texts, or smaller prompt_length and continuation_length."
            )
    prompts = prompts.cut(length)
    refuse_unscorable(model, [row[:-1] for row in prompts.ids], prompts.inputs)
    blocks = first_runs(model)
    values = np.zeros((len(prompts.ids), len(blocks), len(MEASURED) + 1))
    runs = len(prompts.ids) * len(blocks) * len(MEASURED)
    with tqdm(total=runs, desc="measuring", unit="run", disable=not progress) as bar:
        for number, ids in enumerate(prompts.ids):
            inputs = {name: rows[number][None] for name, rows in prompts.inputs.items()}
            for place, at, harm in _harms_of(model, blocks, ids[None], prompt_length, inputs):
                if not np.isfinite(harm):
                    raise ValueError(
                        f"the model's output is not finite in text {number}, with layer "
                        f"{blocks[place].layer} pruned: no harm can be measured."
                    )
                values[number, place, at] = harm
                bar.update()
    labels = {name: ("layer", each) for name, each in coordinates_of(blocks).items()}
    return xr.DataArray(
        values,
        {**labels, "sequence": np.arange(len(values)), "measured": [*MEASURED, 1.0]},
        ("sequence", "layer", "measured"),
        "harm",
        _ABOUT,
    )


def _harms_of(
    model: PreTrainedModel,
    blocks: list[FeedForward],
    ids: Tensor,
    cut: int,
    inputs: dict[str, Tensor],
) -> Iterator[tuple[int, int, float]]:
    """For each block and density, by their places: the harm in one text, int64 (1, token)."""
    masks, past = _selections(model, blocks, ids, cut, inputs)

    def outputs(place: int | None = None, mask: Tensor | None = None) -> Tensor:
        def pruned(block: FeedForward, z: Tensor) -> Tensor | None:
            if place is None or mask is None or block.down is not blocks[place].down:
                return None
            return z * mask.to(z)

        # (The full model is watched too: rounding is the same in mixtures.)
        with torch.no_grad(), observe(model, pruned):
            logits = rest(model, ids, cut, copy.deepcopy(past), inputs)
        return logits[0].float().log_softmax(dim=-1)

    full = outputs()
    for place, several in enumerate(masks):
        for at, mask in enumerate(several):
            pointwise = functional.kl_div(
                outputs(place, mask), full, reduction="none", log_target=True
            )
            yield place, at, pointwise.sum(dim=-1).double().mean().item()


def _selections(
    model: PreTrainedModel,
    blocks: list[FeedForward],
    ids: Tensor,
    cut: int,
    inputs: dict[str, Tensor],
) -> tuple[list[list[Tensor]], Any]:
    """Masks (neuron,) of what GRIFFIN keeps after a prompt, by block and density; its cache."""
    runs = {block.down: block.layer for block in blocks}
    reader = Reader(model, {block.layer: runs[block.down] for block in feedforwards(model)})
    (_, past), read = reader.read(
        lambda: beginning(model, ids, cut, inputs), len(ids), None, cut, None
    )
    masks: list[list[Tensor]] = [[] for _ in blocks]
    for density in MEASURED:
        # (Where so few neurons would be none, as many as none: harm is measured, not refused.)
        counts = [int(density * (block.d_ff // block.experts) + 1e-9) for block in blocks]
        several = [(block, max(1, k)) for block, k in zip(blocks, counts, strict=True)]
        selected = Selector(several, METHODS["topk"], "shared", 0).select(read)
        for mine, block, k, kept in zip(masks, blocks, counts, selected.kept, strict=True):
            mask = torch.zeros(block.d_ff, dtype=torch.bool, device=kept.device)
            mine.append(mask.index_fill(0, kept, True) if k else mask)
    return masks, past


# --------------------------------------------------------------------------------------
# The budget


def spread(harms: xr.DataArray, density: float, floor: float | None = None) -> xr.DataArray:
    """Densities by layer from harms (layer, measured): what :func:`allocate` returns."""
    experts = harms.experts.values if "experts" in harms.coords else np.ones(len(harms), int)
    widths = harms.d_ff.values // experts
    curves = [
        _curve(values, harms.measured.values, width)
        for values, width in zip(harms.values, widths, strict=True)
    ]
    counts = _greedy(
        curves,
        experts,
        total=sum(kept_count(density, d) * e for d, e in zip(widths, experts, strict=True)),
        lowest=np.array([_lowest(density, floor, d) for d in widths]),
    )
    found = harms.isel(measured=0, drop=True).copy(data=counts / widths)
    at = np.array([curve[count] for curve, count in zip(curves, counts, strict=True)])
    found = named(found, "density", "fraction of neurons kept")
    return found.assign_coords(harm=("layer", at, _ABOUT))


def _curve(values: np.ndarray, measured: np.ndarray, width: int) -> np.ndarray:
    """Harm with 0, 1, ... `width` neurons kept.

    A small perturbation's divergence grows with its square, so the root is interpolated. More
    neurons are never more harm: where that was measured, it is noise.
    """
    falling = np.maximum.accumulate(np.sqrt(np.maximum(values, 0))[::-1])[::-1]
    return np.interp(np.arange(width + 1) / width, measured, falling) ** 2


def _greedy(
    curves: list[np.ndarray], experts: np.ndarray, total: int, lowest: np.ndarray
) -> np.ndarray:
    """Neurons that each layer keeps (of a mixture, in each expert), `total` at most in all.

    Removed are, again and again, neurons of the layer where that costs least harm a neuron.
    """
    counts = np.array([len(curve) - 1 for curve in curves])
    steps = np.maximum(1, counts // _STEPS)
    while (excess := int((counts * experts).sum()) - total) > 0:
        removed = np.minimum(np.minimum(steps, counts - lowest), -(-excess // experts))
        costs = [
            (curve[count - step] - curve[count]) / (step * several) if step > 0 else np.inf
            for curve, count, step, several in zip(curves, counts, removed, experts, strict=True)
        ]
        cheapest = int(np.argmin(costs))
        counts[cheapest] -= removed[cheapest]
    return counts
