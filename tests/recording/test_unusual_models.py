"""Models that cannot be padded, read a text twice, or order tokens in another way."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from helpers import assert_same, record, relative

import flocking
from flocking.models import capabilities


@pytest.mark.parametrize("kind", ["longrope", "fnet"])
def test_what_cannot_be_padded_is_batched_by_length(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary embeddings that depend on the longest row; mixing that ignores the mask."""
    if kind == "fnet":
        config = tf.FNetConfig(
            vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2
        )
        model = tf.FNetModel(config).eval()
    else:
        factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
        model = helpers.build(
            "phi3",
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_parameters={**rope, "original_max_position_embeddings": 32},
        )
    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 40)
    texts = helpers.random_ids(60, 20, 60, 10)
    batch = record(model, texts)
    for number, text in enumerate(texts):
        alone = record(model, text)
        assert_same(batch.isel(sequence=[number]).assign_coords(sequence=[0]), alone)
        z = helpers.activations(model, text)[1]
        np.testing.assert_allclose(
            alone.energy.sel(sequence=0, layer=1).sum("window"),
            (relative(z) ** 2).sum(0),
            rtol=1e-3,
        )


def test_positions_that_start_behind_the_padding_index_count(llama: tf.PreTrainedModel) -> None:
    model = helpers.roberta()
    assert record(model, helpers.random_ids(38)).sizes["token"] == 38
    with pytest.raises(ValueError, match="39 tokens, 1 more than the model's context of 38"):
        record(model, helpers.random_ids(39))


def test_sparse_attention_is_not_padded() -> None:
    """Doge leaves out keys of texts longer than its window, padding included."""
    config = tf.DogeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep_window_size=24,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = tf.DogeForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    texts = helpers.random_ids(40, 80)  # padded to 80, the first would change by 0.05
    together = record(model, texts, window=None)
    for row, ids in enumerate(texts):
        alone = record(model, ids, window=None)
        got = together.energy.isel(sequence=row)
        assert np.allclose(got, alone.energy.isel(sequence=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index_topk", 8),
        ("keep_window_size", 8),
        ("attention_type", "block_sparse"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_every_rule_about_a_texts_length_keeps_texts_apart(name: str, value: object) -> None:
    """The rule alone, on a model whose trials on 16 tokens find nothing."""
    plain = helpers.build("llama")
    assert capabilities.traits(plain).paddable
    assert name in capabilities.DEPENDS_ON_LENGTH
    model = helpers.build("llama", **{name: value})
    found = capabilities.traits(model)
    assert not found.paddable
    assert not found.chunkable
    assert capabilities.batches(model, [5, 9, 9], 3) == [[1, 2], [0]]


ENCODER_DECODERS = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=128, d_model=64, d_ff=160, num_layers=2, num_heads=4, d_kv=16)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=128,
            d_model=64,
            encoder_ffn_dim=160,
            decoder_ffn_dim=96,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            pad_token_id=0,
        )
    ),
    "fsmt": lambda: tf.FSMTForConditionalGeneration(  # computes (token, sequence, neuron)
        tf.FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=128,
            tgt_vocab_size=128,
            d_model=64,
            encoder_ffn_dim=160,
            decoder_ffn_dim=160,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            pad_token_id=1,
        )
    ),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_read_the_text_on_both_sides(name: str) -> None:
    torch.manual_seed(0)
    model = ENCODER_DECODERS[name]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    texts = helpers.random_ids(7, 12)
    together = record(model, texts, window=4)
    sides = ["encoder" in path for path in together.module.values]
    assert sides == sorted(sides, reverse=True)
    assert any(sides)
    assert not all(sides)
    seen: dict[str, torch.Tensor] = {}
    blocks = flocking.feedforwards(model)
    for row, ids in enumerate(texts):
        alone = record(model, ids, window=4)
        for variable in ("energy", "mass"):
            got = together[variable].isel(sequence=row, window=slice(alone.sizes["window"]))
            assert np.allclose(got, alone[variable].isel(sequence=0), atol=1e-5)
        handles = [
            block.down.register_forward_pre_hook(
                lambda module, args, path=block.path: seen.update({path: args[0].detach()})
            )
            for block in blocks
        ]
        with torch.no_grad():
            # (FSMT takes what comes with use_cache for one token at a time.)
            both = dict.fromkeys(("input_ids", "decoder_input_ids"), torch.tensor([ids]))
            model(**both, use_cache=False)
        for handle in handles:
            handle.remove()
        for layer, block in enumerate(blocks):
            z = seen[block.path].reshape(len(ids), -1)
            expected = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            got = alone.energy.isel(sequence=0, layer=layer).sum("window")[: block.d_ff]
            assert np.allclose(got, expected, atol=1e-4)
    with pytest.raises(ValueError, match="leave out max_new_tokens"):
        record(model, texts, max_new_tokens=2)
    with pytest.raises(ValueError, match="decoder-only"):
        flocking.griffin(model)


def test_the_context_is_that_of_the_shorter_side() -> None:
    config = tf.LEDConfig(
        vocab_size=128,
        d_model=64,
        encoder_ffn_dim=160,
        decoder_ffn_dim=160,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        attention_window=16,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=32,
        pad_token_id=0,
    )
    model = tf.LEDForConditionalGeneration(config).eval()
    assert record(model, helpers.random_ids(32)).sizes["token"] == 32
    with pytest.raises(ValueError, match="1 more than the model's context of 32"):
        record(model, helpers.random_ids(33))


def test_tokens_first_or_sequences_first_is_the_same_to_a_callback() -> None:
    """XLNet computes (token, sequence, neuron): handed out, and taken back, as all others."""
    torch.manual_seed(0)
    config = tf.XLNetConfig(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=160)
    model = tf.XLNetModel(config).eval()
    ids = torch.tensor(helpers.random_ids(6, 6, 6))
    mask = torch.ones(3, 6, 160)
    mask[1] = 0  # one sequence's neurons, not one token's
    with torch.no_grad():
        plain = model(ids)[0]
        with flocking.observe(model, lambda block, z: z * mask):
            changed = model(ids)[0]
    assert torch.equal(plain[[0, 2]], changed[[0, 2]])
    assert not torch.allclose(plain[1], changed[1])
    assert record(model, ids.tolist()).sizes["token"] == 6
