"""Selections and routing: images hold the neurons that are kept, and the experts that are used."""

from __future__ import annotations

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

import flocking
from flocking.drawing import BLUE, GREEN, ORANGE

COLOURS = {"both": BLUE, "first": ORANGE, "second": GREEN, "neither": "0.9", "nothing": "1.0"}


def kinds(ax: Axes, rows: int) -> list[list[str]]:
    """What each neuron is drawn as, by row."""
    columns = round(ax.images[0].get_extent()[1] + 0.5)
    image = helpers.cells(ax.images[0], rows, columns)
    names = {tuple(np.round(255 * np.array(to_rgb(c)))): name for name, c in COLOURS.items()}
    return [[names[tuple(pixel)] for pixel in row] for row in image]


def selection(rows: list[str], **coordinates: object) -> xr.DataArray:
    """From rows of 1 for kept, 0 for not."""
    values = np.array([[letter == "1" for letter in row] for row in rows])
    return xr.DataArray(values, {"layer": [4, 7], **coordinates}, ("layer", "neuron"))


def test_shows_kept_neurons_in_order_and_no_more_than_there_are() -> None:
    kept = selection(["0110", "1000"], d_ff=("layer", [4, 2]))
    ax = flocking.plot.selection(kept)
    assert kinds(ax, 2) == [
        ["neither", "both", "both", "neither"],
        ["both", "neither", "nothing", "nothing"],
    ]
    assert ax.images[0].get_extent() == [-0.5, 3.5, 1.5, -0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "7"]
    assert [text.get_text() for text in ax.get_legend().texts] == ["kept", "not kept"]


def test_two_selections_are_sorted_by_who_keeps_what() -> None:
    one = selection(["0110", "1100"], d_ff=("layer", [4, 3]))
    other = selection(["1000", "1101"], d_ff=("layer", [4, 3])).isel(layer=[1, 0])
    ax = flocking.plot.selection(one, other)
    assert kinds(ax, 2) == [
        ["first", "first", "second", "neither"],
        ["both", "both", "neither", "nothing"],
    ]
    assert [text.get_text() for text in ax.get_legend().texts] == [
        "both",
        "first alone",
        "second alone",
        "neither",
    ]


def test_lengths_are_the_overlap(recording: xr.Dataset) -> None:
    kept = flocking.select(flocking.statistic(recording), 0.5)
    a, b = kept.sel(sequence="a"), kept.sel(sequence="c")
    rows = kinds(flocking.plot.selection(a, b), 2)
    for row, share in zip(rows, flocking.jaccard(a, b).values, strict=True):
        union = sum(row.count(kind) for kind in ("both", "first", "second"))
        assert row.count("both") / union == pytest.approx(share)


def test_texts_or_one_layer_may_stand_in_the_rows(recording: xr.Dataset) -> None:
    kept = flocking.select(flocking.statistic(recording), 0.5).sel(layer=1)
    ax = flocking.plot.selection(kept)
    assert ax.get_ylabel() == "sequence"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    ax = flocking.plot.selection(kept.isel(sequence=0))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1"]


def test_a_twins_history_is_drawn() -> None:
    twin = flocking.griffin(helpers.proved("llama"), 0.5)
    twin.generate(helpers.tokens(12), max_new_tokens=2, **helpers.GREEDY)
    ax = flocking.plot.selection(twin.history.isel(position=-1))
    drawn = kinds(ax, 2)
    for layer, kept in twin.selection.items():
        row = [place for place, kind in enumerate(drawn[layer]) if kind == "both"]
        assert row == kept.flatten().tolist()
    with pytest.raises(TypeError, match=r"give a bool DataArray, such as the last of a twin's hi"):
        flocking.plot.selection(twin.selection)


def test_selections_that_cannot_be_drawn(recording: xr.Dataset) -> None:
    kept = flocking.select(flocking.statistic(recording), 0.5)
    with pytest.raises(ValueError, match=r"dimensions sequence, layer beside neuron: select one"):
        flocking.plot.selection(kept)
    one = kept.isel(sequence=0)
    with pytest.raises(ValueError, match="cannot be aligned along 'layer'"):
        flocking.plot.selection(one, one.isel(layer=[0]))
    with pytest.raises(ValueError, match="data is by layer and other by sequence"):
        flocking.plot.selection(one, kept.sel(layer=1, drop=True))
    with pytest.raises(ValueError, match="data is not a selection over neurons"):
        flocking.plot.selection(flocking.statistic(recording).isel(sequence=0))
    with pytest.raises(ValueError, match="a part of the neurons cannot be measured"):
        flocking.plot.selection(one.isel(neuron=slice(9)))
    with pytest.raises(TypeError, match="data is a ndarray: give the DataArray"):
        flocking.plot.selection(one.values)
    with pytest.raises(TypeError, match="data is a Dataset: give the DataArray"):
        flocking.plot.selection(recording)


@pytest.fixture(scope="module")
def mixture() -> xr.Dataset:
    ids = helpers.random_ids(20, 12)
    return helpers.record(helpers.proved("mixtral"), ids, window=8)


def test_shares_of_tokens_by_expert(mixture: xr.Dataset) -> None:
    ax = flocking.plot.experts(mixture)
    shares = mixture.routed.values.sum(axis=(0, 2)) / 32
    np.testing.assert_allclose(helpers.cells(ax.images[0], 2, 4), shares)
    np.testing.assert_allclose(shares.sum(axis=1), 2)  # of two experts for each token
    (equal,) = ax.figure.axes[-1].lines
    assert set(equal.get_ydata()) == {0.5}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "layer")


def test_shares_of_one_text_and_some_windows(mixture: xr.Dataset) -> None:
    part = mixture.isel(window=[1])
    ax = flocking.plot.experts(part, sequence=1, colorbar=False)
    np.testing.assert_allclose(
        helpers.cells(ax.images[0], 2, 4), mixture.routed.values[1, :, 1] / 8
    )
    ax = flocking.plot.experts(mixture.isel(layer=1, sequence=0), ax=plt.figure().gca())
    np.testing.assert_allclose(
        helpers.cells(ax.images[0], 1, 4), mixture.routed.values[:1, 1].sum(axis=1) / 20
    )


def test_dense_layers_have_no_row(mixture: xr.Dataset) -> None:
    mixed = mixture.assign_coords(experts=("layer", [1, 4]))
    ax = flocking.plot.experts(mixed)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1"]


def test_routing_that_cannot_be_drawn(recording: xr.Dataset, mixture: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="without mixtures of experts: there is no routing to dr"):
        flocking.plot.experts(recording)
    with pytest.raises(ValueError, match="no token in a layer with experts"):
        flocking.plot.experts(mixture.assign_coords(experts=("layer", [1, 1])))
    with pytest.raises(ValueError, match="no sequence 5: choose from 0, 1"):
        flocking.plot.experts(mixture, sequence=5)
    with pytest.raises(TypeError, match="expected a recording"):
        flocking.plot.experts(mixture.routed)


def test_a_part_of_the_experts_is_refused_and_labels_give_their_order(mixture: xr.Dataset) -> None:
    for part in (mixture.isel(routed_expert=[0, 1]), mixture.isel(routed_expert=[3])):
        with pytest.raises(ValueError, match=r"the recording has \d experts of 4"):
            flocking.plot.experts(part)
    labelled = mixture.assign_coords(routed_expert=np.arange(4))
    ax = flocking.plot.experts(labelled.isel(routed_expert=[2, 0, 3, 1]))
    expected = mixture.routed.values.sum(axis=(0, 2)) / 32
    np.testing.assert_allclose(helpers.cells(ax.images[0], 2, 4), expected)
    for wrong in ([0, 0, 1, 2], [1, 2, 3, 0, 1]):
        with pytest.raises(ValueError, match="or others twice: give all of them"):
            flocking.plot.experts(labelled.isel(routed_expert=wrong))


def test_nothing_is_no_selection(recording: xr.Dataset) -> None:
    kept = flocking.select(flocking.statistic(recording)).isel(sequence=0)
    for other in (None, kept.isel(layer=[])):
        with pytest.raises(ValueError, match="there is no layer to draw: data has none left"):
            flocking.plot.selection(kept.isel(layer=[]), other)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (("a", "b", "c"), ValueError, "labels has 3 names: give two"),
        ((), ValueError, "labels has 0 names"),
        (None, TypeError, "labels is a NoneType: give two names"),
        ("ab", TypeError, "labels is a str: give two names"),
    ],
)
def test_there_are_two_labels(labels: object, kind: type[Exception], message: str) -> None:
    kept = selection(["0110", "1000"])
    for other in (None, kept):
        with pytest.raises(kind, match=message):
            flocking.plot.selection(kept, other, labels=labels)
    assert plt.get_fignums() == []


def test_labels_are_no_mathematics() -> None:
    kept = selection(["0110", "1000"]).rename(layer="$a$").assign_coords({"$a$": ["$x$", "$y_$"]})
    ax = flocking.plot.selection(kept, kept, labels=("$5 and $6", "$\\bad$"))
    texts = [*ax.get_legend().get_texts(), *ax.get_yticklabels(), ax.yaxis.label]
    assert not any(text.get_parse_math() for text in texts)
    assert [text.get_text() for text in texts][1:3] == ["$5 and $6 alone", "$\\bad$ alone"]


def test_the_first_row_is_on_top_in_any_style(mixture: xr.Dataset) -> None:
    with plt.rc_context({"image.origin": "lower"}):
        for ax in (
            flocking.plot.selection(selection(["0110", "1000"])),
            flocking.plot.experts(mixture),
        ):
            assert ax.images[0].origin == "upper"


def test_pictures_that_share_an_axis_have_the_same_rows() -> None:
    kept = selection(["0110", "1000"])
    _, (first, second) = plt.subplots(2, 1, sharey=True)
    flocking.plot.selection(kept, ax=first)
    flocking.plot.selection(~kept, ax=second)
    _, (first, second) = plt.subplots(2, 1, sharey=True)
    flocking.plot.selection(kept, ax=first)
    with pytest.raises(ValueError, match="shares its y axis"):
        flocking.plot.selection(kept.assign_coords(layer=[5, 6]), ax=second)


def test_long_labels_stay_within_the_picture(recording: xr.Dataset) -> None:
    kept = flocking.select(flocking.statistic(recording))
    labels = ("articles of the New York Times, 1987", "dialogues of film scripts, " * 4)
    ax = flocking.plot.selection(kept.isel(sequence=0), kept.isel(sequence=1), labels=labels)
    ax.figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    assert box.x1 <= ax.figure.bbox.x1
    assert box.y1 <= ax.figure.bbox.y1
