"""What comes with token ids: fed to the model as its own forward takes it, or refused by name."""

from __future__ import annotations

import functools

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import assert_same, record, relative

import flocking
from flocking.models import capabilities
from flocking.recording import forward_passes


def expected(model: tf.PreTrainedModel, **inputs: torch.Tensor) -> dict[int, np.ndarray]:
    """Energy by layer of the model's own forward pass, from bare hooks: (neuron,)."""
    seen: dict[int, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple, output: object, layer: int) -> None:
        seen[layer] = args[0].detach()

    handles = [
        block.down.register_forward_hook(functools.partial(keep, layer=block.layer))
        for block in flocking.feedforwards(model)
    ]
    try:
        with torch.no_grad():
            model.base_model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    tokens = inputs["input_ids"].shape[1]  # of one sequence; what comes behind them is padding
    rows = {layer: z.reshape(-1, z.shape[-1])[:tokens] for layer, z in seen.items()}
    return {layer: (relative(z) ** 2).sum(0) for layer, z in rows.items()}


def assert_energy(recording: xr.Dataset, energy: dict[int, np.ndarray], row: int = 0) -> None:
    for layer, values in energy.items():
        mine = recording.energy.sel(layer=layer).isel(sequence=row).sum("window")
        np.testing.assert_allclose(mine, values, rtol=1e-4, atol=1e-6)


def inputs_of(name: str, ids: list[int]) -> dict[str, list[int]]:
    """Types and positions that are not those without them."""
    rest = {"position_ids": [place + 7 for place in range(len(ids))]}
    if name != "llama":
        rest["token_type_ids"] = [int(place > len(ids) // 3) for place in range(len(ids))]
    return rest


def padded(rows: list[list[int]], side: str, fill: int = 0) -> torch.Tensor:
    width = max(map(len, rows))
    filled = [[fill] * (width - len(row)) for row in rows]
    left = side == "left"
    return torch.tensor([f + row if left else row + f for f, row in zip(filled, rows, strict=True)])


NAMES = ["bert", "gpt2", "llama"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right", "ragged"])
def test_each_text_gives_what_the_models_own_forward_gives(name: str, side: str) -> None:
    model = helpers.proved(name)
    texts = helpers.random_ids(23, 9, 1, 16)
    rows = [inputs_of(name, ids) for ids in texts]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    everything = {"input_ids": texts, "attention_mask": [[1] * len(ids) for ids in texts]}
    everything |= columns
    if side != "ragged":
        everything = {key: padded(values, side) for key, values in everything.items()}
    together = record(model, everything, window=4)
    for number, ids in enumerate(texts):
        energy = expected(
            model,
            input_ids=torch.tensor([ids]),
            **{key: torch.tensor([values]) for key, values in rows[number].items()},
        )
        assert_energy(together, energy, number)
        assert_energy(record(model, {"input_ids": ids, **rows[number]}), energy)
    without = record(model, texts, window=4)
    for key in columns:  # llama's rotary embeddings do not see where positions begin
        other = record(model, {"input_ids": texts, key: columns[key]}, window=4)
        differs = np.abs(other.energy - without.energy).max() > 1e-3
        assert bool(differs) == (name != "llama")


_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Other models, and what they are fed besides, as (sequence, token, ...) each.
OTHERS = {
    "xlnet": (
        lambda: tf.XLNetConfig(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=160),
        {"token_type_ids": lambda place: place % 2},
    ),
    "layoutlm": (
        lambda: tf.LayoutLMConfig(**_SIZES, max_2d_position_embeddings=64),
        {"bbox": lambda place: torch.stack([place, place + 3, place + 9, place + 10], dim=-1)},
    ),
    "longformer": (
        lambda: tf.LongformerConfig(
            **_SIZES, attention_window=8, max_position_embeddings=64, pad_token_id=1
        ),
        {"global_attention_mask": lambda place: (place % 5 == 0).long()},
    ),
    "led": (
        lambda: tf.LEDConfig(
            vocab_size=128,
            d_model=64,
            encoder_ffn_dim=160,
            decoder_ffn_dim=160,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            attention_window=8,
            pad_token_id=0,
        ),
        {"global_attention_mask": lambda place: (place % 5 == 0).long()},
    ),
    "xlm": (
        lambda: tf.XLMConfig(
            vocab_size=128, emb_dim=64, n_layers=2, n_heads=4, n_langs=2, pad_index=0
        ),
        {"langs": lambda place: place % 2},
    ),
    "ernie": (
        lambda: tf.ErnieConfig(**_SIZES, use_task_id=True),
        {"task_type_ids": lambda place: place % 3, "token_type_ids": lambda place: place % 2},
    ),
    "opt": (helpers.ARCHITECTURES["opt"], {"position_ids": lambda place: 3 * place + 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_a_model_takes_for_every_token(name: str) -> None:
    config, makers = OTHERS[name]
    torch.manual_seed(0)
    model = tf.AutoModel.from_config(config()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    texts = helpers.random_ids(19, 9, 13)
    more = [{key: make(torch.arange(len(ids))) for key, make in makers.items()} for ids in texts]
    columns = {key: [row[key].tolist() for row in more] for key in makers}
    ones = [[1] * len(ids) for ids in texts]
    together = record(model, {"input_ids": texts, "attention_mask": ones, **columns}, window=4)
    for number, ids in enumerate(texts):
        inputs = {"input_ids": torch.tensor([ids])}
        if name == "led":
            inputs["decoder_input_ids"] = inputs["input_ids"]
        inputs["attention_mask"] = torch.ones(1, len(ids), dtype=int)
        inputs |= {key: values[None] for key, values in more[number].items()}
        assert_energy(together, expected(model, **inputs), number)
    without = record(model, texts, window=4)
    assert np.abs(together.energy - without.energy).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_of_any_order_with_a_mask(name: str) -> None:
    """Not only where they go up by one."""
    model = helpers.proved(name)
    (ids,) = helpers.random_ids(12)
    positions = [3 * place % 31 for place in range(12)]
    text = {"input_ids": [ids], "attention_mask": [[1] * 12], "position_ids": [positions]}
    tensors = {key: torch.tensor(value) for key, value in text.items()}
    assert_energy(record(model, text), expected(model, **tensors))
    del text["attention_mask"]
    with pytest.raises(ValueError, match="position_ids that do not go on at token 1, and no att"):
        record(model, text)


def test_an_encoder_needs_no_mask_for_that() -> None:
    model = helpers.proved("bert")
    (ids,) = helpers.random_ids(12)
    text = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(11, -1, -1)[None]}
    assert_energy(record(model, text), expected(model, **text))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.proved(name)
    texts = helpers.random_ids(60, 41)
    rows = [inputs_of(name, ids) for ids in texts]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    whole = record(model, {"input_ids": texts, **columns}, window=8)
    fed = []
    forward = type(model.base_model).forward

    def watched(self: tf.PreTrainedModel, *args: object, **kwargs: object) -> object:
        if kwargs.keys() >= columns.keys():  # not the trials of a model with another forward
            fed.append({key: kwargs[key].shape[1] for key in ("input_ids", *columns)})
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 14)
    monkeypatch.setattr(type(model.base_model), "forward", functools.wraps(forward)(watched))
    assert_same(record(model, {"input_ids": texts, **columns}, window=8), whole)
    assert [list(sizes.values()) for sizes in fed[-9:]] == [
        [n] * len(fed[-1]) for n in [7] * 8 + [4]
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_continuation_equals_live_hooks(name: str) -> None:
    """Of the model's own `generate`, which is given the same."""
    model = helpers.proved(name)
    texts = helpers.random_ids(20, 13)
    rows = [inputs_of(name, ids) for ids in texts]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    recording = record(model, {"input_ids": texts, **columns}, max_new_tokens=12, window=4)
    for number, ids in enumerate(texts):
        live: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        with flocking.observe(
            model, lambda ff, z, live=live: live[ff.layer].append(z.reshape(-1, z.shape[-1]))
        ):
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=int),
                do_sample=False,
                max_new_tokens=12,
                **{key: torch.tensor([values]) for key, values in rows[number].items()},
            )[0]
        mine = recording.sel(sequence=number)
        assert mine.token_id.values[: len(out) - 1].tolist() == out[:-1].tolist()
        energy = {layer: (relative(torch.cat(z)) ** 2).sum(0) for layer, z in live.items()}
        assert_energy(recording, energy, number)


class Typed:
    """A tokenizer of letters that returns token types with strings, as BERT's does."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        ids = [3 + ord(letter) % 50 for letter in text]
        ids = [1, *ids, 2] if add_special_tokens else ids
        types = [0] * (len(ids) // 2) + [self.kind] * (len(ids) - len(ids) // 2)
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(int(each)) for each in ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(each) for each in ids] if isinstance(ids, list) else str(ids)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_strings_give_what_their_tokenizers_output_gives(name: str) -> None:
    model, tokenizer = helpers.proved(name), Typed(1)
    texts = ["flock", "a murmuration"]
    encodings = [tokenizer(text) for text in texts]
    output = {key: [encoding[key] for encoding in encodings] for key in encodings[0]}
    of_strings = record(model, texts, tokenizer=tokenizer)
    assert_same(of_strings, record(model, output))
    tensors = {key: torch.tensor([value]) for key, value in encodings[0].items()}
    assert_energy(of_strings, expected(model, **tensors))
    bare = record(model, output["input_ids"])
    assert np.abs(bare.energy - of_strings.energy).max() > 1e-3


def test_types_of_a_tokenizers_own_that_the_model_has_not(llama: tf.PreTrainedModel) -> None:
    """Nobody asked for them with strings, and where all are 0 they say nothing."""
    tokenizer = Typed(1)
    plain = record(llama, tokenizer("flock")["input_ids"])
    assert_same(record(llama, "flock", tokenizer=tokenizer), plain)
    assert_same(record(llama, Typed(0)("flock")), plain)
    with pytest.raises(ValueError, match="text has 'token_type_ids', which cannot be fed to Llama"):
        record(llama, tokenizer("flock"))


def test_what_tokenizers_keep_of_their_work_is_left_out(llama: tf.PreTrainedModel) -> None:
    (ids,) = helpers.random_ids(5)
    notes = {
        "special_tokens_mask": [[1, 0, 0, 0, 0]],
        "offset_mapping": [[(0, 1)] * 5],
        "length": [5],
        "overflow_to_sample_mapping": [0],
    }
    assert_same(record(llama, {"input_ids": [ids], **notes}), record(llama, ids))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", torch.zeros(1, 3, 8, 8)),
        ("decoder_input_ids", [[5, 6, 7]]),
        ("inputs_embeds", torch.zeros(1, 3, 64)),
        ("labels", [[5, 6, 7]]),
        ("past_key_values", tf.DynamicCache()),
        ("token_type_ids", [[0, 1, 1]]),
        ("token_type_ids", "abc"),
        ("head_mask", torch.ones(1, 3)),
        ("use_cache", True),
        ("text", ["abc"]),
        ("label", [0]),
    ],
)
def test_all_else_is_refused_by_name(
    llama: tf.PreTrainedModel, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is run, or its blocks are looked for."""
    monkeypatch.setattr(forward_passes, "feedforwards", None)
    with pytest.raises(ValueError, match=f"text has '{name}', which cannot be fed") as caught:
        record(llama, {"input_ids": [[5, 6, 7]], name: value})
    assert "position_ids can" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "problem", "message"),
    [
        ({"position_ids": [[0, 1]]}, ValueError, "3 token ids and 2 in its position_ids"),
        ({"position_ids": [[0, 1, 2]] * 2}, ValueError, "position_ids has 2 rows, input_ids has 1"),
        ({"position_ids": [[-1, 0, 1]]}, ValueError, "position_ids of text 0 .* from -1 to 1"),
        ({"position_ids": [[254, 255, 256]]}, ValueError, "takes those from 0 to 255"),
        ({"token_type_ids": [[0, 1, 2]]}, ValueError, "token_type_ids of .* those from 0 to 1"),
        (
            {"token_type_ids": [[0, 0.5, 1]]},
            TypeError,
            "token_type_ids of .* not an array of whole",
        ),
        ({"attention_mask": [[1, 2, 2]]}, ValueError, "more than 0 and 1"),
        ({"attention_mask": [[0.0, -np.inf, 0.0]]}, TypeError, "attention_mask of text 0 is not"),
    ],
)
def test_wrong_values(inputs: dict, problem: type, message: str) -> None:
    with pytest.raises(problem, match=message) as caught:
        record(helpers.proved("bert"), {"input_ids": [[5, 6, 7]], **inputs})
    assert "\n" not in str(caught.value)


def test_positions_behind_a_padding_index() -> None:
    model = helpers.roberta()
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[37, 38, 39]])}
    assert_energy(record(model, text), expected(model, **text))
    text["position_ids"] += 1
    with pytest.raises(ValueError, match="takes those from 0 to 39"):
        record(model, text)


def test_types_that_decide_which_tokens_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's image tokens see later ones: no text is cut there, and none continued."""
    text = tf.Gemma3TextConfig(**helpers._GROUPED, sliding_window=16).to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.image_token_id = 127
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    (ids,) = helpers.random_ids(40)
    ids = [min(each, 126) for each in ids]
    types = [0] * 9 + [1] * 8 + [0] * 23
    tensors = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
    ones = torch.ones(1, 40, dtype=int)
    energy = expected(model, **tensors, attention_mask=ones)
    monkeypatch.setattr(capabilities, "CHUNK_TOKENS", 14)
    assert_energy(record(model, tensors), energy)
    with pytest.raises(ValueError, match="with token_type_ids, later tokens matter"):
        record(model, tensors, max_new_tokens=3)
