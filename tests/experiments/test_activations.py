"""The experiments on a tiny model: what they plot is what the metrics say; files are redrawn."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes

import flocking
from flocking import artifacts
from flocking.drawing import BY_SELECTION
from flocking.experiments import activations, reproduce
from flocking.experiments.activations import EXPERIMENTS
from flocking.experiments.figures import FIGURES

COMMITTED = Path(__file__).parents[2] / "figures"


@pytest.fixture(scope="module")
def subject() -> tuple:
    """A tiny model that reads the packaged passages, with a context long enough for them."""
    _, tokenizer = flocking.load()
    model = helpers.build("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    return model, tokenizer, flocking.passages()[:4]


def ids_of(subject: tuple, tokens: int) -> list[list[int]]:
    _, tokenizer, texts = subject
    return [tokenizer(text)["input_ids"][:tokens] for text in texts]


def run(name: str, subject: tuple, **options: object) -> xr.Dataset:
    return EXPERIMENTS[name](*subject, progress=False, **options)


def test_every_experiment_has_a_figure() -> None:
    assert reproduce.EXPERIMENTS.keys() == FIGURES.keys()


def test_heatmaps_hold_raw_activations(subject: tuple) -> None:
    data = run("heatmaps", subject, tokens=33, neurons=20)
    layer = data.attrs["layer"]
    for text, ids in zip(data.sequence.values, ids_of(subject, 33), strict=False):
        z = helpers.activations(subject[0], ids)[layer].double().numpy()
        expected = (np.abs(z) / np.linalg.norm(z, axis=1, keepdims=True))[1:, :20]
        shown = data.relative.sel(weights="trained", sequence=text)
        np.testing.assert_allclose(shown, expected, atol=1e-3)
    assert data.relative.sel(weights="control").sum() != data.relative.sel(weights="trained").sum()


def test_scores_are_the_metrics_means(subject: tuple) -> None:
    data = run("scores", subject, tokens=129)
    ids = ids_of(subject, 129)
    for weights, model in (("trained", subject[0]), ("control", flocking.control(subject[0]))):
        recording = flocking.record(model, ids, ranks=True, progress=False, tokenizer=subject[1])
        for name in ("flocking_score", "rank_consistency", "effective_neurons"):
            expected = getattr(flocking, name)(recording).mean("sequence")
            got = data[name].sel(weights=weights)
            np.testing.assert_allclose(got.sel(interval="estimate"), expected, rtol=1e-4)
            assert (got.sel(interval="low") <= got.sel(interval="estimate")).all()
            assert (got.sel(interval="estimate") <= got.sel(interval="high")).all()


def test_sequence_overlap(subject: tuple) -> None:
    data = run("sequence_overlap", subject, tokens=129)
    recording = flocking.record(
        subject[0], ids_of(subject, 129), relative=True, progress=False, tokenizer=subject[1]
    )
    overlap = flocking.between_sequence_overlap(recording)
    here = data.sel(weights="trained", interval="estimate")
    np.testing.assert_allclose(here.within, overlap.within.mean("sequence"))
    np.testing.assert_allclose(here.between, overlap.between.mean(("sequence", "other")))
    for name, different in (("specificity", False), ("different_tokens", True)):
        expected = flocking.specificity(recording, different_tokens=different)
        np.testing.assert_allclose(here[name], expected.mean(("sequence", "other")), rtol=1e-6)


def test_generation(subject: tuple) -> None:
    data = run("generation", subject, tokens=65, new_tokens=20)
    recording = flocking.record(
        subject[0],
        ids_of(subject, 65),
        max_new_tokens=20,
        progress=False,
        tokenizer=subject[1],
    )
    expected = flocking.prompt_generation_overlap(recording, 0.25).mean("sequence")
    here = data.sel(density=0.25, interval="estimate")
    np.testing.assert_allclose(here.jaccard.sel(weights="trained"), expected)
    captured = here.captured.sel(selection="GRIFFIN")
    best = here.captured.sel(selection="hindsight")
    assert (captured <= best + 1e-9).all()
    prompt, later = (flocking.statistic(recording, phase=p) for p in ("prompt", "generation"))
    share = flocking.captured_energy(flocking.select(prompt, 0.25), later).mean("sequence")
    np.testing.assert_allclose(captured, share)
    others = flocking.select(flocking.statistic_of_others(prompt), 0.25)
    share = flocking.captured_energy(others, later).mean("sequence")
    np.testing.assert_allclose(here.captured.sel(selection="other texts"), share)


def test_drift(subject: tuple) -> None:
    data = run("drift", subject, tokens=401)
    recording = flocking.record(
        subject[0], ids_of(subject, 401), window=16, progress=False, tokenizer=subject[1]
    )
    horizon = data.attrs["horizon"]
    for length in data.prompt_length.values.tolist():
        chosen = flocking.select(flocking.statistic(recording, stop=length))
        later = flocking.statistic(recording, start=length, stop=length + horizon)
        got = data.sel(weights="trained", prompt_length=length, interval="estimate")
        # All windows have as much energy, so that the mean of their shares is the range's share.
        share = flocking.captured_energy(chosen, later).mean()
        assert got.captured.item() == pytest.approx(share.item(), rel=1e-5)
        others = flocking.select(flocking.statistic_of_others(flocking.statistic(recording)))
        share = flocking.captured_energy(others, later).mean()
        assert got.other_texts.item() == pytest.approx(share.item(), rel=1e-5)
    cut = data.cut.values[0].item()
    chosen = flocking.select(flocking.statistic(recording, stop=cut))
    later = flocking.statistic(recording, start=cut + 64, stop=cut + 128)
    got = data.captured_far.sel(weights="trained", cut=cut, distance=64, interval="estimate")
    assert got.item() == pytest.approx(flocking.captured_energy(chosen, later).mean().item())


def test_text_kinds(subject: tuple) -> None:
    data = run("text_kinds", subject, tokens=65)
    ids = ids_of(subject, 193)
    for number, row in enumerate(ids):
        excerpts = [row[0:65], row[64:129], row[128:193]]
        recording = flocking.record(subject[0], excerpts, progress=False, tokenizer=subject[1])
        expected = flocking.effective_neurons(recording)
        got = data.isel(text=number).sel(weights="trained")
        np.testing.assert_allclose(got.effective_neurons, expected.mean("sequence"), rtol=1e-4)
        low, high = (got.over_layers.sel(interval=name).item() for name in ("low", "high"))
        means = expected.mean("layer")
        assert (low, high) == pytest.approx((means.min().item(), means.max().item()), rel=1e-4)


def test_texts_are_cut_to_the_models_context(subject: tuple) -> None:
    model = helpers.build("llama", vocab_size=len(subject[1]))  # a context of 256
    with pytest.warns(UserWarning, match="cut to 241 tokens instead of 513"):
        data = EXPERIMENTS["scores"](model, *subject[1:], progress=False)
    assert data.attrs["tokens"] == 241
    with pytest.raises(ValueError, match="text '1' has 3 tokens"):
        EXPERIMENTS["scores"](model, subject[1], ["word " * 300, "a b c"], progress=False)
    with pytest.raises(ValueError, match="there are 1 texts: give two or more"):
        EXPERIMENTS["scores"](model, subject[1], ["word " * 300], progress=False)


# --------------------------------------------------------------------------------------
# Files


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
    with pytest.raises(ValueError, match="is no figure of flocking"):
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
    back = artifacts.from_json(artifacts.to_json(data, "key"))
    xr.testing.assert_identical(back, data)


def lines_of(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in ax.lines]


def drawn(ax: Axes, expected: np.ndarray) -> bool:
    return any(
        y.shape == expected.shape and np.allclose(y, expected, rtol=1e-9) for y in lines_of(ax)
    )


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_committed_figures_show_their_numbers(name: str) -> None:
    """Redrawn from the JSON beside them: artists hold the numbers that the file holds."""
    content = json.loads((COMMITTED / f"{name}.json").read_text())
    data = artifacts.from_json(json.dumps(content))
    figure = FIGURES[name](data)
    axes = figure.subfigs[0].axes
    for ax in axes:
        at = ax.get_subplotspec()
        if at is not None and name != "heatmaps":  # not a colour bar; axes share their labels
            assert ax.get_xlabel() or not at.is_last_row()
            texts = [label.get_text() for label in ax.get_yticklabels()]
            named = {"hindsight: scored tokens", *(data.text.values if "text" in data.dims else ())}
            assert ax.get_ylabel() or not at.is_first_col() or texts[0] in named
    (caption,) = figure.subfigs[1].texts
    assert caption.get_text().replace("\n", " ") == data.attrs["caption"]

    numbers = content["data_vars"]  # read a second time, without xarray
    if name == "heatmaps":
        images = [ax.images[0].get_array() for ax in axes[:4]]
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
    else:
        panels = {
            "scores": ["flocking_score", "rank_consistency", "effective_neurons"],
            "sequence_overlap": ["within", "between", "specificity", "different_tokens"],
            "generation": ["jaccard_mean", "captured_mean"],
            "drift": ["jaccard", "captured"],
            "loss_by_prompt": ["relative"],
            "loss_by_density": ["relative"],
            "loss_by_batch": ["relative"],
        }[name]

        def lines(variable: str, interval: int) -> np.ndarray:
            """A row for each line: the full model, in units of itself, is none."""
            values = np.atleast_2d(np.array(numbers[variable]["data"][interval], float))
            return values[1:] if name.startswith("loss") else values

        for variable in panels:
            dims = numbers[variable]["dims"]
            assert dims[0] == "interval"
            estimate = lines(variable, 0)
            for series in estimate.reshape(-1, estimate.shape[-1]):
                assert any(drawn(ax, series) for ax in axes), (name, variable)
        bands = [c for ax in axes for c in ax.collections]
        low, high = (lines(panels[0], n)[0] for n in (1, 2))
        spans = [c.get_paths()[0].vertices[:, 1] for c in bands]
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
