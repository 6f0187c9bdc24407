"""Which GGUF files transformers' reader can read, and whether it reads all that is in them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flocking.models.gguf import Contents
from flocking.models.gguf_rope import FREQUENCIES, LONG, SHORT
from flocking.models.notices import warn
from flocking.models.problems import listed

# Architectures by their names in files, where transformers' tables have others.
_RENAMED = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "t5encoder": "t5",
}
# Encoders and decoders: no causal language models.
_WITH_ENCODER = ("t5", "umt5", "t5encoder")
# Architectures whose numbers were compared with llama.cpp's, on tiny files of each.
_COMPARED = {
    *("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "stablelm"),
    *("starcoder2", "gpt2", "bloom", "falcon", "nemotron", "lfm2", "mamba"),
}
# Tensors that the config says in other words, see gguf_rope.
_SAID_ELSEWHERE = (FREQUENCIES, LONG, SHORT)
_READER = "transformers.modeling_gguf_pytorch_utils"


def refuse_unknown(contents: Contents) -> None:
    """Refuse a file that transformers' reader cannot read, by what it says of itself.

    Raises
    ------
    ValueError
        It names the architecture, tokenizer or type of tensor, and transformers' version.
    """
    _refuse_architecture(contents)
    _refuse_layers(contents)
    _refuse_tokenizer(contents)
    for kind in sorted({tensor.kind for tensor in contents.tensors}):
        _refuse_type(contents, kind)


def _refuse_architecture(contents: Contents) -> None:
    name = contents.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ValueError(
            f"{contents.file} does not say which architecture its model has "
            "(general.architecture): get the file again."
        )
    if name in _WITH_ENCODER:
        raise ValueError(
            f"{contents.file} holds a model with an encoder ({name}), which is no causal language "
            "model: give another one."
        )
    known = _known("GGUF_SUPPORTED_ARCHITECTURES", _READER) | _known(
        "GGUF_CONFIG_ARCHS", "transformers.integrations.gguf"
    )
    if known and not {name, _RENAMED.get(name, name)} & known:
        there = sorted(known - {"general", "tokenizer", *_WITH_ENCODER})
        raise ValueError(
            f"{contents.file} holds a model of the architecture {name}, which the GGUF reader of "
            f"transformers {version('transformers')} does not know (it knows {', '.join(there)}): "
            "load the model's folder of safetensors, or try a newer transformers."
        )
    if name not in _COMPARED:
        warn(
            f"{contents.file} holds a model of the architecture {name}: what transformers reads "
            "of such files was not compared with llama.cpp here, so compare some of its output."
        )


def _refuse_layers(contents: Contents) -> None:
    """Refuse more layers than there are tensors: each is made before any weight is read."""
    layers = contents.metadata.get(f"{contents.metadata['general.architecture']}.block_count", 0)
    if type(layers) is not int or layers > len(contents.tensors):
        raise ValueError(
            f"{contents.file} says that its model has {layers!r} layers, and has "
            f"{len(contents.tensors)} tensors: get the file again."
        )


def _refuse_tokenizer(contents: Contents) -> None:
    kind = contents.metadata.get("tokenizer.ggml.model")
    if kind is None or not contents.metadata.get("tokenizer.ggml.tokens"):
        raise ValueError(
            f"{contents.file} has no tokenizer in it: get a file of the whole model, as llama.cpp "
            "writes it."
        )
    known = _known("GGUF_TOKENIZER_TYPES", "transformers.integrations.gguf.gguf_tokenizer_mapping")
    if known and kind not in known:
        raise ValueError(
            f"{contents.file} has a tokenizer of the kind {kind}, which the GGUF reader of "
            f"transformers {version('transformers')} does not know (it knows "
            f"{', '.join(sorted(known))}): load the model's folder of safetensors, or try a newer "
            "transformers."
        )


def _known(table: str, module: str) -> set[str]:
    """Names in a table of transformers; empty in versions that have none."""
    try:
        return {*getattr(importlib.import_module(module), table)}
    except (ImportError, AttributeError):
        return set()


def _refuse_type(contents: Contents, kind: GGMLQuantizationType) -> None:
    if not is_readable(kind):
        name = next(tensor.name for tensor in contents.tensors if tensor.kind == kind)
        raise ValueError(
            f"{contents.file} has tensors of type {kind.name} ({name}, ...), which gguf "
            f"{version('gguf')} cannot dequantise: get the model in another quantisation, such as "
            "Q8_0 or Q4_K_M."
        )


def is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether the installed gguf can dequantise a type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    except Exception:  # of the zeros: it knows the type
        return True
    return True


def refuse_other_tensors(config: PreTrainedConfig, contents: Contents) -> None:
    """Refuse a file that has tensors that the model lacks, or lacks some, or of other sizes.

    transformers' reader leaves tensors out for which the model has no place.
    """
    where = _places(config, contents)
    if where is None:
        return
    places, model = where
    left: list[str] = []
    sizes: dict[str, int] = {}
    for tensor in contents.tensors:
        own = places.get(tensor.name) or places.get(tensor.name.removesuffix(".weight"))
        if own is not None:
            sizes[own] = sizes.get(own, 0) + int(np.prod(tensor.shape))
        elif tensor.name not in _SAID_ELSEWHERE:
            left.append(tensor.name)
    found = dict(_differences(model, sizes, config))
    for what, names in (("more tensors than its model", left), *found.items()):
        if names:
            raise ValueError(
                f"{contents.file} has {what} ({listed(names)}; {type(model).__name__} of "
                f"transformers {version('transformers')}), so that its numbers would be wrong: "
                "load the model's folder of safetensors, or another file of it."
            )


def _differences(
    model: PreTrainedModel, sizes: dict[str, int], config: PreTrainedConfig
) -> Iterator[tuple[str, list[str]]]:
    there = model.state_dict()
    tied = model.get_output_embeddings() is not None and config.tie_word_embeddings
    heads = {name for name in there if name.startswith("lm_head.")} if tied else set()
    yield "not all tensors of its model", sorted(there.keys() - sizes.keys() - heads)
    yield (
        "tensors of other sizes than its model",
        sorted(name for name, size in sizes.items() if there[name].numel() != size),
    )


def _places(
    config: PreTrainedConfig, contents: Contents
) -> tuple[dict[str, str], PreTrainedModel] | None:
    """Names of the model's own weights by those in a file, and the model without values."""
    architecture = contents.metadata["general.architecture"]
    if architecture in _known("GGUF_ARCHS", "transformers.integrations.gguf"):
        return None  # read by rules that refuse what has no place
    try:
        reader: Any = importlib.import_module(_READER)
        mapped = reader.get_gguf_hf_weights_map
        processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
    except (ImportError, AttributeError):  # of another version
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # (Given all modules, it makes a table for each, which takes minutes; names of the whole and of
    # the model without its head are enough.)
    inner = SimpleNamespace(state_dict=model.base_model.state_dict, named_children=list)
    whole = SimpleNamespace(
        config=config,
        state_dict=model.state_dict,
        named_children=lambda: [(model.base_model_prefix, inner)],
    )
    places = mapped(whole, processor(config=config.to_dict()))
    if architecture == "gpt2":  # which the reader puts there by name
        places["output.weight"] = "lm_head.weight"
    return places, model
