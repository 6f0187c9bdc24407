"""Where an export is written: what may be replaced there, and whether there is room."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flocking.artifacts import free_bytes
from flocking.models import NOTE, folder_of
from flocking.pruning.amounts import in_words
from flocking.texts import dangling, expanded

# What transformers and flocking.export write for a model; anything else is somebody's own.
_WEIGHTS = re.compile(r"(model|pytorch_model)(\.[A-Za-z]\w*)?(-\d{5}-of-\d{5})?\.(safetensors|bin)")
_BESIDE = {
    "config.json", "generation_config.json", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json",
    "qwen.tiktoken", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", ".gitattributes", NOTE,
}  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # a folder of *.jinja


def place_of_folder(folder: object) -> Path:
    """Where a folder is to be written, from what a user gives as its name."""
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise TypeError(f"folder is a {type(folder).__name__}: give the name of a folder.")
    refuse_nul("folder", os.fspath(folder))
    place = Path(expanded(os.fspath(folder)))
    if not place.name:
        raise ValueError(f"folder={os.fspath(folder)!r} names no folder: give it a name.")
    if is_gguf(place):
        raise ValueError(
            f"folder={os.fspath(folder)!r}: this writes a folder; flocking.export_gguf writes GGUF "
            "files."
        )
    return place


def refuse_nul(argument: str, text: str) -> None:
    """Refuse the character that no name of a file has, before the system does."""
    if "\0" in text:
        raise ValueError(f"{argument}={text!r} has a NUL character, which no name has: remove it.")


def refuse_existing(
    found: Path,
    path: Path,
    overwrite: bool,
    source: str | os.PathLike[str] | None = None,
    *,
    how: str = "give overwrite=True",
) -> None:
    """Replace only what is of the same kind, but not what it is made from, and only if asked to.

    Parameters
    ----------
    found : Path
        What is there: at `path`, or set aside from there.
    path : Path
        A folder for a model, or a file whose name ends in ``.gguf``.
    overwrite : bool
    source : str or path, optional
        What the smaller model is made from.
    how : str
        What to do to have it overwritten, for the error.

    Raises
    ------
    ValueError
        If it may not be replaced.
    """
    if why := dangling(found):
        raise ValueError(f"{path} {why}: choose another name, or make what the link names.")
    own = expanded(os.fspath(source)) if source else None
    if own and os.path.exists(own) and os.path.samefile(own, found):
        raise ValueError(f"{path} is where the model itself is from: choose another name.")
    if is_gguf(path):
        kind, why_not = "GGUF file", _not_a_gguf(found)
    else:
        kind, why_not = "model's folder", _not_a_model(found)
    if why_not is not None:
        raise ValueError(f"{path} exists and is no {kind} ({why_not}): choose another name.")
    if not overwrite:
        raise ValueError(f"{path} exists: choose another name, or {how}.")


def refuse_likely_source(
    found: Path, path: Path, model: PreTrainedModel, smaller: PreTrainedConfig
) -> None:
    """Refuse to replace what may be a model's own folder, where it is not known which that is.

    That is a folder of a model of its type, whose blocks are as wide as the full model's.

    Parameters
    ----------
    found, path : Path
        As of :func:`refuse_existing`.
    model : transformers.PreTrainedModel
        The full model.
    smaller : transformers.PreTrainedConfig
        Of the smaller one: it has other widths.

    Raises
    ------
    ValueError
        If it may be the model's own.
    """
    if folder_of(model) is not None or getattr(model.config, "_commit_hash", None):
        return
    config = _config_in(found)
    before, after = model.config.to_dict(), smaller.to_dict()
    kind = before.get("model_type")
    inside = [config, *(each for each in config.values() if isinstance(each, dict))]
    if any(each.get("model_type", kind) == kind and _as_wide(each, before, after)
           for each in inside if "model_type" in each or each is config):  # fmt: skip
        raise ValueError(
            f"{path} has a model of the full width, and may be where this one is from (its name, "
            f"{getattr(model, 'name_or_path', '')!r}, does not tell): choose another name, or load "
            "the model by its absolute path."
        )


def _as_wide(config: Any, before: Any, after: Any) -> bool:
    """Whether a config says what a model's does wherever a smaller model's says something else."""
    if isinstance(before, dict) and isinstance(after, dict) and isinstance(config, dict):
        return all(
            _as_wide(config[key], before[key], after.get(key))
            for key in before.keys() & config.keys()
        )
    return before == after or config == before


def is_gguf(path: Path) -> bool:
    """Whether a path is named as a GGUF file."""
    return path.suffix.lower() == ".gguf"


def _not_a_gguf(file: Path) -> str | None:
    """Why something is not a GGUF file; None if it is."""
    if not file.is_file():
        return "it is a folder" if file.is_dir() else "it is no file"
    with file.open("rb") as stream:
        return None if stream.read(4) == b"GGUF" else "it has another format"


def _not_a_model(folder: Path) -> str | None:
    """Why something is not the folder of a model and nothing else; None if it is."""
    if not folder.is_dir():
        return "it is a file"
    inside = sorted(folder.iterdir())
    if not inside:
        return None
    names = [path.name for path in inside]
    if "config.json" not in names:
        return "it has no config.json"
    config = _config_in(folder)
    own = {f"{module}.py" for module in _modules(config)}
    for path in inside:
        if not (_is_of_models(path) or (path.is_file() and path.name in own)):
            return f"there is {path.name} in it"
    if not (config.get("model_type") or config.get("architectures")):
        return "its config.json is of no model"
    return None if any(map(_WEIGHTS.fullmatch, names)) else "it has no weights"


def _is_of_models(path: Path) -> bool:
    """Whether models' folders have something by that name."""
    if path.is_file():
        return path.name in _BESIDE or bool(_WEIGHTS.fullmatch(path.name))
    return path.name == _TEMPLATES and all(
        inside.is_file() and inside.suffix == ".jinja" for inside in path.iterdir()
    )


def _modules(config: Mapping[str, Any]) -> Iterator[str]:
    """The modules of code that a config names, which are copied into the folder with it."""
    named = config.get("auto_map")
    for one in named.values() if isinstance(named, dict) else ():
        for text in one if isinstance(one, list) else [one]:
            yield str(text).partition(".")[0]


def _config_in(folder: Path) -> dict[str, Any]:
    """What the config.json in a folder says; nothing if it is none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def refuse_without_room(place: Path, folder: Path, size: int) -> None:
    """Raise an OSError if a number of bytes does not fit on a folder's disk, for `place`."""
    if (free := free_bytes(folder)) < size:
        raise OSError(
            f"{place} cannot be written: {in_words(size)} are needed, and "
            f"{in_words(int(free))} are free: make room, or name another place."
        )
