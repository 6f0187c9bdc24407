"""Texts that ``record`` continues: phase "generation"."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from helpers import record, relative

import flocking


def test_replayed_generation_equals_live_hooks(tiny: tf.PreTrainedModel) -> None:
    if not tiny.can_generate():
        with pytest.raises(ValueError, match="BertModel is not a causal language model"):
            record(tiny, [5, 6], max_new_tokens=3)
        return
    prompts = helpers.random_ids(20, 13)
    recording = record(tiny, prompts, max_new_tokens=12, window=4)
    for number, prompt in enumerate(prompts):
        live: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        with flocking.observe(
            tiny, lambda ff, z, live=live: live[ff.layer].append(z.reshape(-1, z.shape[-1]))
        ):
            out = tiny.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=int),
                do_sample=False,
                max_new_tokens=12,
            )[0]
        fed = len(out) - 1  # the last token was sampled and never fed
        mine = recording.sel(sequence=number)
        assert mine.token_id.values[:fed].tolist() == out[:fed].tolist()
        assert mine.token_id.values[fed:].tolist() == [-1] * (mine.sizes["token"] - fed)
        for layer, parts in live.items():
            r = relative(torch.cat(parts))
            assert len(r) == fed
            phases = mine.energy.sel(layer=layer).groupby("phase").sum()
            expected = {
                "first": r[:1],
                "prompt": r[1 : len(prompt)],
                "generation": r[len(prompt) :],
            }
            for phase, values in expected.items():
                np.testing.assert_allclose(
                    phases.sel(phase=phase), (values**2).sum(0), rtol=1e-3, atol=1e-5
                )


def test_a_bidirectional_model_is_not_continued() -> None:
    """BERT's LM class can generate, but its prompt's tokens would see the continuation."""
    model = tf.BertLMHeadModel(helpers.ARCHITECTURES["bert"]()).eval()
    with pytest.raises(ValueError, match="BertLMHeadModel is not a causal language model"):
        record(model, [5, 6], max_new_tokens=3)


def test_continued_plainly_whatever_the_generation_config(llama: tf.PreTrainedModel) -> None:
    prompt = helpers.random_ids(9)
    plain = record(llama, prompt, max_new_tokens=9)
    llama.generation_config.repetition_penalty = 1.8
    llama.generation_config.return_dict_in_generate = True
    llama.generation_config.num_return_sequences = 2
    before = llama.generation_config.to_dict()
    assert record(llama, prompt, max_new_tokens=9).token_id.equals(plain.token_id)
    assert llama.generation_config.to_dict() == before


def test_the_context_may_be_filled_to_the_brim(llama: tf.PreTrainedModel) -> None:
    llama.generation_config.eos_token_id = None  # nothing ends it before
    recording = record(llama, [[5] * 250], max_new_tokens=7)
    assert recording.sizes["token"] == 256
