"""Caches that others write to, several conversations, and what happens between turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import as_masks, exact, expected_selection, generate, tokens
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

import flocking


def cache_of(model: tf.PreTrainedModel, kind: str) -> tf.Cache:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=96)
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("other", ["model", "twin", "tokens"])
@pytest.mark.parametrize("whole", [False, True])
def test_others_may_write_to_the_cache_in_between(
    some: tf.PreTrainedModel, kind: str, other: str, whole: bool
) -> None:
    """No token is lost: a twin that keeps all neurons writes what the model writes."""
    cache = cache_of(some, kind)
    twin, another = (flocking.griffin(some, 1.0, refresh=4) for _ in range(2))

    def turn(subject: tf.PreTrainedModel, text: Tensor, n: int) -> Tensor:
        fed = text if whole else text[:, int(cache.get_seq_length()) :]
        mask = torch.ones_like(text)
        new = generate(subject, fed, n, attention_mask=mask, past_key_values=cache)
        return torch.cat((text, new[:, fed.shape[1] :]), dim=1)

    text = torch.cat((turn(twin, tokens(20), 6), tokens(3)), dim=1)
    if other == "tokens":
        with torch.no_grad():
            some(text[:, int(cache.get_seq_length()) :], past_key_values=cache, use_cache=True)
        text = torch.cat((text, tokens(4, seed=5)), dim=1)
    else:
        text = turn({"model": some, "twin": another}[other], text, 6)
        text = torch.cat((text, tokens(3, seed=2)), dim=1)
    assert torch.equal(turn(twin, text, 9), generate(some, text, 9))


@pytest.mark.parametrize("whole", [False, True])
def test_a_cache_whose_sequences_were_reordered_is_another_cache(
    some: tf.PreTrainedModel, whole: bool
) -> None:
    order = torch.tensor([2, 0, 1])
    twin = flocking.griffin(some, 1.0, refresh=3)
    first = generate(twin, tokens(20, 20, 20), 7, return_dict_in_generate=True)
    cache = first.past_key_values
    cache.reorder_cache(order)
    text = torch.cat((first.sequences[order], tokens(4, 4, 4, seed=3)), dim=1)
    fed = text if whole else text[:, int(cache.get_seq_length()) :]
    got = generate(twin, fed, 9, attention_mask=torch.ones_like(text), past_key_values=cache)
    assert torch.equal(got[:, -9:], generate(some, text, 9)[:, -9:])


def test_a_cache_that_was_filled_anew_is_another_text(some: tf.PreTrainedModel) -> None:
    for refresh in (None, 3):
        twin = flocking.griffin(some, 0.5, refresh=refresh)
        cache = cache_of(some, "static")
        generate(twin, tokens(20), 7, past_key_values=cache)
        cache.reset()
        text = generate(some, tokens(30, seed=4), 2, past_key_values=cache)
        text = torch.cat((text, tokens(8, seed=6)), dim=1)
        generate(twin, text, 1, past_key_values=cache)
        assert twin.report().prefilled_tokens == 9  # those that the cache lacked
        assert twin.history.position.values.tolist() == [40]


@pytest.mark.parametrize("name", ["llama", "mistral"])  # which has sliding windows
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("failure", "problem", "match"),
    [
        ("refused", ValueError, "guidance_scale would run"),
        ("changed", RuntimeError, "the model was changed since"),
        ("hook", KeyError, "of the user's"),
    ],
)
def test_a_turn_that_fails_leaves_the_cache_as_it_was(
    name: str, kind: str, failure: str, problem: type[Exception], match: str
) -> None:
    """No token of the turns before is lost; if nothing was read, the turn again is as the first."""
    model = exact(name)
    fails = [False]

    def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
        if fails[0]:
            raise KeyError("of the user's")

    model.model.layers[1].register_forward_hook(hook)

    def turn(twin: tf.PreTrainedModel, cache: tf.Cache, text: Tensor, **more: object) -> Tensor:
        fed = text[:, int(cache.get_seq_length()) :]
        options = {"attention_mask": torch.ones_like(text), "past_key_values": cache}
        return generate(twin, fed, 9, **options, **more)[:, -9:]

    for density in (1.0, 0.5):
        twin, undisturbed = (flocking.griffin(model, density, refresh=4) for _ in range(2))
        cache, other = cache_of(model, kind), cache_of(model, kind)
        text = torch.cat((generate(twin, tokens(20), 7, past_key_values=cache), tokens(3)), dim=1)
        generate(undisturbed, tokens(20), 7, past_key_values=other)
        length, weight = int(cache.get_seq_length()), model.model.norm.weight
        fails[0] = failure == "hook"
        if failure == "changed":
            model.model.norm.weight = torch.nn.Parameter(torch.ones(5))
        more = {"guidance_scale": 1.5} if failure == "refused" else {}
        with pytest.raises(problem, match=match):
            turn(twin, cache, text, **more)
        fails[0], model.model.norm.weight = False, weight
        assert int(cache.get_seq_length()) == length
        got, due = turn(twin, cache, text), turn(undisturbed, other, text)
        if density == 1.0:
            assert torch.equal(got, generate(model, text, 9)[:, -9:])
        if failure == "hook":  # it is not known how much of the turn is in the statistic
            assert twin.report().prefilled_tokens == text.shape[1] - length + 8
        else:
            assert torch.equal(got, due)
            assert (twin.history.position == undisturbed.history.position).all()
            assert twin.report().prefilled_tokens == undisturbed.report().prefilled_tokens


@pytest.mark.parametrize("other", ["model", "refilled"])
def test_so_it_is_in_inference_mode(other: str) -> None:
    """There, torch does not count what is written to a fixed cache in place."""
    model = exact("llama")
    with torch.inference_mode():
        twin, cache = flocking.griffin(model, 1.0, refresh=4), cache_of(model, "static")
        text = generate(twin, tokens(20), 7, past_key_values=cache)
        if other == "refilled":
            cache.reset()
            text = generate(model, tokens(20, seed=9), 7, past_key_values=cache)
        else:
            text = torch.cat((text, tokens(3)), dim=1)
            fed = text[:, int(cache.get_seq_length()) :]
            options = {"attention_mask": torch.ones_like(text), "past_key_values": cache}
            new = generate(model, fed, 6, **options)
            text = torch.cat((text, new[:, fed.shape[1] :]), dim=1)
        text = torch.cat((text, tokens(3, seed=2)), dim=1)
        fed = text[:, int(cache.get_seq_length()) :]
        options = {"attention_mask": torch.ones_like(text), "past_key_values": cache}
        got = generate(twin, fed, 9, **options)
        assert torch.equal(got[:, -9:], generate(model, text, 9)[:, -9:])


def test_a_refresh_that_fails_counts_nothing(some: tf.PreTrainedModel) -> None:
    """Its tokens are not in the statistic of a later turn twice."""
    model = exact("llama")
    fails = [True]

    def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
        if fails[0] and args[0].shape[1] == 4:
            raise KeyError("of the user's")

    model.model.layers[1].register_forward_hook(hook)
    twin, ids = flocking.griffin(model, 0.5, refresh=4), tokens(20)
    cache = cache_of(model, "dynamic")
    with pytest.raises(KeyError, match="of the user's"):
        generate(twin, ids, 12, past_key_values=cache)
    fails[0] = False
    text = torch.cat((generate(model, ids, 4), tokens(6)), dim=1)
    generate(twin, text, 2)
    assert (as_masks(twin, model) == expected_selection(model, text)[0]).all()
    read = int(cache.get_seq_length())
    generate(twin, text, 1, past_key_values=cache)
    assert twin.report().prefilled_tokens == text.shape[1] - read


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_inputs_of_the_new_tokens_alone_are_refused(name: str) -> None:
    model = exact("gpt2")
    twin = flocking.griffin(model, 1.0, refresh=4)
    cache = cache_of(model, "dynamic")
    text = torch.cat((generate(twin, tokens(20), 7, past_key_values=cache), tokens(3)), dim=1)
    length = int(cache.get_seq_length())
    values = torch.arange(text.shape[1])[None] if name == "position_ids" else torch.ones_like(text)
    options = {"attention_mask": torch.ones_like(text), "past_key_values": cache}
    with pytest.raises(ValueError, match=f"{name} is of the new tokens alone.*whole conversation"):
        generate(twin, text[:, length:], 9, **options, **{name: values[:, length:]})
    if name == "position_ids":
        got = generate(twin, text, 9, **options, position_ids=values)
        assert torch.equal(got, generate(model, text, 9))


def test_conversations_take_turns_on_one_twin(some: tf.PreTrainedModel) -> None:
    """Each has its own history, and its own statistic; scores and drafts do not disturb them."""
    twin, alone = (flocking.griffin(some, 0.5, refresh=4) for _ in range(2))
    histories = []
    for subject, disturbed in ((alone, False), (twin, True)):
        cache, text = cache_of(some, "dynamic"), tokens(20)
        for turn in range(3):
            if disturbed and turn:
                generate(subject, tokens(18, seed=9), 9)
                flocking.score(subject, [5, 6, 7], [8, 9, 10, 11, 12])
            text = generate(subject, text, 6, past_key_values=cache)
            text = torch.cat((text, tokens(4, seed=turn)), dim=1)
        histories.append(subject.history)
    assert histories[0].position.values.tolist() == [20, 24, 30, 34, 40, 44]
    assert histories[0].identical(histories[1])


def test_numbers_of_sequences_may_differ_between_conversations(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, 0.5, scope="sequence")
    first = cache_of(llama, "dynamic")
    text = generate(twin, tokens(20, 20, 20), 4, past_key_values=first)
    generate(twin, tokens(18, 18), 4)
    generate(twin, torch.cat((text, tokens(4, 4, 4)), dim=1), 4, past_key_values=first)
    assert dict(twin.history.sizes) == {"position": 2, "sequence": 3, "layer": 2, "neuron": 160}


@pytest.mark.parametrize("refresh", [None, 1])
def test_a_twin_inside_of_its_own_generation_is_refused(
    some: tf.PreTrainedModel, refresh: int | None
) -> None:
    twin, other = (flocking.griffin(some, 0.5, refresh=refresh) for _ in range(2))
    ids = tokens(20)
    for inner in (twin, other):
        seen: list[Tensor] = []

        def look(text: Tensor, scores: Tensor, inner=inner, seen=seen) -> Tensor:
            if not seen:
                seen.append(generate(inner, tokens(9, seed=3), 5))
            return scores

        if inner is twin:
            with pytest.raises(RuntimeError, match="busy with another prompt"):
                generate(twin, ids, 9, logits_processor=[look])
        else:
            got = generate(twin, ids, 9, logits_processor=[look])
            assert torch.equal(got, generate(twin, ids, 9))


@pytest.mark.parametrize("refresh", [None, 3])
def test_a_decoder_notices_that_its_twin_was_used(
    some: tf.PreTrainedModel, refresh: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flocking.pruning.graphs._COMPILER", "eager")
    twin = flocking.griffin(some, 0.5, refresh=refresh)
    twin.generation_config = tf.GenerationConfig(pad_token_id=0)  # nothing ends a text
    decoder, another = (flocking.Decoder(twin, 48) for _ in range(2))
    for use in (
        lambda: generate(twin, tokens(9, seed=3), 5),
        lambda: flocking.score(twin, [5, 6, 7], [8, 9, 10]),
        lambda: another.read(tokens(9, seed=3), max_new_tokens=5),
    ):
        decoder.read(tokens(20), max_new_tokens=12)
        decoder.step()
        use()
        with pytest.raises(RuntimeError, match="given another prompt since"):
            decoder.step()
    expected = generate(twin, tokens(20), 12)
    assert torch.equal(decoder.generate(tokens(20), max_new_tokens=12), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_prompts_may_be_embeddings(some: tf.PreTrainedModel, options: dict) -> None:
    options = {"do_sample": "num_return_sequences" in options} | options
    ids = tokens(20)
    fed = {
        "inputs_embeds": some.get_input_embeddings()(ids),
        "attention_mask": torch.ones_like(ids),
    }
    results = []
    for subject in (some, flocking.griffin(some, 1.0, refresh=4)):
        torch.manual_seed(0)
        results.append(
            subject.generate(
                **fed, max_new_tokens=14, eos_token_id=None, pad_token_id=0, top_k=0, **options
            )
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_a_decoder_does_not_refresh_behind_the_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flocking.pruning.graphs._COMPILER", "eager")
    model = exact(name)
    twin, ids = flocking.griffin(model, 0.5, refresh=3), tokens(20)
    end = int(generate(twin, ids, 24)[0, 22])
    expected = generate(twin, ids, 24, eos_token_id=end)
    history = twin.history
    twin.generation_config.eos_token_id, twin.generation_config.pad_token_id = end, 0
    got = flocking.Decoder(twin, 60).generate(ids, max_new_tokens=24)
    assert torch.equal(got, expected)
    assert twin.history.identical(history)


def test_every_step_has_one_hidden_state(some: tf.PreTrainedModel) -> None:
    outputs = [
        generate(
            subject,
            tokens(20),
            14,
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        for subject in (some, flocking.griffin(some, 1.0, refresh=4))
    ]
    for kind in ("hidden_states", "attentions"):
        for expected, got in zip(*(output[kind] for output in outputs), strict=True):
            for a, b in zip(expected, got, strict=True):
                assert a.shape[:-1] == b.shape[:-1]
                if kind == "hidden_states":
                    np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


class _Stopping:
    """A streamer that ends a text as a button of a chat does: by an error of its own."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens + 1  # the prompt comes first

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError

    def end(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("refresh", [None, 3])
def test_a_turn_that_a_streamer_stops_is_gone_on_from(
    some: tf.PreTrainedModel, kind: str, refresh: int | None
) -> None:
    """As one that has ended there by itself."""
    turns = []
    for stopped in (False, True):
        twin, cache = flocking.griffin(some, 0.5, refresh=refresh), cache_of(some, kind)
        whole = generate(twin, tokens(20), 6, past_key_values=cache)
        if stopped:
            cache = cache_of(some, kind)
            with pytest.raises(InterruptedError):
                generate(twin, tokens(20), 30, past_key_values=cache, streamer=_Stopping(6))
        text = torch.cat((whole, tokens(3)), dim=1)
        turns.append((generate(twin, text, 9, past_key_values=cache), twin.report()))
        assert twin.report().prefilled_tokens > 22
    (due, report), (got, other) = turns
    assert torch.equal(got, due)
    assert other.prefilled_tokens == report.prefilled_tokens


def test_a_step_that_was_interrupted_in_a_layer_is_not_gone_on_from() -> None:
    model = exact("llama")
    twin, cache = flocking.griffin(model, 0.5), cache_of(model, "dynamic")
    calls = []

    def hook(module: torch.nn.Module, args: tuple) -> None:
        calls.append(module)
        if len(calls) == 4:
            raise KeyboardInterrupt

    twin.model.layers[1].register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="a hook was registered"):
        generate(twin, tokens(20), 30, past_key_values=cache)
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert len(lengths) == 2
    assert twin._griffin.reader.known(cache, 1) is None
