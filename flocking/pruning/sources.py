"""The files that a model was read from, and whether its weights are still those."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models import folder_of, read_model, read_tokenizer, said_of

LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
# llama.cpp's converter reads the vocabulary of some models (Gemma 2, Phi-3) from this file, which
# transformers does not write.
_SENTENCEPIECE = "tokenizer.model"
# Of images, sound and video: transformers writes them with a processor, which is not loaded here.
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class Source(NamedTuple):
    """Where a model is from.

    Attributes
    ----------
    name : str
        As people know it: a hub id, the name of a folder without what is above it; may be empty.
    folder : Path or None
        Its files, if they are on this machine.
    commit : str
        Of the hub id that `name` is; empty if it is none.
    changed : list of str or None
        The model's weights that differ from those in the files; None if that is not known.
    """

    name: str
    folder: Path | None
    commit: str
    changed: list[str] | None


def source_of(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Source:
    """Where a model is from, whose weights are now `state`."""
    name = str(getattr(model, "name_or_path", "") or "").rstrip("/")
    folder, commit = folder_of(model), ""
    if folder is None and name and os.path.isdir(name):
        folder = Path(name)
    if folder is not None:
        name = folder.resolve().name
    elif commit := _commit(model, name):
        folder = _in_cache(model, name, commit)
    elif os.path.isabs(name):  # where that was on somebody's disk is nobody's business
        name = os.path.basename(name)
    changed = None if folder is None else _changed(model, folder, state)
    return Source(name, folder, commit, changed)


def copy_companions(
    source: Source, folder: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Copy what stands beside a model's weights, is not written with them, and stays true.

    Parameters
    ----------
    source : Source
    folder : Path
        Of the smaller model.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        That was saved there. A vocabulary is copied only if it is the source's own.
    """
    if source.folder is None:
        return
    names = {*_PROCESSORS, *LICENCES}
    if tokenizer is not None and _is_from(tokenizer, source.folder):
        names.add(_SENTENCEPIECE)
    for name in sorted(names):
        if (source.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source.folder / name, folder / name)


def _is_from(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a tokenizer has the tokens of the one in a folder."""
    if not (folder / _SENTENCEPIECE).is_file():
        return False
    try:
        return bool(read_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab())
    except (OSError, ValueError):
        return False


def _commit(model: PreTrainedModel, name: str) -> str:
    """The commit of a hub id; empty if the name is none, or is not known to be one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return str(getattr(model.config, "_commit_hash", None) or "")


def _in_cache(model: PreTrainedModel, name: str, commit: str) -> Path | None:
    cache = said_of(model).get("cache_dir")
    try:
        found = huggingface_hub.try_to_load_from_cache(
            name, "config.json", revision=commit, cache_dir=cache
        )
    except (ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _changed(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor]) -> list[str] | None:
    """Names of weights that differ from those in the files; None if these cannot be read."""
    folder = folder / (said_of(model).get("subfolder") or "")
    tied = getattr(model, "all_tied_weights_keys", {})
    try:
        files = _files(folder)
        lacking = {name for name in state if name not in files}
        if files and all(tied.get(name) in files for name in lacking):
            return [name for name, value in _stored(files) if _differs(state.get(name), value)]
        # They have other names there: in mixtures, whose experts are stored one by one, or in bin.
        with torch.device("cpu"):
            found = read_model(type(model), str(folder), dtype=model.dtype).state_dict()
    except (OSError, ValueError, TypeError, KeyError, MemoryError, RuntimeError, SafetensorError):
        return None
    return [name for name in state if name not in found or _differs(state[name], found[name])]


def _files(folder: Path) -> dict[str, Path]:
    """Where weights are, by their names in the files."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not single.is_file():
        if not index.is_file():
            return {}
        places = json.loads(index.read_bytes())["weight_map"]
        return {name: folder / place for name, place in places.items()}
    with safe_open(single, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _stored(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Each weight in the files, one at a time."""
    for place in sorted({*files.values()}):
        with safe_open(place, "pt", device="cpu") as tensors:
            for name in sorted(name for name, file in files.items() if file == place):
                yield name, tensors.get_tensor(name)


def _differs(mine: Tensor | None, stored: Tensor) -> bool:
    """Whether a weight is another one; what the model has not (another head, say) is none."""
    if mine is None:
        return False
    if mine.shape != stored.shape:
        return True
    mine, stored = mine.detach().cpu(), stored.to(mine.dtype)
    return not torch.equal(mine, stored) and not torch.allclose(
        mine, stored, rtol=0, atol=0, equal_nan=True
    )
