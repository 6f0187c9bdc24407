"""Which fields of a config say the widths is found by trial, whatever they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from exports import MORE, assert_close, logits, made, masked, selected
from helpers import build, tokens
from torch import nn

import flocking
from flocking.pruning.widths import narrowed, sized

_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 256,
}  # fmt: skip


def fields(model: tf.PreTrainedModel, share: float) -> tuple[dict[str, object], list[int]]:
    """Fields that have to change for this share of each block, and the widths that there are."""
    parts = sized(model, [block for block in flocking.feedforwards(model) if block.call == 0])
    config, widths = narrowed(model, parts, [int(share * part.width) for part in parts])
    before, after = model.config.to_dict(), config.to_dict()
    return {key: after[key] for key in after if after[key] != before.get(key)}, widths


FOUND = {
    "llama": {"intermediate_size": 80},
    "gpt2": {"n_inner": 80},
    "opt": {"ffn_dim": 80},
    "falcon": {"ffn_hidden_size": 80},
    "mixtral": {"intermediate_size": 24},  # 20, and a multiple of 8
    "qwen2_moe": {
        "intermediate_size": 80, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
    },
    "llama4": {"intermediate_size": 24, "intermediate_size_mlp": 80},
    "deepseek_v3": {"intermediate_size": 80, "moe_intermediate_size": 24},  # shared ones, too
    "recurrent_gemma": {"intermediate_size": 160},  # of which blocks have the half
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_fields(name: str) -> None:
    assert fields(made(name), 0.5)[0] == FOUND[name]


@pytest.mark.parametrize("kind", [tf.GPT2Config, tf.GPTJConfig, tf.GPTNeoConfig])
def test_fields_that_stand_for_a_default(kind: type[tf.PreTrainedConfig], tmp_path: Path) -> None:
    """None, where the width is four times the model's."""
    config = kind(vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, value in {**sizes, "rotary_dim": 8}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if kind is tf.GPTNeoConfig:
        config.attention_types, config.attention_layers = [[["global"], 2]], ["global"] * 2
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    kept = selected(model)
    done = flocking.export(model, kept, tmp_path / "out")
    assert set(done.stored.values()) == {125}
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert_close(logits(again, tokens(9)), logits(masked(model, kept), tokens(9)))


def test_nested_configs(tmp_path: Path) -> None:
    """The language model's width is changed, and the vision tower's stays, which is the same."""
    vision = {
        "hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**_SIZES, "intermediate_size": 160, "head_dim": 16, "sliding_window": 16}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    done = flocking.export(model, selected(model), tmp_path / "out")
    assert set(done.stored.values()) == {78}
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.config.text_config.intermediate_size == 78
    assert again.config.vision_config.intermediate_size == 160


# --------------------------------------------------------------------------------------
# Classes of a user


class ManyConfig(tf.LlamaConfig):
    model_type = "many-widths"
    widths: list[int] | None = None


class Many(tf.LlamaForCausalLM):
    """Each layer has a width to itself."""

    config_class = ManyConfig

    def __init__(self, config: ManyConfig) -> None:
        super().__init__(config)
        for layer, width in zip(self.model.layers, config.widths, strict=True):
            for name in ("gate_proj", "up_proj"):
                setattr(layer.mlp, name, nn.Linear(config.hidden_size, width, bias=False))
            layer.mlp.down_proj = nn.Linear(width, config.hidden_size, bias=False)


class OddConfig(tf.LlamaConfig):
    model_type = "odd-widths"


class AlsoHead(tf.LlamaForCausalLM):
    """The same field is the width of something else."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.more = nn.Linear(config.intermediate_size, config.intermediate_size)


class Rounded(tf.LlamaForCausalLM):
    """Widths are multiples of 64, whatever is asked for."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        config.intermediate_size = -(-config.intermediate_size // 64) * 64
        super().__init__(config)


def own(kind: Callable[..., tf.PreTrainedModel], **more: object) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return kind(kind.config_class(**_SIZES, **more)).eval()


@pytest.mark.parametrize("widths", [[160, 96], [160, 160], [96, 160]])
def test_a_width_for_each_layer(widths: list[int], tmp_path: Path) -> None:
    model = own(Many, widths=widths, intermediate_size=96)
    kept = selected(model)
    done = flocking.export(model, kept, tmp_path / "out")
    assert done.zeros == 0
    assert list(done.stored.values()) == [int(0.49 * widths[0]), int(0.3 * widths[1])]
    again = Many.from_pretrained(tmp_path / "out").eval()
    assert again.config.widths == list(done.stored.values())
    assert_close(logits(again, tokens(9)), logits(masked(model, kept), tokens(9)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"from {Many.__module__} import Many" in card


def test_fields_that_change_something_else_are_named(tmp_path: Path) -> None:
    model = own(AlsoHead, intermediate_size=160)
    with pytest.raises(ValueError, match=r"AlsoHead cannot .* intermediate_size, changes more\.b"):
        flocking.export(model, selected(model), tmp_path / "out")


def test_what_a_class_makes_of_a_width_is_found(tmp_path: Path) -> None:
    """It is filled up with zeros."""
    model = own(Rounded, intermediate_size=192)
    kept = selected(model)
    done = flocking.export(model, kept, tmp_path / "out")
    assert (set(done.stored.values()), set(done.kept.values())) == ({128}, {94, 57})
    again = Rounded.from_pretrained(tmp_path / "out").eval()
    assert_close(logits(again, tokens(9)), logits(masked(model, kept), tokens(9)))


class Picky(tf.LlamaForCausalLM):
    """Widths are multiples of 32, or there is no model."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        if config.intermediate_size % 32:
            raise ValueError("intermediate_size has to be a multiple of 32\n(it is not)")
        super().__init__(config)


def test_widths_that_a_class_does_not_take_are_named(tmp_path: Path) -> None:
    """And those that it takes are exported."""
    model = own(Picky, intermediate_size=192)
    with pytest.raises(
        ValueError,
        match=r"^Picky cannot be made with FF blocks of 94 neurons \(ValueError: intermediate_size "
        r"has to be a multiple of 32\): keep another number\.$",
    ):
        flocking.export(model, selected(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    kept = flocking.select(flocking.weight_magnitude(model), 0.5)
    assert set(flocking.export(model, kept, tmp_path / "out").stored.values()) == {96}


def test_layers_that_stay_whole_need_no_field(tmp_path: Path) -> None:
    """Experts that keep all of their neurons are not in the way of dense layers."""
    model = made("deepseek_v3")
    kept = flocking.select(flocking.weight_magnitude(model), [0.5, 1, 1])
    done = flocking.export(model, kept, tmp_path / "out")
    assert done.stored == {0: 80, 1: 4 * 48, 2: 48}
    bloom = build("bloom")
    parts = sized(bloom, flocking.feedforwards(bloom))
    assert narrowed(bloom, parts, [256, 256])[1] == [256, 256]
    with pytest.raises(ValueError, match="hidden_size, changes"):
        narrowed(bloom, parts, [256, 255])


def test_experts_are_filled_up_where_a_shared_one_says_their_width() -> None:
    """It is as wide as two of them, and one number says both widths."""
    config = MORE["deepseek_v3"]()
    config.n_shared_experts = 2
    torch.manual_seed(0)
    model = tf.DeepseekV3ForCausalLM(config).eval()
    parts = sized(model, flocking.feedforwards(model))
    assert [part.width for part in parts] == [160, 48, 96]
    for shared, experts in ((75, 40), (50, 32), (95, 48)):  # at least 38, 25 and 48
        smaller, widths = narrowed(model, parts, [80, 24, shared])
        assert smaller.moe_intermediate_size == experts
        assert widths == [80, experts, 2 * experts]


def test_blocks_that_can_stay_whole_are_named() -> None:
    """The router's layers have a width that is another's, too; experts could be exported."""

    class TwoConfig(tf.LlamaConfig):
        model_type = "two-widths"

    class Two(tf.LlamaForCausalLM):
        config_class = TwoConfig

        def __init__(self, config: TwoConfig) -> None:
            super().__init__(config)
            mlp, width = self.model.layers[1].mlp, config.max_position_embeddings
            mlp.gate_proj, mlp.up_proj = (nn.Linear(64, width, bias=False) for _ in range(2))
            mlp.down_proj = nn.Linear(width, 64, bias=False)
            self.more = nn.Linear(width, 3)

    model = own(Two, intermediate_size=160)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp is, max_pos.*all neurons of layers 1\."):
        fields(model, 0.5)
