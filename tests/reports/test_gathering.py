"""Outputs are found, read and put together by model; what cannot be is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import model_outputs as made
import numpy as np
import pandas as pd
import pytest

from flocking.evaluation import sources
from flocking.reports import Outputs, collect, compared

REPOSITORY = Path(__file__).parents[2]


def shown(outputs: Outputs) -> list[tuple[str, int, list[str]]]:
    return [(one.label, len(one.evaluations), list(one.figures)) for one in outputs.models]


def test_outputs_are_put_together_by_model(folders: list[Path]) -> None:
    found = collect(reversed(folders))
    everything = ["scores", "sequence_overlap", "token_order", "loss_by_method"]
    assert shown(found) == [("small-model", 1, everything), ("large-model", 1, ["scores"])]
    assert [one.parameters for one in found.models] == [1_000_000, 9_000_000]
    assert shown(collect([*folders, *folders])) == shown(found)  # each folder once


def test_a_folder_of_folders_is_read_only_if_it_holds_nothing_itself(folders: list[Path]) -> None:
    small, large, _ = folders
    assert shown(collect(small.parent)) == shown(collect([small, large]))
    assert shown(collect(large)) == [("large-model", 1, [])]  # without its folder of figures
    (large / "items.parquet").rename(large / "other.parquet")
    assert shown(collect(large)) == [("large-model", 0, ["scores"])]
    (large / "figures").rename(large / ".figures")
    with pytest.raises(ValueError, match="large holds nothing that is compared"):
        collect(large)


def test_a_model_is_known_by_its_files_and_dtype(tmp_path: Path) -> None:
    one = made.evaluated(tmp_path / "one", "m", 10, made.items_of(1)[lambda x: x["task"] == "piqa"])
    two = made.evaluated(tmp_path / "two", "m", 10, made.items_of(1)[lambda x: x["task"] != "piqa"])
    (model,) = collect([one, two]).models
    assert [each.folder for each in model.evaluations] == [one, two]
    half = made.evaluated(tmp_path / "half", "m", 10, dtype="bfloat16")
    assert [each.label for each in collect([one, half]).models] == ["m, float32", "m, bfloat16"]
    other = made.evaluated(tmp_path / "other", "m", 30, identity="another")
    assert [each.label for each in collect([one, other]).models] == ["m (one)", "m (other)"]
    deep = made.evaluated(tmp_path / "deep" / "one", "m", 30, identity="another")
    labels = [each.label for each in collect([one, deep]).models]
    assert labels == [f"m ({one})", f"m ({deep})"]


def test_models_of_one_name_in_a_folder_of_folders_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made.evaluated(tmp_path / name, "m", 10, identity=name)
    assert [each.label for each in collect(tmp_path).models] == ["m (one)", "m (two)"]


def test_what_was_begun_and_not_finished_is_named(tmp_path: Path) -> None:
    made.evaluated(tmp_path / "one", "m", 10)
    (tmp_path / "two" / "cells").mkdir(parents=True)
    with pytest.warns(UserWarning, match="two: an evaluation was begun and not finished there"):
        found = collect(tmp_path)
    assert [each.label for each in found.models] == ["m"]
    with pytest.raises(ValueError, match="two: an evaluation was begun and not finished there"):
        collect(tmp_path / "two")


def test_documents_are_held_against_the_first_that_says_which_they_are(tmp_path: Path) -> None:
    """Not only against the first output, which may be of a version that did not say it."""
    old = made.evaluated(tmp_path / "old", "old", 5)
    (old / "source.json").unlink()
    (old / "tables.md").write_text("(model old; dtype float32; device cpu)\n")
    one = made.evaluated(tmp_path / "one", "one", 10)
    two = made.evaluated(tmp_path / "two", "two", 20)
    other_documents(two)
    with pytest.raises(ValueError, match=r"one and .*two were not asked the same"):
        collect([old, one, two])


def test_figures_go_with_the_model_of_their_name_and_folder(tmp_path: Path) -> None:
    one = made.evaluated(tmp_path / "one", "m", 10)
    two = made.evaluated(tmp_path / "two", "m", 20, identity="another")
    made.drawn(two, "m", "scores")
    labels = [(label, figures) for label, _, figures in shown(collect([one, two]))]
    assert labels == [("m (one)", []), ("m (two)", ["scores"])]
    alone = made.drawn(tmp_path / "alone", "m", "sequence_overlap")
    told = f"{alone}/sequence_overlap.json is of a model named m, and so are {one} and {two}"
    with pytest.raises(ValueError, match=re.escape(told)):
        collect([one, two, alone])
    assert shown(collect([one, alone])) == [("m", 1, ["sequence_overlap"])]
    said = made.drawn(tmp_path / "said", "m", "sequence_overlap", identity="another")
    figures = [figures for _, _, figures in shown(collect([one, two, said]))]
    assert figures == [[], ["scores", "sequence_overlap"]]


def test_the_size_may_be_said_by_a_figure(tmp_path: Path) -> None:
    folder = made.drawn(tmp_path, "m", "scores", parameters=77)
    assert collect(folder).models[0].parameters == 77


def test_outputs_of_earlier_versions_are_read(tmp_path: Path) -> None:
    made.items_of(1).drop(columns="older").to_parquet(tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"no source\.json, nor a tables\.md that names the model"):
        collect(tmp_path)
    told = "(model old; dtype float32; device cpu; seed 3; flocking 0.1.0; torch 2.13.0+cpu)"
    (tmp_path / "tables.md").write_text(f"# old: tasks, methods and densities\n\n{told}\n")
    (model,) = collect(tmp_path).models
    source = model.evaluations[0].source
    assert (model.label, model.parameters, source.seed, source.dtype) == ("old", None, 3, "float32")
    assert source.versions == {"flocking": "0.1.0", "torch": "2.13.0+cpu"}
    assert not model.evaluations[0].complete
    made.drawn(tmp_path, "old", "scores", parameters=5)
    assert collect(tmp_path).models[0].parameters == 5


def test_a_source_may_say_nothing_but_the_name(tmp_path: Path) -> None:
    folder = made.evaluated(tmp_path, "m", 10)
    (folder / "source.json").write_text(sources.written({"model": "mine"}))
    (model,) = collect(folder).models
    assert (model.label, model.parameters, model.evaluations[0].complete) == ("mine", None, False)


def test_the_committed_outputs_are_read() -> None:
    (model,) = collect([REPOSITORY / "docs/results", REPOSITORY / "figures"]).models
    assert model.label == "SmolLM2-135M-Instruct"
    assert len(model.figures) == 4


# --------------------------------------------------------------------------------------
# What differs


def test_what_differs_is_named(folders: list[Path]) -> None:
    found = collect(folders)
    (torch,) = found.differences
    assert str(torch) == (
        "Outputs differ in torch: 2.13.0 of small-model; 2.13.0 and 2.14.0 of large-model."
    )
    assert torch.others() == found.marked() == ["large-model"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"seed": 5}, "seed: 0 of one; 5 of two"),
        ({"dtype": "bfloat16"}, "dtype: float32 of one; bfloat16 of two"),
        ({"calibration": "the same texts, elsewhere"}, None),
        ({"device": "cuda"}, "device: cpu of one; cuda of two"),
        ({"code": "a" * 64}, "code of the evaluation: eeeeeeee of one; aaaaaaaa of two"),
        ({"calibration_digest": "d" * 64}, "calibration texts (by digest): cccccccc of one; d"),
        ({"versions": {**made.VERSIONS, "lm-eval": "0.5"}}, "lm-eval: 0.4.13 of one; 0.5 of two"),
        ({"versions": {}, "seed": None, "code": ""}, None),  # what is not said does not differ
    ],
)
def test_settings_that_differ(tmp_path: Path, more: dict, told: str | None) -> None:
    one = made.evaluated(tmp_path / "one", "one", 10)
    two = made.evaluated(tmp_path / "two", "two", 20, **more)
    said = [str(each) for each in collect([one, two]).differences]
    assert len(said) == (told is not None)
    assert told is None or said[0].startswith(f"Outputs differ in {told}")


def test_older_code_differs(tmp_path: Path) -> None:
    one = made.evaluated(tmp_path / "one", "one", 10)
    items = made.items_of(3).assign(older="01234567, run 2026-11-25")
    two = made.evaluated(tmp_path / "two", "two", 20, items)
    (code,) = collect([one, two]).differences
    assert "eeeeeeee and older (01234567, run 2026-11-25) of two" in str(code)


def test_fewer_items_of_the_same_documents_are_compared_on_those(tmp_path: Path) -> None:
    """As of a larger model, which was asked fewer; and it is said."""
    few = made.items_of(3, items=12)
    one = made.evaluated(tmp_path / "one", "one", 10)
    two = made.evaluated(tmp_path / "two", "two", 20, few)
    outputs = collect([one, two])
    told = [str(each) for each in outputs.differences if each.what.startswith("items of wiki")]
    assert "Outputs differ in items of wikitext_16 (12 are compared): 16 of one; 12 of two." in told
    rows = compared(outputs)
    assert set(rows.loc[rows["task"] == "wikitext_16", "items"]) == {12}
    whole = made.items_of(10)
    kept = whole[(whole["task"] == "piqa") | (whole["item"] < 12)]
    cut = made.evaluated(tmp_path / "cut", "one", 10, kept)
    alone = compared(collect([cut, two]))
    keys = ["model", "task", "metric", "method", "density"]
    got, expected = (
        table.set_index(keys)[["estimate", "difference"]].sort_index() for table in (rows, alone)
    )
    np.testing.assert_allclose(got, expected)


def test_items_that_each_model_skipped_are_left_out_of_both(tmp_path: Path) -> None:
    """As where prompts are too long, which of them depends on the tokenizer."""
    items = made.items_of(3)
    one, two, three = (
        made.evaluated(
            tmp_path / name, name, 10, items[(items["item"] != gap) | (items["task"] != "piqa")]
        )
        for name, gap in (("one", 1), ("two", 0), ("three", 5))
    )
    outputs = collect([one, two, three])
    told = [str(each) for each in outputs.differences]
    assert "items of piqa (27 are compared): 29 of one, two, three." in told[0]
    rows = compared(outputs)
    assert set(rows.loc[rows["task"] == "piqa", "items"]) == {27}


def test_items_that_no_three_models_share_are_refused(tmp_path: Path) -> None:
    items = made.items_of(3)
    folders = [
        made.evaluated(
            tmp_path / name,
            name,
            10,
            items[items["item"].between(*part) | (items["task"] != "piqa")],
        )
        for name, part in (("one", (0, 29)), ("two", (0, 9)), ("three", (10, 29)))
    ]
    with pytest.raises(ValueError, match="no item of piqa was asked of all of one, two, three"):
        collect(folders)


# --------------------------------------------------------------------------------------
# What is refused


def other_items(folder: Path) -> None:
    items = made.items_of(3)
    made.evaluated(folder, "two", 20, items.assign(item=items["item"] + 30))


def other_protocol(folder: Path) -> None:
    made.evaluated(folder, "two", 20, made.items_of(3).assign(protocol="last-token"))


def other_documents(folder: Path) -> None:
    items = made.items_of(3)
    tasks = made.source_of(items, "two", 20)["tasks"]
    tasks["piqa"]["digest"] = "of other documents"
    versions = {**made.VERSIONS, "lm-eval": "0.5"}
    made.evaluated(folder, "two", 20, items, tasks=tasks, versions=versions)


def contradiction(folder: Path) -> None:
    made.evaluated(folder, "one", 10, made.items_of(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_items, "same items of piqa (30 and 30): evaluate both with the same --limit"),
        (other_protocol, "asked piqa with unlike protocols (context; last-token): evaluate both"),
        (other_documents, "not asked the same piqa (its definition or documents differ; "),
        (other_documents, "lm-eval 0.4.13 and 0.5): evaluate both with the same documents"),
        (contradiction, "are of one model and have different values of full on piqa, acc: leave"),
    ],
)
def test_evaluations_that_do_not_fit_together(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    one = made.evaluated(tmp_path / "one", "one", 10)
    make(tmp_path / "two")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        collect([one, tmp_path / "two"])
    assert str(caught.value).startswith(f"{one} and {tmp_path / 'two'} ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"texts": ["a", "b"]}, "differ in the texts (code, essay, log; a, b): run flocking fig"),
        ({"tokens": 33}, "differ in tokens of a text (65; 33): run flocking figures --only"),
        ({"density": 0.25}, "differ in density (0.5; 0.25)"),
        ({"prompt": 17}, "differ in tokens of the prompt (33; 17)"),
    ],
)
def test_figures_that_do_not_fit_together(tmp_path: Path, more: dict, message: str) -> None:
    one = made.drawn(tmp_path / "one", "one", "loss_by_method")
    two = tmp_path / "two"
    two.mkdir()
    data = made.figure_data("two", "loss_by_method").assign_attrs(more)
    key = made.Key("f" * 64, "i" * 64, {})
    (two / "loss_by_method.json").write_text(made.to_json(data, key))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        collect([one, two])
    places = [folder / "loss_by_method.json" for folder in (one, two)]
    assert str(caught.value).startswith(f"{places[0]} and {places[1]} differ")


def test_figures_of_one_model_that_contradict_each_other(tmp_path: Path) -> None:
    one = made.drawn(tmp_path / "one", "m", "scores")
    same = made.drawn(tmp_path / "same", "m", "scores")
    other = made.drawn(tmp_path / "other", "m", "scores", seed=1)
    assert shown(collect([one, same])) == [("m", 0, ["scores"])]
    with pytest.raises(ValueError, match="are of one model and have different numbers: leave one"):
        collect([one, other])


@pytest.mark.parametrize(
    ("more", "message"),
    [({"layers": 4}, "(4 and 2 FF blocks)"), ({"d_ff": [8, 9]}, "(8, 9 and 8 neurons in a block)")],
)
def test_two_models_of_one_name(tmp_path: Path, more: dict, message: str) -> None:
    folder = made.evaluated(tmp_path, "m", 10, **more)
    made.drawn(folder, "m", "scores")
    with pytest.raises(ValueError, match=re.escape(f"are of two models named m {message}")):
        collect(folder)


def broken_items(folder: Path) -> None:
    (folder / "items.parquet").write_bytes(b"PAR1 no")


def foreign_items(folder: Path) -> None:
    pd.DataFrame({"task": ["piqa"]}).to_parquet(folder / "items.parquet")


def no_items(folder: Path) -> None:
    made.items_of(1).iloc[:0].to_parquet(folder / "items.parquet")


def broken_source(folder: Path) -> None:
    (folder / "source.json").write_text("{")


def later_source(folder: Path) -> None:
    made.changed(folder / "source.json", format=sources.FORMAT + 1)


def other_source(folder: Path) -> None:
    tasks = made.source_of(made.items_of(1), "small-model", 1)["tasks"]
    made.changed(folder / "source.json", tasks={"boolq": tasks["piqa"]})


def broken_figure(folder: Path) -> None:
    (folder / "scores.json").write_text("{")


def edited_figure(folder: Path) -> None:
    made.changed(folder / "scores.json", attrs={"model": "another"})


def figure_of_another_form(folder: Path) -> None:
    data = made.figure_data("small-model", "scores").isel(weights=0, drop=True)
    (folder / "scores.json").write_text(made.to_json(data, made.Key("f" * 64, "i" * 64, {})))


def other_figure(folder: Path) -> None:
    (folder / "scores.json").write_text((folder / "sequence_overlap.json").read_text())


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (broken_items, "items.parquet", "cannot be read ("),
        (foreign_items, "items.parquet", "has no column 'protocol', so that it is not of flocking"),
        (no_items, "items.parquet", "has no rows"),
        (broken_source, "source.json", "cannot be read as what flocking evaluate writes"),
        (later_source, "source.json", "has format 2, and this version of flocking reads 1"),
        (other_source, "items.parquet", "do not belong together (piqa has 30 items in the first"),
        (broken_figure, "scores.json", "cannot be read ("),
        (edited_figure, "scores.json", "was changed after it was written: run flocking figures"),
        (figure_of_another_form, "scores.json", "of this figure (flocking_score has other dim"),
        (
            other_figure,
            "scores.json",
            "not have the numbers of this figure (no flocking_score)",
        ),
    ],
)
def test_files_that_cannot_be_read_are_named(
    folders: list[Path], spoil: Callable[[Path], None], name: str, message: str
) -> None:
    spoil(folders[0])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        collect(folders)
    assert str(folders[0] / name) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nowhere does not exist: name a folder that flocking"):
        collect(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="file is a file: name a folder that flocking"):
        collect(tmp_path / "file")
    with pytest.raises(ValueError, match="empty holds nothing that is compared, and neither do"):
        collect(tmp_path / "empty")
    with pytest.raises(ValueError, match="no outputs are named"):
        collect([])
