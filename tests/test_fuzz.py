"""Random arguments, on four tiny architectures, against computations that share no code with ours.

``make fuzz`` tries many more of them.
"""

from __future__ import annotations

import functools
import itertools
import math

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import assume, given, note
from hypothesis import strategies as st
from scipy.stats import rankdata

import flocking

pytestmark = pytest.mark.usefixtures("one_thread")
DENSE = ["llama", "gpt2", "opt"]
ALL = [*DENSE, "mixtral"]
GREEDY = {"do_sample": False, "pad_token_id": 0}


def relative_of(model: tf.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Relative activations of one text, float64 (layer, token, neuron)."""
    return np.stack([helpers.relative(z) for z in helpers.activations(model, ids).values()])


def standardised(r: np.ndarray) -> np.ndarray:
    """Each token's ranks, with mean 0 and length 1."""
    ranks = rankdata(r, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    return ranks / np.linalg.norm(ranks, axis=-1, keepdims=True)


def window_of(token: int, prompt: int, longest: int, window: int | None) -> int:
    """The number of a token's window: the first token, the prompt's, the generation's."""
    width = window or 10**9
    if token == 0:
        return 0
    if token < prompt:
        return 1 + (token - 1) // width
    return 1 + math.ceil((longest - 1) / width) + (token - prompt) // width


texts = st.lists(st.integers(1, 24), min_size=1, max_size=4)
windows = st.one_of(st.none(), st.integers(1, 30))


@given(
    name=st.sampled_from(ALL),
    lengths=texts,
    window=windows,
    layers=st.sampled_from([None, [0], [1], [1, 0]]),
    relative=st.sampled_from([False, True, [1]]),
    ranks=st.booleans(),
    new=st.sampled_from([0, 0, 1, 2, 5]),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_recording_is_what_bare_hooks_give(
    name: str,
    lengths: list[int],
    window: int | None,
    layers: list[int] | None,
    relative: bool | list[int],
    ranks: bool,
    new: int,
    batch_size: int,
    seed: int,
) -> None:
    assume(relative != [1] or layers != [0])
    model = helpers.proved(name)
    prompts = helpers.random_ids(*lengths, seed=seed)
    recording = flocking.record(
        model,
        prompts,
        window=window,
        layers=layers,
        relative=relative,
        ranks=ranks,
        max_new_tokens=new,
        batch_size=batch_size,
        progress=False,
    )
    kept = recording.layer.values
    assert kept.tolist() == ([0, 1] if layers is None else sorted(layers))
    for row, prompt in enumerate(prompts):
        fed = prompt
        if new:
            asked = {"max_new_tokens": new, **GREEDY}
            fed = model.generate(torch.tensor([prompt]), **asked)[0, :-1].tolist()
        one = recording.isel(sequence=row)
        total = len(fed)
        assert one.token_id.values.tolist() == fed + [-1] * (recording.sizes["token"] - total)
        where = [window_of(t, len(prompt), max(lengths), window) for t in range(total)]
        assert one.token_window.values[:total].tolist() == where
        r = relative_of(model, fed)[kept]
        by_window = np.eye(recording.sizes["window"])[where].T  # (window, token)
        np.testing.assert_array_equal(one.tokens, by_window.sum(1))
        np.testing.assert_allclose(one.energy, by_window @ r**2, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(one.mass, by_window @ r, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(one.l1[:, :total], r.sum(-1), rtol=1e-4)
        assert bool(one.l1[:, total:].isnull().all())
        if ranks and name != "mixtral":  # (rounding may part the zeros of those not routed to)
            got = one["rank"].values
            np.testing.assert_allclose(got, by_window @ standardised(r), rtol=1e-2, atol=1e-3)
        if relative:
            got = one.relative.transpose(..., "token", "neuron")[..., :total, :]
            expected = r if relative is True else r[kept == 1]
            np.testing.assert_allclose(got, expected, atol=1e-3)


def mean_cosine(vectors: np.ndarray) -> float:
    return float(np.mean([a @ b for a, b in itertools.combinations(vectors, 2)]))


@given(
    name=st.sampled_from(ALL),
    lengths=st.lists(st.integers(4, 24), min_size=2, max_size=3),
    window=st.integers(1, 9),
    density=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_measures_are_what_all_pairs_give(
    name: str, lengths: list[int], window: int, density: float, seed: int
) -> None:
    model = helpers.proved(name)
    ids = helpers.random_ids(*lengths, seed=seed)
    recording = flocking.record(model, ids, window=window, batch_size=2, progress=False)
    score, effective = flocking.flocking_score(recording), flocking.effective_neurons(recording)
    statistic = flocking.statistic(recording)
    selection = flocking.select(statistic, density)
    captured = flocking.captured_energy(selection, statistic)
    overlap = flocking.jaccard(selection.isel(sequence=0), selection.isel(sequence=1))
    for row, text in enumerate(ids):
        for layer, r in enumerate(relative_of(model, text)):
            here = {"sequence": row, "layer": layer}
            later = r[1:]  # the first token is left out of measures of flocking
            sums = later.sum(1)
            chance = np.mean([a * b for a, b in itertools.combinations(sums, 2)]) / r.shape[1]
            expected = (mean_cosine(later) - chance) / (1 - chance)
            assert score.isel(here).item() == pytest.approx(expected, abs=1e-4)
            energy = (later**2).sum(0)
            share = energy.sum() ** 2 / (energy**2).sum()
            assert effective.isel(here).item() == pytest.approx(share, rel=1e-3)
            s = np.sqrt((r**2).sum(0))
            np.testing.assert_allclose(statistic.isel(here), s, rtol=1e-3, atol=1e-6)
            mask = selection.isel(here).values
            assert_largest(mask, s, density, 4 if name == "mixtral" else 1)
            share = (s[mask] ** 2).sum() / (s**2).sum()
            assert captured.isel(here).item() == pytest.approx(share, rel=1e-3)
    for layer in range(2):
        a, b = selection.isel(layer=layer).values[:2]
        expected = (a & b).sum() / (a | b).sum()
        assert overlap.isel(layer=layer).item() == pytest.approx(expected)


def assert_largest(mask: np.ndarray, s: np.ndarray, density: float, experts: int = 1) -> None:
    """The mask has ``floor(density * d_ff)`` neurons, none smaller than one that is left out."""
    for kept, values in zip(np.split(mask, experts), np.split(s, experts), strict=True):
        assert kept.sum() == math.floor(density * len(values) + 1e-9)
        if not kept.all():
            assert values[kept].min() >= values[~kept].max() * (1 - 1e-4)


@given(
    name=st.sampled_from(DENSE),
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=3),
    density=st.floats(0.05, 1),
    scope=st.sampled_from(["shared", "sequence"]),
    seed=st.integers(0, 99),
)
def test_a_twin_computes_what_the_masked_model_does(
    name: str, lengths: list[int], density: float, scope: str, seed: int
) -> None:
    model = helpers.proved(name)
    prompts, later = (
        helpers.random_ids(*lengths, seed=seed),
        helpers.random_ids(5, seed=seed + 1)[0],
    )
    widest = max(lengths)
    ids = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (widest - n) + [1] * n for n in lengths])
    twin = flocking.griffin(model, density, scope=scope)
    sequences = twin.generate(ids, attention_mask=mask, max_new_tokens=1, **GREEDY)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=1, **GREEDY)
    assert torch.equal(sequences, whole)  # the first new token is the full model's

    s = np.stack([np.sqrt((relative_of(model, prompt) ** 2).sum(1)) for prompt in prompts])
    kept = np.moveaxis(helpers.as_masks(twin, model), -2, 0)
    if scope == "shared":
        s = (s / np.sqrt(lengths)[:, None, None]).sum(0)
        pairs = zip(kept, s, strict=True)
    else:
        pairs = ((kept[layer, row], s[row, layer]) for row in range(len(s)) for layer in (0, 1))
    for one, statistic in pairs:
        assert_largest(one, statistic, density)

    def masked(module: torch.nn.Module, args: tuple, layer: int) -> tuple:
        own = torch.from_numpy(kept[layer]).to(args[0].dtype)
        own = own if scope == "shared" else own[:1]
        return (args[0] * own, *args[1:])

    if scope == "sequence":  # the first prompt alone, with its own selection
        twin.generate(torch.tensor(prompts[:1]), max_new_tokens=1, **GREEDY)
    past = model(torch.tensor(prompts[:1])).past_key_values
    again = model(torch.tensor(prompts[:1])).past_key_values
    with torch.no_grad():
        got = twin(torch.tensor([later]), past_key_values=past).logits
    handles = [
        block.down.register_forward_pre_hook(
            lambda module, args, layer=layer: masked(module, args, layer)
        )
        for layer, block in enumerate(flocking.feedforwards(model))
    ]
    try:
        with torch.no_grad():
            expected = model(torch.tensor([later]), past_key_values=again).logits
    finally:
        for handle in handles:
            handle.remove()
    note(f"largest difference {float((got - expected).abs().max())}")
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@given(
    name=st.sampled_from(DENSE),
    prompt=st.integers(2, 20),
    new=st.integers(1, 24),
    refresh=st.integers(1, 12),
    density=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_a_refreshed_twin_computes_what_masked_steps_do(
    name: str, prompt: int, new: int, refresh: int, density: float, seed: int
) -> None:
    """A full pass over all text at each refresh, and single steps under masks between them."""
    model = helpers.exact(name)
    text = helpers.random_ids(prompt + new, seed=seed)[0]
    twin = flocking.griffin(model, density, refresh=refresh)
    scored = flocking.score(twin, text[:prompt], text[prompt:]).values
    history = twin.history
    positions = list(range(prompt, prompt + new, refresh))
    assert history.position.values.tolist() == positions
    for position, kept in zip(positions, history.values, strict=True):
        for mask, r in zip(kept, relative_of(model, text[:position]), strict=True):
            assert_largest(mask, np.sqrt((r**2).sum(0)), density)

    def masked(module: torch.nn.Module, args: tuple, layer: int, masks: np.ndarray) -> tuple:
        return (args[0] * torch.from_numpy(masks[layer]).to(args[0].dtype), *args[1:])

    blocks = flocking.feedforwards(model)
    expected, output = [], None
    for step in range(new):
        end, (number, since) = prompt + step, divmod(step, refresh)
        handles = [
            block.down.register_forward_pre_hook(
                functools.partial(masked, layer=layer, masks=history.values[number])
            )
            for layer, block in enumerate(blocks)
            if since
        ]
        fed = text[end - 1 : end] if since else text[:end]
        past = {"past_key_values": output.past_key_values} if since else {}
        with torch.no_grad():
            output = model(torch.tensor([fed]), use_cache=True, **past)
        for handle in handles:
            handle.remove()
        expected.append(float(output.logits[0, -1].log_softmax(-1)[text[end]]))
    np.testing.assert_allclose(scored, expected, rtol=1e-5, atol=1e-5)
