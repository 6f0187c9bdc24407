"""The feed-forward blocks of a GGUF file: which tensors they are, and how narrower ones are cut.

llama.cpp names the tensors of all architectures in one way (``gguf.constants.TENSOR_NAMES``), and
lays them out in one way: the rows of ``ffn_up`` and ``ffn_gate`` are neurons, those of a fused
matrix twice, and so are the columns of ``ffn_down``. Names and shapes decide, not architectures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from flocking.pruning.chosen import Wide

try:  # newer versions of transformers have a second reader, for newer architectures
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
except ImportError:
    GGUF_CONFIG_ARCHS = {}

if TYPE_CHECKING:
    from flocking.models.gguf import Contents, Tensor

_IN_A_BLOCK = re.compile(r"blk\.(\d+)\.([^.]+)")
# What a block's tensors may end with: the one dense block, the experts, the expert that all share.
_KINDS = {
    "": "feed_forward_length",
    "_exps": "expert_feed_forward_length",
    "_shexp": "expert_shared_feed_forward_length",
}
# Tensors of a block that have nothing to do with its neurons, though a width of theirs may equal
# the number of these by chance.
_APART = re.compile(
    r"attn_|post_|layer_out_norm|ffn_norm|ffn_post_norm|ffn_gate_inp|exp_probs_b|ssm_|shortconv"
)


class Cut(Enum):
    """Where the neurons of a tensor are."""

    ROWS = "rows"
    HALVES = "rows of gate, and as many of up"
    COLUMNS = "columns"


class Block(NamedTuple):
    """One feed-forward block of a file, or all experts of a mixture.

    Attributes
    ----------
    layer : int
        Its label in recordings and selections.
    number : int
        The N of ``blk.N``.
    d_ff : int
        Number of neurons, in each expert.
    experts : int
        1 in a dense block.
    key : str
        The metadata that tells the width.
    cuts : dict of Cut
        How each of its tensors is cut, by the tensor's name.
    """

    layer: int
    number: int
    d_ff: int
    experts: int
    key: str
    cuts: dict[str, Cut]

    def wide(self) -> Wide:
        """The layer as selections know it."""
        return Wide(self.layer, self.d_ff * self.experts, self.experts)


class _Part(NamedTuple):
    """A feed-forward block before it has a label."""

    number: int
    kind: str
    d_ff: int
    experts: int
    cuts: dict[str, Cut]


def blocks_of(contents: Contents, where: str) -> list[Block]:
    """The feed-forward blocks of a file, in the order of its layers.

    Parameters
    ----------
    contents : Contents
        What the file says of itself.
    where : str
        Its name, for errors.

    Raises
    ------
    ValueError
        If its architecture is unknown to gguf or transformers, if it has no block, or one that
        cannot be cut: with tensors of other names or shapes, or of a width that the metadata
        does not tell.
    """
    architecture = _architecture(contents.metadata, where)
    try:
        found = [_parts(number, own) for number, own in _by_block(contents.tensors)]
    except _UncutError as problem:
        raise ValueError(f"{where} cannot be pruned: its {problem}.") from None
    parts = [part for own in found for part in own]
    if not parts:
        raise ValueError(
            f"{where} has no feed-forward blocks (tensors such as blk.0.ffn_up.weight), as an "
            "encoder or adapter has none: give the file of a causal model."
        )
    _refuse_predictors(contents.metadata, architecture, where)
    _check_labels(parts, where)
    alone = len({part.number for part in parts}) == len(parts)
    blocks = []
    for count, part in enumerate(parts):
        label = part.number if alone else count
        key = _key(contents.metadata, architecture, part, where)
        blocks.append(Block(label, part.number, part.d_ff, part.experts, key, part.cuts))
    return blocks


def _architecture(metadata: Mapping[str, Any], where: str) -> str:
    """The file's architecture, if both readers know it."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ValueError(f"{where} names no architecture (general.architecture): get it again.")
    readers = {
        "gguf": {*MODEL_ARCH_NAMES.values()},
        "transformers": {*map(_plain, [*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS])},
    }
    if name not in readers["gguf"] or _plain(name) not in readers["transformers"]:
        missing = "gguf" if name not in readers["gguf"] else "transformers"
        raise ValueError(
            f"{where} is of the architecture {name!r}, which the installed {missing} does not "
            "read, so that no selection can be known to fit it: prune the model's folder with "
            "flocking.export, and convert that."
        )
    return name


def _plain(name: str) -> str:
    """An architecture as both spell it: gguf has qwen2moe, transformers qwen2_moe."""
    return re.sub("[-_]", "", name)


def _refuse_predictors(metadata: Mapping[str, Any], architecture: str, where: str) -> None:
    """Layers beyond the model's own have the same width, and no selection is of them."""
    key = f"{architecture}.nextn_predict_layers"
    if metadata.get(key):
        raise ValueError(
            f"{where} has layers that predict further tokens ({key}), of which there is no "
            "selection: get the model without them."
        )


def _check_labels(parts: list[_Part], where: str) -> None:
    """Refuse where it cannot be told which of a layer's selections is whose."""
    for first, second in itertools.pairwise(parts):
        if first.number == second.number and "" in (first.kind, second.kind):
            raise ValueError(
                f"{where} has both a dense block and experts in blk.{first.number}, whose order "
                "among the model's layers is not known: it cannot be pruned."
            )
        if first.number == second.number and (
            first.d_ff * first.experts == second.d_ff * second.experts
        ):
            raise ValueError(
                f"{where} has as many neurons in the experts of blk.{first.number} as in the one "
                "that all tokens share, so that a selection does not tell them apart: it cannot "
                "be pruned."
            )


def _key(metadata: Mapping[str, Any], architecture: str, part: _Part, where: str) -> str:
    """The metadata that tells the width of a block's neurons, which must be the one it has."""
    own = f"{architecture}.{_KINDS[part.kind]}"
    # Mixtures whose experts have the width of a dense block, as Mixtral's.
    shared = f"{architecture}.{_KINDS['']}"
    names = [own, shared] if part.kind == "_exps" else [own]
    key = next((name for name in names if name in metadata), None)
    if key is None:
        raise ValueError(
            f"{where} does not tell the width of its feed-forward blocks ({' or '.join(names)}): "
            "it cannot be pruned."
        )
    said = metadata[key]
    if isinstance(said, list):
        said = said[part.number] if part.number < len(said) else None
    if said != part.d_ff:
        raise ValueError(
            f"{where} says {key}={said}, and blk.{part.number} has {part.d_ff} neurons: it cannot "
            "be pruned."
        )
    return key


# --------------------------------------------------------------------------------------
# Tensors of one block


class _UncutError(Exception):
    """Why a tensor cannot be cut; the file's name is added."""

    def __init__(self, tensor: Tensor, why: str) -> None:
        super().__init__(f"tensor {tensor.name} {why}")


def _by_block(tensors: Iterable[Tensor]) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
    """The tensors of each ``blk.N``, by the part of their names that follows."""
    found: dict[int, dict[str, list[Tensor]]] = {}
    for tensor in tensors:
        if match := _IN_A_BLOCK.match(tensor.name):
            found.setdefault(int(match[1]), {}).setdefault(match[2], []).append(tensor)
    return iter(sorted(found.items()))


def _parts(number: int, own: Mapping[str, list[Tensor]]) -> list[_Part]:
    """The feed-forward blocks within ``blk.N``."""
    parts = [
        _part(number, kind, own)
        for kind in _KINDS
        if any(f"ffn_{name}{kind}" in own for name in ("up", "gate", "gate_up", "down"))
    ]
    cut = {name for part in parts for name in part.cuts} | _output_biases(own)
    widths = {n * part.d_ff for part in parts for n in (1, 2, part.experts)}
    for name, tensors in own.items():
        for tensor in tensors:
            if tensor.name in cut or _APART.match(name):
                continue
            if widths & {*tensor.shape} or (name.startswith("ffn_") and not parts):
                raise _UncutError(tensor, "has a value for each neuron in a way that is not known")
    return parts


def _output_biases(own: Mapping[str, list[Tensor]]) -> set[str]:
    """Names of the down-projections' biases: one value for each output, however many neurons."""
    found = set()
    for kind in _KINDS:
        shapes = {tensor.name: list(tensor.shape) for tensor in own.get(f"ffn_down{kind}", ())}
        for name, shape in shapes.items():
            weight = shapes.get(f"{name.removesuffix('.bias')}.weight", [])
            if name.endswith(".bias") and shape == weight[1:]:
                found.add(name)
    return found


def _part(number: int, kind: str, own: Mapping[str, list[Tensor]]) -> _Part:
    """One block, from its tensors."""
    rows = [
        tensor for name in ("up", "gate", "gate_up") for tensor in own.get(f"ffn_{name}{kind}", ())
    ]
    columns = own.get(f"ffn_down{kind}", [])
    for tensor in rows + columns:
        if tensor.name.count(".") != 3 or not tensor.name.endswith((".weight", ".bias")):
            raise _UncutError(tensor, "is neither weights nor biases of a whole block")
    down = next((tensor for tensor in columns if tensor.name.endswith(".weight")), None)
    if down is None or not rows:
        missing = "ffn_down" if down is None else "ffn_up"
        raise _UncutError((rows + columns)[0], f"has no {missing}{kind} beside it")
    d_ff, _, *experts = down.shape if len(down.shape) > 1 else (*down.shape, 1, 1, 1)
    if len(experts) != (kind == "_exps"):
        raise _UncutError(down, f"has {len(down.shape)} dimensions")
    # Gate and up in one matrix: by its name, or since there is no other.
    fused = len([tensor for tensor in rows if tensor.name.endswith(".weight")]) == 1
    cuts = {tensor.name: _rows(tensor, d_ff, experts, fused) for tensor in rows}
    cuts[down.name] = Cut.COLUMNS
    return _Part(number, kind, d_ff, experts[0] if experts else 1, cuts)


def _rows(tensor: Tensor, d_ff: int, experts: list[int], fused: bool) -> Cut:
    """How up or gate is cut: its rows are neurons, or those of both are one behind the other."""
    weight = tensor.name.endswith(".weight")
    if not weight and GGML_QUANT_SIZES[tensor.kind][0] > 1:
        raise _UncutError(tensor, f"is in {tensor.kind.name}, in which biases share blocks")
    found = list(tensor.shape[weight:])
    if found == [d_ff, *experts]:
        return Cut.ROWS
    if fused and found == [2 * d_ff, *experts]:
        return Cut.HALVES
    sizes = " x ".join(map(str, reversed(tensor.shape)))
    raise _UncutError(tensor, f"is of {sizes}, and its block has {d_ff} neurons")
