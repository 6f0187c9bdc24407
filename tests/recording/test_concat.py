"""Recordings that are put together are the recording of all texts at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pytest
import streams
import transformers as tf
import xarray as xr

import flocking
from flocking.feedforward import width

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = helpers.random_ids(20, 33, 9, 40, 1, seed=2)
OPTIONS = {
    "plain": {"window": 8},
    "generation": {"window": 8, "max_new_tokens": 12, "ranks": True, "relative": True},
    "phases": {"window": None, "max_new_tokens": 5, "relative": [1]},
    "a layer": {"window": 16, "layers": [1], "ranks": True},
}


def of_different_widths() -> tf.PreTrainedModel:
    """A model whose first layer has 96 neurons, the second one 160."""
    model = helpers.build("llama")
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = getattr(mlp, name)
        inputs, outputs = width(old)
        inputs, outputs = (inputs, 96) if name != "down_proj" else (96, outputs)
        new = type(old)(inputs, outputs, bias=False)
        new.weight.data = old.weight.data[:outputs, :inputs].clone()
        setattr(mlp, name, new)
    return model


@functools.cache
def model_of(name: str) -> tf.PreTrainedModel:
    return of_different_widths() if name == "widths" else helpers.proved(name)


@functools.cache
def made(name: str, options: str) -> tuple[list[xr.Dataset], xr.Dataset]:
    """Three recordings, and the one of all their texts."""
    model = model_of(name)
    chosen = {**OPTIONS[options], "batch_size": 1}
    parts = [helpers.record(model, ids, **chosen) for ids in (TEXTS[:1], TEXTS[1:3], TEXTS[3:])]
    return parts, helpers.record(model, TEXTS, **chosen)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "widths"])
def test_concat_is_the_recording_of_all_texts(name: str, options: str) -> None:
    """Bit for bit, with the same names, types and order."""
    parts, whole = made(name, options)
    together = flocking.concat(iter(parts))
    xr.testing.assert_identical(together, whole)
    assert list(together.variables) == list(whole.variables)
    assert {n: v.dtype for n, v in together.variables.items()} == {
        n: v.dtype for n, v in whole.variables.items()
    }
    nested = flocking.concat([flocking.concat(parts[:2]), parts[2]])
    xr.testing.assert_identical(nested, whole)
    backwards = flocking.concat(reversed(parts))
    wanted = whole.isel(sequence=[3, 4, 1, 2, 0]).drop_vars("sequence")
    xr.testing.assert_identical(backwards.drop_vars("sequence"), wanted)


def test_with_and_without_a_generation() -> None:
    """The windows of a prompt that is longer than another's come before all generations."""
    model = model_of("llama")
    parts = [
        helpers.record(model, TEXTS[:1], window=8, max_new_tokens=12),
        helpers.record(model, TEXTS[1:3], window=8),
        helpers.record(model, TEXTS[3:4], window=8, max_new_tokens=20),
    ]
    together = flocking.concat(parts)
    assert together.attrs["max_new_tokens"] == [12, 0, 20]
    assert together.phase.values.tolist() == [
        "first", *["prompt"] * 5, *["generation"] * 3
    ]  # fmt: skip
    assert together.start.values.tolist() == [0, 1, 9, 17, 25, 33, 0, 8, 16]
    assert together.prompt_tokens.values.tolist() == [20, 33, 9, 40]
    row = 0
    for part in parts:
        for number in range(part.sizes["sequence"]):
            mine = part.isel(sequence=number)
            here = together.isel(sequence=row)
            for measure in (flocking.flocking_score, flocking.effective_neurons):
                np.testing.assert_array_equal(measure(here), measure(mine))
            for phase in dict.fromkeys(part.phase.values[1:].tolist()):
                np.testing.assert_array_equal(
                    flocking.statistic(here, phase=phase), flocking.statistic(mine, phase=phase)
                )
            row += 1
    assert together.tokens.values[1].tolist() == [1, 8, 8, 8, 8, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["scalars", "permuted", "stored", "chunked"])
def test_members_of_every_form(kind: str, tmp_path) -> None:
    parts, whole = made("mixtral", "generation")
    if kind == "scalars":
        changed = [part.isel(sequence=n) for part in parts for n in range(part.sizes["sequence"])]
    elif kind == "permuted":
        flip = slice(None, None, -1)
        changed = [
            parts[0],
            *(p.isel(layer=flip, window=flip, neuron=flip, token=flip) for p in parts[1:]),
        ]
        changed = [part.transpose() for part in changed]
    else:
        if kind == "chunked":
            pytest.importorskip("dask")
        for number, part in enumerate(parts):
            part.to_zarr(tmp_path / f"{number}.zarr", zarr_format=2)
        changed = [xr.open_zarr(tmp_path / f"{n}.zarr", chunks=None) for n in range(3)]
        if kind == "chunked":
            changed = [part.chunk(neuron=50) for part in changed]
    together = flocking.concat(changed)
    if kind == "chunked":
        assert together.energy.chunks is not None
    xr.testing.assert_identical(together.load(), whole)


def test_one_layer_of_all() -> None:
    parts, whole = made("llama", "generation")
    together = flocking.concat([part.sel(layer=1) for part in parts])
    xr.testing.assert_identical(together, whole.sel(layer=1))


def test_one_none_and_something_else() -> None:
    parts, _ = made("llama", "plain")
    assert flocking.concat([parts[0]]) is parts[0]
    with pytest.raises(ValueError, match="no recording in the list"):
        flocking.concat([])
    for single in (parts[0], parts[0].energy, "r.zarr", 3, None):
        with pytest.raises(TypeError, match="give a list of recordings"):
            flocking.concat(single)
    with pytest.raises(TypeError, match=r"recording 1: expected a recording .*, got a DataArray"):
        flocking.concat([parts[0], parts[1].energy])
    with pytest.raises(ValueError, match="recording 1: a part of the neurons"):
        flocking.concat([parts[0], parts[1].isel(neuron=slice(80))])


def test_labels_of_sequences() -> None:
    parts, _ = made("llama", "plain")

    def labels(*names: list) -> list:
        named = [p.assign_coords(sequence=each) for p, each in zip(parts, names, strict=True)]
        return flocking.concat(named).sequence.values.tolist()

    assert labels(["a"], ["b", "c"], ["d", "e"]) == ["a", "b", "c", "d", "e"]
    assert labels([7], [3, 9], [1, 2]) == [7, 3, 9, 1, 2]
    assert labels([0], [0, 1], [0, 1]) == [0, 1, 2, 3, 4]
    with pytest.warns(UserWarning, match="Names of sequences repeat: they are numbered"):
        assert labels(["a"], ["a", "b"], ["c", "d"]) == [0, 1, 2, 3, 4]


def test_coordinates_of_the_users_own() -> None:
    parts, _ = made("llama", "plain")
    marked = [
        part.assign_coords(
            file=("sequence", [f"{number}.txt"] * part.sizes["sequence"]),
            number=number,
            depth=("layer", [0.0, 1.0]),
            by_layer=(("sequence", "layer"), np.full((part.sizes["sequence"], 2), number)),
        ).assign(grade=("sequence", np.arange(part.sizes["sequence"]) + number))
        for number, part in enumerate(parts)
    ]
    together = flocking.concat(marked)
    assert together.file.values.tolist() == ["0.txt", "1.txt", "1.txt", "2.txt", "2.txt"]
    assert together.number.values.tolist() == [0, 1, 1, 2, 2]
    assert together.depth.dims == ("layer",)
    assert together.by_layer.values.tolist() == [[n, n] for n in (0, 1, 1, 2, 2)]
    assert together.data_vars["grade"].values.tolist() == [0, 1, 2, 2, 3]
    assert "file" in flocking.statistic(together).coords
    apart = flocking.concat(
        [part.isel(sequence=n) for part in marked for n in range(part.sizes["sequence"])]
    )
    xr.testing.assert_identical(apart, together)
    with pytest.warns(UserWarning, match="Not all recordings have file, grade in the same form"):
        lost = flocking.concat([marked[0], marked[1].drop_vars(["file", "grade"])])
    assert "file" not in lost.variables


def test_of_which_recording_a_skipped_text_was() -> None:
    one = made("llama", "plain")[0][0]
    two = one.assign_attrs(skipped=["3: text 3 has no tokens"])
    both = flocking.concat([one, two, two])
    expected = [f"recording {number}, text 3: text 3 has no tokens" for number in (1, 2)]
    assert both.attrs["skipped"] == expected
    assert "skipped" not in flocking.concat([one, one]).attrs


def test_attributes_that_differ_are_lists(tmp_path) -> None:
    parts, _ = made("llama", "plain")
    changed = [
        parts[0].assign_attrs(seed=1, torch_version="2.0", note="mine", who="me"),
        parts[1].assign_attrs(seed=2, torch_version="2.0", note="yours", who="me"),
        parts[2].assign_attrs(seed=1, torch_version="2.1", note="ours", who="me"),
    ]
    together = flocking.concat(changed)
    assert together.attrs["seed"] == [1, 2]
    assert together.attrs["torch_version"] == ["2.0", "2.1"]
    assert together.attrs["model"] == parts[0].attrs["model"]
    assert "note" not in together.attrs
    assert together.attrs["who"] == "me"
    together.to_zarr(tmp_path / "r.zarr", zarr_format=2)
    restored = xr.open_zarr(tmp_path / "r.zarr", chunks=None).load()
    xr.testing.assert_identical(restored, together)
    once_more = flocking.concat([restored, changed[1].assign_attrs(seed=3)])
    assert once_more.attrs["seed"] == [1, 2, 3]


REFUSED: dict[str, tuple[Callable[[xr.Dataset], xr.Dataset], str]] = {
    **{
        name: (lambda r, name=name: r.assign_attrs({name: "another"}), f"1 has {name} 'another'")
        for name in ("model", "model_path", "revision", "architecture", "dtype")
    },
    **{
        name: (lambda r, name=name: r.assign_attrs({name: "another"}), f"1 has {name} 'another'")
        for name in ("special_tokens", "window")
    },
    "layers": (lambda r: r.isel(layer=[0]), r"1 has layer \[0\], and recording 0 has \[0, 1\]"),
    "labels of layers": (lambda r: r.assign_coords(layer=[0, 2]), r"1 has layer \[0, 2\]"),
    "modules": (
        lambda r: r.assign_coords(module=("layer", ["a", "b"])),
        r"1 has module \['a', 'b'\]",
    ),
    "widths": (lambda r: r.assign_coords(d_ff=("layer", [80, 160])), "1 has d_ff"),
    "ranks": (
        lambda r: r.drop_vars("rank"),
        r"1 has no 'rank': record all of them with record\(\.\.\., ranks=True\), or leave it out",
    ),
    "relative": (lambda r: r.drop_vars("relative"), r"1 has no 'relative'.*relative=True"),
    "some layers": (
        lambda r: r.drop_vars("relative").assign(
            relative=r.relative.isel(layer=[0]).rename(layer="relative_layer")
        ),
        "1 has relative_layer",
    ),
    "windows": (lambda r: r.isel(window=[0, 1]), "1 has a part of its windows only"),
    "tokens": (lambda r: r.isel(token=[0, 1]), "recording 1: tokens do not fit"),
    "schema": (lambda r: r.assign_attrs(schema_version=7), "recording 1: .*schema version 7"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_differs_is_named(what: str) -> None:
    parts, _ = made("llama", "generation")
    change, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        flocking.concat([parts[0], change(parts[1])])


def test_another_window_is_named() -> None:
    model = model_of("llama")
    parts = [helpers.record(model, TEXTS[:1], window=window) for window in (8, 16)]
    with pytest.raises(ValueError, match="recording 1 has window 16, and recording 0 has 8"):
        flocking.concat(parts)
    with pytest.raises(ValueError, match="record all with the same window"):
        flocking.concat([part.drop_attrs(deep=False) for part in parts])


def test_a_single_recording_is_not_copied_and_members_stay_as_they_were() -> None:
    parts, _ = made("gpt2", "generation")
    before = [part.copy(deep=True) for part in parts]
    together = flocking.concat(parts)
    for part, old in zip(parts, before, strict=True):
        xr.testing.assert_identical(part, old)
    together.energy.values[:] = 0
    xr.testing.assert_identical(parts[0], before[0])


def test_recordings_from_before_names_were_apart_from_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have the path as the model's name."""
    monkeypatch.setenv("HOME", "/home/me")
    parts, _ = made("llama", "plain")
    here = [part.assign_attrs(model="run", model_path="/data/a/run") for part in parts]
    old = (
        here[0]
        .drop_attrs(deep=False)
        .assign_attrs(
            {name: value for name, value in here[0].attrs.items() if name != "model_path"}
            | {"model": "/data/a/run"}
        )
    )
    expected = flocking.concat(here)
    xr.testing.assert_identical(flocking.concat([old, *here[1:]]), expected)
    xr.testing.assert_identical(flocking.concat([here[0], old]), flocking.concat([here[0]] * 2))
    with pytest.raises(ValueError, match="1 has model_path '/data/b/run'"):
        flocking.concat([old, here[1].assign_attrs(model_path="/data/b/run")])


def test_chunked_stores_of_texts(tmp_path: Path) -> None:
    pytest.importorskip("dask")
    tokenizer = helpers.letters("<s> $A")
    for name, texts in (("a", ["abc", "defgh"] * 5), ("b", ["abcdefghijk"] * 4)):
        streams.stream(tmp_path / f"{name}.zarr", texts, tokenizer=tokenizer)
    whole, chunked = (
        flocking.concat([flocking.open_recording(tmp_path / f"{n}.zarr", **how) for n in "ab"])
        for how in ({}, {"chunks": {}})
    )
    for name in ("energy", "norm", "l1"):
        assert chunked[name].chunks is not None, name
    xr.testing.assert_identical(chunked.load(), whole.load())


@pytest.mark.parametrize("name", ["text", "token_id", "token_text", "prompt_tokens"])
def test_what_one_recording_lacks_is_left_out(name: str) -> None:
    """In whichever order they are given."""
    parts, _ = made("llama", "plain")
    for first, second in (
        (parts[0], parts[1].drop_vars(name)),
        (parts[0].drop_vars(name), parts[1]),
    ):
        with pytest.warns(UserWarning, match=f"Not all recordings have {name}"):
            together = flocking.concat([first, second])
        expected = flocking.concat(parts[:2]).drop_vars(name)
        xr.testing.assert_identical(together, expected)


def test_attributes_that_are_arrays() -> None:
    parts, _ = made("llama", "plain")
    one, other = np.arange(2000), np.arange(2000)
    other[1000] = 0  # which the array's text does not show
    same = [part.assign_attrs(mine=one.copy()) for part in parts]
    np.testing.assert_array_equal(flocking.concat(same).attrs["mine"], one)
    apart = [parts[0].assign_attrs(mine=one), parts[1].assign_attrs(mine=other)]
    assert "mine" not in flocking.concat(apart).attrs
    seeds = [parts[0].assign_attrs(seed=np.array([0, 1])), parts[1].assign_attrs(seed=2)]
    assert flocking.concat(seeds).attrs["seed"] == [0, 1, 2]
