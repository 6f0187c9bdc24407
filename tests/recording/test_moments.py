"""Sums over windows, against a direct computation in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.stats import rankdata

from flocking import Moments
from flocking.recording.moments import standardised_ranks
from flocking.recording.windows import Windows


def by_brute_force(z: torch.Tensor, window: torch.Tensor, windows: int) -> dict[str, np.ndarray]:
    """The definitions, token by token."""
    z = z.double().numpy()
    n, tokens, d_ff = z.shape
    sums = {name: np.zeros((n, windows, d_ff)) for name in ("energy", "mass", "rank")}
    for i in range(n):
        for t in range(tokens):
            length = np.sqrt((z[i, t] ** 2).sum())
            if window[i, t] < 0 or length == 0:
                continue
            r = np.abs(z[i, t]) / length
            ranks = rankdata(r) - (d_ff + 1) / 2
            sums["energy"][i, window[i, t]] += r**2
            sums["mass"][i, window[i, t]] += r
            sums["rank"][i, window[i, t]] += ranks / np.sqrt((ranks**2).sum())
    return sums


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of 300 tokens, with padding, zeros (ReLU) and a token of zeros only."""
    generator = torch.Generator().manual_seed(1)
    z = (torch.randn(3, 300, 48, generator=generator) + 0.3).relu()
    z *= torch.logspace(-3, 3, 300)[:, None]  # norms over six orders of magnitude
    z[0, 7] = 0
    window = (torch.arange(300) // 40).repeat(3, 1)
    window[1, 250:] = -1
    window[2, :] = -1
    window[2, 100:103] = 2
    return z.to(dtype), window


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_update_is_the_definition(dtype: torch.dtype) -> None:
    z, window = example(dtype)
    moments = Moments.zeros(3, 8, 48, ranks=True)
    norm, l1 = moments.update(z, Windows.of(window))
    for name, expected in by_brute_force(z, window, 8).items():
        np.testing.assert_allclose(getattr(moments, name), expected, rtol=1e-4, atol=1e-4)
    real = window >= 0
    exact = torch.linalg.vector_norm(z.double(), dim=-1)
    torch.testing.assert_close(norm[real].double(), exact[real], rtol=1e-5, atol=0)
    expected = z.double().sum(-1)[real] / exact[real].clamp_min(1e-30)
    torch.testing.assert_close(l1[real].double(), expected, rtol=1e-5, atol=0)


def test_nothing_at_padding_counts() -> None:
    z, window = example()
    clean = Moments.zeros(3, 8, 48, ranks=True)
    clean.update(z, Windows.of(window))
    z[window < 0] = torch.nan
    dirty = Moments.zeros(3, 8, 48, ranks=True)
    dirty.update(z, Windows.of(window))
    for name, value in clean.state_dict().items():
        assert torch.equal(value, dirty.state_dict()[name])


def test_the_activations_are_left_alone() -> None:
    z, window = example()
    before = z.clone()
    Moments.zeros(3, 8, 48, ranks=True).update(z, Windows.of(window))
    assert torch.equal(z, before)


@pytest.mark.parametrize("cut", [1, 40, 129, 299])
def test_chunks_add_up(cut: int) -> None:
    z, window = example()
    whole, parts = Moments.zeros(3, 8, 48), Moments.zeros(3, 8, 48)
    whole.update(z, Windows.of(window))
    for piece in (slice(cut), slice(cut, None)):
        parts.update(z[:, piece], Windows.of(window[:, piece]))
    torch.testing.assert_close(parts.energy, whole.energy)
    torch.testing.assert_close(parts.mass, whole.mass)


def test_merge_and_serialise() -> None:
    z, window = example()
    whole, first, second = (Moments.zeros(3, 8, 48, ranks=True) for _ in range(3))
    whole.update(z, Windows.of(window))
    first.update(z[:, :100], Windows.of(window[:, :100]))
    second.update(z[:, 100:], Windows.of(window[:, 100:]))
    restored = Moments.from_state_dict(load(save(second.state_dict())))
    merged = first.merge(restored)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    with pytest.raises(ValueError, match="expected moments of shape"):
        first.merge(Moments.zeros(3, 9, 48, ranks=True))
    with pytest.raises(ValueError, match="only one of the two"):
        first.merge(Moments.zeros(3, 8, 48))


def test_autocast_does_not_reach_the_sums() -> None:
    z, window = example()
    expected, moments = Moments.zeros(3, 8, 48), Moments.zeros(3, 8, 48)
    expected.update(z, Windows.of(window))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments.update(z, Windows.of(window))
    assert torch.equal(moments.energy, expected.energy)
    assert torch.equal(moments.mass, expected.mass)


def test_ranks_are_spearmans() -> None:
    z, _ = example()
    r = z[0, :2] / z[0, :2].norm(dim=-1, keepdim=True)
    from scipy.stats import spearmanr

    a, b = standardised_ranks(r)
    assert float(a @ b) == pytest.approx(spearmanr(*r.numpy()).statistic, abs=1e-5)
    assert standardised_ranks(torch.zeros(1, 5)).tolist() == [[0] * 5]


def test_moments_add_up_with_a_sign_and_with_sum() -> None:
    parts = []
    for seed in range(3):
        moments = Moments.zeros(1, 2, 8, ranks=True)
        z = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))
        moments.update(z, Windows.of(torch.tensor([[0, 0, 1, 1, 1]])))
        parts.append(moments)
    expected = parts[0].merge(parts[1]).merge(parts[2])
    for got in (parts[0] + parts[1] + parts[2], sum(parts)):
        for name, value in expected.state_dict().items():
            assert torch.equal(got.state_dict()[name], value)
    with pytest.raises(TypeError, match="unsupported operand"):
        parts[0] + 1


SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


def settings() -> list[str]:
    backends: Any = torch.backends
    places = (backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul)
    return [place.fp32_precision for place in places]


PRECISION = """
import sys
sys.path[:0] = {paths!r}
from test_moments import *
from flocking.recording import moments

z, window = example()
def summed():
    sums = Moments.zeros(3, 8, 48, ranks=True)
    sums.update(z, Windows.of(window))
    return sums.state_dict()

expected, inside = summed(), []
rank = moments.standardised_ranks
moments.standardised_ranks = lambda r: inside.append(settings()) or rank(r)
SETTINGS[{name!r}]()
before = settings()
assert {{*before}} & {{"tf32", "bf16"}}
for name, values in summed().items():
    assert torch.equal(values, expected[name]), name
assert inside and not {{*inside[0]}} & {{"tf32", "bf16"}}, inside
assert settings() == before
if {name!r} in ("high", "medium"):
    assert torch.get_float32_matmul_precision() == {name!r}
torch.backends.fp32_precision = "ieee"  # what follows it still does
if {name!r} == "everywhere":
    assert {{*settings()}} == {{"ieee"}}
"""


@pytest.mark.parametrize("name", SETTINGS)
def test_sums_are_in_full_precision_whatever_is_set(name: str) -> None:
    """In a process of its own, since torch's settings cannot all be taken back."""
    here = Path(__file__).parent
    program = PRECISION.format(paths=[str(here), str(here.parent)], name=name)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
