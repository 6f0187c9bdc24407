"""Texts that are given to commands: the same text is the same tokens, however it is named."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import xarray as xr
from typer.testing import CliRunner

import flocking
from flocking.cli import app

WINDOWS = "line one\r\nline two\rline three\r\n"
TEXT = "line one\nline two\nline three\n"


@pytest.fixture(scope="module")
def model(embedded: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    helpers.build("llama", vocab_size=len(embedded[1])).save_pretrained(folder)
    embedded[1].save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "windows.txt").write_bytes(WINDOWS.encode())
    lines = [json.dumps({"text": text}) for text in ("birds", "of a feather")]
    for name in ("birds.jsonl", "BIRDS.JSONL"):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(*arguments: object, stdin: str | None = None):
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin)
    return result.exit_code, " ".join(result.output.split()), result.stdout


def recorded(*arguments: object, out: Path, stdin: str | None = None) -> xr.Dataset:
    code, told, _ = run("record", *arguments, "-o", out, "--window", 4, stdin=stdin)
    assert code == 0, told
    with xr.open_zarr(out) as recording:
        return recording.load()


def test_lines_end_alike_however_a_text_comes(tmp_path: Path, model: Path, texts: Path) -> None:
    windows, options = texts / "windows.txt", ("--model", model)
    same = [
        recorded(windows, *options, out=tmp_path / "a.zarr"),
        recorded("-", *options, out=tmp_path / "b.zarr", stdin=WINDOWS),
    ]
    assert [one.text.item() for one in same] == [TEXT, TEXT]
    tokens = same[0].sizes["token"]
    picture = ("-o", tmp_path / "x.png", *options, "--json")
    document = json.loads(run("heatmap", windows, *picture)[2])
    assert document["tokens"] == tokens - 1
    written = json.loads(run("generate", "-", *options, "--json", stdin=WINDOWS)[2])
    assert written["prompt"] == TEXT
    followed = recorded(windows, *options, "--continuation", windows, out=tmp_path / "c.zarr")
    assert followed.sizes["token"] == 2 * tokens


def test_standard_input_stands_beside_what_else_is_named(
    tmp_path: Path, model: Path, texts: Path
) -> None:
    options = ("--model", model)
    given = (texts / "birds.jsonl", "-", texts, texts / "*.JSONL")
    found = recorded(*given, *options, out=tmp_path / "x.zarr", stdin="Flocks.")
    lines = ["birds", "of a feather"]
    assert found.text.values.tolist() == [*lines, "Flocks.", *lines, *lines, TEXT, *lines]
    assert found.file.values[2] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("record", "-", "-"), "can be read once: name it once"),
        (("record", "-", "--continuation", "-"), "can be read once: name it once"),
        (("record", "a.txt", "b.txt", *["--continuation", "-"] * 2), "read once: name it once"),
        (("heatmap", "{texts}/birds.jsonl"), "has JSON lines, and one text is read here: give a"),
        (("record", "-"), "standard input is empty: give some text"),
    ],
)
def test_what_cannot_be_read_as_asked(
    tmp_path: Path, texts: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [each.format(texts=texts) for each in arguments]
    name = "x.zarr" if arguments[0] == "record" else "x.png"
    code, told, _ = run(*given, "-o", tmp_path / name, "--model", "no-model", stdin="")
    assert (code, message in told) == (2, True), told


def test_strings_that_end_a_text_are_those_of_the_tokenizer(tmp_path: Path, model: Path) -> None:
    """As a model's generation config may name them; and an error has a line of its own."""
    folder = tmp_path / "stops"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "generation_config.json").read_text())
    _, _, whole = run("generate", "birds", "--model", folder, "--json", "--max-new-tokens", 8)
    written = json.loads(whole)["continuations"][0]["text"]
    config["stop_strings"] = [written[2:4]]
    (folder / "generation_config.json").write_text(json.dumps(config))
    code, told, out = run("generate", "birds", "--model", folder, "--json", "--max-new-tokens", 8)
    assert code == 0, told
    assert len(json.loads(out)["continuations"][0]["text"]) < len(written)
    config["guidance_scale"] = 2.0
    (folder / "generation_config.json").write_text(json.dumps(config))
    code, told, out = run("generate", "birds", "--model", folder)
    assert (code, out) == (2, "birds\n")
    assert "guidance_scale" in told


def test_quiet_leaves_out_what_a_file_is_converted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import tqdm

    from flocking.cli import session

    before = tqdm.write
    with session._without_bars():
        tqdm.write("converted")
    assert tqdm.write == before


def test_ranks_are_kept_where_they_are_asked_for(tmp_path: Path, model: Path, texts: Path) -> None:
    lines, options = texts / "windows.txt", ("--model", model)
    assert "rank" not in recorded(lines, *options, out=tmp_path / "a.zarr")
    recorded(lines, *options, "--ranks", out=tmp_path / "b.zarr")
    recording = flocking.open_recording(tmp_path / "b.zarr")
    assert flocking.rank_consistency(recording).dims == ("sequence", "layer")
