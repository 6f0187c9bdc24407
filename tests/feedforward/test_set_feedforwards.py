"""A user decides where blocks are and whether some may be left out, in a call that says so."""

from __future__ import annotations

import helpers
import pytest
import torch
import transformers as tf
from torch import nn

import flocking
from flocking.feedforward import UnsupportedModelError


class ListsConfig(tf.PreTrainedConfig):
    model_type = "lists"

    def __init__(self, **kwargs: object) -> None:
        super().__init__(vocab_size=128, hidden_size=32, num_hidden_layers=3, **kwargs)


class Lists(tf.PreTrainedModel):
    """All up-projections in one list and all down-projections in another: no layer holds both."""

    config_class = ListsConfig

    def __init__(self, config: ListsConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(128, 32)
        self.up = nn.ModuleList(nn.Linear(32, 80) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(80, 32) for _ in range(3))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> tuple:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return (x,)


@pytest.fixture
def lists() -> Lists:
    torch.manual_seed(0)
    model = Lists(ListsConfig()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def test_blocks_that_a_user_names(lists: Lists) -> None:
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.feedforwards(lists)
    named = {f"down.{n}": [f"up.{n}"] for n in range(3)}
    blocks = flocking.set_feedforwards(lists, named)
    assert [(b.layer, b.down, b.up) for b in blocks] == [
        (n, lists.down[n], lists.up[n]) for n in range(3)
    ]
    assert all(block.kind == "plain" and block.error < 1e-5 and block.prunable for block in blocks)
    assert [block.path for block in blocks] == ["down.0", "down.1", "down.2"]
    recording = flocking.record(lists, [[5, 6, 7, 8]], progress=False)  # from then on
    named.clear()  # the user's own, to do with as they please
    assert flocking.feedforwards(lists) == blocks
    z = helpers.activations(lists, [5, 6, 7, 8])
    for layer in range(3):
        r = z[layer] / z[layer].norm(dim=1, keepdim=True)
        energy = recording.energy.sel(layer=layer).sum("window").values[0]
        assert torch.allclose(torch.from_numpy(energy), (r**2).sum(0), atol=1e-5)


@pytest.mark.parametrize("nothing", [(), ({},)], ids=["left out", "empty"])
def test_named_nothing_it_goes_back_to_looking(llama: tf.PreTrainedModel, nothing: tuple) -> None:
    mlp = "model.layers.1.mlp"
    named = {f"{mlp}.down_proj": [f"{mlp}.gate_proj", f"{mlp}.up_proj"]}
    assert [block.layer for block in flocking.set_feedforwards(llama, named)] == [1]
    assert [block.layer for block in flocking.feedforwards(llama)] == [1]
    assert flocking.record(llama, [[5, 6, 7]], progress=False).layer.values.tolist() == [1]
    assert [block.layer for block in flocking.set_feedforwards(llama, *nothing)] == [0, 1]
    assert flocking.record(llama, [[5, 6, 7]], progress=False).layer.values.tolist() == [0, 1]


def test_what_fails_leaves_what_was_decided_before(lists: Lists) -> None:
    blocks = flocking.set_feedforwards(lists, {"down.0": "up.0"})
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.set_feedforwards(lists)
    with pytest.raises(ValueError, match="nowhere"):
        flocking.set_feedforwards(lists, {"down.0": "nowhere"})
    assert [block.path for block in flocking.feedforwards(lists)] == [b.path for b in blocks]


def test_a_function_that_names_them(lists: Lists) -> None:
    blocks = flocking.set_feedforwards(
        lists, lambda model: {f"down.{n}": f"up.{n}" for n in range(len(model.up))}
    )
    assert len(blocks) == 3


def test_wrong_names_do_not_pass_the_proof(lists: Lists) -> None:
    with pytest.raises(UnsupportedModelError, match=r"down\.1 could not be proved"):
        flocking.set_feedforwards(lists, {"down.0": "up.0", "down.1": "up.0"})
    with pytest.raises(UnsupportedModelError, match=r"before its down-projection"):
        flocking.set_feedforwards(lists, {"down.0": "up.1"})
    with pytest.raises(UnsupportedModelError, match="no feed-forward block"):
        flocking.feedforwards(lists)  # what failed is not remembered


@pytest.mark.parametrize(
    ("locate", "error", "match"),
    [
        ({"down.0": ["nowhere"]}, ValueError, "'nowhere'"),
        ({"down.0": ["down.1"]}, ValueError, r"down\.1 \(80, 32\)"),
        ({"down.0": []}, ValueError, r"d_ff, d"),
        ({"embed": ["up.0"]}, ValueError, "None"),
        (["down.0"], TypeError, "give a dict"),
        ({"down.0": 3}, TypeError, "3 for 'down.0': give a path"),
        ({"down.0": ["up.0", 3]}, TypeError, "give a path"),
    ],
)
def test_names_that_make_no_sense(
    lists: Lists, locate: object, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        flocking.set_feedforwards(lists, locate)


def test_naming_what_would_be_found_changes_nothing(tiny: tf.PreTrainedModel) -> None:
    found = flocking.feedforwards(tiny)
    paths = {module: path for path, module in tiny.named_modules()}
    named = {
        paths[b.down]: []
        if b.kind == "experts"
        else [paths[m] for m in {b.up: None, b.gate: None} if m is not None]
        for b in found
    }
    again = flocking.set_feedforwards(tiny, named)
    fields = ("layer", "path", "d_ff", "up", "gate", "down", "interleaved", "experts", "prunable")
    for one, other in zip(again, found, strict=True):
        assert all(getattr(one, field) == getattr(other, field) for field in fields)


def test_what_cannot_be_recorded_may_be_left_out(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(UnsupportedModelError, match=r"allow_partial=True"):
        flocking.record(llama, [[5, 6, 7]], progress=False)
    with pytest.warns(UserWarning, match=r"left out, since model\.layers\.1\.mlp\.down_proj could"):
        blocks = flocking.set_feedforwards(llama, allow_partial=True)
    assert [block.layer for block in blocks] == [0]
    # From then on, everywhere; until it is said otherwise.
    assert flocking.record(llama, [[5, 6, 7]], progress=False).layer.values.tolist() == [0]
    twin = flocking.griffin(llama)
    twin.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    assert list(twin.selection) == [0]
    twin.set_attn_implementation("eager")  # what reads its prompts is proved anew, as it was
    with pytest.warns(UserWarning, match="left out"):
        twin.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"allow_partial=True"):
        flocking.set_feedforwards(llama)
