"""Pairs of methods, prompts and models: against items that are subtracted by hand."""

from __future__ import annotations

from pathlib import Path

import model_outputs as made
import numpy as np
import pandas as pd
import pytest

from flocking.reports import collect, contrasted, write

SAME = {"tokenizer": "a" * 64}


@pytest.fixture
def made_up(tmp_path: Path) -> dict[str, pd.DataFrame]:
    """Items of two models, by name, whose outputs are in folders of these names."""
    items = {"small": made.items_of(1), "large": made.items_of(2, worse=0.5)}
    # A prompt of 256 tokens leaves less to lose than one of 16.
    for table in items.values():
        kind = table["metric"].str.startswith("loss") & (table["method"] != "full")
        table.loc[kind & (table["task"] == "wikitext_256"), "value"] -= 0.2
    # In another order, since items are paired by their numbers.
    items["large"] = items["large"].sample(frac=1, random_state=0).reset_index(drop=True)
    for number, (name, table) in enumerate(items.items()):
        made.evaluated(tmp_path / name, name, 10 ** (6 + number), table, **SAME)
    return items


def values(
    items: pd.DataFrame, task: str, metric: str, method: str, density: float = 0.5
) -> np.ndarray:
    """By item."""
    keep = (items["task"] == task) & (items["metric"] == metric) & (items["method"] == method)
    if method != "full":
        keep &= items["density"] == density
    return items[keep].sort_values("item")["value"].to_numpy()


def above(items: pd.DataFrame, task: str, metric: str, method: str) -> np.ndarray:
    return values(items, task, metric, method) - values(items, task, metric, "full")


def check(rows: pd.DataFrame, expected: np.ndarray, **wanted: object) -> pd.Series:
    """The one row of these labels has this mean, and an interval that a plain bootstrap has."""
    keep = np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])
    (number,) = np.flatnonzero(keep)
    row = rows.iloc[number]
    assert row["difference"] == pytest.approx(expected.mean(), abs=1e-12)
    draws = np.random.default_rng(1).integers(len(expected), size=(4000, len(expected)))
    low, high = np.quantile(expected[draws].mean(axis=1), [0.025, 0.975])
    assert row["low"] == pytest.approx(low, abs=0.2 * (high - low) + 1e-12)
    assert row["high"] == pytest.approx(high, abs=0.2 * (high - low) + 1e-12)
    assert row["items"] == len(expected)
    return row


def test_methods_of_one_model(made_up: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    rows = contrasted(collect([tmp_path / name for name in made_up]))
    for name, items in made_up.items():
        for task, metric in (("piqa", "acc"), ("wikitext_16", "loss_256")):
            expected = values(items, task, metric, "topk") - values(items, task, metric, "static")
            here = {"of": "methods", "model": name, "task": task, "metric": metric}
            check(rows, expected, **here, method="topk", density=0.5, than="static")
    of_methods = rows[rows["of"] == "methods"]
    assert set(of_methods["density"]) == {0.5}  # at 0.25 there is no other method


def test_prompts_of_one_model(made_up: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    rows = contrasted(collect([tmp_path / name for name in made_up]))
    for name, items in made_up.items():
        for metric in ("loss_64", "divergence_64", "agreement_64"):
            for method in ("topk", "static"):
                ends = (above(items, f"wikitext_{n}", metric, method) for n in (256, 16))
                expected = np.subtract(*ends)
                here = {"of": "prompts", "model": name, "task": "wikitext", "metric": metric}
                row = check(rows, expected, **here, method=method, density=0.5)
                assert row["than"] == "wikitext_16"
                if metric == "loss_64":
                    assert row["difference"] == pytest.approx(-0.2)
    assert set(rows[rows["of"] == "prompts"]["task"]) == {"wikitext"}


def test_models(made_up: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    rows = contrasted(collect([tmp_path / name for name in made_up]))
    small, large = made_up["small"], made_up["large"]
    for task, metric in (("piqa", "acc"), ("wikitext_256", "loss_64")):
        for method in ("topk", "static"):
            expected = above(large, task, metric, method) - above(small, task, metric, method)
            here = {"of": "models", "model": "large", "task": task, "metric": metric}
            check(rows, expected, **here, method=method, density=0.5, than="small")
    assert set(rows[rows["of"] == "models"]["model"]) == {"large"}


@pytest.mark.parametrize("other", [{}, {"tokenizer": "b" * 64}])
def test_articles_of_other_tokens_are_not_paired(tmp_path: Path, other: dict[str, str]) -> None:
    """Item 3 may be another article there; a question is the same for any tokenizer."""
    made.evaluated(tmp_path / "one", "one", 10, **SAME)
    made.evaluated(tmp_path / "two", "two", 20, **other)
    made.evaluated(tmp_path / "three", "three", 30, **SAME)
    rows = contrasted(collect(tmp_path))
    pairs = rows[rows["of"] == "models"][["model", "than", "task"]].drop_duplicates()
    assert sorted(map(tuple, pairs.to_numpy().tolist())) == [
        ("three", "one", "wikitext_16"),
        ("three", "one", "wikitext_256"),
        ("three", "two", "piqa"),
        ("two", "one", "piqa"),
    ]


def test_models_without_a_size_have_no_order(tmp_path: Path) -> None:
    made.evaluated(tmp_path / "one", "one", 10, **SAME)
    source = made.evaluated(tmp_path / "two", "two", 20, **SAME) / "source.json"
    source.write_text(source.read_text().replace('"parameters": 20', '"parameters": null'))
    assert set(contrasted(collect(tmp_path))["of"]) == {"methods", "prompts"}


def test_prompts_are_paired_on_the_items_that_both_have(tmp_path: Path) -> None:
    items = made.items_of(1)
    fewer = items[(items["task"] != "wikitext_16") | items["item"].between(3, 9)]
    rows = contrasted(collect(made.evaluated(tmp_path, "m", 10, fewer)))
    long, short = (
        above(items[items["item"].between(3, 9)], f"wikitext_{n}", "loss_64", "topk")
        for n in (256, 16)
    )
    here = {"of": "prompts", "task": "wikitext", "metric": "loss_64", "method": "topk"}
    check(rows, long - short, **here, density=0.5)


def test_prompts_with_other_items_are_refused(tmp_path: Path) -> None:
    items = made.items_of(1)
    first = items["item"] < 7
    fewer = items[np.where(items["task"] == "wikitext_16", first, ~first)]
    outputs = collect(made.evaluated(tmp_path, "m", 10, fewer))
    with pytest.raises(ValueError, match="wikitext_256 and wikitext_16 of m have other items: giv"):
        contrasted(outputs)


def test_without_evaluations_there_are_none(tmp_path: Path) -> None:
    rows = contrasted(collect(made.drawn(tmp_path, "m", "scores")))
    assert rows.empty
    assert "difference" in rows


def test_what_is_written(made_up: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    written = write(collect([tmp_path / name for name in made_up]), tmp_path / "out")
    read = pd.read_csv(tmp_path / "out" / "contrasted.csv")
    assert read["difference"].to_numpy() == pytest.approx(
        written.contrasts["difference"].to_numpy(dtype=float), rel=1e-5, abs=1e-9
    )
    page = (tmp_path / "out" / "compared.md").read_text()
    _, half = page.split("## Density 0.5")
    assert [line for line in half.splitlines() if line.startswith("###")] == [
        "### GRIFFIN against the other methods",
        "### Long prompts against short ones",
        "### Larger models against smaller ones",
    ]
    row = read[(read["of"] == "prompts") & (read["metric"] == "loss_256")]
    (line,) = [line for line in half.splitlines() if "wikitext, perplexity_256 | small" in line]
    ratio = np.exp(row[(row["method"] == "topk") & (row["density"] == 0.5)]["difference"].iloc[0])
    assert f"x{ratio:.2f} [" in line
    assert "| 16 |" in line
    (line,) = [x for x in half.splitlines() if x.startswith("| piqa, acc | large | small |")]
    acc = read[(read["of"] == "models") & (read["task"] == "piqa") & (read["method"] == "topk")]
    assert f"{100 * acc[acc['density'] == 0.5]['difference'].iloc[0]:+.1f} [" in line
