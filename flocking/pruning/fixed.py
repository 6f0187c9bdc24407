"""Selections that are made once, for a model that is pruned for good."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.analysis import kept_count, magnitude, named, select, weight_magnitude
from flocking.feedforward import FeedForward, feedforwards
from flocking.pruning.calibration import global_statistic
from flocking.pruning.chosen import Wide
from flocking.pruning.methods import global_local, over_runs

FIXED = ("static", "global-local", "magnitude")  # methods that need no prompt


def rounded_densities(
    blocks: Sequence[FeedForward] | Sequence[Wide], density: float, multiple: int = 1
) -> list[float]:
    """The density of each layer at which its width is a multiple of a number, rounded down.

    Parameters
    ----------
    blocks : list of FeedForward, or list of Wide
    density : float
        Fraction of neurons to keep, in (0, 1].
    multiple : int
        Of what widths are to be multiples; in a mixture, those of each expert.

    Returns
    -------
    list of float
        For :func:`flocking.select`, in the order of `blocks`.

    Raises
    ------
    ValueError
        If the density is none, or leaves a layer without a neuron.
    """
    found = []
    for block in blocks:
        d_ff = block.d_ff // block.experts
        if multiple > d_ff:
            raise ValueError(
                f"widths cannot be multiples of {multiple:,} where there are {d_ff:,} neurons: "
                "give a smaller number."
            )
        kept = kept_count(density, d_ff) // multiple * multiple
        if not kept:
            raise ValueError(
                f"density {density:g} keeps {kept_count(density, d_ff)} of {d_ff:,} neurons, and "
                f"widths are multiples of {multiple}: give {_above(multiple / d_ff)} or more."
            )
        found.append(kept / d_ff)
    return found


def _above(density: float) -> str:
    """A density in a few digits, rounded up."""
    return f"{np.ceil(density * 1e4) / 1e4:g}"


def fixed_selection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    texts: list[list[int]] | None,
    density: float = 0.5,
    *,
    sources: int | None = None,
    multiple: int = 1,
    seed: int = 0,
) -> xr.DataArray:
    """Select neurons once for all texts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    method : {"static", "global-local", "magnitude"}
        The statistic over `texts`; the mean of ranks by it and by the statistic over texts that
        the model writes itself; or the norms of the weights.
    texts : list of list of int or None
        Token ids. By default, and where "global-local" needs them, the model writes texts itself:
        see :func:`flocking.global_statistic`.
    sources : int, optional
        How many texts there are, if `texts` are pieces of them.
    density, multiple
        As of :func:`rounded_densities`.
    seed : int
        Of what the model writes.

    Returns
    -------
    xarray.DataArray, bool, (layer, neuron)
        True for kept neurons.

    Raises
    ------
    ValueError
        For another method, or as :func:`rounded_densities` and :func:`flocking.global_statistic`.
    """
    if method not in FIXED:
        raise ValueError(f"method={method!r}: choose from {', '.join(FIXED)}.")
    blocks = feedforwards(model)
    densities = rounded_densities(blocks, density, multiple)
    if method == "magnitude":
        return select(weight_magnitude(model), densities)
    # (A model may be unable to write texts, which it says before it reads many.)
    own = static = None
    if method == "global-local" or texts is None:
        own = static = global_statistic(model, tokenizer=tokenizer, seed=seed)
    if texts is not None:
        static = global_statistic(model, texts, tokenizer=tokenizer, seed=seed)
    assert static is not None
    static = _of_blocks(static, blocks)
    if texts is not None and sources is not None:
        pieces = f" of {len(texts)} texts of "
        told = static.attrs["made_from"].replace(
            pieces, f" of {len(texts)} pieces of {sources} texts, "
        )
        static.attrs["made_from"] = told
    if method == "global-local":
        assert own is not None
        static = _mean_of_ranks(static, _of_blocks(own, blocks), blocks)
    return select(static, densities)


def _of_blocks(statistic: xr.DataArray, blocks: list[FeedForward]) -> xr.DataArray:
    """One that a block can be cut by: over all of its runs, and with no expert without a value."""
    joined = over_runs(statistic.values, blocks)
    return _with_weights(statistic.copy(data=joined), blocks)


def _with_weights(statistic: xr.DataArray, blocks: list[FeedForward]) -> xr.DataArray:
    """With the norms of their weights for experts that no token of the texts was routed to.

    As :func:`flocking.griffin` does for those that a prompt does not reach.
    """
    values, count = statistic.values.copy(), 0
    for row, block in zip(values, blocks, strict=True):
        if block.kind != "experts":
            continue
        experts = row[: block.d_ff].reshape(block.experts, -1)  # a view
        absent = (experts == 0).all(axis=1)
        if absent.any():
            experts[absent] = magnitude(block).numpy(force=True).reshape(experts.shape)[absent]
            count += int(absent.sum())
    if not count:
        return statistic
    told = f"{statistic.made_from}, and of weights in {count} experts that no token was routed to"
    return statistic.copy(data=values).assign_attrs(made_from=told)


def _mean_of_ranks(
    local: xr.DataArray, own: xr.DataArray, blocks: list[FeedForward]
) -> xr.DataArray:
    """Mean of the ranks by two statistics, in a mixture within each expert."""
    rows = {block.layer: row for block, row in zip(blocks, own.values, strict=True)}

    def of(block: FeedForward) -> Tensor:
        return torch.from_numpy(rows[block.layer][: block.d_ff])

    method, nowhere = global_local(of, 0.5), torch.Generator("cpu")
    mean = np.full(local.shape, np.nan)
    for row, values, block in zip(mean, local.values, blocks, strict=True):
        statistic = torch.from_numpy(values[: block.d_ff]).view(block.experts, -1)
        scores = method(statistic, 1, block, nowhere)
        row[: block.d_ff] = scores.flatten().numpy()
    told = f"mean of ranks by two statistics: {local.made_from}; and {own.made_from}"
    values = named(local.copy(data=mean), "statistic", "mean of ranks by texts and own samples")
    return values.assign_attrs(made_from=told)
