"""``flocking heatmap``: what it draws of a text, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import helpers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from helpers import ARCHITECTURES
from PIL import Image
from typer.testing import CliRunner

import flocking
from flocking.cli import app, pictures

TEXT = "Birds of a feather flock together, and so do $neurons$ of a model."


@pytest.fixture(scope="module")
def subject(embedded: tuple) -> tuple:
    return helpers.build("llama", vocab_size=len(embedded[1])), embedded[1]


@pytest.fixture(scope="module")
def model(subject: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in subject:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "birds.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, ["heatmap", *map(str, arguments)], input=stdin)


def recorded(subject: tuple, layer: int) -> tuple[xr.Dataset, xr.Dataset]:
    model, tokenizer = subject
    options = {"tokenizer": tokenizer, "layers": [layer], "relative": [layer], "progress": False}
    return tuple(flocking.record(one, TEXT, **options) for one in (model, flocking.control(model)))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_document_has_the_scores_of_that_layer(
    tmp_path: Path, subject: tuple, model: Path, text: Path, layer: int
) -> None:
    out = tmp_path / "new" / "birds.png"
    result = run(text, "-o", out, "--model", model, "--layer", layer, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    ids = subject[1](TEXT)["input_ids"]
    expected = []
    for one in (subject[0], flocking.control(subject[0])):
        z = helpers.activations(one, ids)[layer].double().numpy()[1:]
        r = np.abs(z) / np.linalg.norm(z, axis=1, keepdims=True)
        count, a = len(r), r.sum(axis=1)
        pairs = count * (count - 1)
        consistency = ((r.sum(axis=0) ** 2).sum() - count) / pairs
        chance = (a.sum() ** 2 - (a**2).sum()) / (r.shape[1] * pairs)
        expected.append((consistency - chance) / (1 - chance))
    scores = document.pop("flocking_score"), document.pop("flocking_score_control")
    assert scores == pytest.approx(expected, abs=1e-4)
    assert document == {
        "output": str(out),
        "model": "tiny",
        "layer": layer,
        "module": f"model.layers.{layer}.mlp",
        "d_ff": 160,
        "tokens": len(ids) - 1,
        "neurons": 160,
    }
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.info["Title"] == f"heatmap, tiny, layer {layer}"
        assert "random weights" in image.info["Description"]


def test_the_picture_shows_the_first_tokens_and_neurons(subject: tuple) -> None:
    layer = 1
    own, random = recorded(subject, layer)
    figure = pictures.beside_control(own, random, layer, 0, "birds.txt", tokens=7, neurons=50)
    left, strip, right, _, bar = figure.axes
    ids = subject[1](TEXT)["input_ids"]
    for ax, one in ((left, subject[0]), (right, flocking.control(subject[0]))):
        z = np.abs(helpers.activations(one, ids)[layer].double().numpy())
        r = (z / np.linalg.norm(z, axis=1, keepdims=True))[1:8, :50]
        shown = helpers.cells(ax.images[0], 7, 50)
        np.testing.assert_allclose(shown, r, atol=1e-3)
        assert ax.images[0].norm.vmax == left.images[0].norm.vmax
        box = ax.get_window_extent()  # whole pixels for each cell
        assert (box.width, box.height) == pytest.approx((50 * 11, 7 * 74))
        if ax is left:
            np.testing.assert_allclose(strip.images[0].get_array()[0], r.mean(axis=0), atol=1e-3)
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:3] == ["·of", "·a", "·feather"]
    assert not any(label.get_text() for label in right.get_yticklabels())
    assert "7 tokens by 50 of 160 neurons" in figure.get_suptitle()
    assert "relative activation" in bar.get_ylabel()
    plt.close(figure)


@pytest.mark.parametrize("tokens", [3, 16, 200])
def test_titles_and_labels_are_within_the_picture(subject: tuple, tokens: int) -> None:
    ids = [subject[1]("starlings turn as one " * 60)["input_ids"][: tokens + 1]]
    own, random = (
        flocking.record(one, ids, tokenizer=subject[1], relative=[1], progress=False)
        for one in (subject[0], flocking.control(subject[0]))
    )
    own.attrs["model"] = "m" * 60
    figure = pictures.beside_control(own, random, 1, 0, "$" * 40)
    figure.canvas.draw()
    boxes = [figure._suptitle.get_window_extent()]
    boxes += [ax.get_tightbbox() for ax in figure.axes]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
    plt.close(figure)


def test_both_formats_are_replaced_and_nothing_else(
    tmp_path: Path, model: Path, text: Path
) -> None:
    for name in ("birds.png", "birds.svg"):
        out = tmp_path / name
        first = run(text, "-o", out, "--model", model, "--layer", 0)
        assert first.exit_code == 0, first.output
        assert f"wrote {out}: layer 0 of tiny" in first.stdout
        before = out.read_bytes()
        assert run(text, "-o", out, "--model", model, "--layer", 1).exit_code == 0
        assert out.read_bytes() != before
        assert run(text, "-o", out, "--model", model, "--layer", 0).exit_code == 0
        assert out.read_bytes() == before  # the same picture, byte for byte
    svg = (tmp_path / "birds.svg").read_text(encoding="utf-8")
    assert "<title>heatmap, tiny, layer 0</title>" in svg
    assert len(re.findall("<image", svg)) >= 4  # two heat maps and their means
    names = {"birds.txt", "birds.png", "birds.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_standard_input_and_fewer_tokens(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "x.png"
    options = ("--model", model, "--max-tokens", 5, "--neurons", 20, "--json")
    result = run("-", "-o", out, *options, stdin=TEXT)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["tokens"], document["neurons"], document["layer"]) == (4, 20, 1)
    long = run("-", "-o", out, *options[:2], "--json", stdin="birds " * 400)
    assert long.exit_code == 0, long.output
    assert json.loads(long.stdout)["tokens"] == 255  # all that the model's context of 256 takes


def test_the_seed_is_that_of_the_random_weights(tmp_path: Path, model: Path, text: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        result = run(text, "-o", tmp_path / "x.png", "--model", model, "--seed", seed, "--json")
        found.append(json.loads(result.stdout))
    assert found[0] == found[1]
    assert found[0]["flocking_score"] == found[2]["flocking_score"]
    assert found[0]["flocking_score_control"] != found[2]["flocking_score_control"]


def test_a_mixture_of_experts_is_drawn(tmp_path: Path, embedded: tuple, text: Path) -> None:
    folder = tmp_path / "moe"
    helpers.build("mixtral", vocab_size=len(embedded[1])).save_pretrained(folder)
    embedded[1].save_pretrained(folder)
    result = run(text, "-o", tmp_path / "x.svg", "--model", folder)
    assert "mixtral" in ARCHITECTURES
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt", "-o", "x.png"], "nowhere.txt does not exist"),
        (["{folder}", "-o", "x.png"], "is a folder: name the text files in it."),
        (["{empty}", "-o", "x.png"], "is empty: give some text."),
        (["{text}", "-o", "x.jpg"], "x.jpg: pictures are PNG or SVG, whose names end in .png"),
        (["{text}", "-o", "x"], "x: pictures are PNG or SVG"),
        (["{text}", "--output="], "--output names no file or folder: give it a name."),
        (["{text}", "-o", "{text}/x.png"], "cannot be written"),
        (["{text}", "-o", "{theirs}"], "exists and is not from flocking heatmap: choose another"),
        (["{text}", "-o", "{figure}"], "exists and is not from flocking heatmap: choose another"),
        (["{text}", "-o", "x.png", "--max-tokens", "2"], "--max-tokens 2: give 3 to 16384."),
        (["{text}", "-o", "x.png", "--neurons", "0"], "--neurons 0: give 1 to 16384."),
        (["{text}", "-o", "x.png", "--neurons", "20000"], "--neurons 20000: give 1 to 16384."),
        (["{text}", "-o", "x.png", "--seed", "-1"], "seed=-1: give a whole number from 0 up"),
    ],
)
def test_refused_before_a_model_is_loaded(
    tmp_path: Path,
    text: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*arguments: object) -> tuple:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("flocking.cli.picture_commands.load", load)
    monkeypatch.chdir(tmp_path)
    theirs, figure, empty = (tmp_path / name for name in ("t.png", "figure.svg", "empty.txt"))
    theirs.write_bytes(b"mine")
    committed = Path(__file__).parents[2] / "figures" / "heatmaps.svg"
    figure.write_bytes(committed.read_bytes())
    empty.touch()
    names = {"text": text, "folder": tmp_path, "theirs": theirs, "figure": figure, "empty": empty}
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    result = run(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("layer", "words", "message"),
    [
        (2, TEXT, "--layer 2: this model has FF blocks in layers 0 to 1."),
        (-1, TEXT, "--layer -1: this model has FF blocks in layers 0 to 1."),
        (0, "Hi", "the text has 1 token, of which the first is not drawn: give one of 3 or more."),
    ],
)
def test_refused_when_the_model_is_there(
    tmp_path: Path, model: Path, layer: int, words: str, message: str
) -> None:
    result = run("-", "-o", tmp_path / "x.png", "--model", model, "--layer", layer, stdin=words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_layers_with_gaps_are_named_one_by_one() -> None:
    from flocking.cli import picture_commands

    model = helpers.build("llama", num_hidden_layers=4)
    blocks = [block for block in flocking.feedforwards(model) if block.layer != 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flocking, "feedforwards", lambda model: blocks)
        with pytest.raises(ValueError, match=r"--layer 1: .* in layers 0, 2, 3\."):
            picture_commands._layer_of(model, 1)
        assert picture_commands._layer_of(model, None) == 3
