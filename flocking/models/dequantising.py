"""GGUF files as folders of a model: dequantised once, into the user's cache folder."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import quantization_config

from flocking.artifacts import BusyError, file_digest, free_bytes, replacing
from flocking.models import origins
from flocking.models.checkpoints import read_config, read_model, read_tokenizer
from flocking.models.gguf import Contents, contents_of
from flocking.models.gguf_configs import changes_of, generation_of, ignored
from flocking.models.gguf_support import refuse_other_tensors, refuse_unknown
from flocking.models.gguf_tokenizers import correct
from flocking.models.memory import usable_memory
from flocking.models.notices import warn
from flocking.models.problems import brief, listed

# Who converts GGUF files: raise the number when something else is made of them.
_CONVERTER = "flocking 2"
_PATIENCE = 1800.0  # seconds to wait for another process that is converting the same file


def dequantised(file: Path, name: str, *, splits: bool = True) -> str:
    """The folder of a GGUF file's model in float32, made in the user's cache if it is not there.

    It is written under another name and renamed when it is complete; two processes do not both
    write it. A folder in which a file is missing or has another size is made again, and so is one
    that an earlier version of this package made.

    Parameters
    ----------
    file : Path
    name : str
        Of the folder, which recordings show.
    splits : bool
        Whether its tokenizer splits texts as llama.cpp does, where transformers does otherwise.

    Raises
    ------
    OSError
        If the file is damaged or cannot be read, or the cache cannot be written or has no room.
    ValueError
        If it is in a format, or holds a model or tokenizer, that cannot be read here.
    MemoryError
        If its weights in float32 are larger than all memory.
    """
    contents = contents_of(file)
    digest = file_digest(file)
    place = digest[:16] if splits else f"{digest[:16]}-as-transformers-splits"
    folder = platformdirs.user_cache_path("flocking") / place / name
    if not origins.is_whole(folder, digest, _CONVERTER):
        _convert(contents, folder, digest, splits)
    return str(folder)


def _convert(contents: Contents, folder: Path, digest: str, splits: bool) -> None:
    file = contents.file
    size = _size(contents)
    refuse_unknown(contents)
    _refuse_without_memory(file, size)
    with (
        _writing(file, folder, size),
        replacing(folder, overwrite=False, wait=_PATIENCE) as partial,
    ):
        if origins.is_whole(folder, digest, _CONVERTER):
            return  # another process converted it meanwhile
        if folder.is_dir():  # broken, or of a version that left no note of what it wrote
            shutil.rmtree(folder)
        folder.unlink(missing_ok=True)
        if (free := free_bytes(partial.parent)) < size:
            raise OSError(f"{size / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB are free")
        tqdm.write(
            f"{file.name}: its weights are converted to float32 once, {size / 1e9:.1f} GB in "
            f"{folder}",
            file=sys.stderr,
        )
        _write(contents, partial, splits)
        origins.write_note(partial, digest, file, _CONVERTER)


def read_gguf(file: Path) -> PreTrainedModel:
    """The model in a GGUF file, in float32, without a copy in the cache.

    Raises
    ------
    OSError, ValueError, MemoryError
        As :func:`dequantised`.
    """
    contents = contents_of(file)
    refuse_unknown(contents)
    size = _size(contents)
    _refuse_without_memory(file, size)
    # (Other systems give more memory to swap when they need it.)
    if sys.platform == "linux" and size > (
        there := usable_memory().available + psutil.swap_memory().free
    ):
        raise MemoryError(
            f"{file} takes {size / 2**30:,.1f} GiB in float32, and {there / 2**30:,.1f} GiB are "
            "free."
        )
    return _dequantised(contents)[0].eval()


def _write(contents: Contents, folder: Path, splits: bool) -> None:
    model, tokenizer = _dequantised(contents)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with _naming(contents.file):
        correct(folder, contents, splits=splits)


def _size(contents: Contents) -> int:
    """Bytes of all weights in float32."""
    return sum(4 * _elements(shape) for _, shape, *_ in contents.tensors)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for one in shape:
        product *= one
    return product


def _refuse_without_memory(file: Path, size: int) -> None:
    there = usable_memory().total + psutil.swap_memory().total
    if size > there:
        raise MemoryError(
            f"{file} holds weights that take {size / 2**30:,.0f} GiB in float32, which they are "
            f"converted to, and {there / 2**30:,.0f} GiB of memory are there: convert it on "
            "a larger one, or take a smaller model."
        )


def _dequantised(contents: Contents) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file."""
    # In a folder without other files: transformers would read configs beside it, too. The path is
    # absolute, since it also looks for a file of that name in the working directory.
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place) / "model.gguf"
        _link(contents.file, alone)
        with _naming(contents.file):
            config = _config_of(alone, contents)
            refuse_other_tensors(config, contents)
            tokenizer = read_tokenizer(place, gguf_file=str(alone))
            model = read_model(
                AutoModelForCausalLM,
                place,
                config=config,
                gguf_file=str(alone),
                dtype="float32",
                **_unpacked(),
            )
    # The model is not quantised any more, but with these it would refuse to be saved.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["hf_quantizer"] = None
    model.generation_config.update(**generation_of(contents))
    return model, tokenizer


def _unpacked() -> dict[str, Any]:
    """Arguments with which weights are not left in blocks, where transformers could do that."""
    kind = getattr(quantization_config, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _config_of(alone: Path, contents: Contents) -> PreTrainedConfig:
    """The config of a file's model, with what transformers' reader leaves out."""
    config = read_config(str(alone.parent), gguf_file=str(alone))
    try:
        changes = changes_of(config, contents)
    except ValueError as problem:
        raise ValueError(
            f"{contents.file} {problem}: load the model's folder of safetensors."
        ) from problem
    if changes:
        config = type(config).from_dict({**config.to_dict(), **changes})
    if left := ignored(contents):
        warn(
            f"{contents.file} says {listed(left)}, of which no notice is taken: the model's "
            "numbers may differ from llama.cpp's."
        )
    return config


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Let errors name the file, not the folder that it is read in; a value may be of any kind."""
    try:
        yield
    except MemoryError as problem:
        raise MemoryError(
            f"{file} does not fit in memory in float32, which it is converted to: convert it on a "
            "larger machine, or take a smaller model."
        ) from problem
    except Exception as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise  # of the system: where it is converted, it says what can be done
        if str(problem).startswith(f"{file} "):
            raise _UnreadableError(str(problem)) from problem
        cause = problem.__cause__ if isinstance(problem.__cause__, Exception) else problem
        raise _UnreadableError(
            f"{file} cannot be read as its metadata have it ({brief(cause, 150)}): get the file "
            "again, or another one of the model."
        ) from problem


def _link(file: Path, link: Path) -> None:
    try:
        link.symlink_to(file.resolve())
    except OSError:  # Windows does not let everyone
        os.link(file, link)


class CacheError(OSError):
    """That a copy cannot be written, which is no fault of the file's."""


class _UnreadableError(OSError):
    """A file that passed all checks and cannot be read, which no room in the cache would mend."""


@contextmanager
def _writing(file: Path, folder: Path, size: int) -> Iterator[None]:
    """Say what can be done where a copy cannot be written."""
    try:
        yield
    except (_UnreadableError, BusyError):
        raise
    except (OSError, SafetensorError) as problem:  # safetensors raises another kind
        raise CacheError(
            f"Cannot write the converted copy of {file.name} ({size / 1e6:,.0f} MB) to "
            f"{folder.parent.parent} ({brief(problem)}): make room and make it writable, or set "
            "XDG_CACHE_HOME to a folder that is."
        ) from problem
