"""A comparison in Markdown: models, their rows by method, what differs, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pandas as pd

from flocking.evaluation.summary import (
    chance_in_words,
    label,
    markdown,
    parts_of,
    said,
    scale_of,
)
from flocking.reports.choosing import densities_of, of_pairs
from flocking.reports.comparison import DIFFERENCES, MEANS, missing
from flocking.reports.contrasts import INTERVAL
from flocking.reports.figures import in_words
from flocking.reports.outputs import Outputs

HEADING = "# Models compared: "
_MARK = "†"
_WEIGHTS = ("trained", "control")


def page_of(
    outputs: Outputs, rows: pd.DataFrame, contrasts: pd.DataFrame, captions: Mapping[str, str]
) -> list[str]:
    """Paragraphs of ``compared.md``, without what is said of figures that are not drawn."""
    parts = [
        HEADING + ", ".join(model.label for model in outputs.models),
        _models(outputs),
        *_differences(outputs, rows),
    ]
    weights = rows["method"].isin(_WEIGHTS)
    parts += [_TOLD] if densities_of(rows) else []
    for density in densities_of(rows):
        here = rows[~weights & ((rows["density"] == density) | (rows["method"] == "full"))]
        parts += [f"## Density {density:g}", _by_method(here, outputs)]
        parts += _contrasts(of_pairs(contrasts[contrasts["density"] == density]), rows)
    scores = rows[weights]
    if len(scores):
        parts += ["## Flocking", _TOLD_OF_SCORES, _by_weights(scores, outputs)]
    lacking = missing(outputs, rows)
    if lacking:
        parts += ["## What is missing", "\n".join(f"- {line}" for line in lacking)]
    if captions:
        parts.append("## Figures")
        parts += [f"![{name}]({name}.svg)\n\n{caption}" for name, caption in captions.items()]
    return parts


_TOLD = (
    "The full model's own score and chance, in percent (losses as perplexities, divergences in "
    "nats), and what methods make of it: differences from the full model in percentage points (of "
    "divergences in nats; perplexities as ratios to the full model's), on the same items, with "
    "95% bootstrap intervals. Captured energy, in percent, is no difference. An empty cell was not "
    "measured. Perplexities are by token: between models with other tokenizers, compare ratios; "
    "articles are then other tokens, and may be other articles, since too short ones are left out. "
    "In loss_by_method, a figure, static and global-local are from the figure's other texts, and "
    "in tasks from the calibration texts."
)
_TOLD_OF_SCORES = (
    "Means over layers and texts, of the trained weights and of random ones in the same "
    "architecture; 95% intervals where `token_order` has them for the same tokens. Specificity is "
    "0 where a text is as similar to itself as to another. effective_share: effective neurons, as "
    "a share of all."
)


def _models(outputs: Outputs) -> str:
    lines = []
    for model in outputs.models:
        source = next((one.source for one in model.evaluations), None)
        inside = source.ff_parameters if source is not None else None
        shown = [
            model.label + _mark(model.label, outputs),
            "" if model.parameters is None else in_words(model.parameters),
            "" if inside is None else in_words(inside),
            str(len({task for one in model.evaluations for task in one.items["task"]})),
            ", ".join(model.figures),
        ]
        lines.append(shown)
    head = ["model", "parameters", "in FF blocks", "tasks", "figures"]
    return markdown(head, lines)


def _differences(outputs: Outputs, rows: pd.DataFrame) -> list[str]:
    """What is unlike, and what the mark means."""
    told = [str(one) for one in outputs.differences]
    if not told:
        return []
    lines = "\n".join(f"- {line}" for line in told)
    mark = [f"{_MARK} Unlike the first model in a line above."] if outputs.marked() else []
    return ["## What is unlike", lines, *mark]


def _mark(name: str, outputs: Outputs) -> str:
    return _MARK if name in outputs.marked() else ""


def _by_method(rows: pd.DataFrame, outputs: Outputs) -> str:
    """A row for each metric and model, a column for each method."""
    methods = [name for name in rows["method"].unique() if name != "full"]
    lines = []
    for (task, metric, model, protocol), part in _in_order(
        rows, ["task", "metric", "model", "protocol"]
    ):
        by_method = dict(part.set_index("method").iterrows())
        if not set(methods) & set(by_method):
            continue
        # (Of all models: one scale for all.)
        scale = scale_of(metric, rows[(rows["task"] == task) & (rows["metric"] == metric)])
        full = by_method.get("full")
        chance = (part.iloc[0] if full is None else full)["chance"]
        cells = [
            _measured(task, protocol, metric),
            model + _mark(model, outputs),
            str(part["items"].iloc[0]),
            chance_in_words(chance, scale),
            "" if full is None else _cell(full, MEANS, scale),
        ]
        for method in methods:
            own = by_method.get(method)
            names = MEANS if own is None or pd.isna(own["difference"]) else DIFFERENCES
            cells.append("" if own is None else _cell(own, names, scale))
        lines.append(cells)
    return markdown(["measured", "model", "items", "chance", "full", *methods], lines)


_CONTRASTS = {
    "methods": (
        "### GRIFFIN against the other methods",
        "GRIFFIN's value less the other method's, on the same items (perplexities: the ratio of "
        "GRIFFIN's to the other's).",
    ),
    "prompts": (
        "### Long prompts against short ones",
        "Differences from the full model after the longest prompt less those after the shortest, "
        "on the same tokens (perplexities: the ratio of the two ratios to the full model's).",
    ),
    "models": (
        "### Larger models against smaller ones",
        "A larger model's differences from its own full model less those of the smaller one (of "
        "models of one size, those of the one that is named first in the table above), on the same "
        "items (perplexities: the ratio of the two ratios). Articles are compared only "
        "between models with the same tokenizer.",
    ),
}


def _contrasts(contrasts: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """A table for each kind of pair that there is."""
    parts = []
    for of, (heading, told) in _CONTRASTS.items():
        here = contrasts[contrasts["of"] == of]
        if len(here):
            column = "than" if of == "methods" else "method"
            parts += [heading, told, _pairs(here, column, rows)]
    return parts


def _pairs(contrasts: pd.DataFrame, column: str, rows: pd.DataFrame) -> str:
    """A row for each metric, model and what is subtracted; a column for each method."""
    methods = list(contrasts[column].unique())
    by = [name for name in ("task", "protocol", "metric", "model", "than") if name != column]
    lines = []
    for (task, protocol, metric, *others), part in _in_order(contrasts, by):
        by_method = dict(part.set_index(column).iterrows())
        # (Tasks of several prompts have no score of their own, which would be a share.)
        scale = scale_of(metric, rows[(rows["task"] == task) & (rows["metric"] == metric)])
        items = str(part["items"].iloc[0])
        cells = [_measured(task, protocol, metric), *others, items]
        for method in methods:
            own = by_method.get(method)
            cells.append("" if own is None else said(own[INTERVAL], scale, sign=True))
        lines.append(cells)
    return markdown(["measured", *by[3:], "items", *methods], lines)


def _measured(task: str, protocol: str, metric: str) -> str:
    """What was measured, as it is named in a table."""
    asked = f"{task}, {protocol}" if protocol not in ("", "context") else task
    return f"{asked}, {metric.replace('loss', 'perplexity')}"


def _by_weights(rows: pd.DataFrame, outputs: Outputs) -> str:
    """A row for each score and model, a column for either weights."""
    lines = []
    for (metric, model), part in _in_order(rows, ["metric", "model"]):
        by_method = dict(part.set_index("method").iterrows())
        chance = part["chance"].iloc[0]
        cells = [
            metric,
            model + _mark(model, outputs),
            str(part["items"].iloc[0]),
            "" if pd.isna(chance) else f"{chance:.2f}",
            *(_cell(by_method[name], MEANS, 1) for name in _WEIGHTS if name in by_method),
        ]
        lines.append(cells)
    return markdown(["score", "model", "texts", "chance", "model's", "random weights"], lines)


def _in_order(
    rows: pd.DataFrame, names: list[str]
) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Parts of a table, nested: all models of the first task, then all of the next one."""
    if not names:
        yield (), rows
        return
    for key, part in parts_of(rows, names[:1]):
        for more, inner in _in_order(part, names[1:]):
            yield key + more, inner


def _cell(row: pd.Series, names: list[str], scale: float | None) -> str:
    """A value with its interval, if there is one, and a mark if older code made it."""
    mark = "‡" if row["note"] else ""
    if row[names[1:]].isna().any():
        alone = row[[names[0]] * 3]
        return said(alone, scale, sign=False).partition(" [")[0] + mark
    return said(row[names], scale, sign=names is DIFFERENCES) + mark


def older_code(rows: pd.DataFrame) -> list[str]:
    """What the mark of numbers from older code means, and which rows have it."""
    older = rows[rows["note"] != ""]
    if older.empty:
        return []
    groups = [
        f"code {note}, {model}: "
        + ", ".join(dict.fromkeys(f"{label(m, d)} on {t}" for m, d, t in _cells(part)))
        for (note, model), part in parts_of(older, ["note", "model"])
    ]
    return [f"‡ Computed by older code, or compared with what it computed. {'; '.join(groups)}."]


def _cells(part: pd.DataFrame) -> Iterable[tuple[str, float, str]]:
    return zip(part["method"], part["density"], part["task"], strict=True)
