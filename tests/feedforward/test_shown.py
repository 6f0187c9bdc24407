"""How a model's blocks are shown: a list that prints as a table."""

from __future__ import annotations

import copy
import html.parser
import math
from dataclasses import replace

import helpers
import pytest

import flocking
from flocking.feedforward.block import FeedForwards

# By hand, from the configs in helpers.ARCHITECTURES.
ACTIVATIONS = {"llama": "silu", "gpt2": "gelu_new", "opt": "relu", "gemma": "gelu_pytorch_tanh"}


class Cells(html.parser.HTMLParser):
    """Texts of a table's cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions(name: str) -> None:
    blocks = flocking.feedforwards(helpers.build(name))
    assert [block.activation for block in blocks] == [ACTIVATIONS[name]] * 2


def test_a_list_that_prints_as_a_table() -> None:
    blocks = flocking.feedforwards(helpers.build("llama"))
    title, head, row = repr(blocks).split("\n")
    assert title.startswith("2 FF blocks, proved with relative errors up to ")
    assert head.split() == ["layers", "module", "d_ff", "kind", "activation"]
    assert row.split() == ["0-1", "model.layers.*.mlp", "160", "gated", "silu"]
    assert Cells(blocks._repr_html_()).rows == [head.split(), row.split()]
    assert "<script" not in blocks._repr_html_()
    without = blocks._repr_html_().replace("color:inherit", "")
    assert "color" not in without  # a notebook's own, light or dark


def test_it_is_a_list() -> None:
    blocks = flocking.feedforwards(helpers.build("llama"))
    plain = list(blocks)
    assert isinstance(blocks, list)
    assert blocks == plain == copy.copy(blocks)
    assert (blocks[0], blocks[-1]) == (plain[0], plain[1])
    assert isinstance(blocks[:1], FeedForwards)
    assert blocks[:1] == plain[:1]
    assert repr(blocks[:1]).startswith("1 FF block, proved")
    assert repr(blocks[:0]) == "0 FF blocks"
    blocks.append(plain[0])
    assert len(flocking.feedforwards(helpers.build("llama"))) == 2


def test_kinds_of_blocks_have_a_row_each() -> None:
    block = replace(flocking.feedforwards(helpers.build("llama"))[0], error=1e-7)
    dense, mixed = "layers.{}.mlp", "layers.{}.<b>x</b>"
    layers = [
        replace(block, layer=n, path=(mixed if n % 2 else dense).format(n), d_ff=1600 + n % 2)
        for n in range(20)
    ]
    layers[3] = replace(layers[3], prunable=False, activation="")
    shown = FeedForwards(layers)
    assert [line.split() for line in repr(shown).split("\n")[1:]] == [
        ["layers", "module", "d_ff", "kind", "activation", "prunable"],
        ["0,", "2,", "4,", "...,", "18", "layers.*.mlp", "1,600", "gated", "silu", "yes"],
        ["1,", "5,", "7,", "...,", "19", "layers.*.<b>x</b>", "1,601", "gated", "silu", "yes"],
        ["3", "layers.*.<b>x</b>", "1,601", "gated", "?", "no"],
    ]
    assert "&lt;b&gt;" in shown._repr_html_()
    assert "<b>x" not in shown._repr_html_()
    unproved = FeedForwards([replace(block, error=math.nan)])
    assert repr(unproved).startswith("1 FF block, found by shape and not proved")


def test_mixtures_say_how_many_experts() -> None:
    shown = repr(flocking.feedforwards(helpers.build("mixtral"))).split("\n")
    assert shown[1].split()[-1] == "experts"
    assert shown[2].split()[-4:] == ["160", "experts", "silu", "4"]
