"""The atlas of kinds of text, against selections made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.experiments import kinds

PIECE = 32


@pytest.fixture(scope="module")
def data(subject: tuple) -> xr.Dataset:
    return kinds.atlas(*subject, tokens=129, piece=PIECE, seed=3, progress=False)


@pytest.fixture(scope="module")
def energy(subject: tuple) -> np.ndarray:
    """(kind, piece, layer, neuron), from the raw activations."""
    model, tokenizer, texts = subject
    ids = [tokenizer(text)["input_ids"][:129] for text in texts]
    relative = flocking.record(model, ids, relative=True, progress=False).relative
    squares = relative.values[:, :, 1:].astype(np.float64) ** 2
    pieces = squares.reshape(len(ids), squares.shape[1], -1, PIECE, squares.shape[-1])
    return pieces.sum(axis=3).transpose(0, 2, 1, 3)


def kept(energy: np.ndarray) -> np.ndarray:
    order = np.argsort(-energy, axis=-1, kind="stable")[..., : energy.shape[-1] // 2]
    found = np.zeros(energy.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((one & other).sum(-1) / (one | other).sum(-1)))


def test_overlap_of_kinds(data: xr.Dataset, energy: np.ndarray) -> None:
    chosen = kept(energy)
    found = data.overlap.sel(weights="trained").values
    for one, other in itertools.product(range(4), repeat=2):
        pairs = itertools.product(range(4), repeat=2)
        expected = [
            overlap(chosen[one, a], chosen[other, b]) for a, b in pairs if (one, a) != (other, b)
        ]
        assert found[one, other] == pytest.approx(np.mean(expected), abs=0.005)  # of float16
    within = data.within.sel(weights="trained", interval="estimate")
    assert float(within) == pytest.approx(found.diagonal().mean())
    between = data.between.sel(weights="trained", interval="estimate")
    assert float(between) == pytest.approx(found[~np.eye(4, dtype=bool)].mean())


def test_how_many_kinds_keep_a_neuron(data: xr.Dataset, energy: np.ndarray) -> None:
    times = kept(energy.sum(axis=1)).sum(axis=0)
    found = data.share.sel(weights="trained", dealt="by kind")
    for number in range(5):
        assert float(found.sel(kinds=number)) == pytest.approx(np.mean(times == number), abs=0.01)
    np.testing.assert_allclose(data.share.sum("kinds"), 1)
    mean = (data.share * data.kinds).sum("kinds")
    np.testing.assert_allclose(mean, 2)  # half of four, however pieces are dealt


def test_chance_of_kinds(data: xr.Dataset) -> None:
    np.testing.assert_allclose(data.chance, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])


def test_settling(data: xr.Dataset, energy: np.ndarray) -> None:
    assert data.pieces.values.tolist() == [1, 2, 4, 8]
    settled = data.settled.sel(weights="trained")
    assert (settled.sel(interval="low") <= settled.sel(interval="high")).all()
    # A half of all pieces against the other half, drawn anew: the same up to draws.
    flat, random = energy.reshape(-1, *energy.shape[2:]), np.random.default_rng(0)
    draws = []
    for _ in range(40):
        order = random.permutation(len(flat))
        halves = kept(flat[order[:8]].sum(axis=0)), kept(flat[order[8:]].sum(axis=0))
        draws.append(overlap(*halves))
    here = settled.sel(pieces=8)
    assert float(here.sel(interval="estimate")) == pytest.approx(np.mean(draws), abs=0.05)


def test_it_says_what_it_needs(subject: tuple) -> None:
    model, tokenizer, texts = subject
    with pytest.raises(ValueError, match="expected two texts or more"):
        kinds.atlas(model, tokenizer, texts[:1], progress=False)
    with pytest.raises(ValueError, match=r"has \d+ tokens"):
        kinds.atlas(model, tokenizer, ["too short", "for this"], progress=False)


def test_its_caption_has_its_numbers(data: xr.Dataset) -> None:
    within = float(data.within.sel(weights="trained", interval="estimate"))
    assert f"of one kind: model {within:.2f} [" in data.attrs["caption"]
    none = float(data.share.sel(weights="trained", dealt="by kind", kinds=0))
    assert f"by none: {none:.3f}" in data.attrs["caption"]


def test_experts_that_a_kind_does_not_reach_are_no_neurons_of_all_kinds() -> None:
    """Two kinds, two experts of four neurons: the second kind has no token in the second expert."""
    values = np.array([[4, 3, 2, 1, 4, 3, 2, 1], [1, 2, 3, 4, 0, 0, 0, 0]], dtype=float)
    energy = xr.DataArray(
        values[:, None],
        {"sequence": [0, 1], "layer": [0], "d_ff": ("layer", [8]), "experts": ("layer", [2])},
        ("sequence", "layer", "neuron"),
    )
    found = kinds._shares(energy, 2)
    assert found.values.tolist() == [0, 1, 0]  # of the first expert, each is kept by one kind
