"""A comparison as files, and its figures by the artists on their axes."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import model_outputs as made
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from flocking.reports import Outputs, by_layer, collect, compared, write
from flocking.reports.choosing import of_energy, of_scores, of_sizes
from flocking.reports.figures import in_words, loss_by_energy, loss_by_size, scores_by_size

PICTURES = ("loss_by_size", "loss_by_energy", "scores_by_size")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def told(data: pd.DataFrame) -> pd.DataFrame:
    data.attrs |= {"caption": "made up", "told": "made up"}
    return data


def axes_of(figure: plt.Figure) -> dict[str, Axes]:
    axes = [ax for ax in figure.subfigs[0].axes if ax.axison]
    return {ax.get_title() or ax.get_ylabel(): ax for ax in axes}


def points(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a method's points are, and the ends of its vertical bars."""
    (found,) = [
        one
        for one in ax.containers
        if isinstance(one, ErrorbarContainer) and one.get_label() == label
    ]
    bars = np.array([segment[:, 1] for segment in found[2][-1].get_segments()])
    return found[0].get_xdata(), found[0].get_ydata(), bars


def test_losses_by_size(outputs: Outputs) -> None:
    rows = compared(outputs)
    axes = axes_of(loss_by_size(told(of_sizes(rows, 0.5))))
    assert list(axes) == ["wikitext_16", "wikitext_256", "piqa"]  # loss_by_method is of one
    for task, metric in (("wikitext_256", "loss_256"), ("piqa", "acc")):
        own = rows[
            (rows["task"] == task)
            & (rows["metric"] == metric)
            & (rows["method"] == "topk")
            & (rows["density"] == 0.5)
        ]
        expected = own[["difference", "difference_low", "difference_high"]].to_numpy(dtype=float)
        expected = np.exp(expected) if metric == "loss_256" else expected
        x, y, bars = points(axes[task], "GRIFFIN")
        np.testing.assert_allclose(y, expected[:, 0])
        np.testing.assert_allclose(bars, expected[:, 1:])
        assert (np.abs(np.log(x / own["parameters"].astype(float))) < 0.3).all()  # beside the size
    chances = [line for line in axes["piqa"].lines if line.get_label() == "chance"]
    full = rows[(rows["task"] == "piqa") & (rows["method"] == "full")]["estimate"]
    assert len(chances) == 2  # one a method
    for chance in chances:
        np.testing.assert_allclose(chance.get_ydata(), 0.5 - full)
    assert axes["wikitext_256"].get_xscale() == "log"
    assert [text.get_text() for text in axes["piqa"].get_xticklabels()] == ["1M", "9M"]
    assert axes["wikitext_256"].get_ylabel() == "perplexity of 256,\ntimes full's"
    assert axes["piqa"].get_ylabel() == "acc,\nminus full's"
    for task, height in (("wikitext_16", 1), ("piqa", 0)):
        (line,) = [one for one in axes[task].lines if one.get_label() == "full model"]
        assert set(line.get_ydata()) == {height}


def test_what_is_far_from_all_others_is_said_in_words(outputs: Outputs) -> None:
    rows = compared(outputs)
    rows = rows[rows["model"] == "small-model"].reset_index(drop=True)  # which has it alone
    here = (rows["method"] == "random") & (rows["metric"] == "loss")
    names = ["difference", "difference_low", "difference_high"]
    rows.loc[here, names] = np.log([500.0, 400, 600])
    ax = axes_of(loss_by_size(told(of_sizes(rows, 0.5))))["loss_by_method"]
    (text,) = ax.texts
    assert text.get_text() == "random: 500"
    assert ax.get_ylim()[1] < 400
    assert "random (chance)" not in [one.get_label() for one in ax.containers]


def test_divergences_are_no_losses(tmp_path: Path) -> None:
    items = made.items_of(1)
    for metric, name in (
        ("divergence_64", "divergence (nats) of 64,\nminus full's"),
        ("agreement_64", "agreement of 64,\nminus full's"),
    ):
        alone = items[items["metric"] == metric]
        folder = made.evaluated(tmp_path / metric, "m", 10, alone)
        rows = compared(collect(folder))
        ax = axes_of(loss_by_size(told(of_sizes(rows, 0.5))))["wikitext_16"]
        assert ax.get_ylabel() == name
        own = rows[(rows["task"] == "wikitext_16") & (rows["method"] == "static")]
        _, y, _ = points(ax, "static: calibration texts")
        np.testing.assert_allclose(y, own["difference"])
        assert ax.get_yscale() == "linear"
        percent = ax.yaxis.get_major_formatter()(0.5)
        assert percent == ("50" if metric == "agreement_64" else percent)
    rows = compared(collect(made.evaluated(tmp_path / "all", "m", 10, items)))
    assert set(of_sizes(rows, 0.5)["metric"]) == {"acc", "loss_256"}


def test_losses_by_captured_energy(tmp_path: Path) -> None:
    one = made.drawn(tmp_path / "one", "one", "loss_by_method")
    two = made.drawn(tmp_path / "two", "two", "loss_by_method", seed=4)
    rows = compared(collect([one, two]))
    (ax,) = axes_of(loss_by_energy(told(of_energy(rows, 0.5)))).values()
    data = rows[(rows["method"] == "topk")]
    energy = data[data["metric"] == "captured_energy"]["estimate"]
    loss = data[data["metric"] == "loss"]["difference"]
    x, y, _ = points(ax, "GRIFFIN")
    np.testing.assert_allclose(x, energy)
    np.testing.assert_allclose(y, loss)
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines["chance"].get_xdata()) == {0.5}
    for name in ("one", "two"):  # all selections of a model, but for the full one
        assert len(lines[name].get_xdata()) == len(made.METHODS) - 1


def test_scores_by_size(outputs: Outputs) -> None:
    rows, layers = compared(outputs), by_layer(outputs)
    axes = axes_of(scores_by_size(told(of_scores(rows, layers))))
    assert list(axes) == ["flocking score", "specificity"]
    for label, weights in (("model", "trained"), ("random weights (control)", "control")):
        own = rows[(rows["metric"] == "flocking_score") & (rows["method"] == weights)]
        _, y, bars = points(axes["flocking score"], label)
        np.testing.assert_allclose(y, own["estimate"])
        np.testing.assert_allclose(bars[0], own[["low", "high"]].iloc[0].astype(float))
        np.testing.assert_allclose(bars[1], own["estimate"].iloc[1])  # no interval is known
        _, y, _ = points(axes["specificity"], label)
        assert len(y) == 1  # of the one model that has it
    dots = [line for line in axes["flocking score"].lines if line.get_marker() == "."]
    drawn = np.sort(np.concatenate([line.get_ydata() for line in dots]))
    expected = layers[layers["metric"] == "flocking_score"]["estimate"]
    np.testing.assert_allclose(drawn, np.sort(expected))
    (chance,) = [x for x in axes["flocking score"].lines if x.get_label() == "chance"]
    assert set(chance.get_ydata()) == {0}


def test_a_score_that_no_model_has_is_said(tmp_path: Path) -> None:
    outputs = collect(made.drawn(tmp_path, "m", "scores", parameters=10))
    axes = axes_of(scores_by_size(told(of_scores(compared(outputs), by_layer(outputs)))))
    assert [text.get_text() for text in axes["specificity"].texts] == ["not measured"]


@pytest.mark.parametrize(
    ("size", "expected"), [(12, "12"), (134515008, "135M"), (1543714304, "1.54B"), (7.1e12, "7.1T")]
)
def test_sizes_in_words(size: float, expected: str) -> None:
    assert in_words(size) == expected


def test_all_files_are_written(outputs: Outputs, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    written = write(outputs, out)
    pictures = [f"{name}{suffix}" for name in PICTURES for suffix in (".png", ".svg")]
    names = ["compared.csv", "contrasted.csv", "compared.md", *pictures]
    assert [path.name for path in written.files] == names
    assert {path.name for path in out.iterdir()} == {*names}
    assert written.not_drawn == {}
    table = pd.read_csv(out / "compared.csv", keep_default_na=False, na_values=[""])
    expected = written.rows
    assert list(table) == list(expected)
    np.testing.assert_allclose(table["difference"], expected["difference"], rtol=1e-5)
    write(outputs, out)  # replaces its own files
    assert {path.name for path in out.iterdir()} == {*names}


def test_the_page_says_what_the_rows_say(outputs: Outputs, tmp_path: Path) -> None:
    rows = write(outputs, tmp_path / "out").rows
    page = (tmp_path / "out" / "compared.md").read_text()
    assert page.startswith("# Models compared: small-model, large-model\n")
    assert "| large-model† | 9M | 4.5M | 3 | scores |" in page
    assert "- Outputs differ in torch: 2.13.0 of small-model" in page
    assert "† Unlike the first model in a line above." in page
    assert "- large-model was not measured on sequence_overlap, loss_by_method." in page

    def numbers(**wanted: object) -> pd.Series:
        keep = np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])
        return rows[keep].iloc[0]

    lines = page.partition("## Density 0.5")[2].partition("\n### ")[0].splitlines()
    lines += page.partition("## Flocking")[2].splitlines()
    (line,) = [one for one in lines if one.startswith("| wikitext_256, perplexity_256 | small")]
    own = {"model": "small-model", "task": "wikitext_256", "metric": "loss_256"}
    full = numbers(**own, method="full")
    topk = numbers(**own, method="topk", density=0.5)
    assert f"| 16 |  | {np.exp(full['estimate']):.2f} [" in line
    assert f"| x{np.exp(topk['difference']):.2f} [{np.exp(topk['difference_low']):.2f}, " in line
    (line,) = [one for one in lines if one.startswith("| piqa, acc | large-model†")]
    own = {"model": "large-model", "task": "piqa"}
    topk = numbers(**own, method="topk", density=0.5)
    assert "| 30 | 50.0 | " in line
    assert f"| {100 * topk['difference']:+.1f} [" in line
    (line,) = [one for one in lines if one.startswith("| wikitext_16, divergence_64 | small")]
    own = {"model": "small-model", "task": "wikitext_16"}
    topk = numbers(**own, metric="divergence_64", method="topk", density=0.5)
    assert f"| {topk['difference']:+.2f} [" in line  # nats
    (line,) = [one for one in lines if one.startswith("| wikitext_16, agreement_64 | small")]
    topk = numbers(**own, metric="agreement_64", method="topk", density=0.5)
    assert "| 100.0 [100.0, 100.0] |" in line
    assert f"| {100 * topk['difference']:+.1f} [" in line
    (line,) = [one for one in lines if one.startswith("| loss_by_method, captured_energy | small")]
    energy = numbers(model="small-model", metric="captured_energy", method="topk")
    assert f"| {100 * energy['estimate']:.1f} [" in line
    assert "| 50.0 |" in line
    (line,) = [one for one in lines if one.startswith("| specificity | small-model |")]
    score = numbers(model="small-model", metric="specificity", method="trained")
    assert f"|  | {score['estimate']:.2f} |" in line  # without an interval
    for name in PICTURES:
        assert f"![{name}]({name}.svg)" in page


def test_older_code_is_marked(tmp_path: Path) -> None:
    items = made.items_of(1)
    items.loc[items["task"] == "piqa", "older"] = "01234567, run 2026-11-25"
    write(collect(made.evaluated(tmp_path / "m", "m", 10, items)), tmp_path / "out")
    page = (tmp_path / "out" / "compared.md").read_text()
    marked = {line.split("|")[1].strip() for line in page.splitlines() if "]‡" in line}
    assert marked == {"piqa, acc"}
    assert "‡ Computed by older code" in page
    assert "code 01234567, run 2026-11-25, m: full on piqa, topk@0.5 on piqa" in page


def test_figures_with_nothing_to_show_are_not_written(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(collect(folders), out)
    assert (out / "loss_by_size.png").exists()
    alone = made.drawn(tmp_path / "alone", "m", "loss_by_method")
    written = write(collect(alone), out)
    assert written.not_drawn == {
        "loss_by_size": (
            "loss_by_size is not drawn: no model whose size is known was pruned at density 0.5."
        ),
        "scores_by_size": (
            "scores_by_size is not drawn: no model whose size is known has scores.json or "
            "sequence_overlap.json."
        ),
    }
    # None is stale.
    assert {path.stem for path in out.iterdir()} == {"compared", "contrasted", "loss_by_energy"}
    page = (out / "compared.md").read_text()
    for why in written.not_drawn.values():
        assert why in page
    assert "How large m is, is not known" in page


def test_a_density_that_nothing_was_measured_at(outputs: Outputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"density=0\.3: nothing was measured at it: give one of "):
        write(outputs, tmp_path / "out", density=0.3)
    assert not (tmp_path / "out").exists()
    written = write(outputs, tmp_path / "out", density=0.25)
    assert list(written.not_drawn) == ["loss_by_energy"]
    scores = collect(made.drawn(tmp_path / "scores", "m", "scores", parameters=10))
    assert "loss_by_size" in write(scores, tmp_path / "other", density=0.3).not_drawn


@pytest.mark.parametrize(
    "name", ["compared.csv", "compared.md", "loss_by_size.png", "scores_by_size.svg"]
)
def test_files_of_others_stay(outputs: Outputs, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"{name} exists and is not a comparison")):
        write(outputs, out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


def test_one_model_alone(tmp_path: Path) -> None:
    folder = made.evaluated(tmp_path / "m", "m", 10)
    written = write(collect(folder), tmp_path / "out")
    assert list(written.not_drawn) == ["loss_by_energy", "scores_by_size"]
    assert set(written.rows["model"]) == {"m"}


@pytest.mark.parametrize("draw", [loss_by_size, loss_by_energy, scores_by_size])
def test_given_something_else_they_say_what_they_draw(draw, outputs: Outputs) -> None:
    with pytest.raises(TypeError, match="draws rows of a comparison"):
        draw(None)
    with pytest.raises(ValueError, match="draws rows of a comparison"):
        draw(pd.DataFrame({"model": []}))
