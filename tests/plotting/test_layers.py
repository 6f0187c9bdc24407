"""Scores and overlaps by layer: lines hold what the measures say, with chance and a control."""

from __future__ import annotations

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

import flocking

NAMES = ["flocking_score", "rank_consistency", "effective_neurons"]


@pytest.fixture(scope="module")
def control() -> xr.Dataset:
    ids = helpers.random_ids(41, 49, 45, seed=4)
    random = flocking.control(helpers.proved("llama"), 1)
    return helpers.record(random, ids, window=8, prompt_tokens=33, ranks=True)


def line(ax: Axes, label: str) -> np.ndarray:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(found.get_ydata(), float)


def bands(ax: Axes) -> list[np.ndarray]:
    return [band.get_paths()[0].vertices[:, 1] for band in ax.collections if len(band.get_paths())]


def test_scores_are_the_measures_with_their_bands(
    recording: xr.Dataset, control: xr.Dataset
) -> None:
    axes = flocking.plot.scores(recording, control=control)
    assert axes.shape == (3,)
    assert [ax.get_ylabel() for ax in axes] == [name.replace("_", " ") for name in NAMES]
    for given, label in ((recording, "model"), (control, "random weights (control)")):
        for ax, name in zip(axes, NAMES, strict=True):
            expected = flocking.bootstrap(getattr(flocking, name)(given))
            np.testing.assert_allclose(line(ax, label), expected.sel(interval="estimate"))
            low, high = (expected.sel(interval=end).values for end in ("low", "high"))
            assert any(np.isin(low, y).all() and np.isin(high, y).all() for y in bands(ax))
    assert set(line(axes[0], "chance")) == set(line(axes[1], "chance")) == {0}
    equal = line(axes[2], "all equal ($d_{ff}$)")
    assert set(equal) == {160}
    looks = [
        (drawn.get_linestyle(), drawn.get_color())
        for ax, label in ((axes[0], "chance"), (axes[2], "all equal ($d_{ff}$)"))
        for drawn in ax.lines
        if drawn.get_label() == label
    ]
    assert looks[0] != looks[1]
    legends = [text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().texts]
    assert legends == ["model", "chance", "random weights (control)", "all equal ($d_{ff}$)"]


def test_scores_without_ranks_say_how_to_record_them(recording: xr.Dataset) -> None:
    figure, given = plt.subplots(3, 1)
    axes = flocking.plot.scores(recording.drop_vars("rank"), axes=given)
    assert [*axes] == [*given]
    assert [text.get_text() for text in axes[1].texts] == [
        "no ranks in the recording:\nmake it with record(..., ranks=True)"
    ]
    assert not axes[1].lines
    assert len(axes[0].lines) == 2
    assert not figure.legends
    assert axes[0].get_legend() is None


def test_scores_of_which_one_has_no_ranks_say_which(recording: xr.Dataset) -> None:
    without = recording.drop_vars("rank")
    for data, control, said in ((recording, without, "control: "), (without, recording, "data: ")):
        axes = flocking.plot.scores(data, control=control)
        assert [text.get_text() for text in axes[1].texts] == [
            f"{said}no ranks in the recording:\nmake it with record(..., ranks=True)"
        ]
        assert len(axes[1].lines) == 2  # what is there, and chance
        assert len(axes[1].get_yticks())


def test_scores_and_overlaps_of_summaries_and_pairs(recording: xr.Dataset) -> None:
    running = flocking.RunningScores()
    running.update(recording)
    axes = flocking.plot.scores(running.result())
    expected = flocking.flocking_score(recording).mean("sequence")
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), expected)
    pairs = flocking.between_sequence_overlap(recording, 0.5, pairs="all")
    ax = flocking.plot.overlap(pairs)
    expected = flocking.bootstrap(pairs.between).sel(interval="estimate")
    np.testing.assert_allclose(line(ax, "between two texts"), expected)


def test_scores_of_results_and_their_averages(recording: xr.Dataset) -> None:
    values = xr.Dataset({name: getattr(flocking, name)(recording) for name in NAMES})
    for given in (values, flocking.bootstrap(values), values.mean("sequence")):
        axes = flocking.plot.scores(given)
        for ax, name in zip(axes, NAMES, strict=True):
            np.testing.assert_allclose(line(ax, "model"), values[name].mean("sequence"))


@pytest.mark.parametrize("layer", [1, [1]])
def test_scores_of_one_layer_and_one_sequence_are_points(recording: xr.Dataset, layer) -> None:
    one = recording.sel(sequence="b", layer=layer)
    axes = flocking.plot.scores(one)
    (drawn,) = [found for found in axes[0].lines if found.get_label() == "model"]
    expected = flocking.flocking_score(recording.sel(layer=1)).sel(sequence="b")
    assert (drawn.get_xdata().item(), drawn.get_marker()) == (1, "o")
    assert drawn.get_ydata().item() == pytest.approx(expected.item())
    # Of several sequences, the interval is a stroke.
    axes = flocking.plot.scores(recording.sel(layer=[1]))
    ends = axes[0].collections[0].get_segments()[0][:, 1]
    interval = flocking.bootstrap(flocking.flocking_score(recording)).sel(layer=1)
    np.testing.assert_allclose(ends, interval.sel(interval=["low", "high"]))


def test_scores_of_chosen_windows(recording: xr.Dataset) -> None:
    part = recording.sel(window=recording.phase == "generation")
    axes = flocking.plot.scores(part)
    expected = flocking.flocking_score(part).mean("sequence")
    np.testing.assert_allclose(line(axes[0], "model"), expected)


def test_scores_of_a_mixture_with_narrower_layers() -> None:
    ids = helpers.random_ids(17, 20)
    given = helpers.record(helpers.proved("mixtral"), ids)
    narrow = given.assign_coords(d_ff=("layer", [160, 40]))
    for name in ("energy", "mass"):
        narrow[name] = narrow[name].where((narrow.neuron < 40) | (narrow.layer == 0), 0)
    axes = flocking.plot.scores(narrow)
    assert line(axes[2], "all equal ($d_{ff}$)").tolist() == [160, 40]


@pytest.mark.filterwarnings("ignore:1 of 1 sequences have fewer than two tokens")
def test_scores_of_one_token_are_empty() -> None:
    given = helpers.record(helpers.proved("llama"), [[5]], ranks=True)
    axes = flocking.plot.scores(given)
    assert all(np.isnan(line(ax, "model")).all() for ax in axes)


def test_scores_by_words_for_layers(recording: xr.Dataset) -> None:
    axes = flocking.plot.scores(recording.assign_coords(layer=["first", "last"]))
    axes[0].figure.canvas.draw()
    assert {label.get_text() for label in axes[2].get_xticklabels()} == {"first", "last"}


def test_scores_refuse_what_they_cannot_draw(recording: xr.Dataset) -> None:
    with pytest.raises(TypeError, match="data is a list: give a recording"):
        flocking.plot.scores([recording])
    with pytest.raises(TypeError, match="data is a NoneType: give a recording"):
        flocking.plot.scores(None)
    with pytest.raises(ValueError, match="data has no 'flocking_score': give a recording"):
        flocking.plot.scores(xr.Dataset())
    with pytest.raises(ValueError, match="axes: give 3"):
        flocking.plot.scores(recording, axes=plt.subplots(2)[1])
    with pytest.raises(ValueError, match="axes: give 3"):
        flocking.plot.scores(recording, axes=plt.gca())
    with pytest.raises(ValueError, match="measure before averaging"):
        flocking.plot.scores(recording.mean("layer"))


def test_overlaps_within_and_between_texts_and_of_the_generation(
    recording: xr.Dataset, control: xr.Dataset
) -> None:
    ax = flocking.plot.overlap(recording, 0.25, control=control)
    for given, weights in ((recording, "model"), (control, "random weights")):
        overlaps = flocking.between_sequence_overlap(given, 0.25)
        overlaps["generation"] = flocking.prompt_generation_overlap(given, 0.25)
        names = ("within a text", "between two texts", "prompt and generation")
        for name, label in zip(overlaps, names, strict=True):
            expected = flocking.bootstrap(overlaps[name])
            drawn = line(ax, f"{label}, {weights}")
            np.testing.assert_allclose(drawn, expected.sel(interval="estimate"))
    assert set(line(ax, "chance")) == {0.25 / 1.75}


def test_overlap_of_one_text_is_that_of_its_generation(recording: xr.Dataset) -> None:
    one = recording.isel(sequence=[0])
    ax = flocking.plot.overlap(one, [0.25, 0.5])
    expected = flocking.prompt_generation_overlap(one, [0.25, 0.5])
    np.testing.assert_allclose(line(ax, "prompt and generation"), expected[0])
    np.testing.assert_allclose(line(ax, "chance"), [0.25 / 1.75, 0.5 / 1.5])


def test_overlap_takes_intervals_of_few_texts() -> None:
    """Their bounds may lie above 1."""
    values = xr.DataArray(
        [[0.5, 0.6], [0.9, 0.6]], {"layer": [0, 1]}, ("sequence", "layer"), name="jaccard"
    )
    found = flocking.bootstrap(values)
    assert found.max() > 1
    ax = flocking.plot.overlap(found)
    np.testing.assert_allclose(line(ax, "two selections"), [0.7, 0.6])
    with pytest.raises(ValueError, match="no overlap of selections"):
        flocking.plot.overlap(found + 1)


def test_overlap_takes_results(recording: xr.Dataset) -> None:
    early, late = (
        flocking.select(flocking.statistic(recording, phase=phase), 0.5)
        for phase in ("prompt", "generation")
    )
    values = flocking.jaccard(early, late)
    ax = flocking.plot.overlap(values)
    np.testing.assert_allclose(line(ax, "two selections"), values.mean("sequence"))
    of_generation = flocking.prompt_generation_overlap(recording, 0.5)
    for given in (of_generation, flocking.bootstrap(of_generation)):
        ax = flocking.plot.overlap(given, ax=plt.figure().gca())
        np.testing.assert_allclose(
            line(ax, "prompt and generation"), of_generation.mean("sequence")
        )
    ax = flocking.plot.overlap(
        flocking.bootstrap(flocking.between_sequence_overlap(recording)), ax=plt.figure().gca()
    )
    assert len(ax.lines) == 3


def test_overlap_says_what_is_missing(recording: xr.Dataset) -> None:
    prompt = recording.sel(window=recording.phase != "generation")
    with pytest.raises(ValueError, match="expected two sequences or more, got 1: record several"):
        flocking.plot.overlap(prompt.isel(sequence=[0]))
    with pytest.raises(ValueError, match="record with a smaller window"):
        flocking.plot.overlap(prompt.isel(window=[0, 1]))
    with pytest.raises(TypeError, match="data is a NoneType: give a recording"):
        flocking.plot.overlap(None)
    swept = flocking.prompt_generation_overlap(recording, densities=[0.25, 0.5])
    with pytest.raises(ValueError, match="has dimensions density, too: select one of each"):
        flocking.plot.overlap(swept)


@pytest.mark.parametrize("plot", ["scores", "overlap", "drift"])
def test_what_is_empty_is_said_to_be(recording: xr.Dataset, plot: str) -> None:
    for dim in ("sequence", "layer"):
        with pytest.raises(ValueError, match=f"there is no {dim} to draw"):
            getattr(flocking.plot, plot)(recording.isel({dim: []}))


@pytest.mark.parametrize("options", [{}, {"sharex": True}])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_panels_keep_the_labels_of_their_own_scales(
    recording: xr.Dataset, shape: tuple[int, int], options: dict
) -> None:
    figure, given = plt.subplots(*shape, **options)
    axes = flocking.plot.scores(recording, axes=given)
    figure.canvas.draw()
    for number, ax in enumerate(axes):
        inner = shape == (3, 1) and "sharex" in options and number < 2
        assert ax.get_xlabel() == ("" if inner else "layer")
        assert any(label.get_visible() for label in ax.get_yticklabels())
    _, shared = plt.subplots(*shape, sharey=True)
    with pytest.raises(ValueError, match="axes share their y axis, and what is drawn on them has"):
        flocking.plot.scores(recording, axes=shared)
    assert not any(ax.has_data() for ax in shared)


def test_axes_may_be_any_iterable(recording: xr.Dataset) -> None:
    for make in (
        lambda: plt.figure().subplot_mosaic("ab;cc").values(),
        lambda: plt.figure().subplot_mosaic("ab;cc"),
        lambda: iter(plt.subplots(3)[1]),
        lambda: [plt.subplots(2)[1], plt.figure().gca()],
        lambda: plt.subplots(1, 3, squeeze=False)[1],
    ):
        assert flocking.plot.scores(recording, axes=make()).shape == (3,)


@pytest.mark.parametrize("give", [lambda: "abc", lambda: 3, plt.figure, lambda: [1, 2, 3]])
def test_what_is_no_axes_is_refused_by_all(recording: xr.Dataset, give) -> None:
    given = give()
    kept = flocking.select(flocking.statistic(recording)).isel(sequence=0)
    with pytest.raises(TypeError, match="axes: give 3, as"):
        flocking.plot.scores(recording, axes=given)
    with pytest.raises(TypeError, match="axes: give 2, as"):
        flocking.plot.drift(recording, axes=given)
    for draw in (
        lambda ax: flocking.plot.overlap(recording, ax=ax),
        lambda ax: flocking.plot.heatmap(recording, layer=0, sequence="a", ax=ax),
        lambda ax: flocking.plot.selection(kept, ax=ax),
        lambda ax: flocking.plot.experts(recording, ax=ax),
    ):
        with pytest.raises(TypeError, match=f"ax is a {type(given).__name__}: give axes to draw"):
            draw(given)
    with pytest.raises(TypeError, match="ax is a ndarray"):
        flocking.plot.overlap(recording, ax=plt.subplots(2)[1])


def test_the_same_axes_are_no_three(recording: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"axes: give 3, as .* not 1 different ones"):
        flocking.plot.scores(recording, axes=[plt.gca()] * 3)


def test_refusals_leave_no_figure_and_nothing_on_those_that_are_there(
    recording: xr.Dataset,
) -> None:
    averaged = recording.mean("layer")
    mine, other = plt.figure(), plt.figure()
    given = mine.subplots(3)
    plt.figure(other.number)
    for draw in (
        lambda: flocking.plot.scores(recording, control=averaged, axes=given),
        lambda: flocking.plot.scores(averaged),
        lambda: flocking.plot.overlap(averaged),
        lambda: flocking.plot.drift(averaged),
        lambda: flocking.plot.heatmap(recording),
        lambda: flocking.plot.scores(flocking.drift(recording)),
        lambda: flocking.plot.experts(recording),
        lambda: flocking.plot.selection(recording.energy),
    ):
        with pytest.raises((ValueError, TypeError)):
            draw()
        assert plt.get_fignums() == [mine.number, other.number]
        assert plt.gcf() is other
        assert not other.axes
    assert not any(ax.has_data() for ax in given)


def test_what_is_no_overlap_is_refused(recording: xr.Dataset) -> None:
    for measure in (flocking.flocking_score, flocking.consistency, flocking.effective_neurons):
        values = measure(recording)
        for given in (values, values.mean("sequence"), values.to_dataset(), values * 0.5):
            with pytest.raises(ValueError, match="is no overlap of selections, from 0 to 1"):
                flocking.plot.overlap(given)
    with pytest.raises(ValueError, match="'mine', which is no overlap"):
        flocking.plot.overlap(xr.DataArray([0.5, 1.5], dims="layer", name="mine"))
    ax = flocking.plot.overlap(xr.DataArray([0.5, np.nan, 1], dims="layer", name="$x$ and $y$"))
    ax.figure.canvas.draw()
    (text,) = ax.get_legend().get_texts()
    assert text._preprocess_math(text.get_text()) == ("$x$ and $y$", False)


def test_short_texts_with_a_generation(recording: xr.Dataset) -> None:
    ids = helpers.random_ids(27, 30, seed=7)
    short = helpers.record(helpers.proved("llama"), ids, window=16, prompt_tokens=9)
    ax = flocking.plot.overlap(short)
    expected = flocking.prompt_generation_overlap(short).mean("sequence")
    np.testing.assert_allclose(line(ax, "prompt and generation"), expected)
    assert [one.get_label() for one in ax.lines] == ["prompt and generation", "chance"]
    longer = helpers.record(helpers.proved("llama"), ids, window=16, prompt_tokens=[9, 12])
    with pytest.raises(ValueError, match="has 8 tokens of a prompt after the first, fewer than a"):
        flocking.between_sequence_overlap(longer)
    ax = flocking.plot.overlap(longer, ax=plt.figure().gca())
    expected = flocking.prompt_generation_overlap(longer).mean("sequence")
    np.testing.assert_allclose(line(ax, "prompt and generation"), expected)
    with pytest.raises(ValueError, match="density=7"):
        flocking.plot.overlap(short, 7)


def test_layers_in_any_order_are_drawn_from_left_to_right(recording: xr.Dataset) -> None:
    turned = recording.isel(layer=slice(None, None, -1))
    assert turned.layer.values.tolist() == [1, 0]
    for plot in (flocking.plot.scores, lambda data: [flocking.plot.overlap(data, [0.25, 0.5])]):
        for ax, other in zip(plot(turned), plot(recording), strict=True):
            assert len(ax.get_lines()) == len(other.get_lines())
            for line in ax.get_lines():
                assert (np.diff(line.get_xdata()) >= 0).all()
    ax, other = (flocking.plot.scores(data)[0] for data in (turned, recording))
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), other.lines[0].get_xydata())


@pytest.mark.parametrize("projection", ["polar", "3d"])
def test_axes_without_right_angles_are_refused_before_anything_is_drawn(
    recording: xr.Dataset, projection: str
) -> None:
    ax = plt.figure().add_subplot(projection=projection)
    kept = flocking.select(flocking.statistic(recording.isel(sequence=0)), 0.5)
    for draw in (
        lambda: flocking.plot.overlap(recording, ax=ax),
        lambda: flocking.plot.heatmap(recording, layer=1, sequence="a", ax=ax),
        lambda: flocking.plot.selection(kept, ax=ax),
        lambda: flocking.plot.scores(recording, axes=[*plt.subplots(2)[1], ax]),
    ):
        with pytest.raises(ValueError, match=f"{projection} axes are given, and plots need an x"):
            draw()
    assert not ax.has_data()
    plt.figure().add_subplot(projection=projection)
    assert flocking.plot.overlap(recording).name == "rectilinear"  # not the current axes


def test_a_legend_that_is_there_gets_the_lines_that_it_lacks(recording: xr.Dataset) -> None:
    ax = plt.subplots()[1]
    ax.plot([0, 1], [0, 0.1], label="mine")
    ax.legend(title="Lines")
    flocking.plot.overlap(flocking.between_sequence_overlap(recording, 0.5), ax=ax)
    kept = flocking.select(flocking.statistic(recording), 0.5)
    flocking.plot.overlap(flocking.jaccard(*(kept.isel(sequence=n) for n in (0, 1))), ax=ax)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [*("mine", "within a text", "between two texts", "chance", "two selections")]
    assert ax.get_legend().get_title().get_text() == "Lines"


@pytest.mark.parametrize("context", ["paper", "talk", "poster"])
def test_a_legend_leaves_room_for_the_axes(recording: xr.Dataset, context: str) -> None:
    with sns.plotting_context(context):
        for axes in (
            flocking.plot.scores(recording, control=recording),
            flocking.plot.drift(recording, control=recording),
        ):
            axes[0].figure.canvas.draw()
            width = axes[0].figure.bbox.width
            assert axes[0].get_window_extent().width > width / 2
            if context != "poster":  # where one entry is wider than the figure
                assert axes[0].get_legend().get_window_extent().x1 <= width


def test_lines_for_chance_are_seen_on_a_dark_background(recording: xr.Dataset) -> None:
    with plt.style.context("dark_background"):
        axes = flocking.plot.scores(recording)
        later = flocking.plot.drift(recording, prompt_lengths=[9, 17])
    (equal,) = [line for line in axes[2].lines if "equal" in line.get_label()]
    (chance,) = [line for line in axes[0].lines if line.get_label() == "chance"]
    assert float(equal.get_color()) > 0.8
    assert float(chance.get_color()) > 0.5
    short, long = (
        np.dot(line.get_color(), (0.2126, 0.7152, 0.0722))
        for line in later[0].lines
        if line.get_label().startswith("prompt of")
    )
    assert short < long  # the longest prompt's is the strongest there, too


def test_a_transparent_background_is_not_taken_for_black(recording: xr.Dataset) -> None:
    with plt.rc_context({"axes.facecolor": "none"}):
        axes = flocking.plot.scores(recording)
    (equal,) = [line for line in axes[2].lines if "equal" in line.get_label()]
    assert float(equal.get_color()) < 0.2


@pytest.mark.parametrize("plot", ["scores", "overlap", "drift"])
def test_a_control_that_is_none_is_named(recording: xr.Dataset, plot: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^control "):
        getattr(flocking.plot, plot)(recording, control=xr.Dataset())
