"""The CUDA kernels, run by Triton's interpreter, and compiled for cards that are not here.

`make test` runs this file by itself, with Triton next to the environment, and its interpreter on.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import build, random_ids

import flocking
from flocking.recording import Moments, Windows, moments, windows

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make test runs these under Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="make test puts Triton next to the environment")

from flocking.feedforward import columns
from flocking.recording import kernels


def windows_of(kind: str, sequences: int, tokens: int) -> torch.Tensor:
    token = torch.arange(tokens).expand(sequences, tokens)
    if kind == "prompt":  # as GRIFFIN has it
        return (token > 0).long()
    if kind == "narrow":
        return token // 7
    generator = torch.Generator().manual_seed(1)  # in no order, with holes
    return torch.randint(-1, 4, (sequences, tokens), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["prompt", "narrow", "wild"])
@pytest.mark.parametrize(
    ("sequences", "tokens", "width"), [(1, 290, 200), (3, 70, 128), (2, 1, 130)]
)
def test_sums_against_brute_force(
    dtype: torch.dtype, kind: str, sequences: int, tokens: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(sequences, tokens, 2 * width, generator=generator).to(dtype)[..., :width]
    window = windows_of(kind, sequences, tokens)
    if sequences > 2:  # padding, whatever stands in it; and a token without activations
        window[0, :10] = -1
        z[0, :10] = torch.nan
        z[1, 20] = 0
    start = [torch.rand(sequences, 60, width, generator=generator) for _ in range(2)]
    energy, mass = (part.clone() for part in start)
    norm, l1 = kernels.add(z, kernels.Pieces.of(window, torch.device("cpu")), energy, mass)

    expected = [part.double() for part in start]
    for sequence in range(sequences):
        for token in range(tokens):
            place = int(window[sequence, token])
            if place < 0:
                assert norm[sequence, token] == l1[sequence, token] == 0
                continue
            row = z[sequence, token].double()
            length = row.norm()
            r = row.abs() / length if length else row.abs()
            torch.testing.assert_close(norm[sequence, token].double(), length, rtol=1e-6, atol=0)
            torch.testing.assert_close(l1[sequence, token].double(), r.sum(), rtol=1e-6, atol=0)
            expected[0][sequence, place] += r**2
            expected[1][sequence, place] += r
    for got, exact in zip((energy, mass), expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-6)


def test_what_is_not_finite_is_not_lost() -> None:
    z = torch.ones(1, 4, 8)
    z[0, 2, 3] = torch.nan
    sums = Moments.zeros(1, 2, 8)
    pieces = kernels.Pieces.of(torch.tensor([[0, 1, 1, 1]]), torch.device("cpu"))
    norm, l1 = kernels.add(z, pieces, sums.energy, sums.mass)
    assert norm.isnan().tolist() == l1.isnan().tolist() == [[False, False, True, False]]
    assert sums.energy[0, 1].isnan().all()
    assert sums.energy[0, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width", "k"), [(5, 300, 150), (16, 700, 257), (9, 40, 1)])
def test_columns_are_those_of_indexing(dtype: torch.dtype, height: int, width: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(height, width + 3, generator=generator).to(dtype)[:, :width]
    index = torch.randperm(width, generator=generator)[:k].sort().values
    out = torch.full((height, k), torch.nan, dtype=dtype)
    assert columns.take_columns(whole, index, out) is out
    assert torch.equal(out, whole[:, index])
    turned = whole.T.contiguous().T
    assert torch.equal(columns.take_columns(turned, index, torch.empty_like(out)), out)


def test_nothing_but_padding() -> None:
    sums = Moments.zeros(2, 3, 8)
    pieces = kernels.Pieces.of(torch.full((2, 5), -1), torch.device("cpu"))
    norm, l1 = kernels.add(torch.full((2, 5, 8), torch.nan), pieces, sums.energy, sums.mass)
    for nothing in (norm, l1, sums.energy, sums.mass):
        assert not nothing.any()


@pytest.mark.usefixtures("_on_this_device")
def test_a_chunk_of_padding_alone() -> None:
    sums = Moments.zeros(2, 3, 8)
    norm, _ = sums.update(torch.ones(2, 5, 8), Windows.of(torch.full((2, 5), -1)))
    assert not norm.any()
    assert not sums.energy.any()


@pytest.fixture
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moments, windows):
        monkeypatch.setattr(module, "kernels_for", lambda device: kernels)


@pytest.mark.usefixtures("_on_this_device")
def test_windows_are_sent_once() -> None:
    windows = Windows.of(torch.tensor([[0, 1, 1, -1]]))
    there = windows.to(torch.device("cpu"))
    assert there.pieces is not None
    assert windows.to(torch.device("cpu")) is there is there.to(torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_recordings_and_selections_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    ids = random_ids(30, 21)
    prompt = torch.tensor(random_ids(20, 20, seed=1))
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0

    def everything() -> tuple[xr.Dataset, xr.Dataset, dict[int, torch.Tensor]]:
        twin = flocking.griffin(model, 0.5)
        twin.generate(prompt, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
        options = {"window": 8, "max_new_tokens": 4, "progress": False, "batch_size": 2}
        plain = flocking.record(model, ids, **options)
        return plain, flocking.record(model, ids, ranks=True, **options), twin.selection

    expected = everything()
    calls = []
    add = kernels.add
    monkeypatch.setattr(kernels, "add", lambda *args: calls.append(args) or add(*args))
    for module in (moments, windows):
        monkeypatch.setattr(module, "kernels_for", lambda device: kernels)
    got = everything()
    assert bool(calls) == (name != "mixtral")  # its experts are routed, and summed in another way
    for one, other in zip(got[:2], expected[:2], strict=True):
        xr.testing.assert_allclose(one, other, rtol=1e-5)
    for layer, experts in expected[2].items():
        np.testing.assert_array_equal(got[2][layer], experts)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flocking.feedforward import columns
from flocking.recording import kernels

constants = {"block": kernels._BLOCK, "rows": kernels._ROWS, "columns": kernels._COLUMNS}
floats = {"norm", "l1", "energy", "mass", "energies", "masses"}
whole = {"real", "spans", "targets", "offsets"}
taken = columns._take_columns
for capability in (80, 90):
    for z in ("bf16", "fp16", "fp32"):
        for kernel in (kernels._norms, kernels._sum_pieces, kernels._add_up, taken):
            kinds = {
                name: "constexpr" if name in constants
                else f"*{z}" if name in ("z", "whole", "out")
                else "*i64" if name == "index"
                else "*fp32" if name in floats
                else "*i32" if name in whole
                else "i32"
                for name in kernel.arg_names
            }
            values = {name: constants[name] for name in kernel.arg_names if name in constants}
            source = ASTSource(fn=kernel, signature=kinds, constexprs=values)
            target = GPUTarget("cuda", capability, 32)
            assert triton.compile(source, target=target).asm["cubin"]
            print(capability, z, kernel.__name__)
"""


def test_compile_for_gpus() -> None:
    """Triton brings the assembler with it: no GPU is needed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 2 * 3 * 4
