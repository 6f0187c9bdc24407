"""Figures of several models: rows of a comparison in, a ``Figure`` out; nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from flocking.drawing import (
    BY_SELECTION,
    BY_WEIGHTS,
    CHANCE,
    below,
    guide,
    in_style,
    legend,
    level,
    logarithmic,
    page,
    shown,
    style_of,
)
from flocking.evaluation.figures import against_full, as_drawn, name_beyond
from flocking.evaluation.summary import is_divergence, is_loss, parts_of

_MEANS = ("estimate", "low", "high")
_DIFFERENCES = ("difference", "difference_low", "difference_high")
_DASHES = ("-", "--", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))  # of models, the smallest first
_BESIDE = 0.03  # of the width of a panel, by which methods stand beside each other
_NEAR = 0.2  # of the width of a panel: sizes that are nearer have one label
_SOURCE = "rows of a comparison, as flocking.reports.write chooses them"
_SCORES = {"flocking_score": "flocking score", "specificity": "specificity"}


@in_style(
    _SOURCE, "model", "parameters", "task", "metric", "method", "beyond", "gone", *_DIFFERENCES
)
def loss_by_size(data: pd.DataFrame, figure: Figure) -> None:
    """What each method loses on each task, by the models' size, at one density.

    `data` has one metric a task, and a caption and ``told`` in its ``attrs``. Losses are drawn as
    ratios of perplexities, other metrics as differences. What is ``beyond`` the scale of the
    others is said in words; ``gone`` is what a method's chance is above the full model's score.
    """
    groups = list(parts_of(data, ["task", "metric"]))
    rows = -(-len(groups) // 2)
    upper, axes = page(figure, _told(data), rows, 2, height=0.75 + 1.15 * rows)
    sizes = sorted({int(size) for size in data["parameters"]})
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax, ((task, metric), part) in zip(axes.flat, groups, strict=False):
        _by_size(ax, sizes)
        loss = is_loss(metric)
        level(1 if loss else 0, ax, "full model")
        shown = part[~part["beyond"]]
        methods = sorted(shown["method"].unique(), key=lambda name: _order(str(name)))
        for number, method in enumerate(methods):
            own = shown[shown["method"] == method]
            values = as_drawn(own[list(_DIFFERENCES)], metric, part)
            x = _beside(ax, own["parameters"], number - (len(methods) - 1) / 2)
            _errors(ax, x, values, style_of(method) | {"ms": 3, "lw": 0.9})
            if own["gone"].notna().any():
                gone = as_drawn(own["gone"], metric, part)
                ax.plot(x, gone, **CHANCE | {"ls": "none"}, marker="_", ms=5, label="chance")
        ax.set(title=task, ylabel=_axis_of(metric))
        if loss:
            logarithmic(ax, ax.yaxis)
            name_beyond(ax, part)
        elif not is_divergence(metric):
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    below(axes, "parameters")
    legend(upper, axes, ncols=2)


@in_style(_SOURCE, "model", "method", *_MEANS, *_DIFFERENCES, "chance")
def loss_by_energy(data: pd.DataFrame, figure: Figure) -> None:
    """Loss against the energy that kept neurons capture: a point for each model and selection.

    `data` has the captured energy as ``estimate`` and the loss above the full model's as
    ``difference``, with intervals, and a caption and ``told`` in its ``attrs``.
    """
    models = list(data["model"].unique())
    entries = data["method"].nunique() + len(models)
    upper, axes = page(figure, _told(data), 1, 1, height=2.5 + 0.13 * (-(-entries // 2)))
    (ax,) = axes.flat
    shades = np.linspace(0.65, 0.0, len(models)) if len(models) > 1 else [0.4]
    for number, (name, part) in enumerate(data.groupby("model", sort=False)):
        part = part.sort_values("estimate")
        look = {"color": str(shades[number]), "ls": _DASHES[number % len(_DASHES)], "lw": 0.7}
        ax.plot(part["estimate"], part["difference"], **look, label=shown(str(name)), zorder=1)
    for method, part in data.groupby("method", sort=False):
        # (As the figure names it: its static is of the other texts, not of calibration texts.)
        style = BY_SELECTION.get(str(method)) or style_of(str(method))
        style = style | {"ls": "none", "ms": 3.5, "elinewidth": 0.7}
        across, up = (part[list(each)].to_numpy(dtype=float).T for each in (_MEANS, _DIFFERENCES))
        ax.errorbar(across[0], up[0], yerr=_spread(up), xerr=_spread(across), zorder=2, **style)
    ax.axvline(float(data["chance"].iloc[0]), **CHANCE, label="chance")
    level(0, ax, "full model")
    ax.set(xlabel="captured energy of the scored tokens", xlim=(None, 1))
    ax.set_ylabel("loss above the full model's\n(nats; linear up to 1)")
    ax.set_yscale("symlog", linthresh=1)  # most differ by less than a nat, chance by many
    ax.set_yticks([0, 0.5, 1, 2, 4, 8, 16])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylim(min(-0.1, 1.1 * ax.dataLim.y0), None)
    legend(upper, axes, ncols=2)


@in_style(_SOURCE, "model", "parameters", "metric", "method", "layer", *_MEANS)
def scores_by_size(data: pd.DataFrame, figure: Figure) -> None:
    """Flocking score and specificity by size, of trained and of random weights.

    `data` has means over layers, whose ``layer`` is missing, and the estimates of layers, with a
    caption and ``told`` in its ``attrs``.
    """
    upper, axes = page(figure, _told(data), 1, 2, height=2.2)
    sizes = sorted({int(size) for size in data["parameters"]})
    for ax, (metric, name) in zip(axes.flat, _SCORES.items(), strict=True):
        _by_size(ax, sizes)
        for place, (weights, style) in zip((-1, 1), BY_WEIGHTS.items(), strict=True):
            part = data[(data["metric"] == metric) & (data["method"] == weights)]
            layers, means = part[part["layer"].notna()], part[part["layer"].isna()]
            dots = {"ls": "none", "marker": ".", "ms": 2.5, "mew": 0, "alpha": 0.45}
            x = _beside(ax, layers["parameters"], 2.5 * place)
            ax.plot(x, layers["estimate"].astype(float), color=style["color"], **dots)
            if len(means):
                marker = {"trained": "o", "control": "s"}[weights]
                values = means[list(_MEANS)].to_numpy(dtype=float)
                where = _beside(ax, means["parameters"], place)
                _errors(ax, where, values, style | {"marker": marker, "ms": 3.5, "lw": 0.9})
        if metric == "specificity":
            level(0, ax, "as similar as two texts")
        else:
            guide(0, ax)
        low, high = ax.get_ylim()
        ax.set(ylabel=name, ylim=(min(low, -0.05 * high), high))
        if not (data["metric"] == metric).any():
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center")
    below(axes, "parameters")
    legend(upper, axes, ncols=2)


def in_words(size: float) -> str:
    """A number of parameters, in the unit that suits it."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g}{unit}"
    return f"{size:g}"


def _order(method: str) -> int:
    """Where a method stands among others."""
    known = [*BY_SELECTION, "topk"]
    return known.index(method) if method in known else len(known)


def _told(data: pd.DataFrame) -> str:
    return str(data.attrs.get("told", ""))


def _axis_of(metric: str) -> str:
    if metric == "loss":
        return "perplexity,\ntimes full's"
    return against_full(metric)


def _by_size(ax: Axes, sizes: Sequence[int]) -> None:
    """Make the x axis one of sizes, with the models' own as ticks."""
    low, high = np.log10(sizes[0]), np.log10(sizes[-1])
    room = 0.12 * (high - low) or 0.2
    ax.set_xscale("log")
    ax.set_xlim(10 ** (low - room), 10 ** (high + room))
    ax.set_xticks(sizes, list(_names(sizes, high - low + 2 * room)))
    ax.minorticks_off()


def _names(sizes: Sequence[int], width: float) -> Iterator[str]:
    """Labels of sizes, but for those that have no room beside the one before."""
    last = -np.inf
    for size in sizes:
        here = np.log10(size) / width
        fits = here - last > _NEAR
        last = here if fits else last
        yield in_words(size) if fits else ""


def _beside(ax: Axes, sizes: pd.Series, steps: float) -> np.ndarray:
    """Where values of sizes are drawn: some steps beside them."""
    low, high = np.log10(ax.get_xlim())
    return 10 ** (np.log10(sizes.to_numpy(dtype=float)) + steps * _BESIDE * (high - low))


def _errors(ax: Axes, x: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> None:
    """A line with intervals; where they are not known, without."""
    ax.errorbar(x, values[:, 0], yerr=_spread(values.T), elinewidth=0.8, **style)


def _spread(values: np.ndarray) -> np.ndarray:
    middle, low, high = values
    return np.nan_to_num([middle - low, high - middle]).clip(0)


FIGURES = {
    "loss_by_size": loss_by_size,
    "loss_by_energy": loss_by_energy,
    "scores_by_size": scores_by_size,
}
