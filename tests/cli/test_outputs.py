"""What commands may replace, and what they refuse before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from helpers import proved
from typer.testing import CliRunner

import flocking
from flocking.cli import app, outputs


@pytest.fixture
def recording() -> xr.Dataset:
    return flocking.record(proved("llama"), [[3, 4, 5, 6], [7, 8]], window=2, progress=False)


def reason(path: Path) -> str:
    with pytest.raises(ValueError, match="exists and is not a recording") as caught:
        outputs.refuse_existing(path, overwrite=True)
    return str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:The data type")
def test_a_recording_is_known(
    tmp_path: Path, recording: xr.Dataset, version: int, consolidated: bool
) -> None:
    store = tmp_path / "x.zarr"
    recording.to_zarr(store, zarr_format=version, consolidated=consolidated)
    outputs.refuse_existing(store, overwrite=True)
    with pytest.raises(ValueError, match="exists: choose another name, or pass --overwrite"):
        outputs.refuse_existing(store, overwrite=False)
    for name in ("notes.txt", "energy/notes.txt", "thesis/chapter1", "photos/2024", "12"):
        path = store / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        assert f"there is {name} in it" in reason(store)
        path.unlink()
    outputs.refuse_existing(store, overwrite=True)
    (store / "mass" / "7").symlink_to(tmp_path)
    assert "there is mass/7 in it" in reason(store)


def test_what_only_looks_like_a_recording_is_none(tmp_path: Path, recording: xr.Dataset) -> None:
    for name, changed in {
        "other data": xr.Dataset({"energy": ("x", [1.0])}, attrs={"window": 3}),
        "attributes": recording.assign_attrs(architecture=None).drop_attrs(deep=False),
        "mass": recording.drop_vars("mass"),
    }.items():
        changed.to_zarr(tmp_path / name, zarr_format=2)
        assert "it has no" in reason(tmp_path / name)
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / ".zgroup").write_text('{"zarr_format": 2}')
    assert "it has no flocking_version" in reason(tmp_path / "group")
    for text in ("not JSON", "[]", "3"):
        (tmp_path / "group" / ".zattrs").write_text(text)
        assert "it has no flocking_version" in reason(tmp_path / "group")
    (tmp_path / "x.png").write_bytes(b"mine")
    assert "it is a file" in reason(tmp_path / "x.png")


def test_the_demo_replaces_its_own_files_only(tmp_path: Path, recording: xr.Dataset) -> None:
    def refused(path: Path) -> None:
        with pytest.raises(ValueError, match="exists and is not from flocking demo"):
            outputs.refuse_other_than_demos(path)

    for number, text in enumerate((b"mine", b"", b"\x89PNG\r\n\x1a\n")):
        (tmp_path / f"{number}.png").write_bytes(text)
        refused(tmp_path / f"{number}.png")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png")
    figure = plt.figure()
    figure.savefig(tmp_path / "other.png", metadata={"Source": "me"})
    plt.close(figure)
    refused(tmp_path / "other.png")
    outputs.refuse_other_than_demos(Path(__file__).parents[2] / "figures" / "demo.png")

    recording.to_zarr(tmp_path / "other.zarr", zarr_format=2)
    refused(tmp_path / "other.zarr")
    names = [passage.name for passage in flocking.passages()]
    mine = flocking.record(proved("llama"), [[3, 4, 5]] * len(names), relative=[1], progress=False)
    mine.assign_coords(sequence=names).to_zarr(tmp_path / "demo.zarr", zarr_format=2)
    outputs.refuse_other_than_demos(tmp_path / "demo.zarr")
    (tmp_path / "demo.zarr" / "thesis").touch()
    refused(tmp_path / "demo.zarr")


@pytest.fixture
def unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run commands in that may not load a model."""

    def load(*arguments: object, **options: object) -> tuple:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flocking.cli.commands.load", load)
    monkeypatch.setattr("flocking.models.identity", lambda name: "folder")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Birds of a feather")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "demo.png").write_bytes(b"mine")
    (tmp_path / ".busy.zarr.writing").mkdir()
    owner = {"target": "busy.zarr", "host": "elsewhere", "process": 1, "process_started": 1.0}
    (tmp_path / ".busy.zarr.writing" / "flocking-owner.json").write_text(json.dumps(owner))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("record a.txt -o x.zarr --window 0", "window=0: give a whole number from 1 up"),
        ("record a.txt -o x.zarr --max-new-tokens -1", "max_new_tokens=-1: give a whole number"),
        ("record a.txt -o x.zarr --layers 0-99999999999", "give numbers and ranges"),
        ("record a.txt -o x.zarr --layers ,", "give numbers and ranges"),
        ("record a.txt --output=", "--output names no file or folder: give it a name."),
        ("record a.txt -o file/x.zarr", "file/x.zarr cannot be written"),
        ("record a.txt -o /proc/x.zarr", "/proc/x.zarr cannot be written"),
        (
            "record a.txt -o file --overwrite",
            "file: recordings are Zarr stores, whose names end in .zarr",
        ),
        ("record a.txt -o busy.zarr", "busy.zarr is being written by process 1 on elsewhere"),
        ("demo --out file", "cannot be written"),
        ("demo --out theirs", "demo.png exists and is not from flocking demo"),
        ("generate x --density -1", "density=-1.0: give the fraction of neurons to keep"),
        ("generate x --density nan", "density=nan: give the fraction of neurons to keep"),
        ("generate x --scope all", "scope='all': give 'shared' or 'sequence'"),
        ("generate x --method best", "--method best: choose from topk"),
        ("generate x --max-new-tokens 0", "--max-new-tokens 0: give 1 or more"),
        ("figures --only nope", "there is no figure 'nope'"),
        ("figures --only scores --seed -1", "seed=-1: give a whole number from 0 up"),
        ("figures --only scores --out file", "cannot be written"),
    ],
)
def test_refused_before_a_model_is_loaded(unloaded: Path, command: str, message: str) -> None:
    before = sorted(unloaded.rglob("*"))
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1
    assert sorted(unloaded.rglob("*")) == before


def test_what_is_written_while_a_recording_is_made_stays(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, recording: xr.Dataset
) -> None:
    def load(*arguments: object) -> tuple[object, object]:
        store = unloaded / "x.zarr"
        if not store.exists():
            store.mkdir()
            (store / "thesis").write_text("years of work")
        return helpers.proved("llama"), helpers.letters("<s> $A")

    monkeypatch.setattr("flocking.cli.commands.load", load)
    command = ["record", "a.txt", "-o", "x.zarr", "--overwrite"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "exists and was not written by record" in result.output
    assert [path.name for path in (unloaded / "x.zarr").iterdir()] == ["thesis"]
    assert not list(unloaded.glob(".x.zarr*"))
    (unloaded / "x.zarr" / "thesis").rename(unloaded / "thesis")
    (unloaded / "x.zarr").rmdir()
    recording.to_zarr(unloaded / "x.zarr", zarr_format=2)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert xr.open_zarr(unloaded / "x.zarr").sizes["sequence"] == 1
    assert np.array_equal(xr.open_zarr(unloaded / "x.zarr").file, ["a.txt"])
