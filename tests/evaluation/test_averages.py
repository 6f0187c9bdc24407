"""Tasks with choices together."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import made_up
from scipy import stats

from flocking.evaluation.averages import over_tasks, table_over_tasks

SIZES = {"piqa": 60, "hellaswag": 200, "arc_easy": 120}


@pytest.fixture(scope="module")
def items() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for task, size in SIZES.items():
        full = (rng.random(size) < 0.6).astype(float)
        pruned = np.where(rng.random(size) < 0.2, 0.0, full)
        parts.append(made_up({"full": full, "topk@0.5": pruned}, task))
    loss = made_up({"full": np.ones(9), "topk@0.5": np.ones(9)}, "news_16", metric="loss_64")
    return pd.concat([*parts, loss])


def differences(items: pd.DataFrame) -> list[np.ndarray]:
    """By task, in another way than the code has it."""
    found = []
    for task in SIZES:
        own = items[items["task"] == task].sort_values("item")
        by_method = {name: part["value"].to_numpy() for name, part in own.groupby("method")}
        found.append(by_method["topk"] - by_method["full"])
    return found


def test_each_task_counts_the_same(items: pd.DataFrame) -> None:
    (row,) = over_tasks(items).itertuples()
    apart = differences(items)
    assert (row.metric, row.variant, row.items) == ("acc", "topk@0.5", 380)
    assert row.tasks == "piqa, hellaswag, arc_easy"
    assert row.difference == pytest.approx(np.mean([x.mean() for x in apart]))
    error = np.sqrt(sum(x.var(ddof=1) / len(x) for x in apart)) / 3  # of a stratified mean
    width = (row.difference_high - row.difference_low) / (2 * stats.t.ppf(0.975, 59))
    assert width == pytest.approx(error, rel=0.08)
    against = over_tasks(items, against="topk@0.5").iloc[0]
    assert (against.variant, against.difference) == ("full", pytest.approx(-row.difference))
    (line,) = table_over_tasks(over_tasks(items)).splitlines()[2:]
    assert line.startswith(f"| acc | {row.tasks} | 380 | {100 * row.difference:+.1f} [")


def test_more_tasks_make_the_interval_narrower(items: pd.DataFrame) -> None:
    few = items[items["item"] < 30]
    row = over_tasks(few).iloc[0]
    one = over_tasks(few[few["task"] != "piqa"]).iloc[0]
    assert row.difference_high - row.difference_low < one.difference_high - one.difference_low


def test_one_item_of_a_task_has_no_interval(items: pd.DataFrame) -> None:
    few = items[(items["task"] != "piqa") | (items["item"] == 0)]
    row = over_tasks(few).iloc[0]
    assert np.isfinite(row.difference)
    assert np.isnan([row.difference_low, row.difference_high]).all()


def test_a_variant_that_is_not_there_is_refused(items: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"no variant 'best': choose from full, topk@0\.5"):
        over_tasks(items, against="best")


def test_one_task_or_none_has_no_mean(items: pd.DataFrame) -> None:
    for tasks in (["piqa", "news_16"], ["news_16"]):
        assert table_over_tasks(over_tasks(items[items["task"].isin(tasks)])) == ""


def test_equal_answers_are_no_certainty(items: pd.DataFrame) -> None:
    same = items.assign(value=1.0)
    row = over_tasks(same).iloc[0]
    assert row.difference_low == pytest.approx(-row.difference_high)
    assert 0.005 < row.difference_high < 0.01  # of 380


def test_variants_that_a_task_was_not_asked_with_are_left_out(items: pd.DataFrame) -> None:
    more = made_up({"full": np.ones(9), "static@0.5": np.zeros(9)}, "copa")
    assert over_tasks(pd.concat([items, more])).empty
