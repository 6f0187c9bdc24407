"""Which rows of a comparison a figure draws, and why it draws none."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from flocking.evaluation.summary import (
    beyond_others,
    is_divergence,
    is_loss,
    is_of_tokens,
    parts_of,
)
from flocking.reports.comparison import DIFFERENCES

_ENERGY = "captured_energy"
_SCORES = ("flocking_score", "specificity")


def densities_of(rows: pd.DataFrame) -> list[float]:
    """Densities at which something was pruned, in ascending order."""
    pruned = rows[rows["difference"].notna() & (rows["method"] != "full")]
    return sorted(pruned["density"].unique().tolist())


def refuse_density(rows: pd.DataFrame, density: float) -> None:
    """Raise a ValueError for a density that was not measured, if others were."""
    known = densities_of(rows)
    if known and density not in known:
        names = ", ".join(f"{each:g}" for each in known)
        raise ValueError(f"density={density:g}: nothing was measured at it: give one of {names}.")


def of_sizes(rows: pd.DataFrame, density: float) -> pd.DataFrame:
    """One metric of each task, pruned at one density, of models whose size is known.

    The metric is the loss with most tokens, or the task's first one; tasks with losses come first.
    Tasks of a single model, which show nothing by size, are left out if others have several.
    ``beyond`` is whether a loss is too far from the others to share their scale; ``gone`` is what
    the method's own chance is above the full model's score.
    """
    found = rows[
        rows["parameters"].notna()
        & (rows["method"] != "full")
        & (rows["density"] == density)
        & rows["difference"].notna()
    ]
    several = found.groupby("task")["model"].transform("nunique") > 1
    found = found[several] if several.any() else found
    losses: list[pd.DataFrame] = []
    others: list[pd.DataFrame] = []
    for _, part in parts_of(found, ["task"]):
        metric = headline(part["metric"].unique())
        (losses if is_loss(metric) else others).append(part[part["metric"] == metric])
    chosen = [*losses, *others]
    together = beyond_others(pd.concat(chosen, ignore_index=True) if chosen else found)
    full = together["estimate"] - together["difference"]
    return together.assign(gone=together["chance"] - full)


def headline(metrics: Iterable[str]) -> str:
    """The metric that speaks for a task: the loss of most tokens, or the first one."""
    names = list(metrics)
    return max(filter(is_loss, names), key=_tokens, default=names[0])


def of_pairs(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Of losses and divergences those of most tokens; of other scores all.

    Two ways to read the same answers can say opposite things, so that none is left out.
    """
    keep = []
    for _, part in parts_of(contrasts, ["of", "task"]):
        names = part["metric"].unique().tolist()
        divergences = sorted(filter(is_divergence, names), key=_tokens)
        of_tokens = {headline(names), *divergences[-1:]}
        scores = {name for name in names if not is_of_tokens(name)}
        keep.append(part[part["metric"].isin(scores or of_tokens)])
    return pd.concat(keep) if keep else contrasts


def _tokens(metric: str) -> int:
    """The number at the end of a name such as ``loss_64``."""
    end = metric.rpartition("_")[2]
    return int(end) if end.isdigit() else 0


def of_energy(rows: pd.DataFrame, density: float) -> pd.DataFrame:
    """Captured energy and, beside it, the loss above the full model's, at one density."""
    here = rows[(rows["method"] != "full") & (rows["density"] == density)]
    energy = here[here["metric"] == _ENERGY].drop(columns=DIFFERENCES)
    loss = here[(here["metric"] == "loss") & (here["task"] == "loss_by_method")]
    key = ["model", "method"]
    return energy.merge(loss[[*key, *DIFFERENCES]], on=key, validate="one_to_one")


def of_scores(rows: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Means over layers, and estimates of layers, of models whose size is known."""
    means = rows[rows["metric"].isin(_SCORES) & rows["parameters"].notna()]
    known = layers[layers["metric"].isin(_SCORES) & layers["parameters"].notna()]
    if means.empty:
        return means.assign(layer=[])
    known = known.rename(columns={"weights": "method"})
    return pd.concat([means, known], ignore_index=True)


def why_none(name: str, density: float) -> str:
    """Why a figure is not drawn, in a sentence."""
    reasons = {
        "loss_by_size": f"no model whose size is known was pruned at density {density:g}",
        "loss_by_energy": f"no output has loss_by_method.json, at density {density:g}",
        "scores_by_size": "no model whose size is known has scores.json or sequence_overlap.json",
    }
    return f"{name} is not drawn: {reasons[name]}."
