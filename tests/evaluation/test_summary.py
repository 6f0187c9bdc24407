"""Summaries and their tables, on made-up items."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import made_up

from flocking.evaluation import figures
from flocking.evaluation.summary import (
    by_prompt,
    footnote,
    headlines,
    scale_of,
    summarise,
    table,
)


def test_differences_are_paired() -> None:
    """Against a bootstrap by hand; unpaired, the interval would be many times as wide."""
    rng = np.random.default_rng(0)
    full = rng.normal(size=200)
    topk = full - 0.1 + 0.01 * rng.normal(size=200)
    rows = summarise(made_up({"full": full, "topk@0.5": topk})).set_index("variant")
    draws = rng.integers(200, size=(4000, 200))
    low, high = np.quantile((topk - full)[draws].mean(axis=1), [0.025, 0.975])
    got = rows.loc["topk@0.5"]
    assert got.estimate == pytest.approx(topk.mean())
    assert got.difference == pytest.approx((topk - full).mean())
    assert got.difference_low == pytest.approx(low, abs=1e-4)
    assert got.difference_high == pytest.approx(high, abs=1e-4)
    assert got.high - got.low > 20 * (got.difference_high - got.difference_low)
    assert got.pruned_share == 0.75
    assert (rows.loc["full", ["difference", "difference_low", "difference_high"]] == 0).all()


def test_summary_against_another_variant() -> None:
    values = {"full": np.ones(6), "topk@0.5": np.zeros(6), "static@0.5": np.arange(6) % 2.0}
    rows = summarise(made_up(values), against="static@0.5").set_index("variant")
    assert rows.loc["topk@0.5", "difference"] == -0.5
    with pytest.raises(ValueError, match=r"no variant 'best': choose from"):
        summarise(made_up(values), against="best")
    for odd in (np.nan, np.inf):
        unknown = made_up(values | {"topk@0.5": np.array([1, odd, 1, 1, 1, 1])})
        why = "piqa: acc is infinite or not a number for some items under topk@0.5, as"
        with pytest.raises(ValueError, match=why):
            summarise(unknown)
    missing = made_up(values).iloc[:-1]
    with pytest.raises(ValueError, match="not all variants were asked the same items"):
        summarise(missing)


def test_the_table_reads_as_the_numbers_are() -> None:
    points = made_up({"full": np.array([1.0, 1, 0, 1]), "topk@0.5": np.array([1.0, 0, 0, 0])})
    loss = made_up(
        {"full": np.full(4, math.log(20)), "topk@0.5": np.full(4, math.log(50))},
        "wikitext_16",
        metric="loss_64",
        chance=np.nan,
    )
    lines = table(summarise(pd.concat([points, loss]))).splitlines()
    assert lines[0] == "| task | items | chance | full | topk@0.5 |"
    assert lines[2].startswith("| piqa, acc | 4 | 50.0 | 75.0 [")
    assert "| -50.0 [" in lines[2]
    assert lines[3] == (
        "| wikitext_16, perplexity_64 | 4 |  | 20.00 [20.00, 20.00] | x2.50 [2.50, 2.50] |"
    )


def test_the_table_leaves_scores_beyond_1_as_they_are() -> None:
    (line,) = table(summarise(made_up({"full": np.array([20.0, 30]), "topk@0.5": np.ones(2)})))[
        :-1
    ].splitlines()[2:]
    assert "| 25.0 [" in line
    assert "| -24.0 [" in line
    # Of differences of percents the highest may be below 1, and chance has the same scale.
    values = {"full": np.array([-3.0, 0.5, 0.2]), "topk@0.5": np.array([-4.0, 0.1, -0.3])}
    items = made_up(values, "truthfulqa_gen", metric="bleu_diff", chance=0.25)
    rows = summarise(items)
    assert scale_of("bleu_diff", rows) == 1
    assert "| 3 | 0.2 | -0.77 [" in table(rows)
    (one,) = table(summarise(made_up({"full": [25.0], "topk@0.5": [15.0]}))).splitlines()[2:]
    assert "| 1 | 0.5 | 25.0 [" in one
    assert scale_of("acc", summarise(made_up({"full": [0.0, 1.0], "topk@0.5": [0.0, 0.0]}))) == 100


def test_figures_have_one_scale() -> None:
    """Percents are drawn as shares are, beside them and by themselves."""
    values = {"full": np.array([20.0, 30, 40]), "topk@0.5": np.array([10.0, 20, 15])}
    percents = made_up(values, "truthfulqa_gen", metric="rouge1_max", chance=15.0)
    shares = {name: own / 100 for name, own in values.items()}
    rows = summarise(pd.concat([made_up(shares, chance=0.15), percents]))
    rows.attrs["caption"] = rows.attrs["told"] = "made up"
    panels = figures.quality_by_density(rows).subfigs[0].axes
    assert panels[0].get_ylim() == pytest.approx(panels[1].get_ylim())
    first, second = ([line.get_ydata() for line in ax.lines] for ax in panels[:2])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float))
    (ax,) = figures.quality_by_method(rows).subfigs[0].axes
    drawn = [np.asarray(line.get_xdata(), float) for line in ax.lines]
    assert max(np.abs(x).max() for x in drawn) < 0.5
    plt.close("all")


def test_headlines_are_the_longest_whatever_the_order(several: pd.DataFrame) -> None:
    backwards = headlines(summarise(several.iloc[::-1]))
    assert set(backwards["task"]) == {"piqa", "boolq", "copa", "wikitext_256"}
    assert set(backwards["metric"]) == {"acc", "loss_256"}


def test_by_prompt_groups_items_of_similar_length() -> None:
    values = {"full": np.ones(30), "topk@0.5": np.repeat([0.0, 0.5, 1.0], 10)}
    same = by_prompt(made_up(values, prompt_tokens=7))
    assert same["items"].tolist() == [30, 30]
    rows = by_prompt(made_up(values))
    rows = rows[rows["method"] == "topk"]
    assert rows["prompt_tokens"].tolist() == [14, 24, 34]
    assert rows["difference"].tolist() == [-1, -0.5, 0]
    assert rows["items"].tolist() == [10, 10, 10]
    losses = [made_up(values, f"wikitext_{n}", metric="loss_64", prompt_tokens=n) for n in (16, 64)]
    rows = by_prompt(pd.concat(losses))
    assert rows["task"].unique().tolist() == ["wikitext"]
    assert rows["prompt_tokens"].unique().tolist() == [16, 64]


def test_numbers_of_older_code_are_marked() -> None:
    values = {"full": np.ones(6), "topk@0.5": np.zeros(6), "static@0.5": np.arange(6) % 2.0}
    items = made_up(values).assign(older="")
    assert footnote(items) == footnote(made_up(values)) == ""
    assert table(summarise(items)) == table(summarise(made_up(values)))
    items.loc[items["method"] == "topk", "older"] = "01234567, run 2026-11-25"
    rows = summarise(items).set_index("variant")["older"]
    assert dict(rows) == {"full": "", "topk@0.5": "01234567, run 2026-11-25", "static@0.5": ""}
    *_, line = table(summarise(items)).splitlines()
    assert [cell.endswith("]† ") for cell in line.split("|")[4:-1]] == [False, True, False]
    assert footnote(items).endswith("code 01234567, run 2026-11-25: topk@0.5 on piqa.")
    # All differences from the full model are from older code if its own scores are.
    items["older"] = items["older"].where(items["method"] != "full", "89abcdef, run 2026-11-24")
    rows = summarise(items).set_index("variant")["older"]
    assert rows["static@0.5"] == "89abcdef, run 2026-11-24"
    assert rows["topk@0.5"] == "01234567, run 2026-11-25; 89abcdef, run 2026-11-24"
