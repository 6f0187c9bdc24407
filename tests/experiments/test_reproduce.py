"""Figures as files: run when something that they depend on changed, and checked without a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import flocking
from flocking import artifacts
from flocking.cli import app
from flocking.experiments import activations, reproduce
from flocking.experiments.comparing import changes


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
    assert names == [f"{stem}{suffix}" for stem in stems for suffix in (".json", ".png", ".svg")]
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


def test_nothing_foreign_is_replaced(tmp_path: Path, subject: tuple) -> None:
    (tmp_path / "scores.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not a figure of flocking"):
        reproduce.regenerate(tmp_path, lambda: subject[:2], "tiny", subject[2], only=["scores"])
    with pytest.raises(ValueError, match="there is no figure 'score': choose from heatmaps"):
        reproduce.regenerate(tmp_path, lambda: subject[:2], "tiny", subject[2], only=["score"])
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]


def test_numbers_are_kept_until_the_code_they_come_from_changes() -> None:
    sources = {path.stem for path in artifacts.sources(activations.drift.__module__)}
    assert sources >= {"activations", "common", "overlap", "recorder", "hooks", "moments"}
    assert not sources & {"figures", "reproduce", "commands", "artifacts", "__init__"}


def test_json_keeps_everything() -> None:
    data = xr.Dataset(
        {"x": (("a", "b"), np.array([[1.0, np.nan], [0.1 + 0.2, -1e-9]]), {"units": "1"})},
        {"a": ["one", "two"], "b": [3, 4]},
        {"caption": "c", "texts": ["one", "two"]},
    )
    key = artifacts.Key("code", "inputs", {"torch": "2"})
    written = artifacts.to_json(data, key)
    xr.testing.assert_identical(artifacts.from_json(written), data)
    assert artifacts.Key.read(json.loads(written)["key"]) == key


def told(out: Path, subject: tuple, **changed: object) -> tuple[bool, list[str]]:
    """Whether the check passes, and what it says."""
    lines: list[str] = []
    inputs = {"identity": "tiny", "texts": subject[2], "only": ["scores"], **changed}
    return reproduce.check(out, **inputs, say=lines.append), lines


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
