"""``flocking prune``: a smaller model that others run, and one sentence for what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import ggufs
import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import flocking
from flocking.cli import app
from flocking.pruning import fixed_selection, measure_lost, split_texts
from flocking.texts import passages

TEXTS = [text[:1500] for text in passages()[:3]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's folder, its GGUF file, and texts."""
    place = tmp_path_factory.mktemp("prune")
    ggufs.write(place / "whole.gguf", ggufs.tiny("llama"))
    (place / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (place / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        model, tokenizer = flocking.load(place / "whole.gguf")
    model.save_pretrained(place / "whole")
    tokenizer.save_pretrained(place / "whole")
    return place


@pytest.fixture(autouse=True)
def cache(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(each) for each in ("prune", *arguments)], input=stdin)


def rows_of(output: str) -> dict[str, str]:
    """The table, by the names in its first column."""
    pairs = (line.split("  ", 1) for line in output.splitlines() if "  " in line.strip())
    return {name.strip(): value.strip() for name, value in pairs}


def test_a_folder_that_transformers_loads(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    result = run(files / "whole", "--texts", files / "texts", "--density", 0.3, "-o", out)
    assert result.exit_code == 0, result.output
    smaller = tf.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    assert smaller.config.intermediate_size == 48  # of 160
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    assert tokenizer("Birds")["input_ids"] == ids_of(files, "Birds")

    # What it keeps and what it says, by the functions that it is made of.
    model, tokenizer = flocking.load(files / "whole")
    calibration, _, held_out = split_texts(model, TEXTS, tokenizer)
    kept = fixed_selection(model, tokenizer, "static", calibration, 0.3).values
    for layer, (whole, narrow) in enumerate(
        zip(model.model.layers, smaller.model.layers, strict=True)
    ):
        mine = torch.from_numpy(np.flatnonzero(kept[layer]))
        torch.testing.assert_close(
            narrow.mlp.down_proj.weight, whole.mlp.down_proj.weight[:, mine], rtol=0, atol=0
        )
    lost = measure_lost(model, smaller, held_out, progress=False)
    said = rows_of(result.stdout)
    assert said["held-out texts"] == f"{lost.texts}, {lost.tokens:,} tokens"
    assert said["perplexity"].startswith(f"{lost.pruned_perplexity:.4g}, was {lost.perplexity:.4g}")
    assert said["same likeliest token"] == f"{lost.agreement:.1%}"
    assert said["neurons kept"] == "48 in each of 2 layers"
    assert f"{lost.agreement:.1%}" in (out / "README.md").read_text()


def ids_of(files: Path, text: str) -> list[int]:
    return flocking.load(files / "whole")[1](text)["input_ids"]


def test_a_gguf_file_of_a_gguf_file(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.gguf"
    options = ["--texts", files / "texts", "--own-samples", "--seed", 3]
    result = run(files / "whole.gguf", *options, "-o", out)
    assert result.exit_code == 0, result.output
    reader = gguf.GGUFReader(out)
    assert reader.fields["llama.feed_forward_length"].contents() == 64  # 80, rounded down
    assert rows_of(result.stdout)["neurons kept"] == "64 in each of 2 layers"
    smaller, _ = flocking.load(out)
    model, tokenizer = flocking.load(files / "whole.gguf")
    kept = fixed_selection(model, tokenizer, "static", None, 0.5, multiple=32, seed=3).values
    torch.testing.assert_close(
        smaller.model.layers[1].mlp.up_proj.weight,
        model.model.layers[1].mlp.up_proj.weight[np.flatnonzero(kept[1])],
    )
    held_out = split_texts(model, TEXTS, tokenizer).held_out
    lost = measure_lost(model, smaller, held_out, progress=False)
    assert rows_of(result.stdout)["same likeliest token"] == f"{lost.agreement:.1%}"


@pytest.mark.parametrize("method", ["global-local", "magnitude"])
def test_other_methods(files: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "half"
    text = "\n".join(TEXTS)
    options = ["--method", method, "--keep-multiple", 16, "--dtype", "bfloat16"]
    result = run(files / "whole", "--texts", "-", *options, "-o", out, stdin=text)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["intermediate_size"], config["dtype"]) == (80, "bfloat16")


def test_bad_input_is_said_in_one_sentence_and_changes_nothing(files: Path, tmp_path: Path) -> None:
    short, mine = tmp_path / "short.txt", tmp_path / "mine"
    short.write_text("Birds.", encoding="utf-8")
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work", encoding="utf-8")
    whole, texts = files / "whole", ["--texts", files / "texts"]
    out, file = ["-o", tmp_path / "out"], ["-o", tmp_path / "out.gguf"]
    cases = [
        ((whole, *texts, "-o", mine), "mine exists and is no model's folder"),
        ((whole, *texts, "-o", mine, "--overwrite"), "mine exists and is no model's folder"),
        ((whole, *texts, "-o", whole, "--overwrite"), "is where the model itself is from"),
        ((whole, *texts, "-o", files / "texts" / "0.txt"), "exists and is no model's folder"),
        ((whole, *texts, "-o", ""), "--output names no file or folder"),
        ((whole, *texts, *file), "a GGUF file is made from a GGUF file"),
        ((whole, *texts, *out, "--down", "Q8_0"), "--down Q8_0: "),
        ((files / "whole.gguf", *texts, *file, "--down", "Q4_K"), "no quantiser for it"),
        ((files / "whole.gguf", *texts, *file, "--down", "Q4_0"), "are not quantised (F32)"),
        ((files / "whole.gguf", *texts, *file, "--down", ""), "down='' is no type"),
        ((files / "whole.gguf", *texts, *file, "--keep-multiple", 48), "are multiples of 32"),
        ((files / "whole.gguf", *texts, *file, "--density", 0.1), "give 0.2 or more"),
        ((whole, *texts, *out, "--density", 0.001), "keeps none of 160 neurons"),
        ((whole, *texts, *out, "--density", 1.5), "density=1.5"),
        ((whole, *texts, *out, "--density", "nan"), "density=nan"),
        ((whole, *texts, *out, "--keep-multiple", 0), "--keep-multiple 0: give 1 or more"),
        ((whole, *texts, *out, "--method", "topk"), "choose from static, global-local, magnitude"),
        ((whole, *texts, *out, "--method", "magnitude", "--own-samples"), "reads no texts"),
        ((whole, "--texts", short, *out), "give 256 or more"),
        ((whole, "--texts", tmp_path / "gone.txt", *out), "gone.txt does not exist"),
        ((whole, "--texts", tmp_path / "mine", *out), "mine has no files whose names end in .txt"),
        ((whole, "--texts", "-", "--texts", "-", *out), "name it once"),
        ((tmp_path / "gone.gguf", *texts, *file), "gone.gguf"),
        ((whole, *texts, *out, "--seed", 7), "--seed 7: static draws nothing"),
    ]  # fmt: skip
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, why in cases:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert why in result.stderr, (why, result.stderr)
        assert result.stderr.splitlines()[-1].startswith("flocking: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_models_are_replaced_only_if_asked(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    options = [files / "whole", "--texts", files / "texts", "--method", "magnitude", "-o", out]
    assert run(*options).exit_code == 0
    again = run(*options, "--density", 0.25)
    assert again.exit_code == 2
    assert "pass --overwrite" in again.stderr
    assert run(*options, "--density", 0.25, "--overwrite").exit_code == 0
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 40


def test_a_source_is_not_replaced_however_it_is_written(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves ``'~/m'`` as it is, and so do programs that start the command."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(files / "whole", tmp_path / "m")
    shutil.copyfile(files / "whole.gguf", tmp_path / "m.gguf")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = ["--texts", files / "texts", "--method", "magnitude", "--overwrite"]
    for name in ("m", "m.gguf"):
        for output in (f"~/{name}", tmp_path / name):
            result = run(f"~/{name}", *options, "-o", output)
            assert result.exit_code == 2
            assert "is where the model itself is from" in result.stderr
    monkeypatch.setattr("flocking.models.embedded_file", lambda: tmp_path / "m.gguf")
    assert "is where the model itself is from" in run(*options, "-o", "~/m.gguf").stderr
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_what_cannot_be_exported_is_refused_before_texts_are_read(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object, **kwargs: object) -> None:
        raise AssertionError("texts were read")

    monkeypatch.setattr("flocking.pruning.fixed.global_statistic", slow)
    tokenizer = tf.AutoTokenizer.from_pretrained(files / "whole")
    model = helpers.build("bloom", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    texts = ["--texts", files / "texts"]
    result = run(tmp_path / "bloom", *texts, "-o", tmp_path / "half")
    assert result.exit_code == 2
    assert "BloomForCausalLM cannot be exported" in result.stderr
    monkeypatch.setattr("flocking.cli.pruning.load", slow)
    block = {"ffn_up.weight": (160, 64), "ffn_down.weight": (64, 160), "ffn_act.scales": (160,)}
    tensors = ((f"blk.0.{name}", np.ones(shape, np.float32)) for name, shape in block.items())
    source = ggufs.write_file(
        tmp_path / "scaled.gguf",
        "llama",
        ((name, values, gguf.GGMLQuantizationType.F32) for name, values in tensors),
        metadata={"llama.feed_forward_length": (160, gguf.GGUFValueType.UINT32)},
    )
    result = run(source, *texts, "-o", tmp_path / "half.gguf")
    assert result.exit_code == 2
    assert "blk.0.ffn_act.scales has a value for each neuron" in result.stderr


def test_a_file_is_kept_where_there_is_no_memory_to_measure_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr("flocking.pruning.measure_lost", full)
    out = tmp_path / "half.gguf"
    options = ["--texts", files / "texts", "--method", "magnitude"]
    result = run(files / "whole.gguf", *options, "-o", out)
    assert result.exit_code == 0, result.output
    assert "was not measured, since there is no memory for the new model" in result.stderr
    assert gguf.GGUFReader(out).fields["llama.feed_forward_length"].contents() == 64


def test_a_file_stays_if_its_measurement_is_interrupted(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flocking.pruning.measure_lost", interrupted)
    out = tmp_path / "half.gguf"
    options = ["--texts", files / "texts", "--method", "magnitude"]
    result = run(files / "whole.gguf", *options, "-o", out)
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == f"flocking: interrupted: {out} is complete; nothing else was written."
    assert gguf.GGUFReader(out).fields["llama.feed_forward_length"].contents() == 64
    assert list(tmp_path.iterdir()) == [out]


def test_what_does_not_fit_beside_the_whole_model_is_not_read(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> SimpleNamespace:
        return SimpleNamespace(total=2**40, available=1000)

    monkeypatch.setattr("flocking.models.dequantising.psutil.virtual_memory", full)
    nothing = SimpleNamespace(total=0, free=0)
    monkeypatch.setattr("flocking.models.dequantising.psutil.swap_memory", lambda: nothing)
    out = tmp_path / "half.gguf"
    options = ["--texts", files / "texts", "--method", "magnitude"]
    result = run(files / "whole.gguf", *options, "-o", out)
    assert result.exit_code == 0, result.output
    assert "was not measured, since there is no memory for the new model" in result.stderr
    assert out.exists()


def test_errors_name_the_place_that_was_asked_for(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a full disk is told of before anything is selected."""
    options = ["--texts", files / "texts", "--method", "magnitude"]
    for source, out in (("whole", tmp_path / "half"), ("whole.gguf", tmp_path / "half.gguf")):
        flocking.load(files / source)  # (what is in the cache needs no room)
        with monkeypatch.context() as patch:
            patch.setattr("flocking.pruning.places.free_bytes", lambda folder: 1)
            patch.setattr("flocking.pruning.fixed_selection", None)
            result = run(files / source, *options, "-o", out)
        assert result.exit_code == 2
        assert f"flocking: {out} cannot be written: " in result.stderr
        assert ".writing" not in result.stderr


def test_down_projections_of_quantised_files(files: Path, tmp_path: Path) -> None:
    source = ggufs.write(tmp_path / "q8.gguf", ggufs.tiny("llama"), "Q8_0")
    options = ["--texts", files / "texts", "--method", "magnitude"]
    for down in ("Q8_0", "Q4_0"):
        out = tmp_path / f"{down}.gguf"
        result = run(source, *options, "--down", down, "-o", out)
        assert result.exit_code == 0, result.output
        tensors = gguf.GGUFReader(out).tensors
        assert {t.tensor_type.name for t in tensors if "ffn_down" in t.name} == {down}


def test_nothing_is_lost_where_nothing_is_pruned(files: Path, tmp_path: Path) -> None:
    """Both models are read in the precision that was asked for."""
    options = ["--texts", files / "texts", "--method", "magnitude", "--density", 1]
    result = run(files / "whole.gguf", *options, "--dtype", "bfloat16", "-o", tmp_path / "a.gguf")
    said = rows_of(result.stdout)
    assert (said["same likeliest token"], said["divergence"]) == ("100.0%", "0 nats a token")


def test_a_file_that_transformers_cannot_read_is_written_all_the_same(
    files: Path, tmp_path: Path
) -> None:
    source = ggufs.write(tmp_path / "bloom.gguf", ggufs.tiny("bloom"))
    out = tmp_path / "half.gguf"
    result = run(source, "--texts", files / "texts", "--method", "magnitude", "-o", out)
    assert result.exit_code == 0, result.output
    assert "what is lost was not measured" in result.stderr
    assert "perplexity" not in rows_of(result.stdout)
    assert gguf.GGUFReader(out).fields["bloom.feed_forward_length"].contents() == 128


def test_line_ends_do_not_matter(files: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    text = "\n".join(TEXTS)
    places = [tmp_path / "lf.txt", tmp_path / "cr.txt", tmp_path / "folder" / "crlf.txt"]
    for place, end in zip(places, ("\n", "\r", "\r\n"), strict=True):
        place.write_bytes(text.replace("\n", end).encode())
    places[2] = tmp_path / "folder"
    tables = []
    for number, place in enumerate(places):
        options = ["--method", "magnitude", "-o", tmp_path / str(number)]
        tables.append(rows_of(run(files / "whole", "--texts", place, *options).stdout))
    assert len({table["perplexity"] for table in tables}) == 1


def test_an_output_that_another_process_writes_is_refused_before_anything_is_read(
    files: Path, tmp_path: Path
) -> None:
    from flocking.artifacts import replacing

    out = tmp_path / "half"
    with replacing(out) as partial:
        result = run(tmp_path / "no-such-model", "-o", out)
        assert result.exit_code == 2
        assert "is being written by process" in result.stderr
        partial.mkdir()
