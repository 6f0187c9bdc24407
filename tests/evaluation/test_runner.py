"""Evaluations: against the harness, a direct computation, and themselves, run again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import flocking

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from flocking.cli import app  # noqa: E402
from flocking.evaluation import figures, report, runner  # noqa: E402
from flocking.evaluation.definitions import DEFINITIONS, rouge  # noqa: E402
from flocking.evaluation.harness import GriffinLM  # noqa: E402
from flocking.evaluation.items import foretell  # noqa: E402
from flocking.evaluation.summary import by_prompt, headlines, summarise, table  # noqa: E402
from flocking.evaluation.tasks import find, quiet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

OWN = Path(__file__).parents[1] / "tasks"
CHOICES = ["hellaswag", "piqa", "copa", "arc_easy", "arc_challenge", "boolq"]
TEXT = "Starlings turn together, each following the few that are nearest. " * 3


@pytest.fixture(scope="module")
def evaluate(embedded: tuple) -> Callable[..., pd.DataFrame]:
    def run(tasks: list[str], **options: object) -> pd.DataFrame:
        options = {"data_dir": OWN, "say": lambda line: None, **options}
        return runner.evaluate(*embedded, tasks, **options)

    return run


@pytest.fixture(scope="module")
def items(evaluate: Callable) -> pd.DataFrame:
    """Two variants beside the full model on likelihoods and generated text."""
    return evaluate(
        ["piqa", "boolq", "xsum"],
        methods=["topk", "static@0.75"],
        protocol={"boolq": "last-token"},
        calibration=[TEXT],
        batch_size=2,
    )


def stock(embedded: tuple, name: str) -> dict[int, dict]:
    """What the harness's own model of transformers models gives on the same items."""
    model, tokenizer = embedded
    with quiet():
        samples = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(find([name], OWN).values()),
            bootstrap_iters=0,
            log_samples=True,
        )["samples"][name]
    return {sample["doc_id"]: sample for sample in samples}


@pytest.mark.parametrize("protocol", ["context", "last-token"])
def test_at_density_1_all_is_as_in_the_harness(
    embedded: tuple, evaluate: Callable, protocol: str
) -> None:
    found = evaluate(CHOICES, methods=["topk@1"], protocol=protocol, batch_size=4)
    for name in CHOICES:
        due = stock(embedded, name)
        for row in found[found["task"] == name].itertuples():
            assert row.value == float(due[row.item][row.metric]), (row.method, name, row.item)


def test_what_was_pruned(items: pd.DataFrame) -> None:
    rows = items.set_index(["task", "method"])
    assert (rows.loc[("boolq", "topk"), ["scored", "pruned"]] == 2).all(axis=None)
    assert (rows.loc[("boolq", "full"), "pruned"] == 0).all()
    piqa = rows.loc[("piqa", "topk")]
    assert (piqa["pruned"] == piqa["scored"] - 2).all()  # all but the first of either choice
    assert (rows.loc["xsum", ["scored", "pruned", "left_out"]] == 0).all(axis=None)


def test_chances(items: pd.DataFrame, embedded: tuple) -> None:
    chance = items.groupby("task")["chance"].first()
    assert chance["piqa"] == chance["boolq"] == 0.5
    # Of a summary: its score as one of the next article.
    model, tokenizer = embedded
    rows = items[(items["task"] == "xsum") & (items["method"] == "full")]
    documents = [json.loads(x) for x in (OWN / "xsum.jsonl").read_text().splitlines()]
    for number, document in enumerate(documents):
        ids = tokenizer(document["prompt"] + "\n", return_tensors="pt")
        length = ids.input_ids.shape[1]
        new = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, length:]
        text = tokenizer.decode(new, skip_special_tokens=True)
        text = text.partition("\n")[0].partition("###")[0]
        other = documents[(number + 1) % 2]["reference"]
        own = rows[rows["item"] == number].set_index("metric")
        assert dict(own["value"]) == pytest.approx(rouge(text, document["reference"]))
        assert dict(own["chance"]) == pytest.approx(rouge(text, other))
        assert (own["prompt_tokens"] == length).all()


def test_batches_and_repetition_change_nothing(items: pd.DataFrame, evaluate: Callable) -> None:
    again = evaluate(
        ["piqa", "boolq", "xsum"],
        methods=["topk", "static@0.75"],
        protocol={"boolq": "last-token"},
        calibration=[TEXT],
    )
    pd.testing.assert_frame_equal(again, items)


def test_last_token_is_a_direct_computation(embedded: tuple, evaluate: Callable) -> None:
    """BoolQ: the experts of all tokens but the last one that is fed, which is computed pruned."""
    model, tokenizer = embedded
    found = evaluate(["boolq"], methods=["topk"], protocol="last-token")
    twin = flocking.griffin(model)
    for row, line in enumerate((OWN / "boolq.jsonl").read_text().splitlines()):
        item = json.loads(line)
        prompt = f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:"
        no, yes = (
            float(flocking.score(twin, prompt, x, tokenizer=tokenizer, protocol="last-token").sum())
            for x in (" no", " yes")
        )
        value = found[(found["method"] == "topk") & (found["item"] == row)]["value"].item()
        assert value == ((yes > no) == item["label"])


def test_articles(embedded: tuple, evaluate: Callable, tmp_path: Path) -> None:
    """Losses of the same tokens after prompts of both lengths, held against perplexity."""
    model, tokenizer = embedded
    long = " = One = \n" + " ".join(flocking.passages()[5:7]) + "\n = Two = \n short\n"
    (tmp_path / "wikitext.txt").write_text(long)
    found = evaluate(["wikitext_16", "wikitext_256"], methods=["topk"], data_dir=tmp_path)
    ids = tokenizer(long, verbose=False)["input_ids"][:1280]
    for subject, method in ((model, "full"), (flocking.griffin(model), "topk")):
        for length in (16, 256):
            rows = found[(found["method"] == method) & (found["prompt_tokens"] == length)]
            due = flocking.perplexity(
                subject,
                [ids[1024 - length :]],
                prompt_length=length,
                continuation_length=256,
                tokenizer=tokenizer,
                progress=False,
            ).log_likelihood
            got = rows.set_index("metric")["value"]
            assert got["loss_256"] == pytest.approx(-float(due.mean()))
            assert got["loss_64"] == pytest.approx(-float(due[0, :64].mean()))
            assert rows["chance"].isna().all()
    (tmp_path / "wikitext.txt").write_text(" = One = \n short\n")
    with pytest.raises(ValueError, match="no article has 1280 tokens"):
        evaluate(["wikitext_16"], data_dir=tmp_path)


def test_goes_on_where_it_was(
    evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"methods": ["random"], "limit": {"piqa": 2}, "kept": tmp_path, "identity": "one"}
    ran: list[str] = []
    run = runner._Cell.run

    def interrupted(cell: runner._Cell, *args: object) -> pd.DataFrame:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(f"{cell.variant} {cell.name}")
        return run(cell, *args)

    monkeypatch.setattr(runner._Cell, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(["piqa", "boolq"], **options)
    assert ran == ["full piqa", "full boolq"]
    kept = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert kept == ["boolq-full", "piqa-full"]
    monkeypatch.setattr(runner._Cell, "run", run)
    lines: list[str] = []
    first = evaluate(["piqa", "boolq"], **options, say=lines.append)
    assert lines[0] == "2 of 4 cells are there already."
    assert lines[-1].startswith("[4/4] random@0.5 on boolq: acc ")
    lines.clear()
    pd.testing.assert_frame_equal(evaluate(["piqa", "boolq"], **options, say=lines.append), first)
    assert lines == ["4 of 4 cells are there already."]
    # What numbers depend on makes other cells of them; the full model draws nothing from a seed.
    for changed in ({"identity": "two"}, {"seed": 1}, {"limit": {"piqa": 1}}):
        lines.clear()
        evaluate(["piqa", "boolq"], **{**options, **changed}, say=lines.append)
        assert "4 of 4" not in lines[0]
        lines.clear()  # and destroys none
        evaluate(["piqa", "boolq"], **options, say=lines.append)
        assert lines == ["4 of 4 cells are there already."]
    for path in tmp_path.glob("piqa-full-*"):
        path.write_text("mine")
    with pytest.raises(ValueError, match=r"piqa-full-\w+\.json is no cell of an evaluation"):
        evaluate(["piqa"], **options)


def test_what_is_asked_is_known_again_by_another_process() -> None:
    """Functions in a task's definition have other addresses there."""
    code = (
        "from pathlib import Path; from flocking.evaluation import runner, tasks;"
        f"found = tasks.find([*tasks.DEFINITIONS], Path({str(OWN)!r}));"
        "print(*(runner._digest(task, 'context', 2) for task in found.values()))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    assert len(set(first.stdout.split())) == len(DEFINITIONS)


def test_items_that_are_shown_are_asked_about_too(tmp_path: Path) -> None:
    lines = (OWN / "gsm8k.jsonl").read_text().splitlines()

    def digest() -> str:
        (tmp_path / "gsm8k.jsonl").write_text("\n".join(lines))
        return runner._digest(find(["gsm8k"], tmp_path)["gsm8k"], "context", 1)

    first = digest()
    lines[-1] = lines[-1].replace("pens", "cups")
    assert digest() != first


def test_every_prompt_opens_as_the_tokenizer_has_it(
    embedded: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is cut out of an article, and the same tokens are foretold."""
    model, tokenizer = embedded
    (tmp_path / "wikitext.txt").write_text(" = One = \n" + " ".join(flocking.passages()[5:7]))

    class Opening:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> dict:
            ids = tokenizer(text, **options)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    rows = []
    monkeypatch.setattr(
        "flocking.evaluation.items.perplexity",
        lambda model, ids, **options: rows.append(ids[0]) or 1 / 0,
    )
    lm = SimpleNamespace(tokenizer=Opening(), model=model, max_length=8192)
    for articles in find(["wikitext_16", "wikitext_1024"], tmp_path).values():
        with pytest.raises(ZeroDivisionError):
            foretell(lm, articles, None)
    short, long = rows
    assert (len(short), len(long)) == (16 + 256, 1024 + 256)
    assert short[0] == long[0] == 1
    assert short[1:] == long[-271:]
    lm.max_length = 512
    with pytest.raises(ValueError, match="wikitext_1024 needs 1280 tokens, and the model's c"):
        foretell(lm, articles, None)


def test_only_likelihoods_have_a_protocol(evaluate: Callable) -> None:
    found = evaluate(["piqa", "qasper"], methods=[], protocol="last-token", limit=1)
    protocols = found.drop_duplicates("task").set_index("task")["protocol"]
    assert dict(protocols) == {"piqa": "last-token", "qasper": "context"}


def test_an_item_without_a_prompt_is_named(embedded: tuple, tmp_path: Path) -> None:
    item = {"passage": "", "question": "", "label": True}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(item) + "\n")
    task = find(["boolq"], tmp_path)
    for one in task.values():
        one.set_config(key="doc_to_text", value=lambda doc: "")
    with pytest.raises(ValueError, match=r"boolq, item 0: protocol='last-token' needs a token"):
        runner._Cell("boolq", task["boolq"], runner.FULL, "last-token", 1, "", None).run(
            GriffinLM(embedded[0], tokenizer=embedded[1], method="full"), print
        )


def test_says_what_is_too_long(embedded: tuple, tmp_path: Path) -> None:
    model, tokenizer = embedded
    lines: list[str] = []
    item = {"passage": "The bird sings. " * 4000, "question": "does it sing", "label": True}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(item) + "\n")
    found = runner.evaluate(
        model, tokenizer, ["boolq"], methods=[], data_dir=tmp_path, say=lines.append
    )
    assert lines[0] == "boolq: 1 of 1 items are too long, and lost their beginning."
    assert found["left_out"].item() > 0
    assert found["prompt_tokens"].item() == model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"methods": ["best"]}, "there is no method 'best': choose from full, topk"),
        ({"methods": ["topk@2"]}, "'topk@2': give a density"),
        ({"methods": ["topk@half"]}, "'topk@half': give a density"),
        ({"protocol": "last"}, "protocol='last'"),
        ({"limit": 0}, "limit=0"),
        ({"limit": {"hella": 2}}, "hella has a limit or protocol and is none of the tasks"),
        ({"kept": "cells"}, "kept needs identity"),
        ({"calibration": "nowhere.txt"}, r"calibration: nowhere.txt does not exist"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refuses(evaluate: Callable, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate(["piqa"], **options)


# ----------------------------------------------------------------------------------------
# Summaries and figures


def made_up(values: dict[str, np.ndarray], task: str = "piqa", **columns: object) -> pd.DataFrame:
    """Items of variants such as ``topk@0.5``."""
    parts = []
    for variant, own in values.items():
        method, _, density = variant.partition("@")
        parts.append(
            pd.DataFrame(
                {
                    "task": task,
                    "protocol": "context",
                    "method": method,
                    "density": float(density or 1),
                    "metric": "acc",
                    "item": range(len(own)),
                    "value": own,
                    "chance": 0.5,
                    "prompt_tokens": np.arange(len(own)) + 10,
                    "left_out": 0,
                    "scored": 4,
                    "pruned": 0 if method == "full" else 3,
                    **columns,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


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
    assert got.difference_low == pytest.approx(low, abs=5e-4)
    assert got.difference_high == pytest.approx(high, abs=5e-4)
    assert got.high - got.low > 20 * (got.difference_high - got.difference_low)
    assert got.pruned_share == 0.75
    assert (rows.loc["full", ["difference", "difference_low", "difference_high"]] == 0).all()


def test_summary_against_another_variant() -> None:
    values = {"full": np.ones(6), "topk@0.5": np.zeros(6), "static@0.5": np.arange(6) % 2.0}
    rows = summarise(made_up(values), against="static@0.5").set_index("variant")
    assert rows.loc["topk@0.5", "difference"] == -0.5
    with pytest.raises(ValueError, match=r"no 'best': choose from"):
        summarise(made_up(values), against="best")
    unknown = made_up(values | {"full": np.array([1, np.nan, 1, 1, 1, 1])})
    with pytest.raises(ValueError, match="piqa: acc is not a number for some items"):
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


def test_headlines_are_the_longest_whatever_the_order(several: pd.DataFrame) -> None:
    backwards = headlines(summarise(several.iloc[::-1]))
    assert set(backwards["task"]) == {"piqa", "boolq", "copa", "wikitext_256"}
    assert set(backwards["metric"]) == {"acc", "loss_256"}


def test_by_prompt_groups_items_of_like_length() -> None:
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


@pytest.fixture(scope="module")
def several() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    variants = ("full", "topk@0.25", "topk@0.5", "static@0.5", "magnitude@0.5")
    tasks = [
        made_up({v: (rng.random(30) < 0.6) * 1.0 for v in variants}, task)
        for task in ("piqa", "boolq", "copa")
    ]
    losses = [
        made_up(
            {v: 3 + rng.random(12) for v in variants},
            f"wikitext_{length}",
            metric=f"loss_{horizon}",
            prompt_tokens=length,
            chance=np.nan,
        )
        for length in (16, 256)
        for horizon in (64, 256)
    ]
    return pd.concat(tasks + losses, ignore_index=True)


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
    due = here[(here["task"] == "piqa") & (here["method"] == "static")]["difference"].item()
    assert points["static: calibration texts"].get_xdata() == pytest.approx([due])
    assert [label.get_text() for label in axes[1].get_yticklabels()] == [
        "wikitext_256\nperplexity of 256, n = 12"
    ]

    prompts = headlines(by_prompt(several))
    prompts.attrs["caption"] = "made up"
    axes = figures.quality_by_prompt(prompts).subfigs[0].axes
    assert (axes[3].get_title(), axes[3].get_ylabel()) == ("wikitext", "perplexity of 256")


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
    assert "## GRIFFIN against the other methods at density 0.5" in told
    assert table(summarise(several)).strip() in told


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


def test_the_committed_results_are_what_their_items_say() -> None:
    """Tables beside the data, and the numbers that docs/results.md takes from them."""
    folder = OWN.parents[1] / "docs" / "results"
    rows = summarise(pd.read_parquet(folder / "items.parquet"))
    assert table(rows).strip() in (folder / "tables.md").read_text()
    found = rows.set_index(["task", "metric", "variant"])["difference"]
    prose = (folder.parent / "results.md").read_text()
    for task, metric, variant, said in (
        ("arc_easy", "acc", "topk@0.5", "loses {} points on ARC-e"),
        ("hellaswag", "acc", "topk@0.5", "{} on HellaSwag [0.2"),
        ("cnn_dailymail", "rouge1", "topk@0.5", "{} of 19.4 points"),
        ("xsum", "rouge1", "topk@0.75", "and {}\n  [-2.5"),
    ):
        assert said.format(f"{-100 * found[task, metric, variant]:.1f}") in prose
    ratios = [np.exp(found[f"wikitext_{n}", "loss_256", "topk@0.5"]) for n in (16, 64, 256, 1024)]
    said = "{:.1f} after 16 tokens, {:.1f}\n  after 64, {:.1f} after 256, {:.1f} after 1,024"
    assert said.format(*ratios) in prose


# ----------------------------------------------------------------------------------------
# The command


def test_command(embedded: tuple, tmp_path: Path) -> None:
    arguments = ["evaluate", "--tasks", "piqa,boolq", "--methods", "topk,magnitude@0.75"]
    arguments += ["--protocol", "boolq=last-token", "--limit", "2,boolq=1"]
    arguments += ["--data-dir", str(OWN), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert items.groupby("task")["item"].nunique().to_dict() == {"piqa": 2, "boolq": 1}
    assert set(items["protocol"]) == {"context", "last-token"}
    assert "| boolq, last-token, acc | 1 |" in (tmp_path / "tables.md").read_text()
    again = CliRunner().invoke(app, arguments)
    assert "6 of 6 cells are there already." in again.output


def test_command_interrupted(
    embedded: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", interrupted)
    result = CliRunner().invoke(app, ["evaluate", "--tasks", "piqa", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "cells has what is finished; the same command goes on" in result.output
    assert list(tmp_path.iterdir()) == []


def test_command_refuses(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        common = ["evaluate", "--tasks", "piqa", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, [*common, *arguments])
        assert result.exit_code == 2, result.output
        return result.output

    assert "there is no method 'best'" in said("--methods", "best")
    assert "--limit: 'few' is no number" in said("--limit", "few")
    assert "--limit 1,2: give one for all" in said("--limit", "1,2")
    assert "--densities: 'half' is no number" in said("--densities", "half")
    assert "--batch-size 0" in said("--batch-size", "0")
    assert "densities [2.0]: give a density" in said("--densities", "2")
    (tmp_path / "file").write_text("mine")
    assert "file is a file: name a folder" in said("--out", str(tmp_path / "file"))
    (tmp_path / "summary.csv").write_text("mine")
    assert "summary.csv exists and is no report of flocking" in said()
    assert (tmp_path / "summary.csv").read_text() == "mine"
