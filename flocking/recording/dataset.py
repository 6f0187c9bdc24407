"""The schema of a recording: its names, and the functions that build such a Dataset."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
import xarray as xr
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.feedforward import FeedForward
from flocking.models import fingerprints, name_and_path

if TYPE_CHECKING:
    from flocking.recording.collector import Collector
    from flocking.recording.windows import Layout

FLOCKING_VERSION = version("flocking")

# Attribute ``schema_version``. Another number means that what follows here has changed so that
# measures would misread it: recordings of other versions are refused. Recordings from before there
# was a number have the layout of version 1.
SCHEMA_VERSION = 1

# Phases, the values of coordinate ``phase``.
FIRST, PROMPT, GENERATION = "first", "prompt", "generation"


class Field(NamedTuple):
    """One variable or coordinate of a recording.

    Attributes
    ----------
    dims : tuple of str
    dtype : str
        "str" is text of any length; "object" is text that xarray keeps as Python strings.
    long_name, units : str
        Attributes of the variable; left out where empty. "1" means unitless.
    option : str
        Argument of :func:`flocking.record` that the recording needs to have this variable.
    fill : float
        Value where there is no token.
    """

    dims: tuple[str, ...]
    dtype: str
    long_name: str = ""
    units: str = ""
    option: str = ""
    fill: float = 0

    @property
    def attributes(self) -> dict[str, str]:
        """Those that the variable has in the Dataset."""
        named = {"long_name": self.long_name, "units": self.units}
        return {name: text for name, text in named.items() if text}


MOMENT_DIMS = ("sequence", "layer", "window", "neuron")
_PER_TOKEN = ("sequence", "layer", "token")
_TEXT = ("sequence", "token")

VARIABLES = {
    "energy": Field(MOMENT_DIMS, "float32", "sum of squared relative activations", "1"),
    "mass": Field(MOMENT_DIMS, "float32", "sum of relative activations", "1"),
    "rank": Field(MOMENT_DIMS, "float32", "sum of standardised ranks", "1", option="ranks=True"),
    "norm": Field(_PER_TOKEN, "float32", "l2 norm of the activations", fill=math.nan),
    "l1": Field(_PER_TOKEN, "float32", "l1 norm of the relative activations", "1", fill=math.nan),
    "tokens": Field(("sequence", "window"), "int64", "tokens in the window"),
    "routed": Field(
        ("sequence", "layer", "window", "routed_expert"), "float32", "tokens routed to the expert"
    ),
    "relative": Field(
        ("sequence", "layer", "token", "neuron"),
        "float16",
        "relative activation",
        "1",
        option="relative=True",
        fill=math.nan,
    ),
}

COORDINATES = {
    "sequence": Field(("sequence",), "int64"),
    "layer": Field(("layer",), "int64"),
    "window": Field(("window",), "int64"),
    "neuron": Field(("neuron",), "int64"),
    "token": Field(("token",), "int64"),
    "text": Field(("sequence",), "object"),
    "prompt_tokens": Field(("sequence",), "int64"),  # where the prompt ends: phases follow from it
    "module": Field(("layer",), "str"),
    "d_ff": Field(("layer",), "int64"),
    "phase": Field(("window",), "str"),
    "start": Field(("window",), "int64", units="tokens"),
    "token_id": Field(_TEXT, "int64", fill=-1),
    "token_text": Field(_TEXT, "object"),
    "token_window": Field(_TEXT, "int64", fill=-1),
    "experts": Field(("layer",), "int64"),  # of models with mixtures of experts only
    "expert": Field(("layer", "neuron"), "int32", fill=-1),
    "relative_layer": Field(("relative_layer",), "int64"),  # if ``relative`` has some layers only
}

ATTRIBUTES = (
    "schema_version",
    "model",
    "model_path",
    "revision",
    "architecture",
    "dtype",
    "adapter",
    "autocast",
    "special_tokens",
    "window",
    "max_new_tokens",
    "max_tokens",
    "seed",
    "generation",  # where it comes from
    "flocking_version",
    "transformers_version",
    "torch_version",
)
# What neither older recordings tell of, nor what a store asked for that was begun before.
NOT_TOLD = frozenset({"adapter", "autocast", "structure", "hook", "chat"})


# --------------------------------------------------------------------------------------
# Building


def variables_of(blocks: list[FeedForward], raw: list[FeedForward], ranks: bool) -> list[str]:
    """Variables of a recording of these blocks, with relative activations of those in `raw`."""
    names = ["energy", "mass", "norm", "l1", "tokens"]
    names += ["rank"] if ranks else []
    names += ["routed"] if any(block.kind == "experts" for block in blocks) else []
    names += ["relative"] if raw else []
    return names


def empty(names: Iterable[str], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Arrays for these variables, with no token in them yet."""
    arrays = {}
    for name in names:
        field = VARIABLES[name]
        arrays[name] = np.zeros([sizes[dim] for dim in dimensions(name, sizes)], field.dtype)
        if field.fill != 0:  # (zeros take no memory until something is written there)
            arrays[name].fill(field.fill)
    return arrays


def size_in_bytes(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Memory that arrays for these variables take."""
    return sum(
        math.prod(sizes[dim] for dim in dimensions(name, sizes))
        * np.dtype(VARIABLES[name].dtype).itemsize
        for name in names
    )


def label(
    collector: Collector,
    sequences: list[Tensor],
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> xr.Dataset:
    """Collected arrays as a Dataset with the schema's variables and coordinates."""
    layout, arrays = collector.layout, collector.arrays
    new = np.array(layout.phase) == GENERATION
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).numpy()
    coordinates = {
        "sequence": np.arange(len(sequences)),
        "text": np.array(texts, dtype=object),
        "prompt_tokens": arrays["tokens"][:, ~new].sum(axis=1),
        "token_id": ids,
        "token_text": _texts_of(ids, tokenizer),
        "token_window": layout.window.numpy(),
        **fixed_coordinates(collector.blocks, collector.raw, layout),
    }
    return xr.Dataset(
        {
            name: (dimensions(name, coordinates), arrays[name], field.attributes)
            for name, field in VARIABLES.items()
            if name in arrays
        },
        {
            name: (field.dims, coordinates[name], field.attributes)
            for name, field in COORDINATES.items()
            if name in coordinates
        },
    )


def fixed_coordinates(
    blocks: list[FeedForward], raw: list[FeedForward], layout: Layout
) -> dict[str, np.ndarray]:
    """Values of the coordinates that are the same for all sequences."""
    values = {
        "window": np.arange(len(layout.phase)),
        "neuron": np.arange(max(block.d_ff for block in blocks)),
        "token": np.arange(layout.window.shape[1]),
        "module": np.array([block.path for block in blocks], dtype=str),
        "phase": np.array(layout.phase, dtype=str),
        "start": np.array(layout.start),
        **coordinates_of(blocks),
    }
    if "experts" in values:
        values["expert"] = _expert_of_neurons(blocks)
    if raw and raw != blocks:
        values["relative_layer"] = np.array([block.layer for block in raw])
    return values


def dimensions(name: str, coordinates: Container[str]) -> tuple[str, ...]:
    """Dimensions of a variable in a recording with these coordinates."""
    dims = VARIABLES[name].dims
    if name == "relative" and "relative_layer" in coordinates:
        return tuple("relative_layer" if dim == "layer" else dim for dim in dims)
    return dims


def coordinates_of(blocks: list[FeedForward]) -> dict[str, np.ndarray]:
    """Values of ``layer`` and ``d_ff``, and of ``experts`` if there is a mixture of experts."""
    values = {
        "layer": np.array([block.layer for block in blocks]),
        "d_ff": np.array([block.d_ff for block in blocks]),
    }
    if any(block.kind == "experts" for block in blocks):
        values["experts"] = np.array([block.experts for block in blocks])
    return values


def attributes_of(
    model: PreTrainedModel,
    block: FeedForward,
    *,
    special_tokens: str,
    window: int | None,
    max_new_tokens: int,
    max_tokens: int | None,
    seed: int,
    generation: str,
) -> dict[str, Any]:
    """A recording's attributes: the model, the versions and the arguments."""
    name, path = name_and_path(model)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "model_path": path,
        "revision": str(getattr(model.config, "_commit_hash", None) or ""),
        "architecture": type(model).__name__,
        "dtype": str(block.weight.dtype).removeprefix("torch."),
        "adapter": fingerprints.adapters(model),
        "autocast": fingerprints.autocast(block.device),
        "special_tokens": special_tokens,
        "window": "phase" if window is None else window,
        "max_new_tokens": max_new_tokens,
        "max_tokens": "all" if max_tokens is None else max_tokens,
        "seed": seed,
        "generation": generation,
        "flocking_version": FLOCKING_VERSION,
        "transformers_version": transformers.__version__,
        "torch_version": str(torch.__version__),
    }


def _texts_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase | None) -> np.ndarray:
    """Text of each token; empty at padding, and everywhere without a tokenizer."""
    words = {-1: ""}
    if tokenizer is not None:
        words |= {i: str(tokenizer.decode([i])) for i in np.unique(ids).tolist() if i >= 0}
    return np.array([[words.get(i, "") for i in row] for row in ids.tolist()], dtype=object)


def _expert_of_neurons(blocks: list[FeedForward]) -> np.ndarray:
    """(layer, neuron): the expert that each neuron belongs to, -1 where there are none."""
    field = COORDINATES["expert"]
    shape = len(blocks), max(block.d_ff for block in blocks)
    expert = np.full(shape, field.fill, field.dtype)
    for row, block in zip(expert, blocks, strict=True):
        if block.kind == "experts":
            row[: block.d_ff] = np.arange(block.d_ff) // (block.d_ff // block.experts)
    return expert
