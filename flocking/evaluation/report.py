"""An evaluation as files: its items, their summary, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow.parquet import read_schema

from flocking.artifacts import FileGroup
from flocking.drawing import save, titled
from flocking.evaluation import sources
from flocking.evaluation.averages import over_tasks, table_over_tasks
from flocking.evaluation.domain import MOST_TOKENS, OF_DOMAIN
from flocking.evaluation.figures import (
    quality_by_batch,
    quality_by_density,
    quality_by_method,
    quality_by_prompt,
)
from flocking.evaluation.summary import (
    beyond_others,
    by_batch,
    by_prompt,
    footnote,
    headlines,
    label,
    summarise,
    table,
    table_above_chance,
)

FILES = ("items.parquet", "summary.csv", "tables.md", sources.NAME)
FIGURES = ("quality_by_density", "quality_by_method", "quality_by_prompt")
BY_BATCH = "quality_by_batch"  # a figure if a method says how many prompts share a selection
_MARKS = {"task", "method", "density"}  # columns of its tables
_HEADING = ": tasks, methods and densities"
_PATIENCE = 60.0  # seconds to wait for another run that is writing its report
_BAND = "Bars are 95% intervals over items"
_CHANCE = (
    "Chance (dotted) is one by the number of choices, and of a written answer its score as the "
    "answer to the next item, which differs between methods."
)
_TOGETHER = (
    "Mean difference from the full model over tasks, in percentage points; each task counts the "
    "same. Items are drawn within each task."
)
_ABOVE_CHANCE = (
    "In percentage points, of each method's own answers: their score, less their score as the "
    "answer to the next item."
)


def _is_ours(path: Path) -> bool:
    if path.name == "items.parquet":
        return set(read_schema(path).names) >= _MARKS
    if path.suffix == ".csv":
        return set(path.read_text(encoding="utf-8").partition("\n")[0].split(",")) >= _MARKS
    if path.name == sources.NAME:
        return bool(sources.read(path))
    if path.suffix == ".md":
        return _HEADING in path.read_text(encoding="utf-8").partition("\n")[0]
    return titled(path, path.stem)


REPORT = FileGroup(
    FILES, (*FIGURES, BY_BATCH), _is_ours, "is not a report of flocking: choose another --out"
)


def write(items: pd.DataFrame, out: Path, source: Mapping[str, Any]) -> pd.DataFrame:
    """Write ``FILES``, and ``FIGURES`` as PNG and SVG, each in its place only when complete.

    Parameters
    ----------
    items : pandas.DataFrame
        As :func:`flocking.evaluation.runner.evaluate` returns it.
    out : Path
        Folder; files of an earlier report in it are replaced.
    source : mapping
        Where the numbers come from: ``model``, and what else
        :class:`flocking.evaluation.sources.Source` has, in what JSON has. It is in
        ``source.json``, by which outputs of several models are put together.

    Returns
    -------
    pandas.DataFrame
        Their summary, as in ``summary.csv``.
    """
    rows = summarise(items)
    density = _common_density(rows)
    here = rows[(rows["density"] == density) | (rows["method"] == "full")]
    batches = headlines(by_batch(here))
    names = (*FIGURES, BY_BATCH) if len(batches) else FIGURES
    of_same = items[(items["density"] == density) | (items["method"] == "full")]
    with REPORT.replacing(out, names, wait=_PATIENCE) as partial:
        items.to_parquet(partial / "items.parquet", index=False)
        rows.to_csv(partial / "summary.csv", index=False, float_format="%.6g")
        wanted = {
            "quality_by_density": (quality_by_density, headlines(rows), _by_density),
            "quality_by_method": (quality_by_method, headlines(here), _by_method),
            "quality_by_prompt": (
                quality_by_prompt,
                beyond_others(headlines(by_prompt(of_same))),
                _by_prompt,
            ),
            BY_BATCH: (quality_by_batch, batches, _by_batch),
        }
        captions = {}
        for name in names:
            draw, data, caption = wanted[name]
            captions[name] = data.attrs["caption"] = caption(source["model"], density)
            at = "" if name == "quality_by_density" else f", density {density:g}"
            data.attrs["told"] = f"{source['model']}{at}. {_BAND}."
            save(draw(data), partial, name, source["model"], captions[name])
        told = _tables(items, rows, density, source, captions)
        (partial / "tables.md").write_text(told, encoding="utf-8")
        (partial / sources.NAME).write_text(sources.written(source), encoding="utf-8")
    return rows


def _common_density(rows: pd.DataFrame) -> float:
    """The density at which there are most methods."""
    pruned = rows[rows["method"] != "full"]
    counts = pruned.groupby("density")["method"].nunique()
    return float(counts.idxmax()) if len(counts) else 1.0


def _by_density(model: str, density: float) -> str:
    return (
        f"Scores of {model} by the fraction of FF neurons kept, in percent (perplexities as they "
        f"are). {_BAND}; the grey band is the full model's. {_CHANCE}"
    )


def _by_method(model: str, density: float) -> str:
    return (
        f"Scores of {model} at density {density:g} minus the full model's on the same items. "
        f"{_BAND} of these differences. {_CHANCE}"
    )


def _by_prompt(model: str, density: float) -> str:
    return (
        f"Scores of {model} at density {density:g} minus the full model's, in percentage points "
        "(perplexities: times the full model's), by the length of the prompt, from which the kept "
        f"neurons are selected: groups of items of similar length, at their medians. {_BAND} of "
        "these differences. Where prompts differ from item to item, so do the items; on articles, "
        "the same tokens are predicted after every prompt. Methods that lose over twice as much as "
        "all others are in words, with their ratios."
    )


def _by_batch(model: str, density: float) -> str:
    return (
        f"Scores of {model} at density {density:g} minus the full model's, in percentage points, "
        "by how many prompts share one selection (1: each has one; lines without points: static "
        f"selections, which all share). {_BAND} of these differences."
    )


def _tables(
    items: pd.DataFrame,
    rows: pd.DataFrame,
    density: float,
    source: Mapping[str, Any],
    captions: Mapping[str, str],
) -> str:
    """All of it in Markdown, with the figures and their captions."""
    parts = [
        f"# {source['model']}{_HEADING}",
        f"({sources.in_words(source)})",
        "The full model's scores in percent, and differences from them in percentage points, with "
        "95% intervals over items; differences are paired, on the same items. Chance is the full "
        "model's. "
        "Perplexities: the full model's, and the ratios of the others' to it. Divergences are in "
        "nats.",
        table(rows),
        *filter(None, [_not_asked(rows), _of_domain(rows), footnote(items)]),
    ]
    if together := table_over_tasks(over_tasks(items)):
        parts += ["## Tasks with choices together", _TOGETHER, together]
    if above := table_above_chance(rows):
        parts += ["## Written answers above chance", _ABOVE_CHANCE, above]
    own = label("topk", density)
    others = rows[(rows["density"] == density) & ~rows["method"].isin(["full", "topk"])]
    if own in set(rows["variant"]) and len(others):
        parts.append(f"## GRIFFIN against the other methods at density {density:g}")
        parts.append(
            "GRIFFIN's score minus the other method's, on the same items; for perplexities, the "
            "ratio of GRIFFIN's to the other's."
        )
        names = list(others["variant"].unique())
        parts.append(_against(items, own, names))
        if together := _against_together(items, own, names):
            parts += ["Tasks with choices together:", together]
    parts.append("## What was computed with the kept neurons alone")
    parts.append(
        "Share of the scored tokens by protocol, of the last method. In generation, all new tokens "
        "but the first, and those that a refreshed selection has read again."
    )
    pruned = rows[rows["method"] != "full"].drop_duplicates(["task", "protocol"], keep="last")
    lines = [
        "| task | protocol | share of scored tokens | items cut |",
        "| --- | --- | --- | --- |",
    ]
    for one in pruned.itertuples():
        share = "generation" if pd.isna(one.pruned_share) else f"{one.pruned_share:.1%}"
        lines.append(f"| {one.task} | {one.protocol} | {share} | {one.items_cut} of {one.items} |")
    parts.append("\n".join(lines) + "\n")
    parts.append("## Figures")
    parts += [f"![{name}]({name}.svg)\n\n{caption}" for name, caption in captions.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _not_asked(rows: pd.DataFrame) -> str:
    """Which methods have empty cells, and in which tasks; empty if there are none."""
    everything = set(rows["task"])
    by_tasks: dict[tuple[str, ...], list[str]] = {}
    for variant, part in rows.groupby("variant", sort=False):
        if left := sorted(everything - set(part["task"])):
            by_tasks.setdefault(tuple(left), []).append(str(variant))
    told = (f"{', '.join(variants)} on {', '.join(tasks)}" for tasks, variants in by_tasks.items())
    return f"Not asked (empty cells): {'; '.join(told)}." if by_tasks else ""


def _of_domain(rows: pd.DataFrame) -> str:
    """What static-domain is made from; empty without it."""
    if not rows["method"].isin(list(OF_DOMAIN)).any():
        return ""
    return (
        "static-domain is static from the task's own documents beyond those that are scored, each "
        "as the question about it is asked, without examples and answers: the first "
        f"{MOST_TOKENS:,} tokens at most."
    )


def _against_together(items: pd.DataFrame, own: str, others: list[str]) -> str:
    columns = []
    for other in others:
        rows = over_tasks(items, against=other)
        if len(rows):
            columns.append(rows[rows["variant"] == own].assign(variant=other))
    return table_over_tasks(pd.concat(columns)) if columns else ""


def _against(items: pd.DataFrame, own: str, others: list[str]) -> str:
    named = items.assign(variant=list(map(label, items["method"], items["density"])))
    columns = []
    for other in others:
        pair = items[named["variant"].isin([own, other]).to_numpy()]
        rows = summarise(pair, against=other)
        columns.append(rows[rows["variant"] == own].assign(variant=other))
    return table(pd.concat(columns), base=None)
