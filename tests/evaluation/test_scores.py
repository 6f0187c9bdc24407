"""Intervals of scores where all items have the same value."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers import made_up

from flocking.analysis import intervals
from flocking.evaluation.scores import means
from flocking.evaluation.summary import summarise, table_above_chance


def test_equal_items_leave_room_for_others() -> None:
    """A bootstrap of equal values has no width, as if no other item could differ."""
    values = np.array([[0.0] * 32, [1.0] * 32, [1.0] * 31 + [0.0]])
    none, everything, but_one = means(values, 1, differences=False)
    z2 = 1.959964**2
    assert none == pytest.approx([0, 0, z2 / (32 + z2)], abs=1e-6)  # Wilson's, with no successes
    assert everything == pytest.approx([1, 32 / (32 + z2), 1], abs=1e-6)
    plain = intervals(xr.DataArray(values[2], dims="sequence")).to_numpy()
    assert (but_one == plain).all()


def test_percents_and_tokens() -> None:
    values = np.zeros((1, 20))
    (share,) = means(values, 1, differences=True)
    (percent,) = means(values, 100, differences=True)
    assert percent == pytest.approx(100 * share)
    assert share[1] == pytest.approx(-share[2])
    assert 0.1 < share[2] < 0.15
    assert (means(values, None, differences=True) == 0).all()  # a loss can be the same exactly
    assert np.isnan(means(np.zeros((1, 1)), 1, differences=True)[0, 1:]).all()


@pytest.mark.parametrize("rates", [(0.03, 0.0), (0.0, 0.03), (0.0, 0.97)])
def test_rare_differences_are_inside_of_the_interval(rates: tuple[float, float]) -> None:
    """Where few items or nearly all differ: many draws of 30 items from known shares."""
    better, worse = rates
    rng = np.random.default_rng(0)
    chances = [better, worse, 1 - better - worse]
    drawn = rng.choice([1.0, -1.0, 0.0], p=chances, size=(300, 30))
    found = {
        how: np.mean((low <= better - worse) & (better - worse <= high))
        for how, (_, low, high) in {
            "counts": means(drawn, 1, differences=True).T,
            "bootstrap": means(drawn, None, differences=True).T,
        }.items()
    }
    assert found["counts"] > 0.9
    assert found["bootstrap"] < 0.75


def test_written_answers_have_a_chance_of_their_own() -> None:
    """GRIFFIN's text is above its own chance, though it is below that of the full model's."""
    rng = np.random.default_rng(0)
    chances = {"full": 0.3, "topk@0.5": 0.1}
    scores = {"full": 0.4, "topk@0.5": 0.2}
    parts = [
        made_up(
            {name: scores[name] + 0.05 * rng.normal(size=40)}, "xsum", metric="rouge1", chance=c
        )
        for name, c in chances.items()
    ]
    rows = summarise(pd.concat(parts)).set_index("variant")
    own = rows.loc["topk@0.5"]
    assert own.estimate < rows.loc["full", "chance"]
    assert own.above_chance == pytest.approx(own.estimate - 0.1)
    assert 0 < own.above_chance_low < own.above_chance < own.above_chance_high
    lines = table_above_chance(rows.reset_index()).splitlines()
    assert lines[0] == "| task | items | full | topk@0.5 |"
    assert f"| {100 * own.above_chance:+.1f} [" in lines[2]
    same = summarise(made_up({"full": np.ones(6), "topk@0.5": np.zeros(6)}))
    assert table_above_chance(same) == ""
