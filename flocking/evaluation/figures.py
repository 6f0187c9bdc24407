"""Figures of an evaluation: its summaries in, a ``Figure`` out; nothing is computed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flocking.drawing import (
    CHANCE,
    below,
    guide,
    in_style,
    legend,
    logarithmic,
    page,
    style_of,
)
from flocking.evaluation.summary import is_divergence, is_loss, own_chance, scale_of

_FULL = {"color": "0.15", "ls": "-", "lw": 1, "label": "full model"}
_MEANS = ["estimate", "low", "high"]
_DIFFERENCES = ["difference", "difference_low", "difference_high"]
_SUMMARY = "a summary of an evaluation, as flocking.evaluation.report.write makes it"
_NEEDS = ("task", "metric", "method", "density", "estimate", "chance", *_DIFFERENCES)
_OF_TOKENS = {"loss": "perplexity", "divergence": "divergence (nats)", "agreement": "agreement"}
_STEP = 0.02  # in density, by which methods stand beside each other


@in_style(_SUMMARY, *_NEEDS)
def quality_by_density(data: pd.DataFrame, figure: Figure) -> None:
    """Each task's score by the fraction of neurons kept.

    `data` is from :func:`flocking.evaluation.summary.headlines`, with ``told`` and a caption in its
    ``attrs``.
    """
    upper, axes = _panels(data, figure)
    for ax, part in _each(data, axes):
        full = part[part["method"] == "full"].iloc[0]
        low, high = _shown(part, full[["low", "high"]])
        ax.axhspan(low, high, color=_FULL["color"], alpha=0.12, lw=0)
        ax.axhline(_shown(part, full["estimate"]), **_FULL)
        pruned = _beside(part[part["method"] != "full"])
        if own_chance(part):
            _ticks(ax, pruned["shown_at"], _shown(part, pruned["chance"]))
        elif not np.isnan(full["chance"]):
            guide(float(_shown(part, full["chance"])), ax)
        for method, own in pruned.groupby("method", sort=False):
            own = own.sort_values("density")
            _errors(ax, own["shown_at"], _shown(part, own[_MEANS]), style_of(str(method)))
        ax.set_xlim(0, 1)
        _scale(ax, part)
    below(axes, "density (fraction kept)")
    legend(upper, axes, ncols=2)


@in_style(_SUMMARY, *_NEEDS)
def quality_by_method(data: pd.DataFrame, figure: Figure) -> None:
    """Differences from the full model on each task, by method, at one density.

    `data` is from :func:`flocking.evaluation.summary.headlines`, with a caption in its ``attrs``.
    """
    losses = data["metric"].map(is_loss)
    parts = [part for part in (data[~losses], data[losses]) if len(part)]
    counts = [part.groupby(["task", "metric"]).ngroups for part in parts]
    in_legend = -(-(data["method"].nunique() + 1) // 2)  # lines: methods and chance, two in each
    height = 0.13 * in_legend + 0.45 * len(parts) + 0.42 * sum(counts)
    upper, axes = page(figure, _told(data), len(parts), 1, height=height, height_ratios=counts)
    for ax, part in zip(axes[:, 0], parts, strict=True):
        loss = is_loss(part["metric"].iloc[0])
        names = []
        for row, ((task, metric), own) in enumerate(part.groupby(["task", "metric"], sort=False)):
            names.append(f"{task}\n{metric_in_words(metric)}, n = {own['items'].iloc[0]}")
            full = own[own["method"] == "full"].iloc[0]
            others = own[own["method"] != "full"]
            for number, one in enumerate(others.itertuples()):
                y = row + 0.6 * ((number + 0.5) / len(others) - 0.5)
                middle, low, high = _shown(own, [getattr(one, name) for name in _DIFFERENCES])
                style = style_of(str(one.method)) | {"ls": "none", "ms": 3.5}
                ax.errorbar(middle, y, xerr=[[middle - low], [high - middle]], lw=1, **style)
                if not np.isnan(one.chance):
                    gone = float(_shown(own, one.chance - full["estimate"]))
                    ends = [y - 0.35 / len(others), y + 0.35 / len(others)]
                    ax.plot([gone] * 2, ends, **CHANCE, zorder=4, label="chance")
        ax.axvline(1 if loss else 0, **_FULL)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        if loss:
            ax.set_xlabel("perplexity, times the full model's")
            logarithmic(ax, ax.xaxis)
        else:
            ax.set_xlabel("minus the full model's\n(percentage points)")
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    legend(upper, axes, ncols=2)


@in_style(_SUMMARY, *_NEEDS, "beyond")
def quality_by_prompt(data: pd.DataFrame, figure: Figure) -> None:
    """Differences from the full model by how many tokens the kept neurons were selected from.

    `data` is from :func:`flocking.evaluation.summary.by_prompt`, one metric a task, with what
    :func:`flocking.evaluation.summary.beyond_others` adds, and a caption in its ``attrs``. What is
    ``beyond`` the scale of the others is said in words.
    """
    upper, axes = _panels(data, figure)
    for ax, part in _each(data, axes):
        loss = is_loss(part["metric"].iloc[0])
        ax.axhline(1 if loss else 0, **_FULL)
        shown = part[(part["method"] != "full") & ~part["beyond"]]
        for method, own in shown.groupby("method", sort=False):
            own = own.sort_values("prompt_tokens")
            _errors(
                ax, own["prompt_tokens"], _shown(part, own[_DIFFERENCES]), style_of(str(method))
            )
        logarithmic(ax, ax.xaxis, sorted(part["prompt_tokens"].unique()))
        ax.set_ylabel(against_full(part["metric"].iloc[0]))
        _scale(ax, part)
        name_beyond(ax, part)
    below(axes, "prompt (tokens)")
    legend(upper, axes, ncols=2)


@in_style(_SUMMARY, *_NEEDS, "batch_size")
def quality_by_batch(data: pd.DataFrame, figure: Figure) -> None:
    """Differences from the full model by how many prompts share a selection.

    `data` is from :func:`flocking.evaluation.summary.by_batch`, one metric a task, with a caption
    in its ``attrs``.
    """
    upper, axes = _panels(data, figure)
    for ax, part in _each(data, axes):
        ax.axhline(0, **_FULL)
        own = part[part["batch_size"] > 0].sort_values("batch_size")
        _errors(ax, own["batch_size"], _shown(part, own[_DIFFERENCES]), style_of("topk"))
        for other in part[part["batch_size"] == 0].itertuples():
            level = float(_shown(part, other.difference))
            ax.axhline(level, **style_of(str(other.method)) | {"marker": ""})
        logarithmic(ax, ax.xaxis, sorted(own["batch_size"].unique()))
        ax.set_ylabel(against_full(part["metric"].iloc[0]))
        _scale(ax, part)
    below(axes, "prompts that share\na selection")
    legend(upper, axes, ncols=2)


def _ticks(ax: Axes, x: object, y: np.ndarray) -> None:
    """Chance of each method, where these differ: a short line across the method's bar."""
    ax.plot(x, y, **CHANCE | {"ls": "none"}, marker="_", ms=5, label="each method's chance")


def _beside(pruned: pd.DataFrame) -> pd.DataFrame:
    """Where methods are drawn: side by side where there are several at a density."""
    groups = pruned.groupby("density")["method"]
    order = groups.cumcount()
    middle = (groups.transform("size") - 1) / 2
    return pruned.assign(shown_at=pruned["density"] + _STEP * (order - middle))


def _panels(data: pd.DataFrame, figure: Figure) -> tuple:
    count = data.groupby(["task", "metric"]).ngroups
    rows = -(-count // 2)
    upper, axes = page(figure, _told(data), rows, 2, height=0.6 + 1.15 * rows)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return upper, axes


def _each(data: pd.DataFrame, axes: np.ndarray) -> list[tuple[Axes, pd.DataFrame]]:
    """The data of each task, with the axes that it is drawn on."""
    found = []
    for ax, ((task, metric), part) in zip(
        axes.flat, data.groupby(["task", "metric"], sort=False), strict=False
    ):
        ax.set(title=task, ylabel=metric_in_words(metric))
        found.append((ax, part))
    return found


def _told(data: pd.DataFrame) -> str:
    """A line or two below the figure; its caption stands beside it."""
    return str(data.attrs.get("told", ""))


def metric_in_words(name: str) -> str:
    """A metric as an axis names it, in its unit where it is not a share."""
    for what, words in _OF_TOKENS.items():
        if name.startswith(f"{what}_"):
            return f"{words} of {name.removeprefix(f'{what}_')}"
    return name


def against_full(metric: str) -> str:
    """What an axis shows on which the full model is 1, or 0: in lines, since panels are small."""
    name = metric_in_words(metric).replace(",", ",\n")
    return f"{name},\n{'times' if is_loss(metric) else 'minus'} full's"


def name_beyond(ax: Axes, part: pd.DataFrame) -> None:
    """Keep the scale to what can be told apart on it, and say what is beyond it, and how far.

    `part` has losses of one task as differences from the full model's, and whether each is
    ``beyond`` the others.
    """
    beyond = part[part["beyond"]]
    if beyond.empty:
        return
    inside = np.exp(part.loc[~part["beyond"], _DIFFERENCES].to_numpy(dtype=float))
    ax.set_ylim(min(1, inside.min()) / 1.1, inside.max() * 1.5 ** (1 + beyond["method"].nunique()))
    for line, (method, own) in enumerate(beyond.groupby("method", sort=False)):
        low, high = (f"{np.exp(own['difference'].agg(end)):,.0f}" for end in ("min", "max"))
        told = f"{method}: {low}" + (f"–{high}" if high != low else "")  # noqa: RUF001
        where: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top"}
        ax.annotate(
            told, (1, 1 - 0.12 * line), color=style_of(str(method))["color"], fontsize=5.6, **where
        )


def _shown(part: pd.DataFrame, values: object) -> np.ndarray:
    """Values of one metric as they are drawn: losses as perplexities, percents as shares."""
    return as_drawn(values, part["metric"].iloc[0], part)


def as_drawn(values: object, metric: str, rows: pd.DataFrame) -> np.ndarray:
    """Values on axes that show losses as perplexities, and shares times 100.

    Parameters
    ----------
    values : array_like
    metric : str
    rows : pandas.DataFrame
        All that is drawn of the metric: see :func:`flocking.evaluation.summary.scale_of`.
    """
    values = np.asarray(values, dtype=float)
    if is_loss(metric):
        return np.exp(values)
    is_percent = scale_of(metric, rows) == 1 and not is_divergence(metric)
    return values / 100 if is_percent else values


def _errors(ax: Axes, x: pd.Series, values: np.ndarray, style: dict) -> None:
    middle, low, high = values.T
    ax.errorbar(x, middle, yerr=[middle - low, high - middle], elinewidth=0.8, **style)


def _scale(ax: Axes, part: pd.DataFrame) -> None:
    metric = part["metric"].iloc[0]
    if is_loss(metric):
        logarithmic(ax, ax.yaxis)
    elif not is_divergence(metric):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
