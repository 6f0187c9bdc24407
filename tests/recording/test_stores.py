"""Recordings on disk: as they were, lazily, whole or not at all, and nothing else."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from xarray.backends.zarr import ZarrArrayWrapper

import flocking
from flocking.recording import entrance


@pytest.fixture(scope="module")
def recording() -> xr.Dataset:
    ids = helpers.random_ids(21, 30, seed=1)
    return helpers.record(
        helpers.proved("llama"), ids, window=8, prompt_tokens=17, relative=[1], ranks=True
    )


def assert_as_it_was(path: Path, recording: xr.Dataset) -> None:
    opened = flocking.open_recording(path)
    xr.testing.assert_identical(opened.load(), recording)
    for name, variable in recording.variables.items():
        assert opened.variables[name].dtype == variable.dtype, name
    assert {**opened.attrs} == {**recording.attrs}
    assert [type(value) for value in opened.attrs.values()] == [
        type(value) for value in recording.attrs.values()
    ]


def test_everything_comes_back_as_it_was(tmp_path: Path, recording: xr.Dataset) -> None:
    assert np.isnan(recording.relative.values).any()
    flocking.save_recording(recording, tmp_path / "deep" / "x.zarr")
    assert_as_it_was(tmp_path / "deep" / "x.zarr", recording)
    mixture = helpers.record(helpers.proved("mixtral"), helpers.random_ids(9))
    flocking.save_recording(mixture, str(tmp_path / "m.zarr"))
    assert_as_it_was(tmp_path / "m.zarr", mixture)


def test_texts_with_odd_characters(tmp_path: Path, recording: xr.Dataset) -> None:
    odd = np.array(["", "a\x00b\x00", "tab\t\r\n", "\ufffd\u200b中🐦", " ", '"\\'], dtype=object)
    texts = np.resize(odd, recording.token_text.shape)
    changed = recording.assign_coords(
        token_text=(("sequence", "token"), texts),
        text=("sequence", odd[:2]),
        sequence=["", "中"],
        mine=("sequence", [True, False]),
    ).assign_attrs(model="a\x00'\"中", note=["x", 1.5])
    flocking.save_recording(changed, tmp_path / "x.zarr")
    assert_as_it_was(tmp_path / "x.zarr", changed)
    half = recording.assign_coords(text=("sequence", np.array(["a\ud800", ""])))
    with pytest.raises(ValueError, match=r"'text' has '\\ud800' in a text, which is half of"):
        flocking.save_recording(half, tmp_path / "y.zarr")
    assert not (tmp_path / "y.zarr").exists()


def test_parts_come_back_too(tmp_path: Path, recording: xr.Dataset) -> None:
    parts = [
        recording.isel(sequence=0),
        recording.sel(layer=[1]),
        recording.isel(window=[2, 3]),
        flocking.concat([recording, recording]),
    ]
    for number, part in enumerate(parts):
        flocking.save_recording(part, tmp_path / f"{number}.zarr")
        assert_as_it_was(tmp_path / f"{number}.zarr", part)


def test_arrays_stay_on_disk_until_they_are_used(tmp_path: Path, recording: xr.Dataset) -> None:
    flocking.save_recording(recording, tmp_path / "x.zarr")
    opened = flocking.open_recording(tmp_path / "x.zarr")
    assert not any(opened.variables[name]._in_memory for name in ("energy", "token_text", "text"))
    for name in ("energy", "mass", "rank", "relative"):
        assert not opened.variables[name]._in_memory, name
    for path in (tmp_path / "x.zarr" / "energy").glob("[0-9]*"):
        path.unlink()  # not there from now on
    assert np.isnan(opened.energy.values).all()


def test_opening_reads_tokens_some_at_a_time_or_not_at_all(
    tmp_path: Path, recording: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are more of them with each text."""
    flocking.save_recording(recording, tmp_path / "x.zarr")
    read: dict[str, list[int]] = {}
    inner = ZarrArrayWrapper.__getitem__

    def reading(self: ZarrArrayWrapper, key: Any) -> Any:
        found = inner(self, key)
        read.setdefault(self._array.basename, []).append(np.size(found))
        return found

    monkeypatch.setattr(ZarrArrayWrapper, "__getitem__", reading)
    monkeypatch.setattr(entrance, "_TOKENS", recording.sizes["token"])
    opened = flocking.open_recording(tmp_path / "x.zarr")
    flocking.RunningStatistic().update(opened)
    assert not {"norm", "l1", "token_id", "token_text", "text"} & {*read}
    assert max(read["token_window"]) == recording.sizes["token"]


def test_an_opened_recording_is_saved_again_over_itself(
    tmp_path: Path, recording: xr.Dataset
) -> None:
    path = tmp_path / "x.zarr"
    flocking.save_recording(recording, path)
    with pytest.raises(ValueError, match="exists: choose another name, or pass overwrite=True"):
        flocking.save_recording(recording, path)
    opened = flocking.open_recording(path)
    flocking.save_recording(opened.isel(sequence=[1]), path, overwrite=True)
    assert_as_it_was(path, recording.isel(sequence=[1]))
    assert [one.name for one in tmp_path.iterdir()] == ["x.zarr"]


def test_chunked_in_any_sizes_it_is_written(tmp_path: Path, recording: xr.Dataset) -> None:
    pytest.importorskip("dask")
    chunked = recording.chunk(neuron=(50, 7, 103))
    flocking.save_recording(chunked, tmp_path / "x.zarr")
    assert_as_it_was(tmp_path / "x.zarr", recording)


def test_chunks_without_dask_are_refused(
    tmp_path: Path, recording: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    flocking.save_recording(recording, tmp_path / "x.zarr")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "dask" else real(name, *more),
    )
    with pytest.raises(
        ValueError, match=r"chunks=\{\} needs dask, which is not installed: pip inst"
    ):
        flocking.open_recording(tmp_path / "x.zarr", chunks={})
    assert flocking.open_recording(tmp_path / "x.zarr").sizes == recording.sizes


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, recording: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.zarr"
    flocking.save_recording(recording, path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as changed:
        changed.setattr(xr.Dataset, "to_zarr", fail)
        for place in (path, tmp_path / "new.zarr"):
            with pytest.raises(OSError, match="disk full"):
                flocking.save_recording(recording, place, overwrite=True)
    assert [one.name for one in tmp_path.iterdir()] == ["x.zarr"]
    assert_as_it_was(path, recording)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:The data type")
def test_what_xarray_writes_is_opened(
    tmp_path: Path, recording: xr.Dataset, version: int, consolidated: bool
) -> None:
    path = tmp_path / "x.zarr"
    recording.to_zarr(path, zarr_format=version, consolidated=consolidated)
    opened = flocking.open_recording(path).load()
    xr.testing.assert_equal(opened, recording)
    flocking.save_recording(opened, path, overwrite=True)
    assert_as_it_was(path, opened)


def test_xarray_opens_what_is_saved(tmp_path: Path, recording: xr.Dataset) -> None:
    flocking.save_recording(recording, tmp_path / "x.zarr")
    with xr.open_zarr(tmp_path / "x.zarr") as opened:
        xr.testing.assert_identical(opened.load(), recording)


@pytest.mark.parametrize("name", ["x.nc", "x", "x.zarr.zip", "x.zip", ""])
def test_other_suffixes_are_refused(tmp_path: Path, recording: xr.Dataset, name: str) -> None:
    for path in (name, Path(name)):
        with pytest.raises(ValueError, match=r"whose names end in \.zarr, such as \w+\.zarr"):
            flocking.save_recording(recording, path)
        with pytest.raises(ValueError, match=r"whose names end in \.zarr"):
            flocking.open_recording(path)
    with pytest.raises(ValueError, match="name a folder on a disk, since URLs are left to"):
        flocking.save_recording(recording, "s3://bucket/x.zarr")
    with pytest.raises(ValueError, match=r"s3://bucket/x.zarr cannot be reached \(.*s3fs"):
        flocking.open_recording("s3://bucket/x.zarr")
    with pytest.raises(ValueError, match=r"whose names end in \.zarr"):
        flocking.open_recording("s3://bucket/x.nc")
    with pytest.raises(TypeError, match="path is a NoneType: give the name of a folder"):
        flocking.save_recording(recording, None)


def test_what_is_no_recording_is_refused(tmp_path: Path, recording: xr.Dataset) -> None:
    path = tmp_path / "x.zarr"
    with pytest.raises(FileNotFoundError, match=r"there is no .*x\.zarr: save a recording there"):
        flocking.open_recording(path)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"x\.zarr is not a folder"):
        flocking.open_recording(path)
    with pytest.raises(ValueError, match="exists and is not a recording"):
        flocking.save_recording(recording, path, overwrite=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"x\.zarr is not a Zarr store"):
        flocking.open_recording(path)
    path.rmdir()
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(path, zarr_format=2)
    with pytest.raises(ValueError, match="is not a recording: it has no 'phase'"):
        flocking.open_recording(path)
    with pytest.raises(ValueError, match="exists and is not a recording"):
        flocking.save_recording(recording, path, overwrite=True)
    for given in (
        None,
        recording.energy,
        xr.Dataset(),
        recording.mean("sequence").drop_vars("d_ff"),
    ):
        with pytest.raises((TypeError, ValueError)):
            flocking.save_recording(given, tmp_path / "y.zarr")
    path = tmp_path / "link.zarr"
    path.symlink_to(tmp_path / "nowhere.zarr")
    with pytest.raises(ValueError, match="is a link to"):
        flocking.save_recording(recording, path)


def test_another_layout_or_a_broken_store_is_one_sentence(
    tmp_path: Path, recording: xr.Dataset
) -> None:
    path = tmp_path / "x.zarr"
    recording.assign_attrs(schema_version=2).to_zarr(path, zarr_format=2)
    with pytest.raises(ValueError, match=r"has schema version 2.*update flocking"):
        flocking.open_recording(path)
    shutil.rmtree(path)
    flocking.save_recording(recording, path)
    described = json.loads((path / ".zmetadata").read_text())
    described["metadata"]["phase/.zarray"]["dtype"] = "nonsense"
    (path / ".zmetadata").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"x\.zarr cannot be read \("):
        flocking.open_recording(path)
    (path / ".zmetadata").write_text("not JSON")
    with pytest.raises(ValueError, match=r"x\.zarr cannot be read \("):
        flocking.open_recording(path)


def test_a_tilde_is_the_users_folder(
    tmp_path: Path, recording: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    flocking.save_recording(recording, "~/x.zarr")
    flocking.save_recording(recording.isel(sequence=[0]), Path("~/deep/y.zarr"))
    assert [*here.iterdir()] == []
    assert_as_it_was(home / "x.zarr", recording)
    xr.testing.assert_identical(flocking.open_recording("~/x.zarr").load(), recording)
    assert flocking.open_recording(Path("~/deep/y.zarr")).sizes["sequence"] == 1
    # A folder of this name is one, to both.
    flocking.save_recording(recording.isel(sequence=[1]), here / "~" / "x.zarr")
    assert flocking.open_recording("~/x.zarr")["sequence"].item() == 1


def test_a_nul_in_a_path_is_one_sentence(recording: xr.Dataset) -> None:
    for use in (lambda path: flocking.save_recording(recording, path), flocking.open_recording):
        with pytest.raises(ValueError, match="path has the character NUL"):
            use("a\0b.zarr")


def test_overwrite_is_a_bool(tmp_path: Path, recording: xr.Dataset) -> None:
    with pytest.raises(TypeError, match="overwrite='no': give True or False"):
        flocking.save_recording(recording, tmp_path / "x.zarr", overwrite="no")
    assert [*tmp_path.iterdir()] == []


def test_a_store_that_was_killed_as_it_was_written_is_replaced(
    tmp_path: Path, recording: xr.Dataset
) -> None:
    """With what zarr and the list of files had not renamed yet, and nothing else."""
    path = tmp_path / "x.zarr"
    flocking.save_recording(recording, path)
    half = "0123456789abcdef" * 2
    names = [f"energy/0.0.0.{half}.partial", f"energy/.zarray.{half}.partial"]
    for name in [*names, f".zattrs.{half}.partial", ".zmetadata.partial"]:
        (path / name).write_bytes(b"half")
        flocking.save_recording(recording, path, overwrite=True)
        assert_as_it_was(path, recording)
    for name in ("energy/0.0.0.partial.txt", f"energy/notes.{half}.partial", "my.partial"):
        (path / name).write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"is not a recording \(there is "):
            flocking.save_recording(recording, path, overwrite=True)
        (path / name).unlink()


@pytest.mark.parametrize("inside", ["y.zarr", "energy/y.zarr", "deep/er/y.zarr"])
def test_no_store_is_written_inside_of_another(
    tmp_path: Path, recording: xr.Dataset, inside: str
) -> None:
    flocking.save_recording(recording, tmp_path / "x.zarr")
    before = sorted((tmp_path / "x.zarr").rglob("*"))
    with pytest.raises(ValueError, match=r"is inside of .*x\.zarr, which is a store"):
        flocking.save_recording(recording, tmp_path / "x.zarr" / inside)
    assert sorted((tmp_path / "x.zarr").rglob("*")) == before


NAMES = ["energy", "l1", "layer", "d_ff", "tokens", "token_text", "phase"]


@pytest.mark.parametrize("name", NAMES)
def test_lost_and_cut_files_are_one_sentence(
    tmp_path: Path, recording: xr.Dataset, name: str
) -> None:
    path = tmp_path / "x.zarr"
    zeros = recording.assign_coords(layer=[0, 1]).assign(relative=recording.relative * 0)
    flocking.save_recording(zeros, path)
    (chunk, *_) = sorted((path / name).glob("[0-9]*"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-3])
    with pytest.raises(
        ValueError, match=rf"{name}/0[.0]* is cut \({len(whole) - 3} bytes, not {len(whole)}"
    ):
        flocking.open_recording(path)
    chunk.unlink()
    with pytest.raises(ValueError, match=rf"x\.zarr is not as it was saved: {name}/0[.0]* is lost"):
        flocking.open_recording(path)
    shutil.rmtree(path / name)
    with pytest.raises(ValueError, match=r"is lost \(\d files are\)\. Copy the store again"):
        flocking.open_recording(path)


def test_chunks_of_nothing_but_zeros_are_missed_too(tmp_path: Path, recording: xr.Dataset) -> None:
    path = tmp_path / "x.zarr"
    empty = xr.zeros_like(recording["relative"])
    given = recording.isel(sequence=[0]).assign_coords(mine=("neuron", np.zeros(160)))
    given = given.assign(relative=empty.isel(sequence=[0]) * np.nan, zero=("neuron", np.zeros(160)))
    flocking.save_recording(given, path)
    assert_as_it_was(path, given)
    for name in ("relative", "sequence", "mine", "zero"):
        assert [*(path / name).glob("[0-9]*")], name
    (path / "sequence" / "0").unlink()
    with pytest.raises(ValueError, match="sequence/0 is lost"):
        flocking.open_recording(path)


def test_values_that_were_written_in_place_are_read(tmp_path: Path, recording: xr.Dataset) -> None:
    path = tmp_path / "x.zarr"
    flocking.save_recording(recording, path)
    before = (path / "energy" / "0.0.0.0").stat().st_size
    zarr.open_group(path, mode="r+")["energy"][0] = 0
    assert (path / "energy" / "0.0.0.0").stat().st_size != before
    opened = flocking.open_recording(path)
    np.testing.assert_array_equal(opened.energy[1], recording.energy[1])
    assert not opened.energy[0].any()


def test_stores_without_a_list_of_files_are_opened(tmp_path: Path, recording: xr.Dataset) -> None:
    """Of xarray, or changed by it later: chunks of nothing but zeros may be absent."""
    path = tmp_path / "x.zarr"
    flocking.save_recording(recording, path)
    recording.isel(sequence=[0]).to_zarr(path, mode="w", zarr_format=2)
    assert flocking.open_recording(path).sizes["sequence"] == 1
    flocking.save_recording(recording, path, overwrite=True)
    xr.Dataset({"more": ("neuron", np.ones(160))}).to_zarr(path, mode="a", zarr_format=2)
    assert flocking.open_recording(path).more.sum() == 160


def named(name: object) -> dict:
    return {name: ("sequence", [1.5, 2.5])}


@pytest.mark.parametrize(
    "name", ["a/b", "", 5, "..", ".", ".zattrs", "zarr.json", "a\0", "n" * 300]
)
@pytest.mark.parametrize("way", ["assign", "assign_coords"])
def test_names_that_are_no_folders_are_refused(
    tmp_path: Path, recording: xr.Dataset, name: object, way: str
) -> None:
    changed = getattr(recording, way)(named(name))
    with pytest.raises(ValueError, match=f"has the name {re.escape(repr(name))}, which .*rename"):
        flocking.save_recording(changed, tmp_path / "x.zarr")
    assert [*tmp_path.iterdir()] == []


ATTRIBUTES = {
    "a path": Path("x"),
    "a date": datetime.date(2020, 1, 2),
    "bytes": b"x",
    "an object": object(),
    "a set": {1},
    "numbers as keys": {1: "x"},
    "a dtype": np.dtype("f4"),
    "coordinates": "text",
    "a time": np.datetime64("2020-01-01"),
}


@pytest.mark.parametrize("key", ATTRIBUTES)
def test_attributes_that_do_not_come_back_are_refused(
    tmp_path: Path, recording: xr.Dataset, key: str
) -> None:
    of_one = recording.copy()
    of_one["energy"] = of_one.energy.assign_attrs({key: ATTRIBUTES[key]})
    for changed, of in (
        (recording.assign_attrs({key: ATTRIBUTES[key]}), "the recording"),
        (of_one, "'energy'"),
    ):
        with pytest.raises(ValueError, match=f"attribute '{key}' of {of} is "):
            flocking.save_recording(changed, tmp_path / "x.zarr")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_FillValue", 0.0),
        ("missing_value", 1),
        ("scale_factor", 2.0),
        ("units", "days since 2000"),
    ],
)
def test_attributes_that_change_values_are_refused(
    tmp_path: Path, recording: xr.Dataset, key: str, value: object
) -> None:
    changed = recording.assign_coords(mine=("sequence", [0.0, 1.0], {key: value}))
    with pytest.raises(ValueError, match=f"attribute '{key}' of 'mine' is"):
        flocking.save_recording(changed, tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(["x", None], dtype=object), "'mine' has (None|nan) among its texts, which is"),
        (np.array(["x", 1.5], dtype=object), "'mine' has 1.5 among its texts, which is a float"),
        (np.array([Path("x"), Path("y")], dtype=object), "'mine' has PosixPath"),
        (pd.Categorical(["x", "y"]), "coordinate 'mine' is of category, which Zarr does not give"),
    ],
)
def test_values_that_do_not_come_back_are_refused(
    tmp_path: Path, recording: xr.Dataset, values: object, message: str
) -> None:
    changed = recording.assign_coords(mine=("sequence", values))
    with pytest.raises(ValueError, match=message):
        flocking.save_recording(changed, tmp_path / "x.zarr")
    assert [*tmp_path.iterdir()] == []


def test_an_index_of_several_levels_is_refused(tmp_path: Path, recording: xr.Dataset) -> None:
    index = pd.MultiIndex.from_arrays([[1, 2], ["x", "y"]], names=["a", "b"])
    levels = recording.assign_coords(xr.Coordinates.from_pandas_multiindex(index, "other"))
    with pytest.raises(ValueError, match="coordinate 'other' has an index of several levels"):
        flocking.save_recording(levels, tmp_path / "x.zarr")


def test_the_users_own_comes_back(tmp_path: Path, recording: xr.Dataset) -> None:
    mine = recording.assign_coords(
        when=("sequence", np.array(["2020-01-01", "2021-06-01T12:00"], "M8[ns]")),
        took=("sequence", np.array([1, 5], "m8[s]")),
        half=("neuron", np.linspace(0, 1, 160).astype(np.float16)),
        place=("sequence", [1 + 2j, 0j]),
        words=("sequence", ["a", "bc"]),
    ).assign_attrs(seen=True, many=[1, 2], pair=(1, 2), nothing=None, tree={"a": [1.5]})
    mine = mine.assign_attrs(array=np.arange(3), number=np.float32(0.1))
    flocking.save_recording(mine, tmp_path / "x.zarr")
    xr.testing.assert_identical(flocking.open_recording(tmp_path / "x.zarr").load(), mine)
