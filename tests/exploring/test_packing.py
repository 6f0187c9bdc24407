"""What the page is sent: bytes against brute force, and sentences on what is missing."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.exploring.coarsening import Coarse, for_a_page
from flocking.exploring.packing import Source, prepared, told_of
from flocking.exploring.shares import specific


def source_of(recording: xr.Dataset, **coarse: object) -> Source:
    whole = prepared(recording)
    return Source(whole, Coarse(**{"sequences": 3, **coarse}))


def arrays(source: Source, sequence: int, layer: int) -> tuple[dict, list[np.ndarray]]:
    content, buffers = source.packet(f"layer/{sequence}/{layer}")
    width = int(source.recording.d_ff[layer])
    rows = np.uint8 if source.coarse.rounded else np.float16
    kinds = (np.float32, rows, np.float32)
    return content, [
        np.frombuffer(each, kind).reshape(-1, width)
        for each, kind in zip(buffers, kinds, strict=True)
    ]


def test_energies_and_activations_are_those_of_the_recording(recording: xr.Dataset) -> None:
    source = source_of(recording)
    text, _ = source.packet("text/0")
    assert text["windows"] == [1, 8, 8, 8, 8, 8]
    assert text["phases"] == ["first", *["prompt"] * 4, "generation"]
    assert text["places"] == list(range(41))
    assert text["rows"] == [1] * 41
    assert text["tokens"] == recording.token_text.values[0, :41].tolist()
    content, (energy, rows, _) = arrays(source, 0, 1)
    there = recording.tokens.values[0] > 0
    np.testing.assert_array_equal(energy, recording.energy.values[0, 1, there])
    np.testing.assert_array_equal(rows, recording.relative.values[0, 1, :41])
    shown = rows.astype(np.float32)
    assert content["brightest_row"] == float(np.percentile(shown, 99))


def test_numbers_of_tokens_may_be_floats(recording: xr.Dataset) -> None:
    """As arithmetic makes them, and as measures take them."""
    floats = recording.assign(tokens=recording.tokens.astype(float))
    assert source_of(floats).packet("text/0") == source_of(recording).packet("text/0")
    assert for_a_page(floats, 1, 10**9) == for_a_page(recording, 1, 10**9)
    flocking.explore(floats)


@pytest.mark.parametrize("step", [2, 3, 100])
@pytest.mark.parametrize("tokens", [1, 3, 8, 200])
def test_runs_are_sums_and_means_over_their_tokens(
    recording: xr.Dataset, step: int, tokens: int
) -> None:
    source = source_of(recording, windows=step, tokens=tokens)
    text, _ = source.packet("text/1")
    _, (energy, rows, _) = arrays(source, 1, 0)
    phases = np.repeat(["first", "prompt", "generation"], [1, 32, 16])
    relative = recording.relative.values[1, 0, :49].astype(np.float64)
    assert sum(text["windows"]) == sum(text["rows"]) == 49
    begin = 0
    for count, phase, values in zip(text["windows"], text["phases"], energy, strict=True):
        assert {*phases[begin : begin + count]} == {phase}
        assert count <= 8 * step
        expected = (relative[begin : begin + count] ** 2).sum(0)
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=1e-6)  # of float16
        begin += count
    begin = 0
    edges = np.cumsum([0, *text["windows"]])
    for count, values in zip(text["rows"], rows, strict=True):
        assert count <= tokens
        assert np.searchsorted(edges, begin, "right") == np.searchsorted(edges, begin + count)
        expected = np.sqrt((relative[begin : begin + count] ** 2).mean(0))
        np.testing.assert_allclose(values.astype(np.float64), expected, rtol=1e-3, atol=1e-7)
        begin += count


def test_rounded_rows_are_within_a_step(recording: xr.Dataset) -> None:
    content, (_, rows, _) = arrays(source_of(recording, rounded=True), 0, 0)
    values = recording.relative.values[0, 0, :41].astype(np.float64)
    roots = np.sqrt(values / content["top"])
    assert content["top"] == values.max()
    assert np.abs(rows / 255 - roots).max() <= 0.5 / 255 + 1e-9


def test_parts_add_up_to_the_specificity(recording: xr.Dataset) -> None:
    whole = prepared(recording)
    expected = flocking.specificity(recording).mean("other").values
    for layer in range(2):
        parts = specific(whole, layer)
        np.testing.assert_allclose(parts.sum(1), expected[:, layer], rtol=1e-5)
    # By brute force over pairs of tokens, of the windows that all texts fill.
    r = recording.relative.values[:, 1, 1:41].astype(np.float64)
    r = r[:, recording.token_window.values[0, 1:41] < 5]
    n = r.shape[1]
    within = (r.sum(1) ** 2 - (r**2).sum(1)) / (n * (n - 1))
    expected = np.zeros(r.shape[-1])
    for other in (1, 2):
        between = r[0].mean(0) * r[other].mean(0)
        expected += ((within[0] + within[other]) / 2 - between) / (1 - between.sum()) / 2
    np.testing.assert_allclose(specific(whole, 1)[0], expected, rtol=0.02, atol=2e-6)


def test_a_neuron_that_tells_texts_apart_is_first() -> None:
    recording = helpers.record(helpers.proved("llama"), helpers.random_ids(33, 33), window=8)
    strong = recording.copy(deep=True)
    strong.mass.values[0, 0, :, 7] += 4
    strong.energy.values[0, 0, :, 7] += 2
    assert specific(prepared(strong), 0)[0].argmax() == 7


def test_narrow_layers_and_a_part_of_the_layers() -> None:
    model = helpers.build("llama")
    recording = helpers.record(model, helpers.random_ids(20, 9), window=4, relative=[1])
    recording = recording.assign_coords(d_ff=("layer", [100, 160]))
    source = source_of(recording, sequences=2)
    content, (energy, rows, tells) = arrays(source, 1, 0)
    assert energy.shape == (3, 100)
    assert rows.size == 0
    assert "brightest_row" not in content
    assert tells.shape == (1, 100)
    _, (_, rows, _) = arrays(source, 1, 1)
    np.testing.assert_array_equal(rows, recording.relative.values[1, 0, :9])
    assert [layer["rows"] for layer in told_of(source)["layers"]] == [False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.drop_vars("relative"), "keeps"),
        (lambda r: r.drop_vars("token_text"), "Tokens have no texts: record with a tokenizer"),
        (lambda r: r.isel(sequence=[0]), "needs a recording of two texts or more"),
        (
            lambda r: r.isel(window=[0]),
            "the recording has no window of a prompt after the first token",
        ),
    ],
)
def test_what_is_missing_is_said(recording: xr.Dataset, change, said: str) -> None:
    source = Source(prepared(change(recording)))
    told = told_of(source)
    assert any(said in note for note in [*told["notes"], told["specific"] or ""])
    for key in source.keys:
        source.packet(key)


def test_everything_has_no_notes(recording: xr.Dataset) -> None:
    told = told_of(Source(prepared(recording)))
    assert told["notes"] == []
    assert told["specific"] is None


@pytest.mark.parametrize(
    "key",
    ["", "text", "text/3", "text/-1", "layer/0", "layer/0/2", "text/0/0", "layer/0/1/0", "x/0"],
)
def test_only_what_there_is_can_be_asked_for(recording: xr.Dataset, key: str) -> None:
    with pytest.raises(ValueError, match="there is no"):
        source_of(recording).packet(key)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.isel(sequence=0),
        lambda r: r.isel(layer=1),
        lambda r: r.isel(window=[2, 3]),
        lambda r: r.transpose(),
        lambda r: r.isel(window=[5, 6]).isel(sequence=[1]),
        lambda r: r.assign_coords(layer=["one", "two"]),
    ],
)
def test_takes_what_was_selected(recording: xr.Dataset, change) -> None:
    selected = change(recording)
    explorer = flocking.explore(selected)
    source = explorer._source
    text, _ = source.packet("text/0")
    part = prepared(selected)
    assert text["windows"] == [n for n in part.tokens.values[0].tolist() if n]
    _, (energy, _, _) = arrays(source, 0, 0)
    there = part.tokens.values[0] > 0
    np.testing.assert_array_equal(energy, part.energy.values[0, 0, there])


@pytest.mark.parametrize("room", [50_000, 300_000, 10**7])
def test_a_page_is_as_fine_as_there_is_room_for(recording: xr.Dataset, room: int) -> None:
    whole = prepared(recording)
    many = whole.isel(sequence=[0, 1, 2] * 4)
    coarse = for_a_page(many, 2, room)
    source = Source(many, coarse)
    size = sum(len(buffer) for key in source.keys for buffer in source.packet(key).buffers)
    assert size <= room
    finest = coarse == Coarse(12, 1, 1, False)
    assert finest == (room == 10**7)
    assert finest == (not [n for n in told_of(source)["notes"] if "no texts" not in n])
    assert for_a_page(many, 2, 100) is None


@pytest.mark.parametrize("data", [None, "text", 3, xr.Dataset(), np.zeros(3)])
def test_wants_a_recording(data: object) -> None:
    with pytest.raises(TypeError, match="expected a recording"):
        flocking.explore(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.isel(sequence=[]), "there is no sequence to draw"),
        (lambda r: r.isel(layer=[]), "there is no layer to draw"),
        (lambda r: r.isel(window=[]), "no token left: select windows"),
        (lambda r: r.isel(neuron=slice(5)), "a part of the neurons"),
        (lambda r: r.drop_vars("mass"), "no variable 'mass'"),
    ],
)
def test_refuses_what_cannot_be_shown(recording: xr.Dataset, change, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        flocking.explore(change(recording))
