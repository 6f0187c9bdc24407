"""Tasks with choices taken together: what a method loses in their mean."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flocking.analysis import bounds
from flocking.evaluation import scores
from flocking.evaluation.summary import by_item, markdown, parts_of, said, with_variants

_RESAMPLES = 2000


def over_tasks(items: pd.DataFrame, *, against: str = "full", seed: int = 0) -> pd.DataFrame:
    """Mean differences from another variant over tasks with choices, by how answers are read.

    A task alone often has too few items to tell a loss of a few points from none. Each task counts
    the same. Intervals are 95%: items are drawn with replacement within each task, the same ones
    for both variants (a stratified bootstrap; Efron and Tibshirani 1993, chapter 8),
    and percentiles are those of :func:`flocking.bootstrap` for the fewest items of a task.

    Parameters
    ----------
    items : pandas.DataFrame
        As :func:`flocking.evaluation.runner.evaluate` returns it.
    against : str
        The variant to compare with, such as "full" or "static@0.5".
    seed : int
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        A row for each metric (``acc``, ``acc_norm``) that two or more tasks have, and each variant
        that all of these were asked with: ``metric``, ``tasks``, ``variant``, ``items``;
        ``difference``, ``difference_low``, ``difference_high``. Empty if there is none.

    Raises
    ------
    ValueError
        If there is no such variant.
    """
    named = with_variants(items, against)
    named = named[named["metric"].str.startswith("acc")]
    rows = []
    for (metric,), part in parts_of(named, ["metric"]):
        by_task = {task: by_item(own, (task,))[0] for (task,), own in parts_of(part, ["task"])}
        shared = [
            name
            for name in next(iter(by_task.values())).index
            if all(name in values.index for values in by_task.values())
        ]
        if len(by_task) < 2 or against not in shared:
            continue
        for variant in shared:
            if variant == against:
                continue
            apart = [(own.loc[variant] - own.loc[against]).to_numpy() for own in by_task.values()]
            found = _mean_of(apart, seed)
            rows.append(
                {
                    "metric": metric,
                    "tasks": ", ".join(by_task),
                    "variant": variant,
                    "items": sum(map(len, apart)),
                    "difference": found[0],
                    "difference_low": found[1],
                    "difference_high": found[2],
                }
            )
    return pd.DataFrame(rows)


def _mean_of(apart: list[np.ndarray], seed: int) -> np.ndarray:
    """Mean over tasks of their items' mean, and its bounds; NaN if a task has one item only."""
    estimate, fewest = float(np.mean([own.mean() for own in apart])), min(map(len, apart))
    if fewest < 2:
        return np.array([estimate, np.nan, np.nan])
    joined = np.concatenate(apart)
    if (joined == joined[0]).all():  # draws would be, too
        return scores.means(joined[None], 1, differences=True)[0]
    random = np.random.default_rng(seed)
    drawn = [
        values[random.integers(len(values), size=(_RESAMPLES, len(values)))].mean(axis=1)
        for values in apart
    ]
    low, high = bounds(estimate, np.mean(drawn, axis=0), fewest)
    return np.array([estimate, low, high])


def table_over_tasks(rows: pd.DataFrame) -> str:
    """The same as a table in Markdown, in percentage points; empty without rows."""
    if rows.empty:
        return ""
    variants = list(rows["variant"].unique())
    names = ["mean of", "tasks", "items", *variants]
    lines = []
    for (metric, tasks), part in parts_of(rows, ["metric", "tasks"]):
        by_variant = dict(part.set_index("variant").iterrows())
        cells = [metric, tasks, str(part["items"].iloc[0])]
        for variant in variants:
            own = by_variant.get(variant)
            shown = ["difference", "difference_low", "difference_high"]
            cells.append("" if own is None else said(own[shown], 100, sign=True))
        lines.append(cells)
    return markdown(names, lines) + "\n"
