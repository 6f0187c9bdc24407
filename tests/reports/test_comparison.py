"""The one table: against the files, read and averaged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import model_outputs as made
import numpy as np
import pandas as pd
import pytest

from flocking.reports import Outputs, by_layer, collect, compared, contrasted, missing

FIGURES = Path(__file__).parents[2] / "figures"


@pytest.fixture
def rows(outputs: Outputs) -> pd.DataFrame:
    return compared(outputs)


def row(rows: pd.DataFrame, **wanted: object) -> pd.Series:
    """The one row of these labels."""
    keep = np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])
    (number,) = np.flatnonzero(keep)
    return rows.iloc[number]


def drawn_means(values: np.ndarray) -> tuple[float, float]:
    """A plain bootstrap of a mean, with draws of this test."""
    draws = np.random.default_rng(1).integers(len(values), size=(4000, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def test_evaluations_are_paired_with_the_full_model(
    folders: list[Path], rows: pd.DataFrame
) -> None:
    for folder, name in zip(folders, ("small-model", "large-model"), strict=False):
        items = pd.read_parquet(folder / "items.parquet")
        for task, metric in (("piqa", "acc"), ("wikitext_256", "loss_256")):
            part = items[(items["task"] == task) & (items["metric"] == metric)]
            full = part[part["method"] == "full"].sort_values("item")["value"].to_numpy()
            for method, density in (("topk", 0.5), ("static", 0.5), ("topk", 0.25)):
                own = part[(part["method"] == method) & (part["density"] == density)]
                values = own.sort_values("item")["value"].to_numpy()
                got = row(
                    rows, model=name, task=task, metric=metric, method=method, density=density
                )
                assert got["estimate"] == pytest.approx(values.mean())
                assert got["difference"] == pytest.approx((values - full).mean())
                low, high = drawn_means(values - full)
                width = high - low
                assert got["difference_low"] == pytest.approx(low, abs=0.2 * width)
                assert got["difference_high"] == pytest.approx(high, abs=0.2 * width)
                assert got["items"] == len(values)
        chance = row(rows, model=name, task="piqa", metric="acc", method="full")["chance"]
        assert chance == 0.5


def test_sizes_are_those_of_the_models(rows: pd.DataFrame) -> None:
    sizes = rows.drop_duplicates("model").set_index("model")["parameters"].to_dict()
    assert sizes == {"small-model": 1_000_000, "large-model": 9_000_000}


def test_scores_are_means_over_layers(folders: list[Path], rows: pd.DataFrame) -> None:
    def values(name: str, variable: str) -> np.ndarray:
        content = json.loads((folders[0] / f"{name}.json").read_text())["data_vars"]
        return np.array(content[variable]["data"])

    own = {"model": "small-model"}
    for number, weights in enumerate(("trained", "control")):
        for metric in ("flocking_score", "rank_consistency"):
            got = row(rows, **own, metric=metric, method=weights)
            assert got["estimate"] == pytest.approx(values("scores", metric)[0, number].mean())
            whole = values("token_order", f"{metric}_mean")[:, number, 0]
            assert [got["low"], got["high"]] == pytest.approx(whole[1:])
            assert (got["chance"], got["items"]) == (0, 3)
        share = row(rows, **own, metric="effective_share", method=weights)
        effective = values("scores", "effective_neurons")[0, number]
        assert share["estimate"] == pytest.approx((effective / 8).mean())
        overlap = row(rows, **own, metric="jaccard_between", method=weights)
        assert overlap["estimate"] == pytest.approx(
            values("sequence_overlap", "between")[0, number].mean()
        )
        assert overlap["chance"] == pytest.approx(1 / 3)
        specific = row(rows, **own, metric="specificity", method=weights)
        assert specific[["low", "high", "chance"]].isna().all()  # no file has them


def test_intervals_of_other_tokens_are_not_taken(tmp_path: Path) -> None:
    made.drawn(tmp_path, "m", "scores")
    made.drawn(tmp_path, "m", "token_order", token_ids_sha256="of others")
    rows = compared(collect(tmp_path))
    assert rows[["low", "high"]].isna().all(axis=None)
    assert "token_order" not in set(rows["task"])
    made.drawn(tmp_path, "m", "token_order", seed=9)  # of the same tokens, and another mean
    assert compared(collect(tmp_path))[["low", "high"]].isna().all(axis=None)


def test_intervals_alone_are_no_scores(tmp_path: Path) -> None:
    made.drawn(tmp_path, "m", "token_order")
    with pytest.raises(ValueError, match=r"token_order\.json alone, .*: add scores\.json"):
        compared(collect(tmp_path))


def test_captured_energy_and_loss_by_method(folders: list[Path], rows: pd.DataFrame) -> None:
    content = json.loads((folders[0] / "loss_by_method.json").read_text())["data_vars"]
    captured = np.array(content["captured"]["data"]).mean(axis=1)  # over excerpts
    for number, name in enumerate(made.METHODS):
        method = "topk" if name == "GRIFFIN" else name
        here = {"model": "small-model", "task": "loss_by_method", "method": method}
        energy = row(rows, **here, metric="captured_energy")
        assert energy["estimate"] == pytest.approx(captured[:, number].mean())
        assert energy["chance"] == 0.5
        if name != "full":
            assert energy["density"] == 0.5
            assert energy["low"] < energy["estimate"] < energy["high"]
        loss = row(rows, **here, metric="loss")
        perplexity, relative = (
            np.array(content[each]["data"])[:, number] for each in ("perplexity", "relative")
        )
        assert np.exp(loss[["estimate", "low", "high"]].astype(float)).tolist() == pytest.approx(
            perplexity
        )
        differences = loss[["difference", "difference_low", "difference_high"]].astype(float)
        assert np.exp(differences).tolist() == pytest.approx(relative)


def test_the_committed_figures_give_the_numbers_of_their_captions() -> None:
    rows = compared(collect(FIGURES))
    score = row(rows, metric="flocking_score", method="trained")
    assert f"{score['estimate']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" == (
        "0.19 [0.17, 0.21]"
    )
    assert "model 0.19 [0.17, 0.21]" in (FIGURES / "scores.md").read_text()
    specificity = row(rows, metric="specificity", method="control")["estimate"]
    assert f"random weights {specificity:.2f} [" in (FIGURES / "sequence_overlap.md").read_text()
    whole = json.loads((FIGURES / "token_order.json").read_text())["data_vars"]
    exact = np.array(whole["flocking_score_mean"]["data"])[0, 0, 0]
    assert score["estimate"] == pytest.approx(exact, rel=1e-9)


def test_what_was_measured_twice_counts_once(tmp_path: Path) -> None:
    items = made.items_of(1)
    one = made.evaluated(tmp_path / "one", "m", 10, items[items["density"] != 0.25])
    two = made.evaluated(tmp_path / "two", "m", 10, items[items["method"] != "static"])
    whole = made.evaluated(tmp_path / "whole", "m", 10, items)
    keys = ["task", "metric", "method", "density"]
    parts, at_once = (
        compared(collect(each)).sort_values(keys, ignore_index=True)
        for each in ([one, two], [whole])
    )
    pd.testing.assert_frame_equal(parts, at_once)


def test_older_code_is_noted(tmp_path: Path) -> None:
    items = made.items_of(1)
    items.loc[items["task"] == "piqa", "older"] = "01234567, run 2026-11-25"
    rows = compared(collect(made.evaluated(tmp_path, "m", 10, items)))
    noted = rows[rows["note"] != ""]
    assert set(noted["task"]) == {"piqa"}
    assert set(noted["note"]) == {"01234567, run 2026-11-25"}


@pytest.mark.parametrize("lost", ["full", "a value"])
def test_evaluations_that_cannot_be_summarised_are_named(tmp_path: Path, lost: str) -> None:
    items = made.items_of(1)
    if lost == "full":
        items = items[(items["task"] != "piqa") | (items["method"] != "full")]
    else:
        items.loc[3, "value"] = np.nan
    outputs = collect(made.evaluated(tmp_path, "m", 10, items))
    with pytest.raises(ValueError, match=r"cannot be summarised \(piqa: .*: run flocking evaluate"):
        compared(outputs)


def test_layers(outputs: Outputs, folders: list[Path]) -> None:
    layers = by_layer(outputs)
    content = json.loads((folders[2] / "scores.json").read_text())["data_vars"]
    own = layers[(layers["model"] == "large-model") & (layers["metric"] == "flocking_score")]
    expected = np.array(content["flocking_score"]["data"])[0]
    for number, weights in enumerate(("trained", "control")):
        here = own[own["weights"] == weights].sort_values("layer")
        np.testing.assert_allclose(here["estimate"], expected[number])
    assert set(layers["metric"]) >= {"specificity", "within", "effective_share"}


def test_layers_of_evaluations_alone(tmp_path: Path) -> None:
    layers = by_layer(collect(made.evaluated(tmp_path, "m", 10)))
    assert layers.empty
    assert "estimate" in layers


def test_what_is_missing_is_said(outputs: Outputs, rows: pd.DataFrame) -> None:
    assert missing(outputs, rows) == [
        "large-model was not measured on sequence_overlap, loss_by_method."
    ]


def test_missing_methods_metrics_and_sizes(tmp_path: Path) -> None:
    items = made.items_of(1)
    one = made.evaluated(tmp_path / "one", "one", 10, items[items["metric"] != "divergence_64"])
    here = items[(items["method"] != "static") | (items["task"] == "piqa")]
    two = made.evaluated(tmp_path / "two", "two", 20, here)
    three = made.drawn(tmp_path / "three", "three", "scores")
    outputs = collect([one, two, three])
    assert missing(outputs, compared(outputs)) == [
        "How large three is, is not known, so that it is in no figure by size: flocking evaluate "
        "says it in source.json, also where all cells are there.",
        "one was not measured on scores.",
        "one has no divergence_64 on wikitext_16, wikitext_256.",
        "two was not measured on scores.",
        "two has no static@0.5 on wikitext_16, wikitext_256.",
        "three was not measured on piqa, wikitext_16, wikitext_256.",
    ]


@pytest.mark.parametrize("function", [compared, contrasted])
def test_folders_are_no_outputs(function: Callable) -> None:
    with pytest.raises(TypeError, match="outputs is of type str: give what"):
        function("small")
