"""``record``, against bare hooks, on every architecture and in every arrangement."""

from __future__ import annotations

import gc
import itertools

import helpers
import numpy as np
import psutil
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import hooks_of

import flocking
from flocking.models import capabilities


def record(model: tf.PreTrainedModel, text: object, **kwargs: object) -> xr.Dataset:
    return flocking.record(model, text, progress=False, **kwargs)


def relative(z: torch.Tensor) -> np.ndarray:
    z = z.double().numpy()
    return np.abs(z) / np.linalg.norm(z, axis=-1, keepdims=True)


def assert_same(got: xr.Dataset, expected: xr.Dataset, rtol: float = 1e-4) -> None:
    """Equal where both have tokens; one may have more windows or more padding."""
    for name in ("energy", "mass", "norm", "l1", "tokens"):
        a, b = xr.align(got[name], expected[name], join="inner", copy=False)
        scale = float(np.nanmax(np.abs(b.values)))
        np.testing.assert_allclose(a.values, b.values, rtol=rtol, atol=rtol * 1e-2 * scale)


# --------------------------------------------------------------- what is recorded is true


@pytest.mark.parametrize("window", [1, 16, None])
def test_is_the_definition(tiny: tf.PreTrainedModel, window: int | None) -> None:
    (ids,) = helpers.random_ids(50)
    recording = record(tiny, ids, window=window, ranks=True)
    for layer, z in helpers.activations(tiny, ids).items():
        mine = recording.sel(sequence=0, layer=layer)
        r = relative(z)
        starts = [0, *range(1, 50, window or 50), 50]
        for number, (start, stop) in enumerate(itertools.pairwise(starts)):
            expected = r[start:stop]
            assert int(mine.tokens[number]) == len(expected)
            energy, mass = (expected**2).sum(0), expected.sum(0)
            np.testing.assert_allclose(mine.energy[number], energy, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(mine.mass[number], mass, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(mine.norm, np.linalg.norm(z, axis=-1), rtol=1e-5)
        np.testing.assert_allclose(mine.l1, r.sum(-1), rtol=1e-5)
        assert mine.sizes["window"] == len(starts) - 1


def test_energy_sums_to_the_number_of_tokens(tiny: tf.PreTrainedModel) -> None:
    recording = record(tiny, helpers.random_ids(50, 23, 1), window=16)
    per_window = recording.energy.sum("neuron")
    np.testing.assert_allclose(per_window, recording.tokens.broadcast_like(per_window), rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_batch_equals_its_members(tiny: tf.PreTrainedModel, side: str, batch_size: int) -> None:
    """Also where the caller has padded it, on whichever side."""
    texts = helpers.random_ids(50, 9, 31, 1, 17)
    width = max(map(len, texts))
    ids, mask = [], []
    for text in texts:
        padding, ones = [0] * (width - len(text)), [1] * len(text)
        ids.append(padding + text if side == "left" else text + padding)
        mask.append(padding + ones if side == "left" else ones + padding)
    padded = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    batch = record(tiny, padded, window=8, batch_size=batch_size)
    for number, text in enumerate(texts):
        alone = record(tiny, text, window=8)
        mine = batch.isel(sequence=[number]).assign_coords(sequence=[0])
        assert_same(mine, alone)
        beyond = mine.isel(window=slice(alone.sizes["window"], None))
        assert float(beyond.energy.sum()) == float(beyond.tokens.sum()) == 0
        assert bool(mine.norm.isel(token=slice(len(text), None)).isnull().all())


def test_chunks_equal_one_pass(tiny: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the sliding windows of the models that have one, and padded."""
    texts = helpers.random_ids(60, 41)
    whole = record(tiny, texts, window=8)
    fed = []
    forward = type(tiny.base_model).forward
    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 14)
    monkeypatch.setattr(
        type(tiny.base_model),
        "forward",
        lambda self, *args, **kwargs: (
            fed.append(kwargs["input_ids"].shape[1]) or forward(self, *args, **kwargs)
        ),
    )
    assert_same(record(tiny, texts, window=8), whole)
    causal = tiny.config.model_type != "bert"  # in chunks, a bidirectional model would err
    assert fed[-9:] == [7] * 8 + [4] if causal else fed[-1:] == [60]


def test_windows_of_any_size_add_up(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(150, 70)
    totals = [record(llama, texts, window=w).sum("window") for w in (1, 64, 150, None)]
    for other in totals[1:]:
        xr.testing.assert_allclose(other[["energy", "mass"]], totals[0][["energy", "mass"]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(architecture: str, dtype: torch.dtype) -> None:
    """Statistics are those of the model's own activations, in float32."""
    model = helpers.build(architecture).to(dtype)
    (ids,) = helpers.random_ids(40)
    recording = record(model, ids, window=None)
    for layer, z in helpers.activations(model, ids).items():
        r = relative(z)
        mine = recording.sel(sequence=0, layer=layer)
        np.testing.assert_allclose(mine.energy.sum("window"), (r**2).sum(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(mine.mass.sum("window"), r.sum(0), rtol=1e-3, atol=1e-5)
    assert recording.energy.dtype == np.float32
    assert recording.attrs["dtype"] == str(dtype).removeprefix("torch.")


def test_replayed_generation_equals_live_hooks(tiny: tf.PreTrainedModel) -> None:
    if not tiny.can_generate():
        with pytest.raises(ValueError, match="BertModel is no causal language model"):
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
    with pytest.raises(ValueError, match="BertLMHeadModel is no causal language model"):
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
    config = tf.RobertaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    model = tf.RobertaModel(config).eval()
    assert record(model, helpers.random_ids(38)).sizes["token"] == 38
    with pytest.raises(ValueError, match="39 tokens, 1 more than the model's context of 38"):
        record(model, helpers.random_ids(39))


def test_other_defaults_of_torch(llama: tf.PreTrainedModel) -> None:
    texts = helpers.random_ids(20, 9)
    expected = record(llama, texts)
    torch.set_default_dtype(torch.float64)
    try:
        got = record(helpers.build("llama").float(), texts)
        got_again = record(llama, texts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.energy.dtype == np.float32
    assert_same(got_again, expected)


# ---------------------------------------------------------------------- the Dataset


def test_layout_of_windows(llama: tf.PreTrainedModel) -> None:
    recording = record(llama, helpers.random_ids(10, 6), window=4, max_new_tokens=6)
    assert recording.phase.values.tolist() == ["first", *["prompt"] * 3, *["generation"] * 2]
    assert recording.start.values.tolist() == [0, 1, 5, 9, 0, 4]
    assert recording.tokens.values.tolist()[0] == [1, 4, 4, 1, 4, 1]
    assert recording.tokens.values.tolist()[1][:4] == [1, 4, 1, 0]
    of_token = recording.token_window.values[0]
    assert of_token.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]


def test_labels(embedded: tuple) -> None:
    model, _ = embedded
    recording = record(model, ["Birds of a feather", "flock"], layers=[3, 28], window=2)
    assert dict(recording.sizes) == {
        "sequence": 2, "layer": 2, "window": 3, "neuron": 1536, "token": 4
    }  # fmt: skip
    assert recording.layer.values.tolist() == [3, 28]
    assert recording.module.values.tolist() == ["model.layers.3.mlp", "model.layers.28.mlp"]
    assert recording.token_text.values.tolist() == [
        ["Birds", " of", " a", " feather"],
        ["fl", "ock", "", ""],
    ]
    assert recording.text.values.tolist() == ["Birds of a feather", "flock"]
    assert recording.attrs["model"] == model.name_or_path
    assert recording.attrs["special_tokens"] == "none"
    assert recording.attrs["window"] == 2


def test_special_tokens_are_as_the_tokenizer_adds_them(llama: tf.PreTrainedModel, bos) -> None:
    recording = record(llama, "ab", tokenizer=bos)
    assert recording.token_id.values.tolist() == [[1, 10, 11]]
    assert recording.attrs["special_tokens"] == "<s>"


@pytest.fixture
def bos() -> tf.PreTrainedTokenizerFast:
    """A tokenizer of single letters that adds a beginning-of-sequence token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<unk>": 0, "<s>": 1, "a": 10, "b": 11}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", unk_token="<unk>")


LEFT_PADDED = {
    "input_ids": torch.tensor([[0, 5, 6, 7]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1]]),
}


@pytest.mark.parametrize(
    "text",
    [
        [5, 6, 7],
        [[5, 6, 7]],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]]),
        np.array([5, 6, 7]),
        [torch.tensor([5, 6, 7])],
        {"input_ids": [5, 6, 7]},
        {"input_ids": [[5, 6, 7, 0]], "attention_mask": [[1, 1, 1, 0]]},
        tf.BatchEncoding(LEFT_PADDED),
    ],
    ids=lambda text: type(text).__name__,
)
def test_every_form_of_token_ids(llama: tf.PreTrainedModel, text: object) -> None:
    assert record(llama, text).token_id.values.tolist() == [[5, 6, 7]]


def test_raw_relative_activations(tiny: tf.PreTrainedModel, capsys) -> None:
    texts = helpers.random_ids(20, 12)
    recording = flocking.record(tiny, texts, relative=[1])
    assert recording.relative.dims == ("sequence", "relative_layer", "token", "neuron")
    assert recording.relative.dtype == np.float16
    d_ff = recording.sizes["neuron"]
    size = 2 * 20 * d_ff * 2 / 1000
    assert f"keeping relative activations as float16: {size:.1f} kB" in capsys.readouterr().err
    for number, text in enumerate(texts):
        mine = recording.relative.sel(sequence=number, relative_layer=1)
        expected = relative(helpers.activations(tiny, text)[1])
        np.testing.assert_allclose(mine[: len(text)], expected, atol=1e-3)
        assert bool(mine[len(text) :].isnull().all())
    assert record(tiny, texts, relative=True).relative.dims[1] == "layer"


def test_layers_of_different_widths(llama: tf.PreTrainedModel) -> None:
    from torch import nn

    mlp = llama.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        nn.Linear(64, 96, bias=False),
        nn.Linear(64, 96, bias=False),
        nn.Linear(96, 64, bias=False),
    )
    recording = record(llama, helpers.random_ids(20))
    assert recording.d_ff.values.tolist() == [96, 160]
    assert float(recording.energy.sel(layer=0).isel(neuron=slice(96, None)).sum()) == 0
    np.testing.assert_allclose(recording.energy.sum(("window", "neuron")), 20, rtol=1e-5)


@pytest.mark.parametrize("window", [4, None])
def test_zarr_round_trip(llama: tf.PreTrainedModel, tmp_path, window: int | None) -> None:
    recording = record(
        llama, helpers.random_ids(9, 7), window=window, relative=[1], ranks=True, max_new_tokens=4
    )
    recording = recording.assign_coords(text=("sequence", ["naïve \n", "日本"]))
    recording.to_zarr(tmp_path / "r.zarr", zarr_format=2)
    with xr.open_zarr(tmp_path / "r.zarr") as restored:
        xr.testing.assert_identical(restored.load(), recording)
        numbers = [v for v in recording.variables if recording[v].dtype.kind in "if"]
        assert all(restored[v].dtype == recording[v].dtype for v in numbers)


# ---------------------------------------------------------- nothing is disturbed


def test_fifty_calls_leave_nothing_behind(llama: tf.PreTrainedModel) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    texts = helpers.random_ids(200, 150)
    record(llama, texts)
    alive, size = tensors(), psutil.Process().memory_info().rss
    for _ in range(50):
        record(llama, texts, max_new_tokens=2)
    assert tensors() == alive
    assert psutil.Process().memory_info().rss - size < 50e6
    assert hooks_of(llama) == []


def test_an_interrupted_call_leaves_the_model_as_it_was(llama: tf.PreTrainedModel) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    flocking.feedforwards(llama)
    llama.train()
    llama.model.layers[0].eval()
    flags = [module.training for module in llama.modules()]
    hook = llama.model.layers[1].mlp.register_forward_hook(interrupt)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="training mode"):
        record(llama, helpers.random_ids(9))
    hook.remove()
    assert hooks_of(llama) == []
    assert [module.training for module in llama.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_training_mode_is_warned_of_and_restored() -> None:
    model = helpers.build("gpt2", resid_pdrop=0.5)
    (ids,) = helpers.random_ids(20)
    expected = record(model, ids)
    model.train()
    with pytest.warns(UserWarning, match="recorded in eval mode"):
        got = record(model, ids)
    assert model.training
    assert model.transformer.h[0].mlp.training
    xr.testing.assert_identical(got, expected)


def test_a_models_own_randomness_is_seeded(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output + torch.randn_like(output)
    )
    (ids,) = helpers.random_ids(20)
    random_state = torch.get_rng_state()
    first, second = record(llama, ids, seed=1), record(llama, ids, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    xr.testing.assert_identical(first, second)
    assert not first.energy.equals(record(llama, ids, seed=2).energy)


def test_with_autocast_around_it(llama: tf.PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = record(llama, helpers.random_ids(40))
    energy = recording.energy.sum("neuron")
    np.testing.assert_allclose(energy, recording.tokens.broadcast_like(energy), rtol=1e-5)


def test_a_device_map(tmp_path) -> None:
    """As accelerate dispatches it, with its own wrappers around every forward."""
    helpers.build("llama").save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    mapped = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    from accelerate import dispatch_model

    mapped = dispatch_model(mapped, device_map=places, force_hooks=True)
    assert hasattr(mapped.model.layers[0], "_hf_hook")
    texts = helpers.random_ids(30, 12)
    assert_same(record(mapped, texts), record(plain, texts))


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("text", "kwargs", "problem", "message"),
    [
        ("", {}, ValueError, "text 0 is empty"),
        (["a", ""], {}, ValueError, "text 1 is empty"),
        ([], {}, ValueError, "text is empty"),
        ([[5], []], {}, ValueError, "text 1 has no tokens but padding"),
        (
            {"input_ids": [[5, 6]], "attention_mask": [[0, 0]]},
            {},
            ValueError,
            "no tokens but padding",
        ),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, {}, ValueError, "2 token ids and 1 in"),
        ({"ids": [5]}, {}, ValueError, "without 'input_ids'"),
        (7, {}, TypeError, "text is of type int"),
        (["a", [5]], {}, TypeError, "cannot be mixed"),
        ([[0.5, 1.5]], {}, TypeError, "whole-number token ids"),
        ([[5, 128]], {}, ValueError, "vocabulary ends at 127"),
        ("a", {}, ValueError, "No tokenizer was found with the model"),
        ([5], {"window": 0}, ValueError, "window=0"),
        ([5], {"layers": [2]}, ValueError, r"layers=\[2\]: there are FF blocks in layers 0 to 1"),
        ([5], {"relative": [2]}, ValueError, r"relative=\[2\]: there are FF"),
        ([5], {"layers": 1}, TypeError, "layers=1: give a list"),
        ([5], {"layers": [0.7]}, TypeError, r"layers=\[0.7\]: give a list"),
        ([5], {"layers": [1], "relative": [0]}, ValueError, r"relative=\[0\]: there are FF"),
        ([5], {"window": 2.5}, ValueError, "window=2.5"),
        ([5], {"seed": None}, ValueError, "seed=None"),
        (b"abc", {}, TypeError, "text is of type bytes"),
        ([[True, False]], {}, TypeError, "whole-number token ids"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, {}, ValueError, "gaps in its"),
        ([5], {"batch_size": 0}, ValueError, "batch_size=0"),
        ([5], {"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ([[5] * 300], {}, ValueError, "text 0 has 300 tokens, 44 more than the model's context"),
        ([[5] * 250], {"max_new_tokens": 8}, ValueError, "250 tokens and 8 new ones, 1 more than"),
    ],
)
def test_bad_input_gets_one_clear_sentence(
    llama: tf.PreTrainedModel, text: object, kwargs: dict, problem: type, message: str
) -> None:
    with pytest.raises(problem, match=message) as caught:
        record(llama, text, **kwargs)
    assert "\n" not in str(caught.value)
    assert hooks_of(llama) == []


def test_the_context_may_be_filled_to_the_brim(llama: tf.PreTrainedModel) -> None:
    recording = record(llama, [[5] * 250], max_new_tokens=7)
    assert recording.sizes["token"] <= 256


def test_not_finite_activations_are_named(llama: tf.PreTrainedModel) -> None:
    flocking.feedforwards(llama)

    def spoil(module: object, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output[1, 2, 5] = torch.inf
        return output

    llama.model.layers[1].mlp.up_proj.register_forward_hook(spoil)
    before = hooks_of(llama)
    with pytest.raises(ValueError, match=r"layer 1 .* not finite, first at token 2 of text 0"):
        record(llama, [[5, 6, 7], [5, 6, 7, 8]])  # the longer text is the batch's first row
    assert hooks_of(llama) == before


def test_weights_on_the_meta_device_are_refused(llama: tf.PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="meta device"):
        record(llama.to("meta"), [5, 6])


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


def test_a_short_text_does_not_change_the_attention_for_good() -> None:
    config = tf.BigBirdConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        block_size=16,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = tf.BigBirdModel(config).eval()
    short, long = helpers.random_ids(40, 208)
    due = record(model, long)
    alone = record(model, short)
    assert model.attention_type == "block_sparse"
    assert record(model, long).energy.equals(due.energy)
    together = record(model, [short, long])
    assert np.allclose(together.energy[1], due.energy[0], atol=1e-6)
    assert np.allclose(together.energy[0, :, :2], alone.energy[0], atol=1e-6)


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
            due = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            got = alone.energy.isel(sequence=0, layer=layer).sum("window")[: block.d_ff]
            assert np.allclose(got, due, atol=1e-4)
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


def test_models_that_record_cannot_feed_are_refused() -> None:
    with pytest.raises(TypeError, match="model is a Linear"):
        record(torch.nn.Linear(3, 3), [5, 6])


def test_a_recording_larger_than_memory_is_refused(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, with the window that would fit."""
    free = type("Memory", (), {"available": 400_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    (ids,) = helpers.random_ids(200)
    with pytest.raises(MemoryError, match=r"would take 5\d\d\.\d kB .* window=64 would fit"):
        record(llama, ids, window=1)
    assert record(llama, ids, window=64).sizes["window"] == 5
    free.available = 1000
    with pytest.raises(MemoryError, match="no window would fit"):
        record(llama, ids)
