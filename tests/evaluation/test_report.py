"""Reports: their figures and files, and the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import helpers
import numpy as np
import pandas as pd
import pytest

from flocking.evaluation import figures, report, sources
from flocking.evaluation.summary import (
    beyond_others,
    by_batch,
    by_prompt,
    headlines,
    summarise,
    table,
)
from flocking.reports import collect, compared, contrasted

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PROSE = ROOT / "docs" / "results.md"
LARGER = [f"qwen2.5-coder-{size}-instruct-q4_k_m" for size in ("0.5b", "1.5b")]
LARGER += [f"qwen2.5-coder-{of}" for of in ("0.5b-gsm8k", "1.5b-gsm8k", "0.5b-summaries")]
# A number with its interval, as prose and tables say it.
NUMBERS = re.compile(r"[+-]?[\d.,]+ \[[+-]?[\d.,]+, [+-]?[\d.,]+\]")


def test_figures_show_the_summarys_numbers(several: pd.DataFrame) -> None:
    rows = headlines(summarise(several))
    assert rows[["task", "metric"]].drop_duplicates().to_numpy().tolist() == [
        ["piqa", "acc"],
        ["boolq", "acc"],
        ["copa", "acc"],
        ["wikitext_256", "loss_256"],
    ]
    rows.attrs["caption"] = "made up"
    figure = figures.quality_by_density(rows)
    axes = figure.subfigs[0].axes
    assert [(ax.get_title(), ax.get_ylabel()) for ax in axes if ax.axison] == [
        ("piqa", "acc"),
        ("boolq", "acc"),
        ("copa", "acc"),
        ("wikitext_256", "perplexity of 256"),
    ]
    piqa = rows[(rows["task"] == "piqa") & (rows["method"] == "topk")]
    (line,) = [one[0] for one in axes[0].containers if one.get_label() == "GRIFFIN"]
    np.testing.assert_allclose(line.get_ydata(), piqa["estimate"])
    (wiki,) = [one[0] for one in axes[3].containers if one.get_label() == "GRIFFIN"]
    own = rows[(rows["task"] == "wikitext_256") & (rows["method"] == "topk")]
    np.testing.assert_allclose(wiki.get_ydata(), np.exp(own["estimate"]))
    assert any(line.get_label() == "chance" for line in axes[0].lines)

    here = rows[(rows["density"] == 0.5) | (rows["method"] == "full")]
    here.attrs["caption"] = "made up"
    axes = figures.quality_by_method(here).subfigs[0].axes
    points = {one.get_label(): one[0] for one in axes[0].containers[:3]}
    expected = here[(here["task"] == "piqa") & (here["method"] == "static")]["difference"].item()
    assert points["static: calibration texts"].get_xdata() == pytest.approx([expected])
    assert [label.get_text() for label in axes[1].get_yticklabels()] == [
        "wikitext_256\nperplexity of 256, n = 12"
    ]

    prompts = beyond_others(headlines(by_prompt(several)))
    prompts.attrs["caption"] = "made up"
    axes = figures.quality_by_prompt(prompts).subfigs[0].axes
    assert (axes[3].get_title(), axes[3].get_ylabel()) == (
        "wikitext",
        "perplexity of 256,\ntimes full's",
    )
    assert axes[0].get_ylabel() == "acc,\nminus full's"


def test_what_is_far_from_all_others_is_said_in_words() -> None:
    rng = np.random.default_rng(0)
    full = 3 + rng.random(12)
    values = {"full": full, "topk@0.5": full + 1, "magnitude@0.5": full + 7}
    lost = [
        helpers.made_up(values, f"news_{n}", metric="loss_256", chance=np.nan, prompt_tokens=n)
        for n in (16, 64)
    ]
    rows = beyond_others(headlines(by_prompt(pd.concat(lost))))
    assert rows[rows["beyond"]]["method"].tolist() == ["magnitude"] * 2
    rows.attrs["caption"] = "made up"
    (ax, *_) = figures.quality_by_prompt(rows).subfigs[0].axes
    (text,) = ax.texts
    assert text.get_text() == "magnitude: 1,097"
    assert ax.get_ylim()[1] < 20
    labels = [one.get_label() for one in ax.containers]
    assert labels == ["GRIFFIN"]
    # A method is not named if nothing else is there to be told apart from it.
    alone = rows[rows["method"] != "topk"].drop(columns="beyond")
    assert not beyond_others(alone)["beyond"].any()


def test_methods_stand_beside_each_other_only_where_there_are_several(
    several: pd.DataFrame,
) -> None:
    rows = headlines(summarise(several))
    rows.attrs["caption"] = "made up"
    axes = figures.quality_by_density(rows).subfigs[0].axes
    piqa = rows[(rows["task"] == "piqa") & (rows["method"] != "full")]
    shown = {one.get_label(): one[0].get_xdata() for one in axes[0].containers}
    alone = [d for d, own in piqa.groupby("density") if len({*own["method"]}) == 1]
    shared = [d for d, own in piqa.groupby("density") if len({*own["method"]}) > 1]
    assert alone
    assert shared
    places = np.concatenate(list(shown.values())).astype(float)
    for density in alone:
        assert density in places
    for density in shared:
        near = np.sort(places[np.abs(places - density) < 0.1])
        np.testing.assert_allclose(np.diff(near), 0.02)
        assert near.mean() == pytest.approx(density)


@pytest.mark.parametrize("name", [*report.FIGURES, report.BY_BATCH])
def test_given_something_else_they_say_what_they_draw(name: str, several: pd.DataFrame) -> None:
    with pytest.raises(TypeError, match="draws a summary of an evaluation"):
        getattr(figures, name)(None)
    with pytest.raises(ValueError, match=r"use flocking\.plot"):
        getattr(figures, name)(several)


def test_a_report_is_complete_and_says_where_it_comes_from(
    several: pd.DataFrame, tmp_path: Path
) -> None:
    report.write(several, tmp_path, {"model": "tiny", "torch": "2"})
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {f"{name}.{kind}" for name in report.FIGURES for kind in ("png", "svg")}
    assert names == {*report.FILES, *pictures}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "items.parquet"), several)
    told = (tmp_path / "tables.md").read_text()
    assert "(model tiny; torch 2)" in told
    assert sources.read(tmp_path / "source.json").model == "tiny"
    assert "## GRIFFIN against the other methods at density 0.5" in told
    assert table(summarise(several)).strip() in told
    for name in report.FIGURES:
        assert f"![{name}]({name}.svg)\n\nScores of tiny" in told


def test_metrics_that_are_no_losses_are_in_their_own_units(
    several: pd.DataFrame, tmp_path: Path
) -> None:
    """How near the full model is stands beside the losses, and is no task's main number."""
    losses = several[several["metric"].str.startswith("loss")]
    full = losses["method"] == "full"
    divergence = losses.assign(
        metric=losses["metric"].str.replace("loss", "divergence"),
        value=np.where(full, 0, losses["value"] / 10),
    )
    agreement = losses.assign(
        metric=losses["metric"].str.replace("loss", "agreement"),
        value=np.where(full, 1, 1 / losses["value"]),
    )
    items = pd.concat([several, divergence, agreement], ignore_index=True)
    rows = report.write(items, tmp_path, {"model": "tiny"})
    assert headlines(rows)["metric"].unique().tolist() == ["acc", "loss_256"]
    assert headlines(by_prompt(items))["metric"].unique().tolist() == ["acc", "loss_256"]
    first = pd.concat([divergence, agreement, several], ignore_index=True)
    assert set(headlines(summarise(first))["metric"]) == {"acc", "loss_256"}
    lines = {line.split("|")[1].strip(): line for line in table(rows).splitlines()}
    own = rows[rows["task"] == "wikitext_16"].set_index(["metric", "variant"])["difference"]
    assert f"| {own['divergence_64', 'topk@0.5']:+.2f} [" in lines["wikitext_16, divergence_64"]
    assert "| 0.00 [0.00, 0.00] |" in lines["wikitext_16, divergence_64"]
    shown = f"| {100 * own['agreement_64', 'topk@0.5']:+.1f} ["
    assert shown in lines["wikitext_16, agreement_64"]
    assert "| 100.0 [100.0, 100.0] |" in lines["wikitext_16, agreement_64"]
    alone = rows[rows["metric"] == "divergence_64"]
    alone.attrs["caption"] = "made up"
    ax = figures.quality_by_density(alone).subfigs[0].axes[0]
    assert ax.get_ylabel() == "divergence (nats) of 64"
    assert ax.yaxis.get_major_formatter()(0.5) != "50"  # as a share would be shown


def test_quality_by_batch(several: pd.DataFrame, tmp_path: Path) -> None:
    """Where prompts share a selection there is a figure of it, and it goes with them."""
    rng = np.random.default_rng(1)
    methods = ["full", "topk@0.5", "shared-2@0.5", "shared-8@0.5", "static@0.5", "topk@0.25"]
    values = {method: (rng.random(20) < 0.5) * 1.0 for method in methods}
    items = pd.concat([several, helpers.made_up(values, "xsum", metric="rouge1")])
    rows = report.write(items, tmp_path, {"model": "tiny"})
    assert (tmp_path / "quality_by_batch.png").exists()
    assert "![quality_by_batch](quality_by_batch.svg)" in (tmp_path / "tables.md").read_text()
    data = headlines(by_batch(rows[(rows["density"] == 0.5) | (rows["method"] == "full")]))
    assert set(data["task"]) == {"xsum"}
    sizes = data.set_index("method")["batch_size"]
    assert dict(sizes) == {"topk": 1, "shared-2": 2, "shared-8": 8, "static": 0}
    data.attrs["caption"] = "made up"
    ax = figures.quality_by_batch(data).subfigs[0].axes[0]
    (drawn,) = ax.containers
    x, y = drawn[0].get_data()
    assert list(x) == [1, 2, 8]
    for place, method in zip(y, ("topk", "shared-2", "shared-8"), strict=True):
        assert place == pytest.approx(values[f"{method}@0.5"].mean() - values["full"].mean())
    level = values["static@0.5"].mean() - values["full"].mean()
    assert any(np.allclose(line.get_ydata(), level) for line in ax.lines)
    # The table has nothing where a task was not asked so, and the page says where that is.
    (told,) = [x for x in (tmp_path / "tables.md").read_text().splitlines() if "Not asked" in x]
    shared = "shared-2@0.5, shared-8@0.5 on boolq, copa, piqa, wikitext_16, wikitext_256"
    assert told == f"Not asked (empty cells): magnitude@0.5 on xsum; {shared}."
    cells = next(x for x in table(rows).splitlines() if x.startswith("| piqa")).split("|")
    assert cells.count("  ") + cells.count(" ") >= 2
    report.write(several, tmp_path, {"model": "tiny"})
    assert not (tmp_path / "quality_by_batch.png").exists()


def test_a_report_says_what_is_from_older_code(several: pd.DataFrame, tmp_path: Path) -> None:
    items = several.assign(older=several["task"].map({"copa": "01234567, run 2026-11-25"}))
    report.write(items.fillna({"older": ""}), tmp_path, {"model": "tiny"})
    told = (tmp_path / "tables.md").read_text()
    (note,) = [line for line in told.splitlines() if line.startswith("†")]
    assert "code 01234567, run 2026-11-25: copa." in note
    marked = [line for line in told.splitlines() if "]†" in line]
    assert [line.partition(",")[0] for line in marked] == ["| copa", "| copa"]


@pytest.mark.parametrize("left", ["full only", "one item", "losses only", "one task"])
def test_a_report_of_little(several: pd.DataFrame, tmp_path: Path, left: str) -> None:
    few = {
        "full only": several[several["method"] == "full"],
        "one item": several[several["item"] == 0],
        "one task": several[several["task"] == "piqa"],
        "losses only": several[several["metric"].str.startswith("loss")],
    }[left]
    report.write(few, tmp_path, {"model": "tiny"})
    assert (tmp_path / "quality_by_prompt.png").exists()


@pytest.mark.parametrize("folder", [".", "2026-11-25", *LARGER])
def test_the_committed_tables_are_what_their_items_say(folder: str) -> None:
    rows = summarise(pd.read_parquet(RESULTS / folder / "items.parquet"))
    assert table(rows).strip() in (RESULTS / folder / "tables.md").read_text()


def test_the_numbers_of_the_135m_model_are_those_of_its_items() -> None:
    rows = summarise(pd.read_parquet(RESULTS / "2026-11-25" / "items.parquet"))
    found = rows.set_index(["task", "metric", "variant"])["difference"]
    prose = PROSE.read_text()
    for task, metric, variant, said in (
        ("arc_easy", "acc", "topk@0.5", "loses {} points on ARC-e"),
        ("hellaswag", "acc", "topk@0.5", "{} on HellaSwag [0.2"),
        ("cnn_dailymail", "rouge1", "topk@0.5", "{} of 19.4 points"),
        ("xsum", "rouge1", "topk@0.75", "is {}\n  [-2.5"),
    ):
        assert said.format(f"{-100 * found[task, metric, variant]:.1f}") in prose
    ratios = [np.exp(found[f"wikitext_{n}", "loss_256", "topk@0.5"]) for n in (16, 64, 256, 1024)]
    said = "{:.1f} after 16 tokens, {:.1f}\n  after 64, {:.1f} after 256, {:.1f} after 1,024"
    assert said.format(*ratios) in prose


@pytest.mark.parametrize("section", ["What follows", "Static from the same domain"])
def test_numbers_in_prose_are_those_of_the_committed_tables(section: str) -> None:
    (text,) = (part for part in PROSE.read_text().split("\n## ") if part.startswith(section))
    told = NUMBERS.findall(text)
    assert len(told) > 20
    pages = [*(ROOT / "figures").glob("*.md"), *RESULTS.glob("qwen*/[st]*.md")]
    where = [RESULTS / "sizes" / "compared.md", RESULTS / "tables.md", *pages]
    tables = "\n".join(path.read_text() for path in where)
    known = {each.removeprefix("+") for each in NUMBERS.findall(tables)}
    assert [each for each in told if each.removeprefix("+") not in known] == []


def test_the_committed_comparison_is_of_the_committed_outputs() -> None:
    outputs = collect([RESULTS, ROOT / "figures", *(RESULTS / name for name in LARGER)])
    for name, rows in (("compared", compared(outputs)), ("contrasted", contrasted(outputs))):
        found = pd.read_csv(
            RESULTS / "sizes" / f"{name}.csv", keep_default_na=False, na_values=[""]
        )
        assert list(found) == list(rows)
        assert found["metric"].tolist() == rows["metric"].tolist()
        np.testing.assert_allclose(
            found["difference"],
            rows["difference"].astype(float),
            rtol=1e-4,
            atol=1e-6,
            err_msg="run flocking compare again, as docs/results.md does",
        )
