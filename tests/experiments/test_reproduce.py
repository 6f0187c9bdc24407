"""Figures as files: run when something that they depend on changed, and checked without a run."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import flocking
from flocking import artifacts
from flocking.cli import app
from flocking.experiments import activations, reproduce
from flocking.experiments.comparing import changes
from flocking.experiments.reproduce import EXPERIMENTS


@pytest.fixture(scope="module")
def made(subject: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    reproduce.regenerate(
        out, lambda: subject[:2], "tiny", subject[2], only=["scores", "text_kinds"]
    )
    return out


def test_figures_come_with_their_numbers(made: Path) -> None:
    names = sorted(path.name for path in made.iterdir())
    stems = ("scores", "text_kinds")
    assert names == [
        f"{stem}{suffix}" for stem in stems for suffix in (".json", ".md", ".png", ".svg")
    ]
    content = json.loads((made / "scores.json").read_text())
    wanted = {"model", "revision", "texts", "seed", "torch_version", "flocking_version", "caption"}
    assert wanted <= content["attrs"].keys()


def test_a_redraw_needs_no_model(made: Path, subject: tuple) -> None:
    before = {path.name: path.read_bytes() for path in made.glob("*.[pj]*")}
    said = []

    def load() -> tuple:
        raise AssertionError("the model was loaded")

    arguments = (made, load, "tiny", subject[2])
    reproduce.regenerate(*arguments, only=["scores", "text_kinds"], say=said.append)
    assert "redrawing" in said[0]
    # (An SVG's ids of clip paths come from memory addresses, and differ from time to time.)
    assert {path.name: path.read_bytes() for path in made.glob("*.[pj]*")} == before
    for changed in ({"seed": 1}, {"texts": subject[2][:3]}, {"identity": "other"}):
        inputs = {"identity": "tiny", "texts": subject[2], "seed": 0, "only": ["scores"], **changed}
        with pytest.raises(AssertionError, match="the model was loaded"):
            reproduce.regenerate(made, load, **inputs)


def test_old_numbers_are_drawn_again_without_a_model(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old: what computes numbers is in their key, and what draws them is not."""
    copied(made, tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text())
    content["key"] = {"code": "older", "inputs": "other", "versions": {}}
    (tmp_path / "scores.json").write_text(json.dumps(content))
    for suffix in (".png", ".svg", ".md"):
        (tmp_path / f"scores{suffix}").unlink()
    drawn: list[str] = []
    draw = reproduce.FIGURES["scores"]
    monkeypatch.setitem(
        reproduce.FIGURES, "scores", lambda data: drawn.append(data.attrs["model"]) or draw(data)
    )
    monkeypatch.setattr("flocking.cli.commands.load", None)  # no model
    result = CliRunner().invoke(app, ["figures", "--redraw", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(drawn) == 1
    assert json.loads((tmp_path / "scores.json").read_text()) == content
    for suffix in (".png", ".md"):
        assert (tmp_path / f"scores{suffix}").read_bytes() == (
            made / f"scores{suffix}"
        ).read_bytes()


def test_drawing_is_no_part_of_a_key() -> None:
    for module in {run.__module__ for run in EXPERIMENTS.values()}:
        rooms = {path.parent.name for path in artifacts.sources(module)}
        assert not rooms & {"drawing", "plotting"}
        names = {path.name for path in artifacts.sources(module)}
        assert not names & {"figures.py", "loss_figures.py", "reproduce.py"}


def test_numbers_that_are_not_there_or_were_changed_are_not_drawn(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has no numbers of figures"):
        reproduce.redraw(tmp_path)
    with pytest.raises(ValueError, match=r"scores\.json cannot be read"):
        reproduce.redraw(tmp_path, only=["scores"])
    with pytest.raises(ValueError, match="there is no figure 'score': choose from"):
        reproduce.redraw(tmp_path, only=["score"])
    copied(made, tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text())
    content["data_vars"]["flocking_score"]["data"][0][0][0] += 0.1
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"scores\.json was changed after it was written"):
        reproduce.redraw(tmp_path, only=["scores"])
    result = CliRunner().invoke(app, ["figures", "--redraw", "--check"])
    assert (result.exit_code, "give one of the two" in result.output) == (2, True)


def test_notes_beside_a_figure_stay(made: Path, tmp_path: Path) -> None:
    copied(made, tmp_path)
    (tmp_path / "scores.md").write_text("# my notes")
    with pytest.raises(ValueError, match=r"scores\.md exists and is not a figure of flocking"):
        reproduce.redraw(tmp_path, only=["scores"])
    assert (tmp_path / "scores.md").read_text() == "# my notes"


def test_nothing_foreign_is_replaced(tmp_path: Path, subject: tuple) -> None:
    (tmp_path / "scores.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not a figure of flocking"):
        reproduce.regenerate(tmp_path, lambda: subject[:2], "tiny", subject[2], only=["scores"])
    with pytest.raises(ValueError, match="there is no figure 'score': choose from heatmaps"):
        reproduce.regenerate(tmp_path, lambda: subject[:2], "tiny", subject[2], only=["score"])
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]


def copied(made: Path, tmp_path: Path) -> Path:
    for name in ("scores", "text_kinds"):
        for suffix in (".json", ".md", ".png", ".svg"):
            (tmp_path / f"{name}{suffix}").write_bytes((made / f"{name}{suffix}").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("there", "broken"),
    [
        ([".png"], None),
        ([".png", ".svg"], None),
        ([".json"], None),
        ([".json", ".png"], None),
        ([".json", ".png", ".svg"], ".png"),
        ([".png"], ".png"),
    ],
)
def test_a_figure_out_of_step_is_made_whole(
    made: Path, subject: tuple, tmp_path: Path, there: list[str], broken: str | None
) -> None:
    """As a kill between its three files leaves it: from the numbers, or run again."""
    for suffix in there:
        content = (made / f"scores{suffix}").read_bytes()
        (tmp_path / f"scores{suffix}").write_bytes(content if suffix != broken else b"")
    said: list[str] = []
    loaded: list[tuple] = []

    def load() -> tuple:
        loaded.append(subject[:2])
        return subject[:2]

    ran = EXPERIMENTS["scores"]
    with pytest.MonkeyPatch.context() as patch:
        data = artifacts.from_json((made / "scores.json").read_text())
        patch.setitem(EXPERIMENTS, "scores", functools.wraps(ran)(lambda *a, **k: data))
        arguments = (tmp_path, load, "tiny", subject[2])
        reproduce.regenerate(*arguments, only=["scores"], say=said.append)
    assert bool(loaded) == (".json" not in there)
    for suffix in (".json", ".png"):
        assert (tmp_path / f"scores{suffix}").read_bytes() == (
            made / f"scores{suffix}"
        ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"scores{suffix}" for suffix in (".json", ".md", ".png", ".svg")
    ]


def test_numbers_are_kept_if_they_cannot_be_drawn(
    made: Path, subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = artifacts.from_json((made / "scores.json").read_text())
    ran, draw = EXPERIMENTS["scores"], reproduce.FIGURES["scores"]
    monkeypatch.setitem(EXPERIMENTS, "scores", functools.wraps(ran)(lambda *a, **k: data))

    def interrupted(data: xr.Dataset) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(reproduce.FIGURES, "scores", interrupted)
    arguments = {"identity": "tiny", "texts": subject[2], "only": ["scores"]}
    with pytest.raises(KeyboardInterrupt):
        reproduce.regenerate(tmp_path, lambda: subject[:2], **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    monkeypatch.setitem(reproduce.FIGURES, "scores", draw)
    reproduce.regenerate(tmp_path, lambda: pytest.fail("it was computed again"), **arguments)
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.parametrize("name", ["heatmaps", "text_kinds", "atlas"])
def test_names_of_texts_are_no_formulas(name: str, tmp_path: Path) -> None:
    committed = Path(__file__).parents[2] / "figures" / f"{name}.json"
    data = artifacts.from_json(committed.read_text("utf-8"))
    for dim in {"sequence", "text", "kind", "other"} & {*data.dims}:
        data = data.assign_coords({dim: [f"price_$_{n}_{{$^^" for n in range(data.sizes[dim])]})
    figure = reproduce.FIGURES[name](data)
    figure.savefig(tmp_path / "drawn.png")
    plt.close(figure)


@pytest.mark.parametrize("times", [0.02, 1, 50])
def test_chance_is_in_the_picture(times: float) -> None:
    committed = Path(__file__).parents[2] / "figures" / "loss_by_prompt.json"
    data = artifacts.from_json(committed.read_text("utf-8"))
    random = data.relative.sel(selection="random") * times
    data["relative"] = data.relative.where(data.selection != "random", random)
    figure = reproduce.FIGURES["loss_by_prompt"](data)
    ax = next(ax for ax in figure.subfigs[0].axes if ax.get_ylabel() == "chance")
    low, high = ax.get_ylim()
    assert low <= random.min() <= random.max() <= high
    assert len(ax.get_yticks()) >= 2
    plt.close(figure)


def test_a_broken_figure_is_named_and_blocks_no_other(
    made: Path, subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = (made / "scores.json").read_text()
    numbers = artifacts.from_json(written)
    ran = EXPERIMENTS["scores"]
    monkeypatch.setitem(EXPERIMENTS, "scores", functools.wraps(ran)(lambda *a, **k: numbers))
    out = copied(made, tmp_path)
    path = out / "scores.json"
    digits = re.search(r"0\.\d+", written[written.index("data_vars") :])
    assert digits is not None
    changed = written[::-1].replace(digits[0][::-1], "9.0", 1)[::-1]
    for text, why in (
        ("", "cannot be read"),
        (written[:-90], "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"key": 1}', "does not have the parts"),
        (changed, "was changed after it was written"),
    ):
        path.write_text(text)
        ok, lines = told(out, subject, only=["scores", "text_kinds"])
        assert not ok
        assert path.read_text() == text  # the check writes nothing
        assert lines[0].startswith(f"scores: {path} {why}")
        assert lines[1] == "text_kinds: up to date"
        said: list[str] = []
        arguments = (out, lambda: subject[:2], "tiny", subject[2])
        reproduce.regenerate(*arguments, only=["scores", "text_kinds"], say=said.append)
        assert any(line.startswith(f"scores: {path} {why}") for line in said)
        assert any("text_kinds: numbers are there" in line for line in said)
        assert path.read_text() == written
        aside = list(out.glob("*.set-aside*"))
        assert len(aside) == (0 if text == changed else 1)  # ours, and it is known by its key
        for one in aside:
            assert one.read_text() == text
            one.unlink()


def test_files_without_a_checksum_are_up_to_date(
    made: Path, subject: tuple, tmp_path: Path
) -> None:
    """As earlier versions wrote them, and as they are committed."""
    content = json.loads((made / "scores.json").read_text())
    del content["checksum"]
    (tmp_path / "scores.json").write_text(json.dumps(content))
    assert told(tmp_path, subject) == (True, ["scores: up to date"])


def test_two_runs_do_not_write_one_figure(made: Path, subject: tuple, tmp_path: Path) -> None:
    with artifacts.replacing(tmp_path / "scores.json") as partial:
        partial.touch()
        arguments = (tmp_path, lambda: subject[:2], "tiny", subject[2])
        with pytest.raises(artifacts.BusyError, match=r"scores\.json is being written by"):
            reproduce.regenerate(*arguments, only=["scores"])


def test_numbers_are_kept_until_the_code_they_come_from_changes() -> None:
    sources = {path.stem for path in artifacts.sources(activations.drift.__module__)}
    assert sources >= {"activations", "common", "overlap", "recorder", "hooks", "moments"}
    assert not sources & {"figures", "reproduce", "commands", "artifacts", "__init__"}


def told(out: Path, subject: tuple, **changed: object) -> tuple[bool, list[str]]:
    """Whether the check passes, and what it says."""
    lines: list[str] = []
    inputs = {"identity": "tiny", "texts": subject[2], "only": ["scores"], **changed}
    found = reproduce.check(out, **inputs, say=lines.append)
    assert [one.name for one in found] == inputs["only"]
    return all(one.why is None for one in found), lines


def altered(path: Path, **parts: object) -> None:
    content = json.loads(path.read_text())
    content["key"] = parts.get("key") or content["key"] | parts
    path.write_text(json.dumps(content))


def test_the_check_says_which_part_is_stale(made: Path, subject: tuple, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text((made / "scores.json").read_text())
    assert told(tmp_path, subject) == (True, ["scores: up to date"])
    assert told(tmp_path, subject, seed=1) == (False, ["scores: stale in inputs"])
    altered(path, code="0")
    assert told(tmp_path, subject) == (False, ["scores: stale in code"])
    assert told(tmp_path, subject, texts=["a", "b"])[1] == ["scores: stale in code and inputs"]
    versions = json.loads(path.read_text())["key"]["versions"]
    altered(path, versions=versions | {"numpy": "1.0"})
    _, (line,) = told(tmp_path, subject)
    assert line == f"scores: stale in code and versions (numpy 1.0 -> {versions['numpy']})"
    altered(path, key="0123")
    _, (line,) = told(tmp_path, subject)
    assert line.startswith("scores: stale in all parts (its key is not in three parts")
    path.unlink()
    assert told(tmp_path, subject) == (False, ["scores: not there"])
    assert list(tmp_path.iterdir()) == []


def test_the_check_says_what_changed_since_the_last_commit(
    made: Path, subject: tuple, tmp_path: Path
) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / "scores.json"
    path.write_text((made / "scores.json").read_text())
    git("init", "-q")
    git("add", "scores.json")
    assert told(tmp_path, subject) == (True, ["scores: up to date"])  # nothing is committed yet
    git("commit", "-qm", "scores")
    assert told(tmp_path, subject) == (True, ["scores: up to date"])
    altered(path, code="0")
    same = "  drawn again since the last commit; same numbers"
    assert told(tmp_path, subject) == (False, ["scores: stale in code", same])
    content = json.loads(path.read_text())
    content["data_vars"]["rank_consistency"]["data"][0][0][0] += 0.5
    path.write_text(json.dumps(content))
    _, lines = told(tmp_path, subject)
    assert lines[0] == f"scores: {path} was changed after it was written"
    del content["checksum"]  # as if it were written by an earlier version
    path.write_text(json.dumps(content))
    _, lines = told(tmp_path, subject)
    assert lines[1] == "  drawn again since the last commit; changed:"
    (line,) = lines[2:]
    assert line.startswith("    rank_consistency: at most 0.5, ")


def test_changes_are_the_largest_by_variable() -> None:
    before = xr.Dataset(
        {
            "x": ("a", [1.0, -4.0, np.nan, 0.0]),
            "y": ("a", [1.0, 2.0, 3.0, 4.0]),
            "gone": 1,
        },
        {"a": list("pqrs")},
        {"caption": "before"},
    )
    now = before.drop_vars("gone").assign(new=2, x=("a", [1.5, -5.0, np.nan, 0.1]))
    assert changes(before, before.assign_attrs(caption="now")) == []
    assert changes(before, now) == [
        "x: at most 1, 0.5 of the number before",
        "gone: gone",
        "new: new",
    ]
    missing = before.assign(x=("a", [1.0, np.nan, np.nan, 0.0]))
    assert changes(before, missing) == ["x: 1 numbers are missing in one of the two"]
    shorter = before.isel(a=slice(2)).assign_coords(a=["p", "z"])
    assert changes(before, shorter)[0] == "x: shape {'a': 4} -> {'a': 2}"
    assert changes(before.isel(a=slice(2)), shorter) == ["a: other values"]


def test_the_command_checks_and_runs_nothing(
    made: Path, subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> tuple:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flocking.cli.commands.load", load)
    monkeypatch.setattr("flocking.models.identity", lambda name: "folder")
    arguments = ["figures", "--only", "scores", "--out", str(tmp_path), "--check"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (1, "scores: not there\n")
    key = reproduce._keys(tmp_path, "folder None", flocking.passages(), ["scores"], 0)["scores"]
    data = artifacts.from_json((made / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(artifacts.to_json(data, key))
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, "scores: up to date\n")


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_experiments_say_what_to_give(name: str, subject: tuple) -> None:
    model, tokenizer, texts = subject
    recording = xr.Dataset({"energy": ("x", [1.0])})
    for given, match in (
        (("a/folder", tokenizer, texts), r"model is a str: load it first"),
        ((recording, tokenizer, texts), "model is a Dataset"),
        ((model, None, texts), "tokenizer is None: give the model's own"),
        ((model, "gpt2", texts), "tokenizer is 'gpt2': give a transformers tokenizer"),
        ((model, tokenizer, recording), "texts is of type Dataset: give a list of texts"),
        ((model, tokenizer, "one text"), "texts is of type str: give a list of texts"),
        ((model, tokenizer, None), "texts is of type NoneType: give a list of texts"),
        ((model, tokenizer, [texts[0], 3]), "text 1 is of type int: give each text as a string"),
    ):
        with pytest.raises(TypeError, match=match):
            reproduce.EXPERIMENTS[name](*given)


def test_a_figure_that_cannot_be_made_does_not_keep_others_from_it(
    subject: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: object, **options: object) -> xr.Dataset:
        raise ValueError("text 'a' has 5 tokens, and 65 are needed.")

    monkeypatch.setitem(EXPERIMENTS, "scores", short)
    said: list[str] = []
    arguments = (tmp_path, lambda: subject[:2], "tiny", subject[2])
    done = reproduce.regenerate(*arguments, only=["scores", "text_kinds"], say=said.append)
    assert [each.problem is None for each in done] == [False, True]
    told = reproduce.unmade(done)
    assert told.startswith("1 of 2 figures cannot be made (scores), all others are: text 'a' has 5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"text_kinds{suffix}" for suffix in (".json", ".md", ".png", ".svg")
    ]
    assert any(line.startswith("scores: cannot be made: text 'a'") for line in said)
    assert reproduce.unmade(done[:1]).startswith("text 'a' has 5 tokens")
    assert not reproduce.unmade(done[1:])


def test_the_command_says_what_cannot_be_made_and_what_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.txt" for name in "ab"]
    for file in files:
        file.write_text("Too short.")
    options = [part for file in files for part in ("--texts", str(file))]
    out = ["--out", str(tmp_path / "out"), "--only", "scores", "--only", "text_kinds"]
    ended = CliRunner().invoke(app, ["figures", *out, *options, "--json"])
    assert ended.exit_code == 2
    problems = {each["name"]: each["problem"] for each in json.loads(ended.stdout)["figures"]}
    assert problems.keys() == {"scores", "text_kinds"}
    assert all("tokens" in problem for problem in problems.values())
    assert "flocking: text" in ended.stderr
