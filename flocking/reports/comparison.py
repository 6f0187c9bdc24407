"""All outputs as one table; what of it is missing; and scores layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from flocking.analysis import intervals
from flocking.evaluation.summary import label, parts_of, summarise
from flocking.reports.outputs import Evaluation, Measured, Numbers, Outputs, refuse_no_outputs

MEANS = ["estimate", "low", "high"]
DIFFERENCES = ["difference", "difference_low", "difference_high"]
COLUMNS = (
    *("model", "parameters", "task", "protocol", "metric", "method", "density", "items"),
    *(*MEANS, *DIFFERENCES, "chance", "note"),
)
# Names of selections in figures that evaluations know by another.
_METHODS = {"GRIFFIN": "topk"}
_BY_LAYER = {
    "scores": ("flocking_score", "rank_consistency", "effective_share"),
    "sequence_overlap": ("specificity", "within", "between"),
}
_ZERO_BY_CHANCE = ("flocking_score", "rank_consistency")


def compared(outputs: Outputs) -> pd.DataFrame:
    """All that was measured, as one table.

    Evaluations are summarised as :func:`flocking.evaluation.summary.summarise` does. Numbers of
    figures are taken as they are in their files; of the energy that kept neurons capture, the
    interval is computed over texts. Means over layers have an interval only where a file has one:
    of flocking score and rank consistency, in ``token_order`` on the same tokens.

    Parameters
    ----------
    outputs : Outputs
        From :func:`collect`.

    Returns
    -------
    pandas.DataFrame
        A row for each model, task (or figure), metric, method and density: ``parameters`` (missing
        if not known), ``protocol``, ``items`` (or texts), ``estimate``, ``low``, ``high``, 95%;
        ``difference``, ``difference_low``, ``difference_high`` from the full model's on the same
        items; ``chance``; ``note``, the older code that a row comes from. Losses and divergences
        are in nats a token, other scores as they are. In ``scores`` and ``sequence_overlap``,
        methods are the ``trained`` weights and those of the ``control``.

    Raises
    ------
    ValueError
        If an evaluation has no full model, or values that are not numbers.
    TypeError
        If `outputs` is something else, such as a folder.

    Examples
    --------
    >>> from flocking.reports import collect, compared
    >>> rows = compared(collect(["small", "large"]))
    >>> after_16 = rows[(rows["task"] == "wikitext_16") & (rows["metric"] == "loss_64")]
    >>> griffin = after_16[(after_16["method"] == "topk") & (after_16["density"] == 0.5)]
    >>> griffin[["model", "items"]].to_numpy().tolist()
    [['small-model', 16], ['large-model', 16]]
    """
    refuse_no_outputs(outputs)
    rows = []
    for model in outputs.models:
        evaluated = [_evaluated(model)] if model.evaluations else []
        read = [pd.DataFrame(_ROWS[name](one, model)) for name, one in model.figures.items()]
        for part in filter(len, [*evaluated, *read]):
            about = {"model": model.label, "parameters": model.parameters}
            rows.append(part.assign(**about).reindex(columns=list(COLUMNS)))
    if not rows:
        raise ValueError(
            "the outputs hold token_order.json alone, which gives scores their intervals: add "
            "scores.json (flocking figures --only scores) or an evaluation."
        )
    found = pd.concat([part.astype(object) for part in rows], ignore_index=True)
    numbers = ["density", *MEANS, *DIFFERENCES, "chance"]
    kinds: dict[str, Any] = dict.fromkeys(numbers, float)
    kinds |= {"parameters": "Int64", "items": "Int64"}
    texts = [name for name in COLUMNS if name not in kinds]
    return found.fillna(dict.fromkeys(texts, "")).astype({**kinds, **dict.fromkeys(texts, str)})


def _evaluated(model: Measured) -> pd.DataFrame:
    """The summary of a model's evaluations."""
    parts = []
    for (task,), part in parts_of(model.items(), ["task"]):
        try:
            parts.append(summarise(part))
        except (ValueError, KeyError) as problem:
            why = "not all metrics have a full model" if isinstance(problem, KeyError) else problem
            raise ValueError(
                f"{_folder_of(task, model).folder} cannot be summarised ({task}: {why}): run "
                "flocking evaluate again with the same --out."
            ) from problem
    return pd.concat(parts).rename(columns={"older": "note"})


def _folder_of(task: str, model: Measured) -> Evaluation:
    return next(one for one in model.evaluations if task in set(one.items["task"]))


def _by_layer(numbers: Numbers) -> xr.Dataset:
    """A figure's estimates by layer: (weights, layer)."""
    data = numbers.data.sel(interval="estimate")
    if "effective_neurons" in data:
        data = data.assign(effective_share=data["effective_neurons"] / data["d_ff"])
    return data[list(_BY_LAYER[numbers.name])]


def _score_rows(numbers: Numbers, model: Measured) -> list[dict[str, Any]]:
    """Means over layers, of the trained weights and of the control."""
    about, means = numbers.data.attrs, _by_layer(numbers).mean("layer", skipna=False)
    rows = []
    for metric in _BY_LAYER[numbers.name]:
        overlap = metric in ("within", "between")
        chance = 0.0 if metric in _ZERO_BY_CHANCE else np.nan
        for weights in means["weights"].to_numpy().tolist():
            estimate = float(means[metric].sel(weights=weights))
            low, high = _interval_of(metric, weights, estimate, numbers, model)
            rows.append(
                {
                    "task": numbers.name,
                    "metric": f"jaccard_{metric}" if overlap else metric,
                    "method": weights,
                    "density": about["density"] if overlap else np.nan,
                    "items": len(about["texts"]),
                    "estimate": estimate,
                    "low": low,
                    "high": high,
                    "chance": about.get("chance", np.nan) if overlap else chance,
                }
            )
    return rows


def _interval_of(
    metric: str, weights: str, estimate: float, numbers: Numbers, model: Measured
) -> tuple[float, float]:
    """The interval of a mean over layers, where another figure has that mean of the same tokens."""
    other = model.figures.get("token_order")
    name = f"{metric}_mean"
    same = "token_ids_sha256"
    if other is None or name not in other.data or same not in other.data.attrs:
        return np.nan, np.nan
    if other.data.attrs[same] != numbers.data.attrs.get(same):
        return np.nan, np.nan
    again, low, high = _three(other.data[name].sel(weights=weights, order="in order"))
    return (low, high) if np.isclose(again, estimate, rtol=1e-4) else (np.nan, np.nan)


def _method_rows(numbers: Numbers, model: Measured) -> list[dict[str, Any]]:
    """Losses by method, and the energy that their neurons capture."""
    data = numbers.data
    by_text = data["captured"].mean("excerpt").rename(text="sequence").drop_vars("sequence")
    captured = intervals(by_text)
    rows: list[dict[str, Any]] = []
    for name in data["selection"].to_numpy().tolist():
        full = name == "full"
        common = {
            "task": numbers.name,
            "method": _METHODS.get(name, name),
            "density": 1.0 if full else data.attrs["density"],
            "items": data.sizes["text"],
        }
        here = data.sel(selection=name)
        loss = np.log(_three(here["perplexity"]))
        above = np.log(_three(here["relative"]))
        told = dict(zip([*MEANS, *DIFFERENCES], [*loss, *above], strict=True))
        rows.append({**common, "metric": "loss", **told})
        energy = dict(zip(MEANS, _three(captured.sel(selection=name)), strict=True))
        rows.append(
            {**common, "metric": "captured_energy", **energy, "chance": data.attrs["density"]}
        )
    return rows


def _three(values: xr.DataArray) -> np.ndarray:
    return np.array([float(values.sel(interval=name)) for name in MEANS])


def _no_rows(numbers: Numbers, model: Measured) -> list[dict[str, Any]]:
    """Of a figure that only gives intervals to another."""
    return []


_ROWS: dict[str, Callable[[Numbers, Measured], list[dict[str, Any]]]] = {
    "scores": _score_rows,
    "sequence_overlap": _score_rows,
    "token_order": _no_rows,
    "loss_by_method": _method_rows,
}


def by_layer(outputs: Outputs) -> pd.DataFrame:
    """Scores of each layer.

    Parameters
    ----------
    outputs : Outputs
        From :func:`collect`.

    Returns
    -------
    pandas.DataFrame
        ``model``, ``parameters``, ``metric``, ``weights`` ("trained", "control"), ``layer`` and
        ``estimate``, the mean over texts.

    Examples
    --------
    >>> from flocking.reports import by_layer, collect
    >>> layers = by_layer(collect(["small", "large"]))
    >>> layers.groupby("model", sort=False)["layer"].nunique().tolist()
    [2, 3]
    """
    parts = []
    for model in outputs.models:
        for name in _BY_LAYER:
            if name in model.figures:
                data = _by_layer(model.figures[name]).to_array("metric", name="estimate")
                table = data.drop_vars("d_ff", errors="ignore").to_dataframe().reset_index()
                about = {"model": model.label, "parameters": model.parameters}
                parts.append(table.assign(**about))
    columns = ["model", "parameters", "metric", "weights", "layer", "estimate"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts, ignore_index=True)[columns].astype({"parameters": "Int64"})


def missing(outputs: Outputs, rows: pd.DataFrame) -> list[str]:
    """What some models have and others do not, in sentences.

    Parameters
    ----------
    outputs : Outputs
    rows : pandas.DataFrame
        Of :func:`compared`.

    Returns
    -------
    list of str

    Examples
    --------
    >>> from flocking.reports import collect, compared, missing
    >>> outputs = collect("small")
    >>> missing(outputs, compared(outputs))  # without another model, nothing is
    []
    """
    found = list(_unknown(outputs))
    named = rows.assign(variant=list(map(_variant, rows["method"], rows["density"])))
    everything = named[["task", "metric", "variant"]].drop_duplicates()
    for model in outputs.models:
        own = named[named["model"] == model.label]
        tasks = set(own["task"])
        lacking = [task for task in everything["task"].unique() if task not in tasks]
        if lacking:
            found.append(f"{model.label} was not measured on {', '.join(lacking)}.")
        by_thing: dict[str, list[str]] = {}
        for thing in ("variant", "metric"):
            there = set(zip(own["task"], own[thing], strict=True))
            wanted = everything[everything["task"].isin(tasks)][["task", thing]].drop_duplicates()
            for task, name in wanted.itertuples(index=False):
                if (task, name) not in there:
                    by_thing.setdefault(name, []).append(task)
        found += [
            f"{model.label} has no {name} on {', '.join(on)}." for name, on in by_thing.items()
        ]
    return found


def _variant(method: str, density: float) -> str:
    return method if np.isnan(density) else label(method, density)


def _unknown(outputs: Outputs) -> Iterator[str]:
    """What outputs do not say of themselves."""
    for model in outputs.models:
        for one in model.evaluations:
            if not one.complete:
                yield (
                    f"{one.folder} has no source.json that says what was asked, since earlier "
                    f"versions wrote none: whether {model.label} had the same documents as others "
                    "is not known."
                )
        if model.parameters is None:
            yield (
                f"How large {model.label} is, is not known, so that it is in no figure by size: "
                "flocking evaluate says it in source.json, also where all cells are there."
            )
