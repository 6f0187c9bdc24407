"""What an evaluation says: each variant against the full model, item by item, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from flocking.evaluation import scores
from flocking.evaluation.naming import label

_BY = ["task", "protocol", "metric"]
_MEANS = ["estimate", "low", "high"]
_FEW = 5  # items, whose interval is Student's and may reach beyond what values can be
_DIFFERENCES = ["difference", "difference_low", "difference_high"]
_ABOVE = ["above_chance", "above_chance_low", "above_chance_high"]
_BLIND = ("random", "magnitude")  # methods that read no text
_LEAST = 5  # items in a group of similar prompt lengths
_MARK = "†"  # of numbers from older code


def summarise(items: pd.DataFrame, *, against: str = "full", seed: int = 0) -> pd.DataFrame:
    """Means over items, and differences from another variant on the same items.

    Intervals are those of :func:`flocking.evaluation.scores.means`, 95%, over items; those of
    differences are paired: both variants are drawn on the same items.

    Parameters
    ----------
    items : pandas.DataFrame
        As :func:`flocking.evaluation.runner.evaluate` returns it.
    against : str
        The variant to compare with, such as "full" or "static@0.5". Tasks that it was not asked
        are left out.
    seed : int
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        A row for each task, metric and variant: ``items``, ``estimate``, ``low``, ``high``;
        ``difference``, ``difference_low``, ``difference_high``; ``chance``, the variant's own, and
        ``above_chance``, ``above_chance_low``, ``above_chance_high``, what its score is above it;
        ``pruned_share`` of the scored tokens, missing in generation; ``items_cut``, the number of
        items with a prompt that was too long; ``older``, the older code that the row or its
        difference comes from, empty for today's. Losses are in nats a token: ``exp`` of them is a
        perplexity, of a difference a ratio of perplexities.

    Raises
    ------
    ValueError
        If there is no such variant, or it was not asked the same items.
    """
    rows = []
    named = with_variants(items, against).assign(older=items.get("older", ""))
    for group, part in parts_of(named, _BY):
        if against not in set(part["variant"]):  # not all are asked of every task
            continue
        values, chances = by_item(part, group)
        highest = highest_of(group[-1], values.to_numpy())
        means = _means(values, highest, seed)
        others = values.drop(against) - values.loc[against]
        differences = _means(others, highest, seed, differences=True)
        differences = differences.reindex(values.index, fill_value=0.0)  # of itself, exactly
        above = _means(values - chances, highest, seed, differences=True)
        codes = part.groupby("variant")["older"].agg(set)
        for key, own in part.groupby("variant", sort=False):
            variant = str(key)  # as what it is typed costs mypy ten minutes
            rows.append(
                {
                    **dict(zip(_BY, group, strict=True)),
                    "method": own["method"].iloc[0],
                    "density": own["density"].iloc[0],
                    "variant": variant,
                    "items": len(own),
                    **dict(zip(_MEANS, means.loc[variant], strict=True)),
                    **dict(zip(_DIFFERENCES, differences.loc[variant], strict=True)),
                    **dict(zip(_ABOVE, above.loc[variant], strict=True)),
                    **_totals(own),
                    "older": "; ".join(sorted((codes[variant] | codes[against]) - {""})),
                }
            )
    return pd.DataFrame(rows)


def with_variants(items: pd.DataFrame, against: str) -> pd.DataFrame:
    """Items with a column ``variant``, such as "topk@0.5".

    Raises
    ------
    ValueError
        If none is of the variant `against`.
    """
    named = items.assign(variant=list(map(label, items["method"], items["density"])))
    if against not in set(named["variant"]):
        known = ", ".join(named["variant"].unique())
        raise ValueError(f"there is no variant {against!r}: choose from {known}.")
    return named


def by_item(part: pd.DataFrame, group: tuple[str, ...]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Values and chance of one task and metric: a row for each variant, a column for each item."""
    refuse_not_finite(part)
    values, chances = (
        part.pivot_table(index="variant", columns="item", values=name, dropna=False)
        for name in ("value", "chance")
    )
    order = part["variant"].unique()
    values, chances = values.loc[order], chances.loc[order]
    if values.isna().any(axis=None):
        raise ValueError(f"{group[0]}: not all variants were asked the same items.")
    return values, chances


def refuse_not_finite(items: pd.DataFrame) -> None:
    """Raise a ValueError if a score is infinite or not a number.

    A mean would be of the other items alone, and these differ between variants.

    Parameters
    ----------
    items : pandas.DataFrame
        As :func:`flocking.evaluation.evaluate` gives it.
    """
    odd = items[~np.isfinite(items["value"].astype(float))]
    if len(odd):
        task, metric = odd["task"].iloc[0], odd["metric"].iloc[0]
        named = ", ".join(dict.fromkeys(map(label, odd["method"], odd["density"])))
        raise ValueError(
            f"{task}: {metric} is infinite or not a number for some items under {named}, as where "
            "half precision overflows: leave that out, or compute in float32."
        )


def _totals(own: pd.DataFrame) -> dict[str, float]:
    """What the items of one variant come to."""
    scored, pruned = own["scored"].sum(), own["pruned"].sum()
    return {
        "chance": own["chance"].mean(),
        "pruned_share": pruned / scored if scored else np.nan,
        "items_cut": int((own["left_out"] > 0).sum()),
    }


def parts_of(
    data: pd.DataFrame, names: list[str]
) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Parts of a table by the texts in some of its columns, in order of appearance."""
    for key, part in data.groupby(names, sort=False):
        yield tuple(map(str, key)), part


def _means(
    values: pd.DataFrame, highest: float | None, seed: int, *, differences: bool = False
) -> pd.DataFrame:
    """Estimate, low and high of each row's mean."""
    found = scores.means(values.to_numpy(), highest, differences=differences, seed=seed)
    return pd.DataFrame(found, index=values.index)


def highest_of(metric: str, values: np.ndarray) -> float | None:
    """The highest score of an item: 100 of percents, 1 of other scores; None of means of tokens.

    Parameters
    ----------
    metric : str
    values : ndarray of float
        Scores of all variants.
    """
    if is_of_tokens(metric):
        return None
    return 100 if np.abs(values).max(initial=0) > 1 else 1


def by_prompt(items: pd.DataFrame, *, groups: int = 3, seed: int = 0) -> pd.DataFrame:
    """Differences from the full model by how long the prompts were.

    Parameters
    ----------
    items : pandas.DataFrame
        As :func:`flocking.evaluation.runner.evaluate` returns it.
    groups : int
        How many groups of items, of about the same size, if prompts differ.
    seed : int
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        As of :func:`summarise`, with ``prompt_tokens``, the median of a group's. Tasks that differ
        in nothing but the prompt, such as ``wikitext_16`` and ``wikitext_64``, are one.
    """
    parts = []
    for (task, metric), part in parts_of(items, ["task", "metric"]):
        lengths = part.drop_duplicates("item").set_index("item")["prompt_tokens"]
        count = max(1, min(groups, len(lengths) // _LEAST))
        # Items of the same length are in the same group.
        number = pd.qcut(lengths, count, labels=False, duplicates="drop").fillna(0)
        for _, members in lengths.groupby(number):
            rows = summarise(part[part["item"].isin(members.index)], seed=seed)
            name = family(task, metric)
            parts.append(
                rows.assign(task=name, metric=metric, prompt_tokens=round(members.median()))
            )
    return pd.concat(parts, ignore_index=True)


def by_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that say how quality falls with the number of prompts that share a selection.

    Parameters
    ----------
    rows : pandas.DataFrame
        Of :func:`summarise`, at one density.

    Returns
    -------
    pandas.DataFrame
        Of tasks with a method such as ``shared-4``: these, ``topk``, where each prompt has a
        selection, and static ones, to compare with. ``batch_size`` is how many share a selection,
        0 where that does not matter. Empty if there is no such method.
    """
    number = rows["method"].str.extract(r"^shared-(\d+)$")[0].astype(float)
    sizes = number.where(rows["method"] != "topk", 1.0)
    rows = rows.assign(batch_size=sizes.fillna(0).astype(int))
    tasks = rows.loc[rows["batch_size"] > 1, "task"].unique()
    others = rows["method"].isin(["static", "static-domain"]) | (rows["batch_size"] > 0)
    return rows[rows["task"].isin(tasks) & others]


def beyond_others(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows, and whether each is too far from the others to be drawn on their scale.

    Parameters
    ----------
    rows : pandas.DataFrame
        With ``task``, ``metric``, ``method`` and differences from the full model.

    Returns
    -------
    pandas.DataFrame
        With ``beyond``: of losses, whether the method reads no text and loses over twice as much,
        as a ratio of perplexities, as all others do on that task.
    """
    parts = []
    for (_, metric), part in parts_of(rows, ["task", "metric"]):
        blind = part["method"].isin(_BLIND)
        others = part.loc[~blind & (part["method"] != "full"), "difference_high"]
        worst = part.groupby("method")["difference"].transform("max")
        far = blind & (worst > others.max() + np.log(2))
        parts.append(part.assign(beyond=far & bool(len(others)) & is_loss(metric)))
    return pd.concat(parts) if parts else rows.assign(beyond=False)


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss in nats, shown as a perplexity, and its differences as ratios."""
    return metric.startswith("loss")


def is_divergence(metric: str) -> bool:
    """Whether a metric is a divergence from the full model, in nats."""
    return metric.startswith("divergence")


def is_of_tokens(metric: str) -> bool:
    """Whether a metric is a mean over predicted tokens: a loss, or how near the full model is."""
    return is_loss(metric) or is_divergence(metric) or metric.startswith("agreement")


def family(task: str, metric: str) -> str:
    """A task's name without the length of its prompt, if it is one of several lengths."""
    shorter = task.rpartition("_")[0] if is_of_tokens(metric) else ""
    return shorter or task


def headlines(rows: pd.DataFrame) -> pd.DataFrame:
    """One metric of each family of tasks: its first one, or its loss with most tokens.

    Losses are compared by the length of the prompt first, then of the continuation.
    """
    chosen: dict[str, tuple[str, str]] = {}
    for task, metric in rows[["task", "metric"]].drop_duplicates().itertuples(index=False):
        name, loss = family(task, metric), is_loss(metric)
        before = chosen.get(name)
        longer = before and _tokens(task, metric) > _tokens(*before)
        if before is None or (loss and (longer or not is_loss(before[1]))):
            chosen[name] = (task, metric)
    wanted = set(chosen.values())
    keep = [pair in wanted for pair in zip(rows["task"], rows["metric"], strict=True)]
    return rows[keep]


def _tokens(*names: str) -> tuple[int, ...]:
    """The numbers at the ends of names such as ``wikitext_16`` and ``loss_64``; 0 for none."""
    ends = (name.rpartition("_")[2] for name in names)
    return tuple(int(end) if end.isdigit() else 0 for end in ends)


def table(rows: pd.DataFrame, *, base: str | None = "full") -> str:
    """A summary as a table in Markdown, with the differences by variant.

    Parameters
    ----------
    rows : pandas.DataFrame
        Of :func:`summarise`.
    base : str, optional
        The variant whose own score and chance are shown first, instead of a difference.

    Returns
    -------
    str
        In percent and percentage points; losses as perplexities and their ratios to the full
        model's. Numbers from older code are marked; see :func:`footnote`.
    """
    variants = [name for name in rows["variant"].unique() if name != base]
    first = [] if base is None else ["chance", base]
    names = ["task", "items", *first, *variants]
    lines = []
    for (task, protocol, metric), part in parts_of(rows, _BY):
        by_variant = dict(part.set_index("variant").iterrows())
        scale = scale_of(metric, part)
        name = metric.replace("loss", "perplexity")
        asked = f"{task}, {protocol}" if protocol != "context" else task
        cells = [f"{asked}, {name}", f"{part['items'].iloc[0]}"]
        if base is not None:
            own = by_variant[base]
            cells.append(chance_in_words(own.chance, scale))
            cells.append(said(own[_MEANS], scale, sign=False) + _mark(own))
        for variant in variants:
            if variant not in by_variant:  # not all are asked of every task
                cells.append("")
                continue
            own = by_variant[variant]
            cells.append(said(own[_DIFFERENCES], scale, sign=True) + _mark(own))
        lines.append(cells)
    return markdown(names, lines) + "\n"


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, of a head and lines of cells."""
    names = list(head)
    rows = [names, ["---"] * len(names), *map(list, lines)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def table_above_chance(rows: pd.DataFrame) -> str:
    """The scores of written answers above their chance, as a table in Markdown.

    Chance there is the same text's score as the answer to another item, which differs between
    variants: who writes more words of any text has more of it.

    Parameters
    ----------
    rows : pandas.DataFrame
        Of :func:`summarise`.

    Returns
    -------
    str
        In percentage points; empty if chance is the same for all variants of every task.
    """
    variants = list(rows["variant"].unique())
    names = ["task", "items", *variants]
    lines = []
    for (task, _, metric), part in parts_of(rows, _BY):
        if not own_chance(part):
            continue
        scale = scale_of(metric, part)
        by_variant = dict(part.set_index("variant").iterrows())
        cells = [f"{task}, {metric}", f"{part['items'].iloc[0]}"]
        for variant in variants:
            own = by_variant.get(variant)
            cells.append("" if own is None else said(own[_ABOVE], scale, sign=True) + _mark(own))
        lines.append(cells)
    return markdown(names, lines) + "\n" if lines else ""


def own_chance(part: pd.DataFrame) -> bool:
    """Whether variants differ in their chance; `part` has the rows of one task and metric."""
    return bool(np.ptp(part["chance"].to_numpy(dtype=float)) > 0)


def _mark(row: pd.Series) -> str:
    return _MARK if row["older"] else ""


def footnote(items: pd.DataFrame) -> str:
    """What the mark in a table means, and which cells are of which code; empty if none is."""
    older = items[items["older"] != ""] if "older" in items else items.iloc[:0]
    if older.empty:
        return ""
    codes = [
        f"code {code}: {', '.join(_cells_of(part, items))}"
        for code, part in older.groupby("older", sort=False)
    ]
    return (
        f"{_MARK} Computed by older code, or compared with what older code computed "
        f"(kept with --keep-older; inputs and versions are the same). {'; '.join(codes)}."
    )


def _cells_of(part: pd.DataFrame, items: pd.DataFrame) -> Iterator[str]:
    """Names of the cells in a part of the items: tasks, where all of a task is in it."""
    for task, rows in part.groupby("task", sort=False):
        if len(rows) == (items["task"] == task).sum():
            yield str(task)
            continue
        variants = dict.fromkeys(map(label, rows["method"], rows["density"]))
        yield from (f"{variant} on {task}" for variant in variants)


def scale_of(metric: str, rows: pd.DataFrame) -> float | None:
    """What a metric is shown times: 100 of shares, 1 of others; None of losses, as perplexities.

    `rows` are all that are shown together, of :func:`summarise`. Some tasks have their scores in
    percent already: what is beyond 1 anywhere, or chance is, is no share. (Bounds of an interval
    over few items may lie beyond.)
    """
    if is_loss(metric):
        return None
    several = rows[rows["items"] > _FEW][["low", "high"]]
    shown = [part.to_numpy(dtype=float) for part in (rows[["estimate", "chance"]], several)]
    most = max(np.nanmax(np.abs(part), initial=0) for part in shown)
    return 1 if is_divergence(metric) or most > 1 else 100


def chance_in_words(chance: float, scale: float | None) -> str:
    """A chance level as a table shows it, times the scale of its metric; empty without one."""
    return "" if np.isnan(chance) else f"{(scale or 1) * chance:.1f}"


def _of_ratio(number: float) -> str:
    if number < 0.095:
        return f"{number:.2g}"  # 0.00 would say nothing
    return f"{number:,.2f}" if number < 100 else f"{number:,.0f}"


def said(values: pd.Series, scale: float | None, sign: bool) -> str:
    """Estimate and interval, times `scale`; without one, as perplexities of losses.

    What is shown times 100 has one digit behind the point, other numbers up to 1 have two.
    """
    numbers = values.to_numpy(dtype=float)
    if scale is None:
        digits = [_of_ratio(x) for x in np.exp(numbers)]
        return "{}{} [{}, {}]".format("x" if sign else "", *digits)
    digits_behind = 2 if scale == 1 and np.abs(numbers).max() < 10 else 1
    digits = [f"{scale * x:{'+' if sign else ''}.{digits_behind}f}" for x in numbers]
    return "{} [{}, {}]".format(*digits)
