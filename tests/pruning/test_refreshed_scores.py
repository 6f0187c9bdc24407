"""Refreshed selections in scores, in the decoder and in reports; and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import activations, generate, random_ids, relative, selected_by_hand, tokens
from transformers.cache_utils import DynamicCache

import flocking
from flocking.feedforward import feedforwards
from flocking.models import Bookmark


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_scoring_is_what_generation_would_be(some: tf.PreTrainedModel, scope: str) -> None:
    twin, ids = flocking.griffin(some, 0.5, refresh=5, scope=scope), tokens(20, 20)
    output = generate(twin, ids, 18, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(output.logits, dim=1).double().log_softmax(dim=-1)
    new = output.sequences[:, 20:]
    expected = logits.gather(-1, new[..., None])[..., 0]
    history, report = twin.history, twin.report()
    scored = flocking.perplexity(
        twin,
        output.sequences.tolist(),
        prompt_length=20,
        continuation_length=18,
        progress=False,
    )
    np.testing.assert_allclose(scored.log_likelihood, expected, rtol=1e-4, atol=1e-5)
    assert twin.history.identical(history)
    assert twin.report().effective_density == report.effective_density


def test_score_says_what_was_pruned(some: tf.PreTrainedModel) -> None:
    prompt, continuation = random_ids(20, 12)
    twin = flocking.griffin(some, 0.5, refresh=4)
    scored = flocking.score(twin, prompt, continuation)
    assert np.flatnonzero(~scored.pruned).tolist() == [0, 4, 8]
    full = flocking.score(some, prompt, continuation)
    np.testing.assert_allclose(scored[[0, 4, 8]], full[[0, 4, 8]], rtol=1e-4)
    assert np.abs(scored - full)[1:4].max() > 1e-3
    every = flocking.score(flocking.griffin(some, 0.5, refresh=1), prompt, continuation)
    np.testing.assert_allclose(every, full, rtol=1e-4)
    assert not every.pruned.any()


def test_branches_do_not_see_each_other(some: tf.PreTrainedModel) -> None:
    prompt, *rest = (torch.tensor(row) for row in random_ids(20, 9, 14, 9))
    twin = flocking.griffin(some, 0.5, refresh=4)
    ((_, together),) = flocking.pruning.branches(
        [twin], [torch.cat((prompt, row)) for row in rest], list(map(len, rest)), 20, size=3
    )
    for row, (likelihood, _) in zip(rest, together, strict=True):
        alone = flocking.score(twin, prompt.tolist(), row.tolist())
        np.testing.assert_allclose(likelihood, alone, rtol=1e-5)


def test_twins_side_by_side_start_from_the_prompt(some: tf.PreTrainedModel) -> None:
    ids = tokens(40)
    twins = [flocking.griffin(some, 0.5, refresh=n) for n in (None, 4, None, 6)]
    together = [values for _, values in flocking.pruning.side_by_side([*twins, some], ids, 20)]
    for model, values in zip([*twins, some], together, strict=True):
        alone = flocking.score(model, ids[0, :20].tolist(), ids[0, 20:].tolist())
        np.testing.assert_allclose(values[0, 19:], alone, rtol=1e-5)


@pytest.mark.parametrize("scope", ["shared", "sequence"])
@pytest.mark.parametrize("refresh", [1, 5])
def test_the_decoder_refreshes_too(
    some: tf.PreTrainedModel, scope: str, refresh: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `generate` does, also in a padded batch of which one text ends early."""
    monkeypatch.setattr("flocking.pruning.graphs._COMPILER", "eager")
    rows = random_ids(20, 13)
    ids = torch.tensor([rows[0], [0] * 7 + rows[1]])
    mask = torch.tensor([[1] * 20, [0] * 7 + [1] * 13])
    twin = flocking.griffin(some, 0.5, refresh=refresh, scope=scope)
    end = int(generate(twin, ids, 24, attention_mask=mask)[0, 27])
    expected = generate(twin, ids, 24, attention_mask=mask, eos_token_id=end)
    history = twin.history
    twin.generation_config.eos_token_id, twin.generation_config.pad_token_id = end, 0
    decoder = flocking.Decoder(twin, 64, batch_size=2)
    for _ in range(2):
        got = decoder.generate(ids, mask, max_new_tokens=24)
        assert torch.equal(got, expected)
        # (It looks every 16 tokens only whether all have ended.)
        assert twin.history[: len(history)].identical(history)


def test_history_is_for_the_analysis(some: tf.PreTrainedModel) -> None:
    """In one call: how much of the energy that followed each selection had kept."""
    twin = flocking.griffin(some, 0.5, refresh=8)
    text = generate(twin, tokens(20), 25)[0].tolist()
    history = twin.history
    assert history.dims == ("position", "layer", "neuron")
    recording = flocking.record(some, text, window=None, progress=False)
    z = {layer: relative(each) for layer, each in activations(some, text).items()}
    for place, kept in zip(history.position.values, history, strict=True):
        by_hand = selected_by_hand(some, text[:place])
        assert (kept.values == np.stack([by_hand[b.layer] for b in feedforwards(some)])).all()
    captured = flocking.captured_energy(history, flocking.statistic(recording).isel(sequence=0))
    assert captured.dims == ("position", "layer")
    for row, layer in enumerate(history.layer.values):
        energy = np.square(z[layer]).sum(axis=0)
        expected = [energy[kept].sum() / energy.sum() for kept in history.values[:, row]]
        np.testing.assert_allclose(captured.sel(layer=layer), expected, rtol=1e-4)


def test_the_report_counts_full_reads(some: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(some, 0.5, refresh=5)
    generate(twin, tokens(20), 16)  # 15 steps, three of them full
    report = twin.report()
    share = report.compact_bytes / report.ff_bytes
    assert report.refreshes == 3
    assert report.effective_density == pytest.approx((12 * share + 3) / 15)
    size = sum(p.numel() * p.element_size() for p in {id(p): p for p in some.parameters()}.values())
    assert report.bytes_per_token == pytest.approx(
        size - report.ff_bytes + report.effective_density * report.ff_bytes, abs=1
    )
    plain = flocking.griffin(some, 0.5)
    generate(plain, tokens(20), 16)
    assert plain.report().effective_density == pytest.approx(share)
    assert plain.history.position.values.tolist() == [20]


# --------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("refresh", [0, -1, 1.5, True, "8", float("nan")])
def test_refuses_what_is_no_number_of_tokens(some: tf.PreTrainedModel, refresh: object) -> None:
    with pytest.raises(ValueError, match=r"refresh=.*: give a whole number from 1 up"):
        flocking.griffin(some, refresh=refresh)


def test_refuses_beams_with_a_selection_each(some: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(some, refresh=4, scope="sequence")
    with pytest.raises(ValueError, match="make the twin with scope='shared', or without refresh"):
        generate(twin, tokens(20), num_beams=2)


def test_refuses_caches_that_cannot_be_taken_back(some: tf.PreTrainedModel) -> None:
    class Compressed(tf.cache_utils.DynamicLayer):
        """Somebody's own."""

    cache = DynamicCache()
    cache.layers = [Compressed() for _ in range(2)]
    twin = flocking.griffin(some, refresh=4)
    with pytest.raises(ValueError, match="Compressed, in which tokens are cached, cannot be taken"):
        generate(twin, tokens(20), past_key_values=cache)
    with pytest.raises(RuntimeError, match="no selection yet"):
        _ = twin.selection
    with pytest.raises(ValueError, match="tuple, in which tokens are cached"):
        Bookmark(((torch.zeros(1),),))


def test_a_failure_leaves_no_selection(some: tf.PreTrainedModel) -> None:
    model = copy.deepcopy(some)
    fail: list[int] = []

    def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
        if fail and args[0].shape[1] == 4:
            raise RuntimeError("of the user's")

    model.get_input_embeddings().register_forward_hook(hook)
    twin = flocking.griffin(model, refresh=4)
    fail.append(1)
    with pytest.raises(RuntimeError, match="of the user's"):
        generate(twin, tokens(20))
    with pytest.raises(RuntimeError, match="no selection yet"):
        _ = twin.selection
    fail.clear()
    generate(twin, tokens(20))
    assert twin.report().refreshes == 2
