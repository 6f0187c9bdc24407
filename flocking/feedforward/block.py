"""One feed-forward (FF) block, and the error for models that have none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from flocking.feedforward.moe import is_experts
from flocking.models import any_tensor_of, device_of, html_table, text_table


class UnsupportedModelError(ValueError):
    """A transformers model in which FF blocks cannot be located and proved.

    Examples
    --------
    >>> import torch
    >>> broken = flocking.control(model)
    >>> for layer in broken.model.layers:
    ...     layer.mlp = torch.nn.Identity()
    >>> try:
    ...     flocking.feedforwards(broken)
    ... except flocking.UnsupportedModelError as error:
    ...     print(error)
    LlamaForCausalLM has no feed-forward block that flocking can prove: ...
    """


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One FF block: ``down(z)`` with ``z = act(gate(x)) * up(x)`` or ``z = act(up(x))``.

    Attributes
    ----------
    layer : int
        Index of the decoder (or encoder) layer that holds the block.
    path : str
        Path of the smallest module that holds all of the block's projections; that of the
        down-projection, if the smallest module is the whole model.
    d_ff : int
        Number of neurons, the width of ``z``; in a mixture, those of all experts together.
    up, down : torch.nn.Module
        The projections. The input of ``down`` is the tensor ``z`` that is recorded. In a mixture
        of experts, both are the one module that holds all experts.
    gate : torch.nn.Module or None
        The projection inside the activation function; None in a plain block. Where gate and up
        are fused into one matrix of ``2 * d_ff`` rows, the same module as ``up``.
    interleaved : bool
        Whether a fused matrix alternates gate and up row by row (else it stacks them).
    error : float
        Largest relative error seen in the proof; NaN if unproved (meta device).
    experts : int
        Number of experts in a mixture, which share the neurons evenly; 1 in a dense block.
    prunable : bool
        Whether its neurons are independent of each other. If not (because of a norm between the
        activation function and the down-projection, for example), they can only be recorded.
    token_first : bool
        Whether the model computes z as (token, sequence, neuron), as XLNet does.
    offset : int or None
        Where the text's tokens begin in a z that has more rows than those: after a prefix that
        the model adds, or before rows that fill it up. None if there are no such rows.
    call, calls : int
        Which run of the block in one forward pass this is, counted from 0, and how many there
        are. Where layers share weights, or a layer runs repeatedly, each run counts as a layer.
    activation : str
        transformers' name for the activation function, such as "silu"; empty where it is no module
        of the block, or there are several.

    Examples
    --------
    >>> block = flocking.feedforwards(model)[0]
    >>> block
    FeedForward(layer=0, path='model.layers.0.mlp', d_ff=64, error=..., experts=1, prunable=True)
    >>> block.kind, block.down
    ('gated', Linear(in_features=64, out_features=32, bias=False))
    """

    layer: int
    path: str
    d_ff: int
    up: nn.Module = field(repr=False)
    gate: nn.Module | None = field(repr=False)
    down: nn.Module = field(repr=False)
    interleaved: bool = field(default=False, repr=False)
    error: float = math.nan
    experts: int = 1
    prunable: bool = True
    token_first: bool = field(default=False, repr=False)
    offset: int | None = field(default=None, repr=False)
    call: int = field(default=0, repr=False)
    calls: int = field(default=1, repr=False)
    activation: str = field(default="", repr=False)

    @property
    def weight(self) -> Tensor:
        """Weight of the down-projection(s); without values while it is offloaded."""
        return any_tensor_of(self.down, self._weight_name)

    @property
    def device(self) -> torch.device:
        """Where the block computes, which need not be where its weights are kept."""
        return device_of(self.down, self._weight_name)

    @property
    def _weight_name(self) -> str:
        return "down_proj" if self.kind == "experts" else "weight"

    @property
    def kind(self) -> str:
        """``"plain"``, ``"gated"``, ``"fused"`` (gate and up in one matrix) or ``"experts"``."""
        if is_experts(self.down):
            return "experts"
        if self.gate is None:
            return "plain"
        return "fused" if self.gate is self.up else "gated"


class FeedForwards(list[FeedForward]):
    """FF blocks of a model: a list that prints as a table, a row for each kind of block.

    Blocks whose modules' paths differ in the number of the layer alone share a row.
    """

    @overload
    def __getitem__(self, index: SupportsIndex) -> FeedForward: ...
    @overload
    def __getitem__(self, index: slice) -> FeedForwards: ...
    def __getitem__(self, index: SupportsIndex | slice) -> FeedForward | FeedForwards:
        """One block, or such a list of some."""
        found = super().__getitem__(index)
        return FeedForwards(found) if isinstance(found, list) else found

    def __repr__(self) -> str:
        """How many blocks there are, how exactly they were proved, and the table."""
        head, rows = self._table()
        return "\n".join(
            [self._title(), *([text_table([head, *rows], right=(2,))] if rows else [])]
        )

    def _repr_html_(self) -> str:
        head, rows = self._table()
        return html_table(rows, self._title(), head=head)

    def _title(self) -> str:
        title = f"{len(self)} FF block{'' if len(self) == 1 else 's'}"
        errors = [block.error for block in self]
        if not errors:
            return title
        if any(map(math.isnan, errors)):
            return f"{title}, found by shape and not proved: the weights have no values"
        return f"{title}, proved with relative errors up to {max(errors):.1g}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and rows; what is so of all blocks of most models has no column."""
        kinds: dict[tuple[str, ...], list[int]] = {}
        for block in self:
            row = (
                re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", block.path, count=1),
                f"{block.d_ff:,}",
                block.kind,
                block.activation or "?",
                f"{block.experts:,}" if block.kind == "experts" else "",
                "yes" if block.prunable else "no",
            )
            kinds.setdefault(row, []).append(block.layer)
        columns = ["module", "d_ff", "kind", "activation", "experts", "prunable"]
        shown = [0, 1, 2, 3]
        shown += [4] if any(row[4] for row in kinds) else []
        shown += [5] if any(row[5] == "no" for row in kinds) else []
        rows = [[_runs(layers), *(row[n] for n in shown)] for row, layers in kinds.items()]
        return ["layers", *(columns[n] for n in shown)], rows


def activation_in(module: nn.Module) -> str:
    """Transformers' name for the one activation function among a module's own; empty if none.

    Parameters
    ----------
    module : torch.nn.Module
        The smallest that holds all projections of a block.
    """
    names: dict[Any, str] = {}
    for name, entry in ACT2CLS.items():
        names.setdefault(entry[0] if isinstance(entry, tuple) else entry, name)
    found = {names[type(child)] for child in module.modules() if type(child) in names}
    return found.pop() if len(found) == 1 else ""


def _runs(numbers: Iterable[int], most: int = 4) -> str:
    """Numbers of layers: runs by their ends, and of many runs the first ones and the last."""
    runs: list[list[int]] = []
    for number in sorted({*numbers}):
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    texts = ["-".join(map(str, run)) for run in runs]
    return ", ".join(texts if len(texts) <= most else [*texts[: most - 1], "...", texts[-1]])
