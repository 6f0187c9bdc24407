"""Methods of selection: what each of them keeps, and the references that some need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import as_masks, build, expected_selection, generate, random_ids, tokens
from torch import Tensor

import flocking
from flocking.drawing.style import BY_SELECTION
from flocking.pruning import DRAWN, METHODS, WITH_REFERENCE, WITHOUT_TEXT


def scores_of(method: str, statistic: Tensor, k: int = 40, seed: int = 0) -> Tensor:
    block = flocking.feedforwards(build("llama"))[0]
    return METHODS[method](statistic, k, block, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_reproducible(llama: tf.PreTrainedModel, method: str) -> None:
    ids = tokens(20)
    chosen = []
    for seed in (0, 0, 1):
        twin = flocking.griffin(llama, 0.5, method=method, seed=seed)
        generate(twin, ids)
        chosen.append(as_masks(twin, llama))
    assert (chosen[0].sum(-1) == 80).all()
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert (chosen[0] != chosen[2]).any() == (method in DRAWN)
    if method != "topk":
        assert (chosen[0] != expected_selection(llama, ids)[0]).any()


@pytest.mark.parametrize("method", [*METHODS, *WITH_REFERENCE])
def test_which_methods_need_the_text_is_known(llama: tf.PreTrainedModel, method: str) -> None:
    """Evaluations hold one selection for all texts of those that do not."""
    options: dict[str, Any] = {}
    if method in WITH_REFERENCE:
        options["reference"] = flocking.global_statistic(llama, random_ids(30, 30, seed=5))
    twin = flocking.griffin(llama, 0.5, method=method, **options)
    chosen = []
    for seed in (0, 1):
        generate(twin, tokens(20, seed=seed))
        chosen.append(as_masks(twin, llama))
    same = method in WITHOUT_TEXT or method == "random"  # (which draws the same for every text)
    assert (chosen[0] == chosen[1]).all() == same


def test_methods_have_a_style_in_figures() -> None:
    """Else an evaluation would fail when it draws, after all was computed. GRIFFIN is topk."""
    assert {*METHODS, *WITH_REFERENCE} - {"topk"} <= BY_SELECTION.keys()


def test_samples_in_proportion_to_the_statistic() -> None:
    """Drawing two of four: frequencies against the closed form, within five standard errors."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    due = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    n = 20_000
    scores = METHODS["sampled"](
        torch.tensor(p * 7).expand(n, 4), 2, None, torch.Generator().manual_seed(0)
    )
    got = np.bincount(scores.topk(2).indices.flatten().numpy(), minlength=4) / n
    assert (np.abs(got - due) < 5 * np.sqrt(np.array(due) * (1 - np.array(due)) / n)).all()


def test_half_sampling_keeps_the_highest() -> None:
    statistic = torch.rand(160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = scores_of("half-sampled", statistic, seed=1).topk(40).indices.tolist()
    assert set(statistic.topk(20).indices.tolist()) < set(kept)
    assert set(kept) != set(statistic.topk(40).indices.tolist())


def test_half_sampling_draws_the_others_in_proportion() -> None:
    """Of five, one is kept always: the shares of the other, within five standard errors."""
    statistic, n = torch.tensor([10.0, 1, 2, 3, 4], dtype=torch.float64), 20_000
    kept = scores_of("half-sampled", statistic.expand(n, 5), k=2).topk(2).indices
    assert (kept[:, 0] == 0).all()
    shares = np.bincount(kept[:, 1].numpy(), minlength=5) / n
    np.testing.assert_allclose(shares, [0, 0.1, 0.2, 0.3, 0.4], atol=0.018)


def test_magnitude_is_the_weights(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, 0.5, method="magnitude")
    generate(twin, tokens(20))
    due = flocking.select(flocking.weight_magnitude(llama), 0.5).values
    np.testing.assert_array_equal(as_masks(twin, llama), due)


def test_global_statistic_and_what_is_selected_by_it(llama: tf.PreTrainedModel) -> None:
    texts = random_ids(30, 50, 12)
    reference = flocking.global_statistic(llama, texts, progress=False)
    energy = 0
    for row in texts:
        recording = flocking.record(llama, [row], window=None, progress=False)
        energy = energy + flocking.statistic(recording).values[0] ** 2 / len(row) / 3
    np.testing.assert_allclose(reference, np.sqrt(energy), rtol=1e-5)
    assert reference.dims == ("layer", "neuron")

    def chosen(method: str, **options: object) -> np.ndarray:
        twin = flocking.griffin(llama, 0.5, method=method, **options)
        generate(twin, tokens(20))
        return as_masks(twin, llama)

    given = {"reference": reference}
    static, prompt = chosen("static", **given), chosen("topk")
    np.testing.assert_array_equal(static, flocking.select(reference, 0.5).values)
    np.testing.assert_array_equal(chosen("global-local", weight=1, **given), static)
    np.testing.assert_array_equal(chosen("global-local", weight=0, **given), prompt)
    both = chosen("global-local", **given)
    assert (both != static).any()
    assert (both != prompt).any()
    # By hand: mean of ranks, for the first layer.
    s = flocking.statistic(
        flocking.record(llama, tokens(20).tolist(), window=None, progress=False)
    ).values[0, 0]
    ranks = s.argsort().argsort() + reference.values[0].argsort().argsort()
    kept = ranks[both[0]]
    assert kept.min() >= np.sort(ranks)[-80]


def test_a_reference_is_taken_by_its_labels(llama: tf.PreTrainedModel) -> None:
    texts = random_ids(30, 20)
    reference = flocking.global_statistic(llama, texts, progress=False)
    flip = slice(None, None, -1)
    chosen = []
    for given in (reference, reference.isel(neuron=flip, layer=flip).transpose()):
        twin = flocking.griffin(llama, 0.5, method="static", reference=given)
        generate(twin, tokens(9), 2)
        chosen.append(twin.selection)
    assert all(torch.equal(chosen[0][layer], chosen[1][layer]) for layer in (0, 1))


def test_the_oracle_is_static_in_hindsight(llama: tf.PreTrainedModel) -> None:
    prompt, later = random_ids(20, 15)
    recording = flocking.record(llama, [prompt + later], window=19, progress=False)
    reference = flocking.statistic(recording, start=20).isel(sequence=0)
    twin = flocking.griffin(llama, 0.5, method="static", reference=reference)
    flocking.score(twin, prompt, later)
    np.testing.assert_array_equal(as_masks(twin, llama), flocking.select(reference, 0.5).values)


def test_a_users_own_method(llama: tf.PreTrainedModel) -> None:

    def lowest(statistic: Tensor, k: int, block: object, generator: object) -> Tensor:
        return -statistic

    twin = flocking.griffin(llama, 0.5, method=lowest)
    generate(twin, tokens(20))
    np.testing.assert_array_equal(as_masks(twin, llama), ~expected_selection(llama, tokens(20))[0])
    twin = flocking.griffin(llama, 0.5, method=lambda s, k, b, g: torch.arange(160) > 60)
    generate(twin, tokens(20))
    assert twin.selection[0].tolist() == [*range(61, 141)]
    for wrong, message in (
        (lambda s, k, b, g: s[:3], r"one score for each of 160 neurons, method returned \(3,\)"),
        (lambda s, k, b, g: None, "expected one score .* method returned NoneType"),
        (lambda s, k, b, g: s * float("nan"), "returned NaN in layer 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(flocking.griffin(llama, method=wrong), tokens(20))


@pytest.mark.parametrize("method", ["static", "global-local"])
def test_a_reference_is_ranked_by_its_values(llama: tf.PreTrainedModel, method: str) -> None:
    """By negative ones too, such as logarithms."""
    statistic = flocking.global_statistic(llama, random_ids(20), progress=False)
    weight = {} if method == "static" else {"weight": 1.0}
    for reference in (np.log(statistic), -statistic, statistic - statistic.mean()):
        twin = flocking.griffin(llama, 0.5, method=method, reference=reference, **weight)
        generate(twin, tokens(9))
        expected = flocking.select(reference, 0.5)
        np.testing.assert_array_equal(as_masks(twin, llama), expected.values)


def test_runs_of_one_block_need_a_statistic() -> None:
    """Theirs are added as norms are, which negative values are not."""
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    statistic = flocking.global_statistic(model, random_ids(20), progress=False)
    twin = flocking.griffin(model, 0.5, method="static", reference=statistic)
    generate(twin, tokens(9))
    norm = np.sqrt((statistic.values**2).sum(axis=0))
    assert set(twin.selection[0].tolist()) == set(norm.argsort()[-80:])
    with pytest.raises(ValueError, match="reference has negative values"):
        flocking.griffin(model, 0.5, method="static", reference=-statistic)


def test_refuses_a_reference_of_another_model(llama: tf.PreTrainedModel) -> None:
    reference = flocking.global_statistic(llama, random_ids(20), progress=False)
    with pytest.raises(
        ValueError,
        match="expected reference of 2 layers, 0 to 1, of 160 neurons, got one of 1 layers",
    ):
        flocking.griffin(llama, method="static", reference=reference.isel(layer=[1]))
    for width in (9, 500):  # also a wider model's, whose first neurons are others
        other = reference.reindex(neuron=range(width), fill_value=1.0)
        with pytest.raises(ValueError, match=f"(it has|0 to 1, of) {width} neurons"):
            flocking.griffin(llama, method="static", reference=other)
    with pytest.raises(ValueError, match="not finite"):
        flocking.griffin(llama, method="static", reference=reference.where(reference.layer > 0))
    with pytest.raises(TypeError, match="reference is a ndarray"):
        flocking.griffin(llama, method="static", reference=reference.values)
    with pytest.raises(ValueError, match=r"expected reference \(layer, neuron\)"):
        flocking.griffin(llama, method="static", reference=reference.isel(layer=0))
    with pytest.raises(ValueError, match="weight=2"):
        flocking.griffin(llama, method="global-local", reference=reference, weight=2)
    for weight in ("0.5", None, True):
        with pytest.raises(ValueError, match="give the weight of the global ranks"):
            flocking.griffin(llama, method="global-local", reference=reference, weight=weight)
