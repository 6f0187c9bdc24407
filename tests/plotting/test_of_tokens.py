"""Heat maps of recordings show the values of one text and layer, and its tokens."""

from __future__ import annotations

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes

import flocking
from flocking.drawing.words import printed


def shown(ax: Axes, rows: int, columns: int = 160) -> np.ndarray:
    return helpers.cells(ax.images[0], rows, columns)


def labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def with_texts(recording: xr.Dataset, *texts: str) -> xr.Dataset:
    words = np.full(recording.token_text.shape, "x", dtype=object)
    words[:, : len(texts)] = texts
    return recording.assign_coords(token_text=(("sequence", "token"), words))


def test_shows_one_text_and_layer_without_padding(recording: xr.Dataset) -> None:
    ax = flocking.plot.heatmap(recording, layer=1, sequence="a")
    values = recording.relative.sel(layer=1, sequence="a").values.astype(np.float32)
    assert np.isnan(values[41:]).all()
    np.testing.assert_array_equal(shown(ax, 41), values[:41])
    assert ax.images[0].get_extent() == [-0.5, 159.5, 40.5, -0.5]
    assert ax.get_xlabel() == "neuron of layer 1"
    assert ax.images[0].norm.vmax == pytest.approx(np.percentile(values[:41], 99))


def test_one_layer_or_sequence_needs_no_name(recording: xr.Dataset) -> None:
    some = recording.sel(sequence=["b"]).assign(relative=recording.relative.sel(layer=[0, 1]))
    one = some.drop_vars("relative").assign(
        relative=some.relative.sel(layer=[1]).rename(layer="relative_layer")
    )
    values = recording.relative.sel(layer=1, sequence="b").values
    for given in (one, one.isel(sequence=0), recording.sel(sequence="b", layer=1)):
        ax = flocking.plot.heatmap(given, ax=plt.figure().gca(), colorbar=False)
        np.testing.assert_array_equal(shown(ax, 49), values)


def test_takes_a_part_of_the_neurons_and_their_labels(recording: xr.Dataset) -> None:
    part = recording.relative.sel(layer=0, sequence="b").isel(neuron=[3, 90, 7], token=[5, 6])
    ax = flocking.plot.heatmap(part)
    np.testing.assert_array_equal(shown(ax, *part.shape), part.values)
    ax.set_xticks([0, 1, 1.5, 2])
    texts = [label.get_text() for label in ax.get_xticklabels()]
    assert texts == ["3", "90", "", "7"]


def test_names_tokens_where_there_is_room(recording: xr.Dataset) -> None:
    known = with_texts(recording, " The", "$x$", "\n", "中", "\x00")
    part = known.relative.sel(layer=0, sequence="b")
    ax = flocking.plot.heatmap(part.isel(token=slice(8)))
    assert labels(ax) == ["·The", "$x$", "↵", "\\u4e2d", "\\x00", "x", "x", "x"]
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())
    assert ax.get_ylabel() == "token"
    small = plt.figure(figsize=(6, 1.5)).gca()
    flocking.plot.heatmap(part, ax=small)
    assert small.get_ylabel() == "token (position in the text)"
    tall = plt.figure(figsize=(6, 8)).gca()
    flocking.plot.heatmap(part, ax=tall)
    assert labels(tall)[:2] == ["·The", "$x$"]
    assert len(labels(tall)) == 49


def test_positions_stand_where_no_text_is_known(recording: xr.Dataset) -> None:
    assert not recording.token_text.values.astype(bool).any()
    ax = flocking.plot.heatmap(recording.relative.sel(layer=0, sequence="b").isel(token=[4, 5]))
    assert ax.get_ylabel() == "token (position in the text)"
    assert ax.images[0].get_extent()[2:] == [5.5, 3.5]


def test_long_texts_are_cut_and_strange_ones_escaped() -> None:
    font = plt.figure().text(0, 0, "").get_fontproperties()
    texts = ["a" * 40, "", "\u200b", "é", "\ud800"]
    assert printed(texts, font) == ["a" * 15 + "…", "", "\\u200b", "é", "\\ud800"]


def test_one_token_and_nothing_but_zeros(recording: xr.Dataset) -> None:
    one = recording.relative.sel(layer=0, sequence="a").isel(token=[0])
    assert shown(flocking.plot.heatmap(one), 1).shape == (1, 160)
    flocking.plot.heatmap(one * 0, ax=plt.figure().gca())


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda r: r.drop_vars("relative"), {}, "no variable 'relative': make it with record"),
        (lambda r: r, {"layer": 0}, "there are 3 sequences .'a', 'b', 'c'.: choose one, as in"),
        (lambda r: r, {"sequence": "a"}, "2 layers .0, 1.: choose one, as in layer=0"),
        (lambda r: r, {"sequence": "d", "layer": 0}, "no sequence 'd': choose from 'a', 'b', 'c'"),
        (lambda r: r, {"sequence": "a", "layer": 7}, "no layer 7: choose from 0, 1"),
        (
            lambda r: r.assign_coords(sequence=["a", "a", "b"]),
            {"sequence": "a", "layer": 0},
            "is there 2 times: select one by its position first",
        ),
        (
            lambda r: r.sel(layer=1),
            {"sequence": "a", "layer": 0},
            "there is no layer 0: choose from 1",
        ),
        (lambda r: r.relative.sel(layer=0), {}, "there are 3 sequences"),
        (lambda r: r.energy.isel(sequence=0, layer=0), {}, "select one sequence and one layer"),
        (lambda r: r.isel(neuron=slice(9)), {"sequence": "a", "layer": 0}, "a part of the neurons"),
        (
            lambda r: r.relative.sel(layer=0, sequence="a").isel(token=slice(45, None)),
            {},
            "no token with values",
        ),
    ],
)
def test_says_what_is_missing(recording: xr.Dataset, change, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.plot.heatmap(change(recording), **arguments)


@pytest.mark.parametrize("data", [None, "text", np.zeros((3, 4)), xr.Dataset()])
def test_wants_a_recording(data: object) -> None:
    with pytest.raises(TypeError, match="expected a recording"):
        flocking.plot.heatmap(data)


def test_draws_over_nothing(recording: xr.Dataset) -> None:
    panels = flocking.plot.scores(recording)
    ax = flocking.plot.heatmap(recording, sequence="a", layer=0)
    assert ax.figure is not panels[0].figure
    empty = plt.figure().add_subplot(1, 2, 1)
    assert flocking.plot.overlap(recording) is empty


def test_a_narrower_layer_has_its_own_scale(recording: xr.Dataset) -> None:
    values = recording.relative.sel(layer=0, sequence="b")
    narrow = values.where(values.neuron < 40)
    ax = flocking.plot.heatmap(narrow)
    expected = np.percentile(values.values[:, :40].astype(np.float32), 99)
    assert ax.images[0].get_clim() == (0, expected)


@pytest.mark.parametrize("vmax", [np.nan, -1.0, 0, np.inf, "1", True, [0.1]])
def test_the_brightest_value_is_a_number_above_0(recording: xr.Dataset, vmax: object) -> None:
    for data in (recording, recording.relative):
        with pytest.raises((ValueError, TypeError), match=r"vmax.*: give a number above 0"):
            flocking.plot.heatmap(data, layer=0, sequence="b", vmax=vmax)
    flocking.plot.heatmap(recording, layer=0, sequence="b", vmax=np.float32(0.5))


def test_the_first_token_is_on_top_in_any_style(recording: xr.Dataset) -> None:
    with plt.rc_context({"image.origin": "lower"}):
        ax = flocking.plot.heatmap(recording, sequence="a", layer=1)
    assert ax.images[0].origin == "upper"


def test_pictures_that_share_an_axis_share_its_names(recording: xr.Dataset) -> None:
    part = with_texts(recording, "one", "two").relative.sel(layer=0).isel(token=slice(8))
    other = with_texts(recording, "three", "four").relative.sel(layer=0).isel(token=slice(8))
    for shape in ((1, 2), (2, 1)):
        figure, (first, second) = plt.subplots(*shape, sharey=True)
        flocking.plot.heatmap(part.sel(sequence="a"), ax=first)
        flocking.plot.heatmap(part.sel(sequence="b"), ax=second)
        figure.canvas.draw()
        assert labels(first)[:3] == ["one", "two", "x"]
        figure, (first, second) = plt.subplots(*shape, sharey=True)
        flocking.plot.heatmap(part.sel(sequence="a"), ax=first)
        for texts in (other, part.drop_vars("token_text")):
            with pytest.raises(
                ValueError, match=r"shares its y axis .*give axes that are not shar"
            ):
                flocking.plot.heatmap(texts.sel(sequence="b"), ax=second)
            assert not second.has_data()
        figure.canvas.draw()
        assert labels(first)[:3] == ["one", "two", "x"]
    _, (first, second) = plt.subplots(2, 1, sharex=True)
    flocking.plot.heatmap(part.sel(sequence="a").isel(neuron=[3, 90, 7]), ax=first)
    with pytest.raises(ValueError, match="shares its x axis"):
        flocking.plot.heatmap(part.sel(sequence="a").isel(neuron=[4, 91, 7]), ax=second)
    _, (first, second) = plt.subplots(1, 2, sharex=True, sharey=True)
    for ax, layer in ((first, 0), (second, 1)):  # numbers are the same on both
        flocking.plot.heatmap(recording, layer=layer, sequence="a", ax=ax)


@pytest.mark.parametrize("several", [[0, 1], np.array([0, 1]), (0,)])
def test_one_layer_and_one_sequence(recording: xr.Dataset, several: object) -> None:
    for data in (recording, recording.relative, recording.relative.sel(sequence="a", layer=0)):
        with pytest.raises(TypeError, match=r"layer=.* is several: give one label"):
            flocking.plot.heatmap(data, layer=several, sequence="a")
        with pytest.raises(TypeError, match=r"sequence=.* is several: give one label"):
            flocking.plot.heatmap(data, layer=0, sequence=several)
    flocking.plot.heatmap(recording, layer=np.int64(1), sequence=np.str_("a"))
    one = recording.isel(layer=[0])
    with pytest.raises(TypeError, match=r"layer=.* is several: give one label"):
        flocking.plot.heatmap(one, layer=several, sequence="a")


def test_a_layer_that_is_not_in_the_data_is_refused(recording: xr.Dataset) -> None:
    """Also where `relative` was recorded of some layers, which have a dimension of their own."""
    one = recording.relative.isel(sequence=0)
    some = one.isel(layer=[1]).rename(layer="relative_layer")
    for given in (some, some.isel(relative_layer=0), one.isel(layer=1)):
        ax = flocking.plot.heatmap(given, layer=1)
        np.testing.assert_allclose(
            ax.collections[0].get_array().ravel() if ax.collections else ax.images[0].get_array(),
            flocking.plot.heatmap(one, layer=1).images[0].get_array()
            if not ax.collections
            else flocking.plot.heatmap(one, layer=1).collections[0].get_array().ravel(),
        )
        with pytest.raises(ValueError, match=r"layer 99|layer=99"):
            flocking.plot.heatmap(given, layer=99)
    with pytest.raises(ValueError, match="layer=1: data does not say of which layer it is"):
        flocking.plot.heatmap(one.isel(layer=1).drop_vars("layer"), layer=1)


def test_another_picture_takes_the_place_of_the_first(recording: xr.Dataset) -> None:
    few = recording.relative.sel(layer=1).isel(sequence=0, token=slice(0, 12))
    few = with_texts(recording, *"abcdefghijkl").isel(sequence=0).relative.sel(layer=1)
    figure, ax = plt.subplots()
    flocking.plot.heatmap(few.isel(token=slice(12)), ax=ax)
    assert labels(ax)[:3] == ["a", "b", "c"]
    flocking.plot.heatmap(recording, layer=1, sequence="b", ax=ax)
    figure.canvas.draw()
    assert len(ax.images) == 1
    assert len(figure.axes) == 2  # one colour bar
    assert all(label.lstrip("\N{MINUS SIGN}").isdigit() for label in labels(ax) if label)
    flocking.plot.heatmap(few.isel(neuron=[5, 3, 1]), ax=ax)
    kept = flocking.select(flocking.statistic(recording.isel(sequence=0)), 0.5)
    flocking.plot.selection(kept, ax=ax)
    assert ax.get_legend() is not None
    flocking.plot.heatmap(recording, layer=1, sequence="b", ax=ax, colorbar=False)
    figure.canvas.draw()
    assert ax.get_legend() is None
    assert figure.axes == [ax]
    places = [label.get_text() for label in ax.get_xticklabels()]
    assert all(place.lstrip("\N{MINUS SIGN}").isdigit() for place in places if place)
    ax.clear()  # by the user
    flocking.plot.heatmap(recording, layer=1, sequence="b", ax=ax)
    figure.clear()


def test_of_selected_windows_only_their_tokens_are_shown(recording: xr.Dataset) -> None:
    values = recording.relative.sel(layer=1, sequence="a").values.astype(np.float32)
    inside = recording.token_window.sel(sequence="a").values
    for windows in ([3], [4, 0, 2]):
        part = recording.isel(window=windows)
        ax = flocking.plot.heatmap(part, layer=1, sequence="a", ax=plt.figure().gca())
        expected = values[np.isin(inside, part.window.values)]
        np.testing.assert_array_equal(shown(ax, len(expected)), expected)
    last = recording.isel(window=[-1])  # which the shortest text does not reach
    with pytest.raises(ValueError, match="the text has no token in these windows"):
        flocking.plot.heatmap(last, layer=1, sequence="a")


def test_cells_keep_their_colours_where_pixels_are_no_whole_number_of_them() -> None:
    """No grid is drawn over them, either."""
    values = np.zeros((65, 61), np.float32)
    values[:, ::2] = 1
    relative = xr.DataArray(values, {"token": range(65), "neuron": range(61)}, ("token", "neuron"))
    with plt.rc_context({"axes.grid": True, "grid.color": "cyan", "savefig.dpi": 90}):
        figure, ax = plt.subplots(dpi=90)
        flocking.plot.heatmap(relative, ax=ax, colorbar=False, vmax=1)
        figure.canvas.draw()
        drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    box = ax.get_window_extent()
    inside = drawn[-int(box.y1) + 2 : -int(box.y0) - 2, int(box.x0) + 2 : int(box.x1) - 2]
    dark, bright = (np.array(ax.images[0].cmap(v)[:3]) * 255 for v in (0.0, 1.0))
    far = np.minimum(abs(inside - dark).max(axis=-1), abs(inside - bright).max(axis=-1))
    # Columns are 5.5 pixels wide, and of those between two columns there is one at most.
    assert (far > 30).mean() < 1 / 5.5


def test_a_layer_without_relative_activations_says_so() -> None:
    recording = helpers.record(helpers.proved("llama"), helpers.random_ids(9), relative=[1])
    with pytest.raises(ValueError, match="layer 0 was recorded without its relative activations"):
        flocking.plot.heatmap(recording, layer=0)
    with pytest.raises(ValueError, match="no sequence True: choose from 0"):
        flocking.plot.heatmap(recording.isel(sequence=[0, 0]), sequence=True)


def test_pictures_of_unlike_sizes_do_not_share_an_axis() -> None:
    """The second one would cut rows or neurons off the first, which has no names either."""
    values = np.random.default_rng(0).random((300, 40))
    long = xr.DataArray(values, dims=("token", "neuron"), coords={"token": range(300)})
    long = long.assign_coords(neuron=range(40))
    for share, other in (("sharey", long[:200]), ("sharex", long[:, :30])):
        _, (one, two) = plt.subplots(1, 2, **{share: True})
        flocking.plot.heatmap(long, ax=one)
        limits = one.get_xlim(), one.get_ylim()
        with pytest.raises(ValueError, match="same names and limits"):
            flocking.plot.heatmap(other, ax=two)
        assert (one.get_xlim(), one.get_ylim()) == limits
        flocking.plot.heatmap(long + 1, ax=two)


def test_what_is_sparse_is_seen() -> None:
    """The brightest colour is that of large values, also where nearly all are 0."""
    values = np.zeros((100, 50), np.float32)
    values[3, :5] = 0.01
    ax = flocking.plot.heatmap(xr.DataArray(values, dims=("token", "neuron")))
    assert ax.images[0].norm.vmax == pytest.approx(0.01)
