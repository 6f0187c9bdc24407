"""The command line, as a stranger meets it."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import xarray as xr
from typer.testing import CliRunner

import flocking
from flocking.cli import app
from flocking.recording import growing


@pytest.fixture
def model(tmp_path: Path, embedded: tuple) -> str:
    """A folder with a tiny model and a tokenizer that fits it."""
    folder = tmp_path / "tiny"
    helpers.build("llama", vocab_size=len(embedded[1])).save_pretrained(folder)
    embedded[1].save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "birds.txt"
    path.write_text("Birds of a feather flock together.", encoding="utf-8")
    return str(path)


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_record_writes_what_the_options_ask_for(tmp_path: Path, model: str, text: str) -> None:
    out = tmp_path / "deep" / "out.zarr"
    options = ["--window", 2, "--layers", 1, "--max-new-tokens", 3, "--dtype", "bfloat16"]
    result = run(
        *("record", text, "-", "-o", out, "--model", model, "--device", "cpu", *options),
        stdin="Flocks.",
    )
    assert result.exit_code == 0, result.output
    assert "flocking.open_recording" in result.output
    with xr.open_zarr(out) as recording:
        assert recording.file.values.tolist() == [text, "-"]
        assert recording.text.values.tolist() == ["Birds of a feather flock together.", "Flocks."]
        assert recording.layer.values.tolist() == [1]
        assert "generation" in recording.phase.values
        assert recording.attrs["dtype"] == "bfloat16"
        assert recording.attrs["window"] == 2


def test_record_reads_the_beginning_of_each_text(tmp_path: Path, model: str, text: str) -> None:
    out = tmp_path / "out.zarr"
    long = tmp_path / "long.txt"
    long.write_text("birds " * 400, encoding="utf-8")
    refused = run("record", long, text, "-o", out, "--model", model)
    assert refused.exit_code == 2
    assert "more than the model's context of 256" in refused.output
    assert "max_tokens=256" in refused.output
    result = run("record", long, text, "-o", out, "--model", model, "--max-tokens", 4)
    assert result.exit_code == 0, result.output
    with xr.open_zarr(out) as recording:
        assert recording.tokens.sum("window").values.tolist() == [4, 4]
        assert recording.text.values[0] == "birds " * 400
        assert recording.attrs["max_tokens"] == 4
    new = tmp_path / "new.zarr"
    assert (
        "max_tokens=0: give a whole number from 1 up"
        in run("record", text, "-o", new, "--max-tokens", 0).output
    )


def test_record_takes_continuations_that_are_there(
    tmp_path: Path, model: str, text: str, embedded: tuple
) -> None:
    out, answer = tmp_path / "out.zarr", tmp_path / "answer.txt"
    answer.write_text(" Starlings do.", encoding="utf-8")
    options = ("--model", model, "-o", out)
    result = run("record", text, *options, "--continuation", answer)
    assert result.exit_code == 0, result.output
    with xr.open_zarr(out) as recording:
        cut = recording.prompt_tokens.values.item()
        words = recording.token_text.values[0]
        assert "".join(words[:cut]) == "Birds of a feather flock together."
        assert "".join(words[cut:]) == " Starlings do."
        assert recording.phase.values.tolist() == ["first", "prompt", "generation"]
    result = run("record", text, *options, "--prompt-tokens", 3, "--overwrite")
    assert result.exit_code == 0, result.output
    with xr.open_zarr(out) as recording:
        assert recording.prompt_tokens.values.tolist() == [3]
        assert recording.tokens.values.tolist() == [[1, 2, len(words[:cut]) - 3]]


def test_what_follows_is_checked_before_the_model_is_loaded(tmp_path: Path, text: str) -> None:
    for options, message in (
        (["--prompt-tokens", 0], "prompt_tokens=0: give a whole number"),
        (["--continuation", text, "--max-new-tokens", 3], "continuation were given, and each"),
        (["--continuation", text, "--continuation", text], "given 2 times for 1 text: give one"),
        (["--continuation", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--continuation", "-", "-"], "- stands for standard input"),
    ):
        files = [text, *options] if "-" not in options else ["-", "--continuation", "-"]
        result = run("record", *files, "-o", tmp_path / "o.zarr", "--model", "no/such-model")
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_an_existing_output_is_only_replaced_when_told(
    tmp_path: Path, model: str, text: str
) -> None:
    out = tmp_path / "out.zarr"
    assert run("record", text, "-o", out, "--model", model).exit_code == 0
    before = sorted(path.stat().st_mtime_ns for path in out.rglob("*"))
    again = run("record", text, "-o", out, "--model", model)
    assert again.exit_code == 0
    assert f"{out} is finished: nothing is left to record" in again.output
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*")) == before
    other = run("record", text, "-o", out, "--model", model, "--window", 2)
    assert other.exit_code == 2
    assert "was begun with another window (64; now 2)" in " ".join(other.output.split())
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*")) == before
    assert run("record", text, "-o", out, "--model", model, "--overwrite").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["birds.txt", "out.zarr", "tiny"]


def test_nothing_but_a_recording_is_ever_replaced(tmp_path: Path, model: str, text: str) -> None:
    folder, file = tmp_path / "precious.zarr", tmp_path / "file.zarr"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    for output in (folder, file):
        result = run("record", text, "-o", output, "--model", model, "--overwrite")
        assert result.exit_code == 2
        assert "exists and is not a recording" in result.output
    for output in (text, tmp_path, "..", "mine.nc", "mine"):
        result = run("record", text, "-o", output, "--model", "no/such-model", "--overwrite")
        assert result.exit_code == 2
        assert "recordings are Zarr stores, whose names end in .zarr" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_that_fails_leaves_the_old_recording(
    tmp_path: Path, model: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.zarr"
    assert run("record", text, "-o", out, "--model", model).exit_code == 0
    before = sorted(tmp_path.rglob("*"))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(growing.GrowingStore, "write", fail)
    result = run("record", text, "-o", out, "--model", model, "--overwrite")
    assert result.exit_code == 2
    assert "disk full" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "nowhere.txt does not exist"),
        (["flocking"], "flocking has no files whose names end in .txt or .jsonl"),
        (["{binary}"], "is not text in UTF-8 (byte 0)"),
        (["{empty}"], "is empty"),
        (["{text}", "--layers", "x"], "--layers x: give numbers and ranges"),
        (["{text}", "--layers", "²"], "--layers ²: give numbers and ranges"),
        (["{text}", "--layers", "3-1"], "--layers 3-1: give numbers and ranges"),
        (["{text}", "--layers", "0,9"], "layers=[9]: there are FF blocks in layers 0 to 1"),
        (["{text}", "--dtype", "toaster"], "--dtype toaster: give float32"),
        (["-"], "standard input is empty"),
        (["{text}", "--window", "0"], "window=0"),
        (["{text}", "--device", "toaster"], "--device toaster"),
        (["{text}", "--model", "{binary}"], "binary"),
    ],
)
def test_bad_input_ends_with_code_2_and_no_file(
    tmp_path: Path, model: str, text: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").touch()
    names = {"text": text, "binary": tmp_path / "binary.txt", "empty": tmp_path / "empty.txt"}
    filled = [argument.format(**names) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    result = run("record", "--model", model, *filled, "-o", tmp_path / "new" / "out.zarr")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_help_shows_an_example_of_each_command() -> None:
    for command in (
        "record",
        "demo",
        "figures",
        "heatmap",
        "generate",
        "inspect",
        "evaluate",
        "check",
    ):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"Example: flocking {command}" in result.output
    assert run("--version").output.strip() == flocking.__version__
    assert run("record").exit_code == 2


def test_demo_refuses_a_model_whose_context_is_too_short(tmp_path: Path, model: str) -> None:
    result = run("demo", "--out", tmp_path / "out", "--model", model)
    assert result.exit_code == 2  # its context of 256 tokens is too short for the passages
    assert "more than the model's context of 256" in result.output
    assert not list(tmp_path.glob("out/*"))


def test_demo_prints_the_scores_by_layer_and_writes_its_files(
    tmp_path: Path, shallow: tuple
) -> None:
    """What `make demo` runs, after another model's, since its files may be there already."""
    for options in (["--model", shallow[0].name_or_path], []):
        result = run("demo", "--out", tmp_path, *options)
        assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.png", "demo.zarr"]
    assert (tmp_path / "demo.png").stat().st_size < 300_000
    with xr.open_zarr(tmp_path / "demo.zarr") as recording:
        assert recording.sizes["layer"] == 30
        assert (recording.tokens.sum("window") == 512).all()
        score = flocking.flocking_score(recording).mean("sequence")
    rows = [line.split() for line in result.output.splitlines() if "model.layers." in line]
    assert [int(row[0]) for row in rows] == list(range(30))
    for row, value in zip(rows, score.values, strict=True):
        assert float(row[6].partition("±")[0]) == pytest.approx(value, abs=6e-4)
    # Measured when the design was made, on news: weak at first, strong in the last two layers.
    assert float(score[:10].mean()) < 0.12
    assert float(score[-2:].min()) > 0.5


def test_generate_prints_the_text_and_compares_when_asked(model: str) -> None:
    options = ["--model", model, "--max-new-tokens", 6]
    result = run("generate", "Birds of a feather", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Birds of a feather ")
    assert "GRIFFIN" not in result.stdout

    compared = run("generate", "-", "--compare", "--density", 1, *options, stdin="Flocks.")
    assert compared.exit_code == 0, compared.output
    full, _, twin = compared.stdout.partition("GRIFFIN, density 1")
    text = full.partition("Flocks.")[2].strip()
    assert text
    assert "".join(text.split()) in "".join(twin.split())  # density 1: the same tokens
    assert "tokens a second" in twin
    loaded, _ = flocking.load(model)
    assert twin.count(f"{loaded.num_parameters():,}") == 2

    every = run("generate", "-", "--compare", "--refresh", 1, *options, stdin="Flocks.")
    full, _, twin = every.stdout.partition("GRIFFIN, density 0.5, anew every 1")
    text = full.partition("Flocks.")[2].strip()
    assert "".join(text.split()) in "".join(twin.split())  # each is the full model's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--density", 0], "density=0.0: give the fraction"),
        (["x", "--method", "best"], "--method best: choose from topk"),
        (["x", "--method", "static"], "--method static: choose from topk"),
        (["x", "--max-new-tokens", 300], "300 new ones, 44 more than the model's context of 256"),
        (["x", "--dtype", "int8"], "--dtype int8: give float32"),
        (["x", "--device", "cuda:7"], "--device cuda:7 cannot be used here: give cpu"),
        (["x", "--model", "/no/such/folder"], "model /no/such/folder: there is no such folder"),
        (["x", "--scope", "all"], "scope='all': give 'shared' or 'sequence'"),
        (["x", "--max-new-tokens", 0], "--max-new-tokens 0: give 1 or more"),
        (["x", "--refresh", 0], "--refresh 0: give 1 or more"),
        ([""], "the prompt is empty"),
    ],
    ids=str,
)
def test_generate_refuses(model: str, arguments: list, message: str) -> None:
    result = run("generate", "--model", model, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_inspect_lists_the_blocks(model: str) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("LlamaForCausalLM, ")
    for layer in (0, 1):
        row = next(line for line in lines if f"model.layers.{layer}.mlp" in line).split()
        assert row[:5] == [str(layer), f"model.layers.{layer}.mlp", "gated", "64", "160"]
        assert float(row[5]) < 1e-4
    assert lines[-1].startswith("recorded: yes; GRIFFIN: yes, at density 0.5 with ")
    missing = run("inspect", "/no/such/folder")
    assert missing.exit_code == 2
    assert "there is no such folder" in missing.output


def test_check_prints_a_row_each_and_exits_with_1_on_failure(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("check", model)
    assert result.exit_code == 0
    rows = {line.partition("  ")[0]: line for line in result.stdout.splitlines()[1:]}
    assert list(rows) == ["proof", "watching", "batch", "selection", "density 1", "density 0.5"]
    assert all("passed" in row for row in rows.values())
    monkeypatch.setattr("flocking.checking.tolerance", lambda dtype: -1.0)
    failing = run("check", model)
    assert failing.exit_code == 1
    assert failing.output.count("FAILED") == 6


def test_record_takes_folders_and_json_lines(tmp_path: Path, model: str, text: str) -> None:
    news = tmp_path / "news"
    news.mkdir()
    (news / "b.txt").write_text("of a feather")
    (news / "a.jsonl").write_text('{"body": "Flocks."}\n"birds flock"\n')
    out = tmp_path / "out.zarr"
    options = ("-o", out, "--model", model, "--field", "body")
    assert run("record", text, news, *options).exit_code == 0
    recording = flocking.open_recording(out)
    files = [text, f"{news}/a.jsonl:1", f"{news}/a.jsonl:2", f"{news}/b.txt"]
    assert recording.file.values.tolist() == [str(name) for name in files]
    assert recording.text.values.tolist()[1:] == ["Flocks.", "birds flock", "of a feather"]


def test_record_leaves_texts_out_when_told(tmp_path: Path, model: str, text: str) -> None:
    (tmp_path / "long.txt").write_text("birds " * 400)
    command = ("record", tmp_path / "long.txt", text, "-o", tmp_path / "out.zarr")
    refused = run(*command, "--model", model).output
    assert f"text 0 ({tmp_path}/long.txt) has" in " ".join(refused.split())
    with pytest.warns(UserWarning, match=rf"^1 text left out: text 0 \({tmp_path}/long\.txt\) has"):
        result = run(*command, "--model", model, "--on-error", "skip")
    assert result.exit_code == 0
    recording = flocking.open_recording(tmp_path / "out.zarr")
    assert recording.file.values.tolist() == [text]
    assert recording.attrs["skipped"][0].startswith(f"0: text 0 ({tmp_path}/long.txt) has")


def test_record_goes_on_after_an_interruption(
    tmp_path: Path, model: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("birds flock" + " together" * (number % 3))
    command = ("record", f"{tmp_path}/[0-9]*.txt", "-o", tmp_path / "out.zarr", "--model", model)
    write, blocks = growing.GrowingStore.write, []

    def writing(self: object, *args: object) -> None:
        if blocks:
            raise KeyboardInterrupt
        blocks.append(write(self, *args))

    with monkeypatch.context() as patch:
        patch.setattr(growing.GrowingStore, "write", writing)
        result = run(*command)
    assert result.exit_code == 130
    said = "out.zarr: 32 of 40 texts are recorded so far; the same command goes on."
    assert said in " ".join(result.output.split())
    assert run(*command).exit_code == 0
    assert flocking.open_recording(tmp_path / "out.zarr").sizes["sequence"] == 40
