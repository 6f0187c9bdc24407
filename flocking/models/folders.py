"""Checks of a model's folder that come before its weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedModel

from flocking.models.memory import usable_memory
from flocking.models.problems import brief, listed, of_suspect, told
from flocking.models.suspects import find_suspect
from flocking.texts import dangling, why_no_file

# Sizes that a config gives under these names, or under the names that its kind has for them.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)
# JSON objects that transformers reads, where they are there.
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Ends of names of files that make a model or its tokenizer.
_ENDS = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja")
# Settings for generating that are numbers, which nothing checks before they are computed with.
_NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "num_beams"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
    *("guidance_scale", "penalty_alpha", "num_beam_groups", "diversity_penalty"),
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
    folder = folder / (kwargs.get("subfolder") or "")
    _refuse_dangling(folder)
    for name in _OBJECTS:
        if (folder / name).exists():
            read_json(folder / name)
    _check_generation(folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file() or kwargs.get("config") is not None:
            return  # the config is elsewhere
        raise FileNotFoundError(_without_config(folder))
    check_config(folder, auto, kwargs, lambda: shapes_in(folder, kwargs.get("variant")))


def check_config(
    folder: Path,
    auto: Any,
    kwargs: Mapping[str, Any],
    stored: Callable[[], dict[str, list[int]]] = dict,
) -> None:
    """Refuse a folder's config that describes no model, or one that is too large.

    Parameters
    ----------
    folder : Path
    auto : type
    kwargs : dict
        As for :func:`check_folder`.
    stored : callable
        Gives the shapes of the weights in files; by default none are known.
    """
    config = folder / "config.json"
    content = read_json(config)
    if not isinstance(content.get("model_type"), str) and "auto_map" not in content:
        raise ValueError(f"{config} has no model_type: get it again, for it is not a model's.")
    for place in _dicts(content):
        _check_sizes(config, place)
    shapes = stored()
    # A stranger's class need not bear to be made without memory.
    foreign = kwargs["trust_remote_code"] and "auto_map" in content
    if foreign or kwargs.get("config") is not None:
        return
    model = _check_described(folder, auto, shapes)
    if model is not None:
        _check_memory(folder, model, kwargs)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's."""
    if why := why_no_file(file):
        raise OSError(f"{file} {why}: get it again.")
    try:
        raw = file.read_bytes()
        if raw.startswith(b"\xef\xbb\xbf"):
            raise ValueError(
                f"{file} begins with a byte order mark, which transformers does not read: save it "
                "in UTF-8 without one."
            )
        text = raw.decode()
    except OSError as problem:
        raise OSError(f"{file} cannot be read: {problem.strerror}: get it again.") from problem
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{file} is not text in UTF-8 (byte {problem.start}), as JSON is: get it again."
        ) from problem
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        what = brief(problem) if text.strip() else "it is empty"
        raise ValueError(
            f"{file} is not JSON ({what}): get it again, for it is damaged."
        ) from problem
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
            pickled = folder / f"pytorch_model.bin.index{dot}.json"
            if pickled.exists() and not (folder / f"pytorch_model{dot}.bin").exists():
                _shards(pickled)
            return {}
        files = _shards(index)
    shapes: dict[str, list[int]] = {}
    for file in files:
        if why := why_no_file(file):
            raise OSError(f"{file} {why}: get it again.")
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as problem:
            remedy = "get it again, for it is damaged or not whole"
            if _is_pointer(file):
                remedy = "it only names the file that Git LFS keeps elsewhere: run `git lfs pull`"
            raise OSError(f"{file} cannot be read ({brief(problem)}): {remedy}.") from problem
    return shapes


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of which are there."""
    content = read_json(index)
    weights, described = content.get("weight_map"), content.get("metadata")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) for name in weights.values())
    ):
        raise ValueError(f"{index} has no weight_map: get it again, for it is damaged.")
    if not isinstance(described, dict):  # transformers does without what is in it, not without it
        raise ValueError(f'{index} has no metadata: get it again, or write "metadata": {{}} in it.')
    files = [index.parent / name for name in sorted(set(weights.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of {len(files)} files of its weights "
            f"({listed(missing)}): get them too."
        )
    return files


def _refuse_dangling(folder: Path) -> None:
    """Refuse links to files that are gone, as a cache that was cleaned leaves them."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.name.endswith(_ENDS) and (why := dangling(file)):
            raise FileNotFoundError(f"{file} {why}: get that file again.")


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
            f"{folder} has no config.json but {listed(ggufs)}: give such a file itself, as in "
            f"{folder / ggufs[0]}."
        )
    return f"{folder} has no config.json, only {listed(names)}: give a model's folder."


def _dicts(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and the configs in it."""
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _dicts(value)


def _check_sizes(file: Path, content: dict[str, Any]) -> None:
    for name, value in content.items():
        if value != value:
            raise ValueError(f"{file}: {name} is NaN: correct it, or get the file again.")
    window = content.get("sliding_window")  # which not every kind checks
    if window is not None and type(window) is not int:
        raise ValueError(f"{file}: sliding_window is {window!r}: it has to be a whole number.")
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


def _check_described(
    folder: Path, auto: Any, shapes: dict[str, list[int]]
) -> PreTrainedModel | None:
    """The model that the config describes, if it fits the files; None if it cannot be made here."""
    file = folder / "config.json"
    try:
        model = _described(folder, auto)
    except ImportError:  # of an attention or a quantiser that the user may have another for
        return None
    except Exception as problem:
        found = told(str(folder), "config", problem)
        if "trust_remote_code" in str(problem) or "transformers knows" in str(found):
            raise found from problem
        suspect = find_suspect(folder, [file.name], lambda place: _described(place, auto))
        if suspect is not None:
            raise of_suspect(folder, suspect, problem) from problem
        raise ValueError(
            f"{file} describes no model ({brief(problem)}): get it again, or correct it."
        ) from problem
    if getattr(model.config, "quantization_config", None) is not None:
        return None  # packed weights have shapes of their own
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    described = sum(parameter.numel() for parameter in model.parameters())
    if shapes and described > _MOST_PER_NUMBER * stored:
        raise ValueError(
            f"{file} describes a model of {described:,} parameters, but the files hold "
            f"{stored:,}: it belongs to another model, or sizes are missing in it."
        )
    return model


def _check_memory(folder: Path, model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse a model that is larger than all memory of this machine, unless it is spread."""
    if kwargs.get("device_map") is not None or kwargs.get("quantization_config") is not None:
        return
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    asked = getattr(torch, asked, None) if isinstance(asked, str) else asked
    sizes = [
        parameter.numel() * (asked if isinstance(asked, torch.dtype) else parameter.dtype).itemsize
        for parameter in model.parameters()
    ]
    there = usable_memory().total + psutil.swap_memory().total
    if sum(sizes) > there:
        raise MemoryError(
            f"{folder / 'config.json'} describes a model that takes {sum(sizes) / 2**30:,.0f} GiB, "
            f"and {there / 2**30:,.0f} GiB of memory are there: load it with "
            "dtype='bfloat16', spread it with device_map='auto', or take a smaller model."
        )


def _generation_of(folder: Path) -> GenerationConfig:
    return GenerationConfig.from_dict(read_json(folder / "generation_config.json"))


def _check_generation(folder: Path) -> None:
    """Refuse settings for generating that cannot be read, or that nothing can be done with."""
    file = folder / "generation_config.json"
    if not file.exists():
        return
    for name, value in read_json(file).items():
        several = value if isinstance(value, list) else [value]
        if (token := name.endswith("token_id")) or name in _NUMBERS:
            kinds = (int, type(None)) if token else (int, float, bool, type(None))
            if any(type(one) not in kinds for one in (several if token else [value])):
                raise ValueError(
                    f"{file}: {name} is {value!r}: it has to be a number. Correct it, or get the "
                    "file again."
                )
            if any(isinstance(one, int) and abs(one) >= 2**63 for one in several):
                raise ValueError(f"{file}: {name} is {value}: it has to be below 2 ** 63.")
    try:
        _generation_of(folder)
    except Exception as problem:  # it raises whatever reading a value of another kind does
        suspect = find_suspect(folder, [file.name], _generation_of)
        if suspect is not None:
            raise of_suspect(folder, suspect, problem) from problem
        raise ValueError(f"{file} cannot be used ({brief(problem)}): get it again.") from problem
