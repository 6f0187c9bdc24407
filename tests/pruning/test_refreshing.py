"""Selections that are made anew while a text is generated."""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import (
    ARCHITECTURES,
    activations,
    as_masks,
    exact,
    expected_selection,
    generate,
    random_ids,
    relative,
    selected_by_hand,
    tokens,
)
from packaging.version import parse
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

import flocking
from flocking.feedforward import feedforwards

DENSE = [name for name in ARCHITECTURES if name not in ("bert", "mixtral", "gpt_oss")]


@pytest.fixture(params=[name for name in ARCHITECTURES if name != "bert"])
def each(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return exact(request.param)


def by_hand(model: tf.PreTrainedModel, ids: Tensor, refresh: int, n: int) -> tuple[list, list]:
    """Greedy tokens and logits: a full pass over all text at each refresh, masked steps between.

    Nothing is rewound: the cache is the full model's own, from a pass over the text so far.
    """
    text, logits = ids[0].tolist(), []
    blocks = feedforwards(model)

    def masked(module: torch.nn.Module, args: tuple, layer: int, masks: dict) -> tuple:
        return (args[0] * torch.from_numpy(masks[layer]).to(args[0]), *args[1:])

    with torch.no_grad():
        for step in range(n):
            if step % refresh == 0:
                output = model(torch.tensor([text]), use_cache=True)
                masks = selected_by_hand(model, text)
            else:
                hooks = [
                    block.down.register_forward_pre_hook(
                        functools.partial(masked, layer=block.layer, masks=masks)
                    )
                    for block in blocks
                ]
                output = model(
                    torch.tensor([text[-1:]]),
                    attention_mask=torch.ones(1, len(text), dtype=torch.int64),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
                for hook in hooks:
                    hook.remove()
            logits.append(output.logits[:, -1])
            text.append(int(logits[-1].argmax()))
    return text, logits


@pytest.mark.parametrize("refresh", [8, 13])
@pytest.mark.parametrize("name", DENSE)
def test_gives_what_masks_by_hand_give(name: str, refresh: int) -> None:
    """Beyond the sliding windows of 16 that some have."""
    model, ids = exact(name), tokens(20)
    twin = flocking.griffin(model, 0.5, refresh=refresh)
    output = generate(twin, ids, 30, return_dict_in_generate=True, output_logits=True)
    text, logits = by_hand(model, ids, refresh, 30)
    assert output.sequences[0].tolist() == text
    for got, expected in zip(output.logits, logits, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    last = (29 // refresh) * refresh
    masks = selected_by_hand(model, text[: 20 + last])
    assert (as_masks(twin, model) == np.stack([masks[b.layer] for b in feedforwards(model)])).all()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_mixture_selects_from_all_that_was_read(name: str) -> None:
    model = exact(name)
    twin = flocking.griffin(model, 0.5, refresh=6)
    text = generate(twin, tokens(20), 14)
    assert twin.history.position.values.tolist() == [20, 26, 32]
    due = expected_selection(model, text[:, :32])[0]
    assert (due != expected_selection(model, text[:, :26])[0]).any()
    assert (as_masks(twin, model) == due).all()


def test_every_token_is_the_full_models(each: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    twin = flocking.griffin(each, 0.5, refresh=1)
    assert torch.equal(generate(twin, ids, 30), generate(each, ids, 30))
    assert twin.report().effective_density == 1


def test_keeping_all_neurons_changes_nothing(each: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    twin = flocking.griffin(each, 1.0, refresh=7)
    assert torch.equal(generate(twin, ids, 30), generate(each, ids, 30))


def test_before_the_first_refresh_it_is_the_once_chosen_twin(each: tf.PreTrainedModel) -> None:
    """Bit for bit."""
    ids = tokens(20)
    options = {"return_dict_in_generate": True, "output_logits": True}
    once, beyond = (flocking.griffin(each, 0.5, refresh=n) for n in (None, 12))
    got, expected = (generate(twin, ids, 12, **options) for twin in (beyond, once))
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert torch.equal(a, b)
    assert beyond.report().refreshes == 0


def states_of(cache: tf.Cache) -> list[Tensor]:
    """All that a cache holds of each layer; of a fixed one, up to its length."""
    states = []
    for layer in cache.layers:
        values = itertools.chain.from_iterable(
            value.values() if isinstance(value, dict) else [value] for value in vars(layer).values()
        )
        for value in values:
            if isinstance(value, Tensor) and value.ndim > 2:
                fixed = hasattr(layer, "max_cache_len") and not layer.is_sliding
                states.append(value[:, :, : int(layer.get_seq_length())] if fixed else value)
    return states


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_is_the_full_models_after_a_refresh(each: tf.PreTrainedModel, kind: str) -> None:
    """As after one pass of the full model over the whole text, into a cache of the same kind."""
    ids = tokens(20)

    def cache() -> tf.Cache:
        if kind == "static":
            return StaticCache(config=each.config, max_cache_len=64)
        return DynamicCache(config=each.config)

    got, expected = cache(), cache()
    twin = flocking.griffin(each, 0.5, refresh=6)
    text = generate(twin, ids, 25, past_key_values=got)  # the last token is not fed
    assert twin.history.position.values.tolist() == [20, 26, 32, 38, 44]
    with torch.no_grad():
        each(text[:, :-1], past_key_values=expected, use_cache=True)
    found = states_of(got)
    assert len(found) > 0
    for a, b in zip(found, states_of(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max())


OTHER_STATES = {
    "recurrent": lambda: tf.Qwen3NextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
        max_position_embeddings=256,
    ),
    "convolutions": lambda: tf.Lfm2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=256,
        block_auto_adjust_ff_dim=False,
    ),
}


@pytest.mark.parametrize("kind", OTHER_STATES)
def test_states_that_are_overwritten_are_restored(kind: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(OTHER_STATES[kind]()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ids, cache = tokens(20), DynamicCache(config=model.config)
    twin = flocking.griffin(model, 0.5, refresh=5)
    text = generate(twin, ids, 16, past_key_values=cache)
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text[:, :-1], past_key_values=expected, use_cache=True)
    for a, b in zip(states_of(cache), states_of(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max())
    assert torch.equal(generate(flocking.griffin(model, 0.5, refresh=1), ids), generate(model, ids))


@pytest.mark.parametrize("while_reading", [False, True])
@pytest.mark.parametrize("kind", OTHER_STATES)
def test_they_are_as_before_if_a_turn_fails(kind: str, while_reading: bool) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(OTHER_STATES[kind]()).eval()
    fails = [False]

    def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
        if fails[0]:
            raise KeyError("of the user's")

    model.model.layers[-1].register_forward_hook(hook)  # the states of those before are written
    cache = DynamicCache(config=model.config)
    twin = flocking.griffin(model, 0.5, refresh=5)
    text = torch.cat((generate(twin, tokens(20), 8, past_key_values=cache), tokens(3)), dim=1)
    before = [state.clone() for state in states_of(cache)]
    fails[0] = while_reading
    more = {} if while_reading else {"guidance_scale": 1.5}
    with pytest.raises((KeyError, ValueError)):
        generate(twin, text, 3, past_key_values=cache, **more)
    after = states_of(cache)
    assert len(after) > 2
    assert all(map(torch.equal, after, before))


def test_a_padded_batch_equals_its_members(some: tf.PreTrainedModel) -> None:
    """Also where one member ends early, and is filled up with padding that the cache holds."""
    rows = random_ids(20, 13)
    ids = torch.tensor([rows[0], [0] * 7 + rows[1]])
    mask = torch.tensor([[1] * 20, [0] * 7 + [1] * 13])
    twin = flocking.griffin(some, 0.5, refresh=5, scope="sequence")
    alone = [generate(twin, torch.tensor([row]), 24)[0, len(row) :] for row in rows]
    # A token of the first that the second does not have, and its twin's selection until the end.
    (at,) = [n for n, t in enumerate(alone[0]) if n >= 7 and t not in alone[1]][:1] or [None]
    end = int(alone[0][at])
    first = alone[0].tolist().index(end)
    together = generate(twin, ids, 24, attention_mask=mask, eos_token_id=end)
    assert torch.equal(together[1, 20:], alone[1])
    assert torch.equal(together[0, 20 : 21 + first], alone[0][: first + 1])
    assert (together[0, 21 + first :] == 0).all()
    generate(twin, torch.tensor([rows[1]]), 24)
    kept = twin.history.isel(sequence=0)
    generate(twin, ids, 24, attention_mask=mask, eos_token_id=end)
    assert (kept.values == twin.history.isel(sequence=1).values).all()


def test_padding_behind_an_ended_text_does_not_count(some: tf.PreTrainedModel) -> None:
    """With one selection for all, it is made from the texts up to where they ended."""
    ids = tokens(20, 20)
    twin = flocking.griffin(some, 0.5, refresh=5)
    free = generate(twin, ids, 24)
    end = int(free[0, 22])
    written = generate(twin, ids, 24, eos_token_id=end)
    ended = [(row == end).nonzero()[:1] for row in written[:, 20:]]
    lengths = [int(found[0]) + 21 if len(found) else 44 for found in ended]
    assert min(lengths) < 30
    position = int(twin.history.position[-1])
    total = {}
    for row, length in zip(written, lengths, strict=True):
        text = row[: min(length, position)].tolist()
        for layer, z in activations(some, text).items():
            statistic = np.sqrt(np.square(relative(z)).sum(axis=0) / len(text))
            total[layer] = total.get(layer, 0) + statistic
    for layer, statistic in total.items():
        expected = np.sort(np.argsort(-statistic, kind="stable")[: len(statistic) // 2])
        assert twin.selection[layer].tolist() == expected.tolist()


@pytest.mark.parametrize("prompts", [1, 2])
def test_beams_take_their_statistic_along(some: tf.PreTrainedModel, prompts: int) -> None:
    """After each refresh, the moments are those of each beam's own text."""
    ids = tokens(*[20] * prompts)
    twin = flocking.griffin(some, 0.5, refresh=4)
    generate(twin, ids, 24, num_beams=3)
    read = twin._griffin.read
    assert read.end == 40
    orders = set()
    for row, text in enumerate(read.text.tolist()):
        orders.add(tuple(text[20:]))
        for layer, z in activations(some, text).items():
            energy = np.square(relative(z)).sum(axis=0)
            got = read.moments[layer].energy[row].sum(dim=0)
            np.testing.assert_allclose(got, energy, rtol=1e-3, atol=1e-5)
    assert len(orders) > prompts  # beams that differ


def test_beams_at_the_limits(some: tf.PreTrainedModel) -> None:
    ids = tokens(20, 20)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(some, ids, 24, **beams)
    for density, refresh in [(0.5, 1), (1.0, 7)]:
        twin = flocking.griffin(some, density, refresh=refresh)
        assert torch.equal(generate(twin, ids, 24, **beams), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_static_caches_beams_and_samples(some: tf.PreTrainedModel, options: dict) -> None:
    twin = flocking.griffin(some, 0.5, refresh=4)
    results = []
    for kind in (None, "static"):
        torch.manual_seed(0)
        results.append(generate(twin, tokens(20, 20), 24, cache_implementation=kind, **options))
        assert twin.report().refreshes == 5
    assert torch.equal(*results)


@pytest.mark.parametrize("given", ["conversation", "new"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_second_turn_reads_what_was_not_read(
    some: tf.PreTrainedModel, given: str, kind: type
) -> None:
    """As if the full model had read all of it at once, whether all of it is given or the end."""
    twin = flocking.griffin(some, 0.5, refresh=6)
    cache = kind(config=some.config, **({"max_cache_len": 80} if kind is StaticCache else {}))
    first = generate(twin, tokens(20), 10, past_key_values=cache)  # 3 of 9 tokens are not read
    whole = torch.cat((first, tokens(8, seed=1)), dim=1)
    # (The cache lacks the last token that was generated.)
    ids = whole if given == "conversation" else whole[:, 29:]
    output = generate(
        twin,
        ids,
        1,
        past_key_values=cache,
        attention_mask=torch.ones_like(whole),
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        expected = some(whole).logits[:, -1]
    np.testing.assert_allclose(output.logits[0], expected, rtol=1e-4, atol=1e-5)
    assert (as_masks(twin, some) == expected_selection(some, whole)[0]).all()
    assert twin.history.position.values.tolist() == [20, 26, 38]
    assert twin.report().prefilled_tokens == 38


def test_a_draft_does_not_refresh(some: tf.PreTrainedModel) -> None:
    twin, ids = flocking.griffin(some, 0.5, refresh=2), tokens(20)
    other = copy.deepcopy(some)  # whose drafts are not taken
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape))
    try:
        generate(some, ids, 24, assistant_model=other)
    except RuntimeError as problem:
        if parse(tf.__version__) >= parse("5.23"):  # as in test_generation.py
            raise
        pytest.skip(f"transformers itself cannot draft for this model: {problem}")
    drafted = generate(some, ids, 24, assistant_model=twin)
    assert torch.equal(drafted, generate(some, ids, 24))
    assert twin.report().refreshes == 0
    assert twin.report().drafted_tokens > 0
    generate(twin, ids, 5)
    assert twin.report().refreshes == 2


def test_the_users_hooks_run_in_a_refresh(some: tf.PreTrainedModel) -> None:
    seen = []
    model = copy.deepcopy(some)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1])
    )
    twin = flocking.griffin(model, 0.5, refresh=4)
    seen.clear()
    generate(twin, tokens(20), 10)
    assert seen == [20, 1, 1, 1, 4, 1, 1, 1, 4, 1]


def test_compiled_steps_and_refreshes(some: tf.PreTrainedModel) -> None:
    """Where `generate` compiles its steps, a refresh is in none of them."""
    twin, ids = flocking.griffin(some, 0.5, refresh=4), tokens(20)
    expected = generate(twin, ids, 16)
    twin._valid_auto_compile_criteria = lambda *args: True
    config = tf.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled = generate(twin, ids, 16, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)
    assert twin.report().refreshes == 3


def test_a_step_by_hand_is_not_taken_for_a_refresh(some: tf.PreTrainedModel) -> None:
    """Inputs that were prepared and not used do not answer for others."""
    twin, ids = flocking.griffin(some, 0.5, refresh=1), tokens(20)
    for use_it in (True, False):
        cache = DynamicCache(config=some.config)
        whole = generate(twin, ids, 1, past_key_values=cache)
        with torch.no_grad():
            prepared = twin.prepare_inputs_for_generation(
                whole, next_sequence_length=1, past_key_values=cache
            )
            if use_it:
                expected = some(whole).logits[:, -1]
                got = twin(**prepared).logits[:, -1]
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
            else:
                assert twin(tokens(3, seed=5)).logits.shape[1] == 3
