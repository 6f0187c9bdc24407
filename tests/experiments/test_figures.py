"""Figures draw the data they are given: the tests read the artists, not pixels."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.legend import Legend

import flocking
from flocking import artifacts
from flocking.drawing import BY_REFERENCE, BY_SELECTION, heatmap, logarithmic, shown
from flocking.experiments import activations, reproduce
from flocking.experiments.figures import FIGURES

COMMITTED = Path(__file__).parents[2] / "figures"


@pytest.fixture
def relative(llama):
    texts = helpers.random_ids(30, 12)
    recording = flocking.record(llama, texts, relative=[1], progress=False)
    return recording.relative.sel(relative_layer=1)


def test_heatmap_shows_tokens_by_neurons(relative) -> None:
    figure, axes = plt.subplots(1, 2)
    data = relative.sel(sequence=0).isel(neuron=slice(10, 40), token=slice(1, None))
    ax = heatmap(data, axes[0])
    assert ax is axes[0]
    (image,) = ax.images
    shown = data.values.astype(np.float32)
    np.testing.assert_allclose(helpers.cells(image, *shown.shape), shown)
    assert image.get_extent() == [9.5, 39.5, 29.5, 0.5]  # neuron and token numbers, first on top
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("neuron", "token (position in the text)")
    assert image.norm.vmin == 0
    assert image.norm.vmax == pytest.approx(np.percentile(data.values.astype(np.float32), 99))
    assert "relative activation" in figure.axes[-1].get_ylabel()
    plt.close(figure)


def test_heatmap_leaves_padding_out(relative) -> None:
    figure, ax = plt.subplots()
    heatmap(relative.sel(sequence=1), ax, colorbar=False)
    assert helpers.cells(ax.images[0], 12, 160).shape == (12, 160)
    assert len(figure.axes) == 1
    plt.close(figure)


def test_heatmap_wants_one_sequence_and_layer(relative) -> None:
    with pytest.raises(ValueError, match="select one sequence and one layer"):
        heatmap(relative)


@pytest.mark.parametrize("name", FIGURES)
def test_legends_and_labels_are_whole(name: str) -> None:
    """Nothing reaches over the picture's edges, and no axis label into a legend."""
    data = artifacts.from_json((COMMITTED / f"{name}.json").read_text("utf-8"))
    figure = FIGURES[name](data)
    figure.canvas.draw()
    whole = figure.bbox
    legends = [found.get_window_extent() for found in figure.findobj(Legend)]
    labels = [
        label.get_window_extent()
        for ax in figure.findobj(Axes)
        for label in (ax.xaxis.label, ax.yaxis.label)
        if label.get_text()
    ]
    for box in legends + labels:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert not any(label.overlaps(box) for label in labels for box in legends)
    plt.close(figure)


def test_the_users_own_style_is_left_out_and_no_figure_is_left() -> None:
    data = artifacts.from_json((COMMITTED / "scores.json").read_text())
    with plt.rc_context({"axes.grid": True, "figure.facecolor": "black", "text.usetex": True}):
        figure = FIGURES["scores"](data.assign_attrs(model="$-large_$_a_b"))
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert not any(line.get_visible() for ax in figure.axes for line in ax.get_xgridlines())
    figure.canvas.draw()
    plt.close("all")
    with pytest.raises(KeyError, match="texts"):
        FIGURES["scores"](data.drop_attrs().assign_attrs(caption=""))
    assert not plt.get_fignums()


def test_labels_are_shown_as_they_are() -> None:
    _, ax = plt.subplots()
    ax.plot([0, 1], label=shown("_merged$"))
    (label,) = ax.legend().get_texts()
    assert label.get_text().endswith("_merged\\$")
    plt.close("all")


def test_every_experiment_has_a_figure() -> None:
    assert reproduce.EXPERIMENTS.keys() == FIGURES.keys()


def lines_of(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in ax.lines]


def drawn(ax: Axes, expected: np.ndarray) -> bool:
    return any(
        y.shape == expected.shape and np.allclose(y, expected, rtol=1e-9) for y in lines_of(ax)
    )


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_committed_figures_show_their_numbers(name: str) -> None:
    """Drawn again from their JSON files: artists hold the numbers that the file holds."""
    content = json.loads((COMMITTED / f"{name}.json").read_text())
    data = artifacts.from_json(json.dumps(content))
    figure = FIGURES[name](data)
    axes = figure.subfigs[0].axes
    for ax in axes:
        at = ax.get_subplotspec()
        if at is not None and name != "heatmaps":  # not a colour bar; axes share their labels
            assert ax.get_xlabel() or not at.is_last_row()
            texts = [label.get_text() for label in ax.get_yticklabels()]
            named = {
                "hindsight: scored tokens",
                "global-local: own beginning",
                "random (chance)",
                *(data.text.values if "text" in data.dims else ()),
            }
            assert ax.get_ylabel() or not at.is_first_col() or texts[0] in named
    (told,) = figure.subfigs[1].texts
    assert 1 <= len(told.get_text().splitlines()) <= 2
    assert data.attrs["model"] in told.get_text()
    page = (COMMITTED / f"{name}.md").read_text()
    assert page.startswith(f"# {name}, {data.attrs['model']}\n\n![{name}]({name}.svg)\n")
    assert data.attrs["caption"] in page.splitlines()

    numbers = content["data_vars"]  # read a second time, without xarray
    if name == "heatmaps":
        images = [helpers.cells(ax.images[0], 128, 256) for ax in axes[:4]]
        expected = np.array(numbers["relative"]["data"], float)
        for image, values in zip(images, expected.reshape(-1, *expected.shape[2:]), strict=True):
            np.testing.assert_allclose(image, values, rtol=1e-6)
    elif name == "text_kinds":
        assert numbers["effective_neurons"]["dims"] == ["weights", "text", "layer"]
        rows = {tuple(row) for row in numbers["effective_neurons"]["data"][0]}
        (mesh,) = axes[0].collections
        assert {tuple(row) for row in np.asarray(mesh.get_array())} == rows
        shown = {round(x, 6) for line in axes[1].lines for x in np.ravel(line.get_xdata())}
        for weights in numbers["over_layers"]["data"][0]:
            assert {round(x, 6) for x in weights} <= shown
    elif name == "loss_by_method":
        names = numbers["perplexity"]["dims"], numbers["excess"]["dims"]
        assert names == (["interval", "selection"], ["text", "excerpt", "selection"])
        (upper, lower) = axes
        shown = [line.get_xdata().item() for line in upper.lines if len(line.get_xdata()) == 1]
        values = np.array(numbers["relative"]["data"][0])
        order = values.argsort()  # best first; the full model, which comes first, is not drawn
        assert order[0] == 0
        assert shown == pytest.approx(values[order[1:]].tolist())
        names = [content["coords"]["selection"]["data"][n] for n in order[1:]]
        labels = [label.get_text() for label in upper.get_yticklabels()]
        assert labels == [BY_SELECTION[name]["label"] for name in names]
        x, y = (np.array(numbers[which]["data"], float) for which in ("captured", "excess"))
        *points, _, _ = lower.lines  # the last are the full model's level, and chance
        for column, line in zip(order[1:], points, strict=True):
            np.testing.assert_allclose(line.get_xdata(), x[..., column].ravel())
            np.testing.assert_allclose(line.get_ydata(), y[..., column].ravel())
        assert len(points) == x.shape[-1] - 1
    elif name == "loss_by_reference":
        assert numbers["relative"]["dims"] == ["interval", "selection", "prompt_length"]
        values = np.array(numbers["relative"]["data"][0])
        selections = content["coords"]["selection"]["data"]
        expected = [selections.index(name) for name in BY_REFERENCE]
        columns = values.shape[1]
        for upper, lower, column in zip(axes[:columns], axes[columns:], values.T, strict=True):
            lines = [*upper.lines, *lower.lines]
            shown = [line.get_xdata().item() for line in lines if len(line.get_xdata()) == 1]
            assert shown == pytest.approx(column[expected].tolist())
        labels = [label.get_text() for ax in axes[::columns] for label in ax.get_yticklabels()]
        assert labels == [style["label"] for style in BY_REFERENCE.values()]
        assert len(expected) == len(selections) - 1  # the full model is the line at 1
    elif name == "loss_by_lengths":
        dims = ["interval", "selection", "prompt_length", "horizon"]
        assert numbers["relative"]["dims"] == numbers["agreement"]["dims"] == dims
        selections = content["coords"]["selection"]["data"]
        ratios, shares = (np.array(numbers[of]["data"][0]) for of in ("relative", "agreement"))
        expected = [
            *(ratios[selections.index(one)] for one in ("GRIFFIN", "static", "global-local")),
            ratios[selections.index("random")],
            np.array(numbers["over_static"]["data"][0]),
            shares[selections.index("GRIFFIN")],
        ]
        for ax, values in zip(axes, expected, strict=True):
            np.testing.assert_allclose(ax.images[0].get_array(), values)
            assert len(ax.texts) == values.size
    else:
        panels = {
            "scores": ["flocking_score", "rank_consistency", "effective_neurons"],
            "token_order": [
                "flocking_score",
                "flocking_score_change",
                "rank_consistency",
                "overlap",
            ],
            "atlas": ["settled"],
            "sequence_overlap": ["within", "between", "specificity", "different_tokens"],
            "overlap_by_density": ["within", "between"],
            "generation": ["jaccard_mean", "captured_mean"],
            "drift": ["jaccard", "captured"],
            "loss_by_prompt": ["relative"],
            "loss_by_density": ["relative", "over_static"],
            "loss_by_allocation": ["over_one"],
            "loss_by_batch": ["relative", "over_alone", "over_static"],
            "loss_by_distance": ["relative", "agreement"],
        }[name]

        def lines(variable: str, interval: int) -> np.ndarray:
            """A row for each line; the full model, in units of itself, is not drawn."""
            values = np.atleast_2d(np.array(numbers[variable]["data"][interval], float))
            values = values[1:] if variable in ("relative", "agreement") else values
            return values.reshape(-1, values.shape[-1])

        for variable in panels:
            dims = numbers[variable]["dims"]
            assert dims[0] == "interval"
            estimate = lines(variable, 0)
            for series in estimate:
                assert any(drawn(ax, series) for ax in axes), (name, variable)
        bands = [c for ax in axes for c in ax.collections]
        low, high = (lines(panels[0], n)[0] for n in (1, 2))
        spans = [c.get_paths()[0].vertices[:, 1] for c in bands if c.get_paths()]
        assert any(np.isin(low, y).all() and np.isin(high, y).all() for y in spans)
    plt.close(figure)


def test_committed_captions_are_of_this_model() -> None:
    for name in reproduce.EXPERIMENTS:
        content = json.loads((COMMITTED / f"{name}.json").read_text())
        assert content["attrs"]["model"] == "SmolLM2-135M-Instruct"
        assert content["attrs"]["seed"] == 0
        assert (COMMITTED / f"{name}.png").exists()
        assert (COMMITTED / f"{name}.svg").exists()
    assert activations.WEIGHTS == ["trained", "control"]


@pytest.mark.parametrize("name", FIGURES)
def test_given_something_else_they_say_what_they_draw(name: str, relative) -> None:
    recording = relative.to_dataset(name="relative")
    for given in (None, "scores", [1.0], relative.values):
        with pytest.raises(TypeError, match=f"{name} draws the numbers of an experiment"):
            FIGURES[name](given)
    for given in (recording, recording.assign_attrs(caption=""), {}):
        with pytest.raises((ValueError, TypeError), match=r"of your own, use flocking\.plot"):
            FIGURES[name](given)


@pytest.mark.parametrize("name", FIGURES)
def test_chance_is_dotted_and_other_levels_are_not(name: str) -> None:
    data = artifacts.from_json((COMMITTED / f"{name}.json").read_text("utf-8"))
    figure = FIGURES[name](data)
    levels = {"full model", "no difference", "all equal ($d_{ff}$)", "as similar as two texts"}
    for ax in figure.findobj(Axes):
        for line in ax.lines:
            if line.get_label() == "chance":
                assert (line.get_linestyle(), line.get_color()) == (":", "0.35")
            elif line.get_label() in levels:
                assert (line.get_linestyle(), line.get_color()) == ("-", "0.1")
    plt.close(figure)


def test_drift_uses_its_axes_and_chance_takes_little_of_the_losses() -> None:
    def figure_of(name: str) -> list[Axes]:
        data = artifacts.from_json((COMMITTED / f"{name}.json").read_text("utf-8"))
        figure = FIGURES[name](data)
        figure.canvas.draw()
        return figure.subfigs[0].axes

    for ax in figure_of("drift"):
        values = np.concatenate([y for y in lines_of(ax) if np.isfinite(y).any()])
        low, high = ax.get_ylim()
        assert np.ptp(values[np.isfinite(values)]) > 0.75 * (high - low)
    axes = figure_of("loss_by_prompt")
    (chance,) = [ax for ax in axes if any("random" in str(y.get_label()) for y in ax.lines)]
    heights = [ax.get_position().height for ax in axes if ax is not chance and ax.axison]
    assert chance.get_position().height < 0.25 * max(heights)
    plt.close("all")


def test_the_atlas_shows_its_overlaps_and_shares() -> None:
    data = artifacts.from_json((COMMITTED / "atlas.json").read_text("utf-8"))
    figure = FIGURES["atlas"](data)
    axes = figure.subfigs[0].axes
    for ax, weights in zip(axes[:2], data.weights.values, strict=True):
        (mesh,) = ax.collections
        np.testing.assert_allclose(mesh.get_array(), data.overlap.sel(weights=weights))
    for weights in data.weights.values:
        for dealt in data.dealt.values:
            assert drawn(axes[2], data.share.sel(weights=weights, dealt=dealt).values)
    assert drawn(axes[2], data.chance.values)
    plt.close(figure)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 3e7, ["1", "100", "10000", "$10^{6}$"]),
        (1e-5, 2, ["$10^{-5}$", "$10^{-4}$", "0.001", "0.01", "0.1", "1"]),
    ],
)
def test_ticks_of_a_wide_axis_are_numbers(low: float, high: float, expected: list[str]) -> None:
    figure, ax = plt.subplots(figsize=(3, 2.4))
    ax.plot([0, 1], [low, high])
    logarithmic(ax, ax.yaxis)
    figure.canvas.draw()
    seen = [
        label.get_text()
        for place, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
        if low * 0.99 <= place <= high
    ]
    assert seen == expected
    assert not ax.yaxis.get_offset_text().get_text()
    plt.close(figure)
