"""Two measurements of the same items against each other: of two methods, prompts or models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from flocking.evaluation import scores
from flocking.evaluation.summary import family, highest_of, is_of_tokens, parts_of
from flocking.reports.outputs import Measured, Outputs, refuse_no_outputs

COLUMNS = ("of", "model", "task", "protocol", "metric", "method", "density", "items", "than")
INTERVAL = ["difference", "low", "high"]
_FULL = "full"
_OWN = "topk"  # GRIFFIN, which other methods are compared with
_BY = ["task", "protocol", "metric"]


def contrasted(outputs: Outputs) -> pd.DataFrame:
    """How much more one of two measurements is than the other, on the same items.

    Three kinds of pairs are compared, each item with itself, so that what makes an item hard for
    both drops out. Intervals are those of :func:`flocking.evaluation.scores.means`, 95%, over
    items.

    ==========  ===================================================================================
    ``of``      what is subtracted
    ==========  ===================================================================================
    methods     GRIFFIN's value, less the method's at the same density
    prompts     the difference from the full model after the longest prompt, less that after the
                shortest; of tasks such as ``news_16`` and ``news_256``, which score the same tokens
    models      a larger model's difference from its own full model, less that of the next smaller;
                of articles, only if both have the same tokenizer, since they are other tokens else
    ==========  ===================================================================================

    Parameters
    ----------
    outputs : Outputs
        From :func:`collect`.

    Returns
    -------
    pandas.DataFrame
        A row for each pair and metric: ``of``; ``model``; ``task``, of prompts the tasks' common
        name; ``protocol``, ``metric``, ``method``, ``density``, ``items``; ``than``, what is
        subtracted: the other method, task or model; ``difference``, ``low``, ``high``. Of losses,
        ``exp`` of these is a ratio of perplexities (of methods), or of ratios to the full model's
        (of prompts and models).

    Raises
    ------
    ValueError
        If two prompts of one model have no item in common.
    TypeError
        If `outputs` is something else, such as a folder.

    Examples
    --------
    >>> from flocking.reports import collect, contrasted
    >>> rows = contrasted(collect(["small", "large"]))
    >>> rows["of"].unique().tolist()
    ['methods', 'prompts', 'models']
    >>> rows[rows["of"] == "prompts"][["task", "than"]].drop_duplicates().to_numpy().tolist()
    [['wikitext', 'wikitext_16']]
    """
    refuse_no_outputs(outputs)
    evaluated = [model for model in outputs.models if model.evaluations]
    measured = [part for model in evaluated for part in _parts(model.label, model.items())]
    models = [model for model in evaluated if model.parameters is not None]
    rows = [*_of_methods(measured), *_of_prompts(measured), *_of_models(measured, models)]
    return pd.DataFrame(rows, columns=[*COLUMNS, *INTERVAL])


_Variant = tuple[str, float]  # method and density


@dataclass(frozen=True, eq=False)
class _Part:
    """One metric of one task, of one model.

    Attributes
    ----------
    model, task, protocol, metric : str
    items : list of int
        Ascending.
    by_variant : dict of tuple to numpy.ndarray
        Values of the items, by method and density.
    """

    model: str
    task: str
    protocol: str
    metric: str
    items: list[int]
    by_variant: Mapping[_Variant, np.ndarray]

    @property
    def pruned(self) -> list[_Variant]:
        """All but the full model."""
        return [variant for variant in self.by_variant if variant[0] != _FULL]

    def above_full(self, variant: _Variant) -> np.ndarray:
        """By item, the difference from the full model."""
        (full,) = (values for (name, _), values in self.by_variant.items() if name == _FULL)
        return np.asarray(self.by_variant[variant] - full)


def _parts(model: str, items: pd.DataFrame) -> Iterator[_Part]:
    for (task, protocol, metric), part in parts_of(items.sort_values("item", kind="stable"), _BY):
        by_variant = {
            (str(own["method"].iloc[0]), float(own["density"].iloc[0])): own["value"].to_numpy()
            for _, own in part.groupby(["method", "density"], sort=False)
        }
        numbers = part["item"].drop_duplicates().tolist()
        yield _Part(model, task, protocol, metric, numbers, by_variant)


def _of_methods(parts: list[_Part]) -> Iterator[dict[str, object]]:
    for part in parts:
        for method, density in part.pruned:
            own = (_OWN, density)
            if method != _OWN and own in part.by_variant:
                values = part.by_variant[own] - part.by_variant[method, density]
                yield _row("methods", part, own, values, than=method)


def _of_prompts(parts: list[_Part]) -> Iterator[dict[str, object]]:
    groups: dict[tuple[str, ...], list[_Part]] = {}
    for part in parts:
        name = family(part.task, part.metric)
        if name != part.task and is_of_tokens(part.metric):
            groups.setdefault((part.model, name, part.protocol, part.metric), []).append(part)
    for (_, name, *_), group in groups.items():
        group.sort(key=lambda part: int(part.task.rpartition("_")[2]))
        short, long = group[0], group[-1]
        if short is long:
            continue
        _, of_long, of_short = np.intersect1d(
            long.items, short.items, assume_unique=True, return_indices=True
        )
        if not len(of_long):
            raise ValueError(
                f"{long.task} and {short.task} of {long.model} have other items: give both the "
                "same --limit."
            )
        for variant in long.pruned:
            if variant in short.by_variant:
                values = long.above_full(variant)[of_long] - short.above_full(variant)[of_short]
                yield _row("prompts", long, variant, values, than=short.task) | {"task": name}


def _of_models(parts: list[_Part], models: list[Measured]) -> Iterator[dict[str, object]]:
    for number, model in enumerate(models):
        smaller = models[:number][::-1]  # the next smaller one first
        for part in parts:
            other = _same_of(smaller, model, part, parts) if part.model == model.label else None
            if other is None:
                continue
            for variant in part.pruned:
                if variant in other.by_variant:
                    values = part.above_full(variant) - other.above_full(variant)
                    yield _row("models", part, variant, values, than=other.model)


def _same_of(
    others: list[Measured], model: Measured, part: _Part, parts: list[_Part]
) -> _Part | None:
    """The same metric of the same items, of the first of other models that has it."""
    if is_of_tokens(part.metric):
        others = [one for one in others if _tokenizer(one) == _tokenizer(model) != ""]
    asked = (part.task, part.protocol, part.metric)
    found = {one.model: one for one in parts if (one.task, one.protocol, one.metric) == asked}
    return next((found[one.label] for one in others if one.label in found), None)


def _tokenizer(model: Measured) -> str:
    """Its digest; empty if that is not known, or not one."""
    found = {one.source.tokenizer for one in model.evaluations}
    return found.pop() if len(found) == 1 else ""


def _row(
    of: str, part: _Part, variant: _Variant, values: np.ndarray, than: str
) -> dict[str, object]:
    highest = highest_of(part.metric, np.stack(list(part.by_variant.values())))
    (row,) = scores.means(values[None], highest, differences=True)
    told = zip(INTERVAL, row.tolist(), strict=True)
    asked = (part.task, part.protocol, part.metric)
    about = (of, part.model, *asked, *variant, len(values), than)
    return dict(zip(COLUMNS, about, strict=True)) | dict(told)
