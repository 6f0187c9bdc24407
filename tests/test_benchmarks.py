"""The benchmarks' logic, on a small shape, and their bounds against what is known of the shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flocking.pruning import graphs

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(FOLDER)
    import measuring

    return measuring


@pytest.mark.parametrize(
    ("shape", "parameters", "bounds"),
    [  # bounds from the issue about them, where it has some
        ("Llama 2 7B", 6_738_415_616, {0: 1.5}),
        ("Llama 2 13B", 13_015_864_320, {0: 1.49, 2048: 1.45, 4096: 1.41}),
        ("Gemma 7B", 8_537_680_896, {0: 1.59, 2048: 1.54, 4096: 1.50}),
        ("Llama 3 8B", 8_030_261_248, {0: 1.60}),
    ],
)
def test_bounds_are_those_of_the_shapes(
    measuring: object, shape: str, parameters: int, bounds: dict[int, float]
) -> None:
    config = AutoConfig.for_model(**measuring.SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == parameters
    ff_bytes = 2 * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    report = SimpleNamespace(ff_bytes=ff_bytes, compact_bytes=ff_bytes // 2)
    full = measuring.weight_bytes(model)
    pruned = measuring.weight_bytes(model, SimpleNamespace(report=lambda: report))
    found = {}
    for tokens in (0, 2048, 4096):
        keys = measuring.kv_bytes(model, tokens)
        found[tokens] = (full + keys) / (pruned + keys)
    for tokens, expected in bounds.items():
        assert found[tokens] == pytest.approx(expected, abs=0.015)
    row = " | ".join([shape, *(f"{bound:.2f}" for bound in found.values())])
    assert f"| {row} |" in (FOLDER / "README.md").read_text()
    if shape == "Llama 2 7B":  # 32 layers x 4,096 keys and as many values x 2 bytes
        assert measuring.kv_bytes(model, 1) == 32 * 2 * 4096 * 2


def test_built_models_are_the_same_every_time(measuring: object) -> None:
    one, other = (measuring.build("small", "cpu", torch.float32, "sdpa") for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert one.model.rotary_emb.inv_freq.isfinite().all()
    ids = measuring.prompts(one, 2, 8)
    assert one.generate(ids, max_new_tokens=5).shape == (2, 13)


def test_contestants_take_turns(measuring: object) -> None:
    calls: list[str] = []
    found = measuring.interleaved(
        {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 4
    )
    assert {name: len(values) for name, values in found.items()} == {"a": 4, "b": 4}
    assert all(set(calls[n : n + 2]) == {"a", "b"} for n in range(0, 10, 2))
    assert measuring.ratios({"a": [4.0, 9.0], "b": [2.0, 3.0]}, "a", "b") == [2, 3]


@pytest.fixture
def gpu(measuring: object, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The GPU benchmark, whose steps are not compiled here: tests of `Decoder` do that."""
    import gpu

    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    return gpu


def test_the_gpu_benchmark_runs_on_a_cpu(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "gpu.json"
    sections = ["decoding", "reading", "recording", "batches", "generation", "offloading"]
    once = ["--repetitions", "1"]
    gpu.main(["--device", "cpu", "--out", str(path), *once, "--only", *sections])
    said = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["machine"]["torch"] == torch.__version__
    decoding = results["decoding"]["small"]
    assert len(decoding["seconds_per_token"]["GRIFFIN, compiled"]) == 1
    # 3 layers x 3 matrices of 256 x 1,024 in float32, half of which is kept; 4 of 8 heads of 32
    ff = 3 * 3 * 256 * 1024 * 4
    keys = 3 * 2 * 4 * 32 * 4 * (48 + 3)
    sizes = decoding["bytes_per_token"]
    assert sizes["full"] - sizes["GRIFFIN"] == ff / 2
    assert decoding["bound"] == sizes["full"] / sizes["GRIFFIN"]
    attention = 3 * (2 * 256 * 256 + 2 * 256 * 128) * 4
    assert sizes["full"] == ff + keys + attention + (1000 * 256 + 7 * 256) * 4
    assert set(results["batches"]) == {"small, 1", "small, 2"}
    assert set(results["generation"]) == {"small, 48 + 8", "small, 48 + 24"}
    assert results["offloading"]["small"]["model_bytes"] > ff
    for line in ("GRIFFIN, new modules, eager", "times the headless forward's", "is read in"):
        assert line in said


def test_what_the_time_does_not_suffice_for_is_named(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(path)])
    assert capsys.readouterr().out.count("left out for want of time") == 9
    assert len(json.loads(path.read_text())["left_out"]) == 9


def test_a_case_that_fails_does_not_cost_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(run: object, shape: str, tokens: int) -> Iterator[str]:
        """Fail."""
        yield "one line"
        raise RuntimeError("a compiler's words\nand more")

    monkeypatch.setattr(gpu, "recording", failing)
    failing.__name__ = "recording"
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--out", str(path), "--only", "recording", "offloading"]
    gpu.main([*arguments, "--shapes", "small"])
    results = json.loads(path.read_text())
    (why,) = (case["why"] for case in results["left_out"].values())
    assert why.endswith("RuntimeError: a compiler's words\nand more\n")
    assert "small" in results["offloading"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_kernels.py"])
def test_without_a_gpu_the_benchmark_says_so(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / script)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.endswith(  # what packages say of what they lack may stand before it
        "there is no CUDA device here: --device cpu tries the script on a small shape.\n"
    )


def test_the_profile_names_both_models_and_what_they_do(
    gpu: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    import gpu_kernels

    gpu_kernels.main(["small", "--device", "cpu", "--prompt", "24"])
    said = capsys.readouterr().out
    for name in ("full, a step", "full, the prompt", "GRIFFIN, a step", "GRIFFIN, the prompt"):
        assert f"small, {name}: " in said
    assert "aten::mm" in said
