"""The experiments on activations: what they return is what the metrics say."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.experiments.activations import EXPERIMENTS


def ids_of(subject: tuple, tokens: int) -> list[list[int]]:
    _, tokenizer, texts = subject
    return [tokenizer(text)["input_ids"][:tokens] for text in texts]


def run(name: str, subject: tuple, **options: object) -> xr.Dataset:
    return EXPERIMENTS[name](*subject, progress=False, **options)


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


def test_drift_of_short_texts(subject: tuple) -> None:
    """The fewest tokens that give something in all panels."""
    data = EXPERIMENTS["drift"](*subject, tokens=81, progress=False)
    assert data.cut.values.tolist() == [17]
    for name in ("captured", "jaccard", "captured_far", "jaccard_far", "other_texts_far"):
        assert np.isfinite(data[name]).all(), name
    for tokens in (113, 129):
        data = EXPERIMENTS["drift"](*subject, tokens=tokens, progress=False)
        assert np.isfinite(data.captured_far.sel(distance=0)).all()
    with pytest.raises(ValueError, match="65 tokens of each were asked for, and 81 are needed"):
        EXPERIMENTS["drift"](*subject, tokens=65, progress=False)


def test_generation_of_a_short_context(subject: tuple) -> None:
    """Only what does not fit is made shorter, and it is said."""
    model = helpers.build("llama", vocab_size=len(subject[1]))  # a context of 256
    texts = subject[2][:2]
    with pytest.warns(UserWarning, match="191 tokens are generated instead of 400"):
        data = EXPERIMENTS["generation"](
            model, subject[1], texts, tokens=65, new_tokens=400, progress=False
        )
    assert (data.attrs["tokens"], data.attrs["new_tokens"]) == (65, 191)
    with pytest.warns(UserWarning, match="193 tokens instead of 257: .* 16 of it for what is gen"):
        data = EXPERIMENTS["generation"](
            model, subject[1], texts, tokens=257, new_tokens=16, progress=False
        )
    assert (data.attrs["tokens"], data.attrs["new_tokens"]) == (193, 16)


def test_a_model_of_one_layer(subject: tuple) -> None:
    model = helpers.build("llama", vocab_size=len(subject[1]), num_hidden_layers=1)
    data = EXPERIMENTS["heatmaps"](model, *subject[1:], tokens=33, progress=False)
    assert data.relative.dims == ("weights", "sequence", "token", "neuron")


def test_halves_are_of_as_many_tokens(subject: tuple) -> None:
    """Of texts with an odd number of windows, the last one is left out."""
    with pytest.warns(UserWarning, match="257 tokens instead of 321: they are a first token and"):
        data = EXPERIMENTS["sequence_overlap"](*subject, tokens=321, progress=False)
    assert data.attrs["tokens"] == 257
    recording = flocking.record(
        subject[0], ids_of(subject, 257), relative=True, progress=False, tokenizer=subject[1]
    )
    expected = flocking.between_sequence_overlap(recording).within.mean("sequence")
    np.testing.assert_allclose(data.within.sel(weights="trained", interval="estimate"), expected)


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
    with pytest.raises(ValueError, match="expected two texts or more, to compare them, got 1"):
        EXPERIMENTS["scores"](model, subject[1], ["word " * 300], progress=False)
