"""The experiments on losses, compared with the public functions called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

import flocking
from flocking import artifacts
from flocking.experiments import losses, reproduce
from flocking.experiments.losses import EXPERIMENTS


def ids_of(subject: tuple, tokens: int) -> list[list[int]]:
    _, tokenizer, texts = subject
    return [tokenizer(text)["input_ids"][:tokens] for text in texts]


def loss(
    model, rows: list[list[int]], prompt: int, batch_size: int = 1, **twin: object
) -> np.ndarray:
    """(sequence, distance), by flocking.perplexity."""
    subject = flocking.griffin(model, **twin) if twin else model
    options = {"prompt_length": prompt, "continuation_length": len(rows[0]) - prompt}
    scored = flocking.perplexity(subject, rows, batch_size=batch_size, progress=False, **options)
    return -scored.log_likelihood.values


def static(model, rows: list[list[int]]) -> dict[str, object]:
    """griffin's arguments for the static selection from these texts."""
    return {
        "method": "static",
        "reference": flocking.global_statistic(model, rows, progress=False),
    }


def estimate(values: xr.DataArray, **where: object) -> float:
    return values.sel(interval="estimate", **where).item()


def test_loss_by_prompt(subject: tuple) -> None:
    model = subject[0]
    data = EXPERIMENTS["loss_by_prompt"](*subject, tokens=241, horizon=112, progress=False)
    ids = ids_of(subject, 241)
    assert data.prompt_length.values.tolist() == [17, 65]
    whole = flocking.record(model, ids, window=16, progress=False)
    later = flocking.statistic(whole, start=129)
    for length in (17, 65):
        rows = [row[129 - length :] for row in ids]
        full = loss(model, rows, length)
        griffin = loss(model, rows, length, density=0.5)
        got = data.sel(prompt_length=length)
        assert estimate(got.perplexity, selection="full") == pytest.approx(
            np.exp(full.mean()), rel=1e-4
        )
        assert estimate(got.perplexity, selection="GRIFFIN") == pytest.approx(
            np.exp(griffin.mean()), rel=1e-4
        )
        near = estimate(got.relative_far, selection="GRIFFIN", distance=31.5)
        assert near == pytest.approx(np.exp((griffin - full)[:, 1:64].mean()), rel=1e-4)
        assert np.isnan(got.ageing).all()  # the first and the last 64 tokens are not two parts
        by_text = []
        for number, row in enumerate(rows):
            others = static(model, [text for n, text in enumerate(ids) if n != number])
            own = {"method": "static", "reference": later.isel(sequence=number)}
            mixed = {**others, "method": "global-local"}
            random = {"method": "random", "seed": number}
            by_text.append(
                [loss(model, [row], length, **chosen) for chosen in (own, mixed, others, random)]
            )
        expected = np.exp(np.mean(by_text, axis=(0, 2, 3)))
        for name, value in zip(
            ("hindsight", "global-local", "static", "random"), expected, strict=True
        ):
            assert estimate(got.perplexity, selection=name) == pytest.approx(value, rel=1e-4), name
        assert estimate(got.over_static) == pytest.approx(
            np.exp(griffin.mean()) / expected[2], rel=1e-4
        )


def test_ageing_is_of_the_first_and_the_last_tokens(subject: tuple) -> None:
    """Also where what is scored is no multiple of 64 tokens."""
    model = subject[0]
    data = EXPERIMENTS["loss_by_prompt"](*subject, tokens=321, horizon=160, progress=False)
    rows = [row[-160 - 17 :] for row in ids_of(subject, 321)]
    excess = loss(model, rows, 17, density=0.5) - loss(model, rows, 17)
    expected = np.exp(excess[:, -64:].mean() - excess[:, 1:64].mean())
    assert estimate(data.ageing.sel(prompt_length=17)) == pytest.approx(expected, rel=1e-4)
    assert "in the last 64 to that in the first 64: " in data.attrs["caption"]
    short = EXPERIMENTS["loss_by_prompt"](*subject, tokens=161, horizon=64, progress=False)
    assert "in the last" not in short.attrs["caption"]
    assert "nan" not in short.attrs["caption"]


def test_loss_by_density(subject: tuple) -> None:
    data = EXPERIMENTS["loss_by_density"](*subject, tokens=97, progress=False)
    rows = ids_of(subject, 97)
    assert data.attrs["prompt"] == 49
    for density in (0.1, 0.3, 1.0):
        expected = np.exp(loss(subject[0], rows, 49, density=density).mean())
        got = estimate(data.perplexity, selection="GRIFFIN", density=density)
        assert got == pytest.approx(expected, rel=1e-4)
    at_one = data.perplexity.sel(density=1.0)
    for name in at_one.selection.values:
        np.testing.assert_allclose(
            at_one.sel(selection=name), at_one.sel(selection="full"), rtol=1e-4
        )


def test_loss_by_method(subject: tuple) -> None:
    model = subject[0]
    data = EXPERIMENTS["loss_by_method"](*subject, tokens=65, progress=False)
    excerpts = [[row[64 * n : 64 * n + 65] for n in range(3)] for row in ids_of(subject, 193)]
    everything = [row for rows in excerpts for row in rows]
    magnitude = loss(model, everything, 33, method="magnitude")
    got = estimate(data.perplexity, selection="magnitude")
    assert got == pytest.approx(np.exp(magnitude.mean()), rel=1e-4)
    recording = flocking.record(model, everything, window=16, progress=False)
    kept = flocking.select(flocking.statistic(recording, stop=33))
    later = flocking.statistic(recording, start=33)
    share = flocking.captured_energy(kept, later).mean("layer").values
    griffin = data.sel(selection="GRIFFIN")
    np.testing.assert_allclose(griffin.captured.values.ravel(), share, rtol=1e-6)
    excess = (loss(model, everything, 33, density=0.5) - loss(model, everything, 33)).mean(axis=1)
    np.testing.assert_allclose(griffin.excess.values.ravel(), excess, atol=1e-4)
    expected = spearmanr(griffin.captured.values.ravel(), griffin.excess.values.ravel()).statistic
    assert estimate(data.between_excerpts) == pytest.approx(expected)
    pruned = data.sel(selection=losses.METHODS)
    each = [
        spearmanr(pruned.captured[text, at], pruned.excess[text, at]).statistic
        for text in range(4)
        for at in range(3)
    ]
    assert estimate(data.between_methods) == pytest.approx(np.mean(each))
    # Hindsight cannot be beaten in energy, nor has the static selection seen its own text.
    assert (pruned.captured <= pruned.captured.sel(selection="hindsight") + 1e-9).all()
    others = [row for rows in excerpts[1:] for row in rows]
    own = loss(model, excerpts[0], 33, **static(model, others)) - loss(model, excerpts[0], 33)
    first = data.excess.sel(selection="static").isel(text=0)
    np.testing.assert_allclose(first, own.mean(axis=1), atol=1e-4)


def test_loss_by_batch(subject: tuple) -> None:
    model = subject[0]
    data = EXPERIMENTS["loss_by_batch"](*subject, tokens=65, progress=False)
    rows = ids_of(subject, 65)
    assert data.batch_size.values.tolist() == [1, 2, 4]
    for size in (1, 4):
        expected = np.exp(loss(model, rows, 33, batch_size=size, density=0.5).mean())
        got = estimate(data.perplexity, selection="GRIFFIN", batch_size=size)
        assert got == pytest.approx(expected, rel=1e-4)
    pairs = [
        np.exp(loss(model, [rows[n] for n in order], 33, batch_size=2, density=0.5).mean())
        for order in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2])
    ]
    between = estimate(data.perplexity, selection="GRIFFIN", batch_size=2)
    assert min(pairs) - 1 < between < max(pairs) + 1
    for size in (1, 2, 4):
        full = estimate(data.perplexity, selection="full", batch_size=size)
        assert full == pytest.approx(np.exp(loss(model, rows, 33).mean()), rel=1e-4)


def test_seed_decides(subject: tuple) -> None:
    run = EXPERIMENTS["loss_by_density"]
    first, again, other = (
        run(*subject[:2], subject[2][:2], tokens=65, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    xr.testing.assert_identical(first, again)
    random = [data.perplexity.sel(selection="random", density=0.5) for data in (first, other)]
    assert not np.allclose(*random)
    griffin = [data.perplexity.sel(selection="GRIFFIN") for data in (first, other)]
    np.testing.assert_allclose(*griffin)


def test_every_experiment_is_reproduced() -> None:
    assert EXPERIMENTS.keys() < reproduce.EXPERIMENTS.keys()
    sources = {path.stem for path in artifacts.sources(losses.__name__)}
    assert sources >= {"losses", "parts", "build", "compact", "selection", "methods"}
