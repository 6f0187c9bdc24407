"""Several models over one text: sharing the run of its beginning changes no model's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import build, generate, random_ids
from torch import Tensor

import flocking
from flocking.pruning import SharedPrompts, branches, logits_side_by_side, side_by_side, together


def test_side_by_side_is_each_alone() -> None:
    """Sharing the prompt's run changes no model's numbers, nor its selection."""
    model = build("llama")
    ids = torch.tensor(random_ids(26, 26))
    options = [{"density": 0.5}, {"density": 0.25, "scope": "sequence"}, {"method": "magnitude"}]
    twins = [flocking.griffin(model, **chosen) for chosen in options]
    scored = list(side_by_side((subject for subject in (*twins, model)), ids, 16))
    assert [subject for subject, _ in scored] == [*twins, model]
    fixed = {"prompt_length": 16, "continuation_length": 10, "batch_size": 2, "progress": False}
    for chosen, (subject, values) in zip([*options, None], scored, strict=True):
        alone = model if chosen is None else flocking.griffin(model, **chosen)
        due = flocking.perplexity(alone, ids.tolist(), **fixed).log_likelihood
        np.testing.assert_array_equal(values[:, 15:].numpy(), due.values.astype(np.float32))
        if chosen is not None:
            for layer, kept in alone.selection.items():
                assert torch.equal(subject.selection[layer], kept)


def test_what_runs_between_the_models_changes_none() -> None:
    """Nor does what a twin did before the text count for it."""
    model = build("llama")
    ids = torch.tensor(random_ids(26))
    twin, other = flocking.griffin(model), flocking.griffin(model)
    due = [values for _, values in side_by_side([model, twin, other], ids, 16)]
    got = []
    for subject, values in side_by_side([model, twin, other], ids, 16):
        got.append(values)
        if subject is model:  # the leader reads something else in the meantime
            prompt = torch.tensor(random_ids(9, 9, seed=3))
            for each in (twin, other):
                each.generate(prompt, max_new_tokens=2, num_beams=3, do_sample=False)
    assert all(map(torch.equal, got, due))
    for each in (twin, other):
        assert each.report().prefilled_tokens == 16


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_branches_are_each_alone(generating: tf.PreTrainedModel, scope: str) -> None:
    """Several continuations of one beginning, together: the same likelihoods as one by one."""
    (head,) = random_ids(12)
    tails = random_ids(5, 1, 9, 3, seed=1)
    rows = [torch.tensor(head + tail) for tail in tails]
    twin = flocking.griffin(generating, scope=scope)
    for subject in (generating, twin):
        ((_, found),) = branches([subject], rows, list(map(len, tails)), len(head), size=4)
        for tail, (likelihoods, greedy) in zip(tails, found, strict=True):
            due = flocking.score(subject, head, tail)
            np.testing.assert_allclose(likelihoods.numpy(), due.values, rtol=1e-4, atol=2e-5)
            assert greedy.shape == likelihoods.shape


@pytest.mark.parametrize("size", [1, 2])
def test_branches_say_which_tokens_are_the_likeliest(size: int) -> None:
    """All of those that a model writes; where one was changed, not that one."""
    model = build("llama")
    (head,) = random_ids(12)
    for subject in (flocking.griffin(model), model):
        ids = torch.tensor([head])
        whole = generate(subject, ids, 6)[0]
        changed = whole.clone()
        changed[12 + 2] = (changed[12 + 2] + 1) % 128
        ((_, found),) = branches([subject], [whole, changed], [6, 6], 12, size=size)
        assert found[0][1].all()
        assert found[1][1][:3].tolist() == [True, True, False]


@pytest.mark.filterwarnings("ignore:.*falling back to its reference")
def test_branches_of_a_model_with_states() -> None:
    """What a convolution remembers goes along with keys and values."""
    torch.manual_seed(0)
    config = tf.Lfm2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    (head,) = random_ids(12)
    tails = random_ids(5, 1, 9, seed=1)
    rows = [torch.tensor(head + tail) for tail in tails]
    for subject in (model, flocking.griffin(model)):
        ((_, found),) = branches([subject], rows, list(map(len, tails)), 12, size=3)
        for tail, (got, _) in zip(tails, found, strict=True):
            due = flocking.score(subject, head, tail)
            np.testing.assert_allclose(got.numpy(), due.values, rtol=1e-4, atol=2e-5)


def variants_of(model: tf.PreTrainedModel) -> list[tf.PreTrainedModel]:
    """The full model first, and twins of every kind."""
    twins = [
        flocking.griffin(model, scope="sequence"),
        flocking.griffin(model, 0.25, method="magnitude", scope="sequence"),
        flocking.griffin(model, method="random", scope="sequence", seed=3),
    ]
    return [model, *twins]


def test_the_full_model_may_come_first() -> None:
    """A twin reads the beginning for it, and goes on with its own selection afterwards."""
    model = build("llama")
    ids = torch.tensor(random_ids(26))
    models = variants_of(model)
    for order in (models, models[::-1], models[:1], [models[0], models[2]]):
        found = list(logits_side_by_side(iter(order), ids, 16))
        assert [one for one, _ in found] == order
        for one, logits in found:
            due = flocking.score(one, ids[0, :16].tolist(), ids[0, 16:].tolist())
            got = logits[0].log_softmax(-1).gather(-1, ids[0, 16:, None])[:, 0]
            np.testing.assert_allclose(got, due, rtol=1e-5)
    assert list(side_by_side([], ids, 16)) == []


def test_branches_share_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all models, among them those that refresh within a continuation, and those that do not."""
    model = build("llama")
    (head,) = random_ids(12)
    tails = random_ids(5, 1, 9, 3, seed=1)
    rows = [torch.tensor(head + tail) for tail in tails]
    models = variants_of(model) + [flocking.griffin(model, refresh=n) for n in (4, 9)]
    runs = []
    beginning = together.beginning
    monkeypatch.setattr(together, "beginning", lambda *args: runs.append(args) or beginning(*args))
    found = list(branches(models, rows, list(map(len, tails)), len(head), size=4))
    assert [one for one, _ in found] == models
    assert len(runs) == 1
    for one, answers in found:
        for tail, (likelihoods, greedy) in zip(tails, answers, strict=True):
            due = flocking.score(one, head, tail)
            np.testing.assert_allclose(likelihoods.numpy(), due.values, rtol=1e-4, atol=2e-5)
            assert greedy.shape == likelihoods.shape


def written(model: tf.PreTrainedModel, ids: Tensor, mask: Tensor, **more: object) -> Tensor:
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options, **more)


def batch_of(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("lengths", [(20,), (20, 20), (20, 13)])
def test_generation_from_shared_prompts(generating: tf.PreTrainedModel, lengths: tuple) -> None:
    """Every model writes what it writes alone, on every architecture, also in padded batches."""
    ids, mask = batch_of(random_ids(*lengths))
    models = [*variants_of(generating), flocking.griffin(generating, scope="shared")]
    shared = SharedPrompts(models, ids, mask)
    for one in models[::-1]:
        options = shared.cache_for(one)
        assert options
        got = written(one, ids, mask, **options)
        kept = None if one is generating else one.selection
        assert torch.equal(got, written(one, ids, mask))
        for layer, indices in (kept or {}).items():
            assert torch.equal(indices, one.selection[layer])


@pytest.mark.parametrize("refresh", [1, 4])
def test_refreshed_generation_from_shared_prompts(some: tf.PreTrainedModel, refresh: int) -> None:
    ids, mask = batch_of(random_ids(20, 13))
    twins = [flocking.griffin(some, refresh=refresh), flocking.griffin(some)]
    for order in (twins, twins[::-1]):
        shared = SharedPrompts([some, *order], ids, mask)
        for one in [*order, some]:
            got = written(one, ids, mask, **shared.cache_for(one))
            assert torch.equal(got, written(one, ids, mask))


def test_prompts_of_one_token_are_not_shared() -> None:
    model = build("llama")
    models = [model, flocking.griffin(model)]
    for rows in ([[5]], [[5, 6, 7], [8]]):
        shared = SharedPrompts(models, *batch_of(rows))
        assert shared.cache_for(model) == shared.cache_for(models[1]) == {}
    assert SharedPrompts([model], *batch_of([[5, 6, 7]])).cache_for(model) == {}
