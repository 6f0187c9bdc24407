"""Checks of a model's folder that come before its weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from flocking.models.problems import brief, listed, told

# Sizes that a config gives under these names, or under the names that its kind has for them.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
# Each layer is a Python object: more would take hours and all memory before any weight is read.
_MOST_LAYERS = 10_000
# A model may have more parameters than its files have numbers, where layers share them.
_MOST_PER_NUMBER = 3


def check_folder(folder: Path, auto: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a folder from which no model can be made, before anything is made of it.

    Parameters
    ----------
    folder : Path
    auto : type
        Such as ``AutoModelForCausalLM``.
    kwargs : dict
        Of its ``from_pretrained``; with ``trust_remote_code``, code in the folder may run.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If a file is damaged.
    ValueError
        If the config describes no model, or one that is much larger than the files.
    """
    if kwargs.get("gguf_file"):
        if not (folder / kwargs["gguf_file"]).is_file():
            raise FileNotFoundError(f"{folder} has no file {kwargs['gguf_file']}.")
        return
    folder = folder / (kwargs.get("subfolder") or "")
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file() or kwargs.get("config") is not None:
            return  # the config is elsewhere
        raise FileNotFoundError(_without_config(folder))
    content = read_json(config)
    if not isinstance(content.get("model_type"), str) and "auto_map" not in content:
        raise ValueError(f"{config} has no model_type: get it again, for it is not a model's.")
    for place in _dicts(content):
        _check_sizes(config, place)
    shapes = shapes_in(folder, kwargs.get("variant"))
    # A stranger's class need not bear to be made without memory.
    foreign = kwargs["trust_remote_code"] and "auto_map" in content
    if not foreign and kwargs.get("config") is None:
        _check_described(folder, auto, shapes)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ValueError(
            f"{file} is not JSON ({brief(problem)}): get it again, for it is damaged."
        ) from problem
    except OSError as problem:
        raise OSError(f"{file} cannot be read: {problem.strerror}.") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{file} has no JSON object in it: get it again, for it is damaged.")
    return content


def shapes_in(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Shapes of the tensors in a folder's safetensors, from their headers; empty if it has none.

    Raises
    ------
    FileNotFoundError
        If a shard is missing.
    OSError
        If a file is damaged.
    """
    dot = f".{variant}" if variant else ""
    files = [folder / f"model{dot}.safetensors"]
    index = folder / f"model.safetensors.index{dot}.json"
    if not files[0].exists():
        if not index.exists():
            return {}
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(f, str) for f in weights.values()):
            raise ValueError(f"{index} has no weight_map: get it again, for it is damaged.")
        files = [folder / name for name in sorted(set(weights.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(files)} files of its weights "
                f"({listed(missing)}): get them too."
            )
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as problem:
            remedy = "get it again, for it is damaged or not whole"
            if _is_pointer(file):
                remedy = "it only names the file that Git LFS keeps elsewhere: run `git lfs pull`"
            raise OSError(f"{file} cannot be read ({brief(problem)}): {remedy}.") from problem
    return shapes


def _is_pointer(file: Path) -> bool:
    """Whether Git left a note of a large file in its place."""
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(20).startswith(b"version https://git")
    return False


def _without_config(folder: Path) -> str:
    """Why there is no model in a folder."""
    if not folder.is_dir():
        return f"{folder}: there is no such folder."
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return f"{folder} is empty: give a folder with a model's config.json and weights."
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return (
            f"{folder} has no config.json but {listed(ggufs)}: load it in Python with "
            f"flocking.load({str(folder)!r}, gguf_file={ggufs[0]!r})."
        )
    return f"{folder} has no config.json, only {listed(names)}: give a model's folder."


def _dicts(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and the configs in it."""
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _dicts(value)


def _check_sizes(file: Path, content: dict[str, Any]) -> None:
    kind = content.get("model_type")
    names: dict[str, str] = {}
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        names = CONFIG_MAPPING[kind].attribute_map
    for size in _SIZES:
        name = names.get(size, size)
        value = content.get(name)
        if value is None or isinstance(value, list | dict):
            continue  # the default, or one for each layer
        if type(value) is not int or value < 1:
            raise ValueError(f"{file}: {name} is {value!r}: it has to be a whole number from 1 up.")
        if size == "num_hidden_layers" and value > _MOST_LAYERS:
            raise ValueError(
                f"{file}: {name} is {value}: no model has more than {_MOST_LAYERS:,} layers."
            )


def other_shapes(folder: Path, auto: Any) -> list[str]:
    """Weights whose shape in a folder's files is not the one that its config says."""
    stored = shapes_in(folder)
    described = dict(_described(folder, auto).named_parameters())
    return [
        name
        for name, parameter in described.items()
        # What was saved without a language modelling head has shorter names.
        for key in (name, name.partition(".")[2])
        if key in stored and tuple(stored[key]) != tuple(parameter.shape)
    ]


def _described(folder: Path, auto: Any) -> PreTrainedModel:
    """The model that a config describes, without memory for its weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False)


def _check_described(folder: Path, auto: Any, shapes: dict[str, list[int]]) -> None:
    """Compare the model that the config describes with the files."""
    file = folder / "config.json"
    try:
        model = _described(folder, auto)
    except ImportError:  # of an attention or a quantiser that the user may have another for
        return
    except Exception as problem:
        found = told(str(folder), "config", problem)
        if "trust_remote_code" in str(problem) or "transformers knows" in str(found):
            raise found from problem
        raise ValueError(f"{file} describes no model: {brief(problem)}.") from problem
    if not shapes or getattr(model.config, "quantization_config", None) is not None:
        return  # packed weights have shapes of their own
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > _MOST_PER_NUMBER * stored:
        raise ValueError(
            f"{file} describes a model of {described:,} parameters, but the files hold "
            f"{stored:,}: it belongs to another model, or sizes are missing in it."
        )
