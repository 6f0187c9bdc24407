"""What goes wrong while files of a model are read, told in a sentence with a remedy."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from flocking.models.suspects import Suspect

# What Python says of an argument that a function does not have.
_OF_ARGUMENTS = re.compile(r"(unexpected|multiple values for|missing .* required) .*argument")
# Before what a check of transformers' configs says.
_OF_CHECKS = re.compile(r"^(Class validation error|Validation error) for \w+ '\w+': \w+: ")
_LONGEST_VALUE = 60  # characters of a field's value that an error shows


class UnexplainedError(ValueError):
    """That files cannot be read, without a word about which of them."""


@contextmanager
def reading(name: str, what: str = "model") -> Iterator[None]:
    """Tell in one sentence what fails inside; `what` is read from `name`, a folder or hub id."""
    try:
        yield
    except Exception as problem:  # transformers, safetensors, pickle and torch raise many kinds
        raise told(name, what, problem) from problem


def told(name: str, what: str, problem: Exception) -> Exception:
    """An error of a kind and wording for users."""
    for explain in (_of_foreign_code, _of_memory, _of_files, _of_kinds):
        if (found := explain(name, problem)) is not None:
            return found
    if isinstance(problem, OSError) and not os.path.isdir(name):
        return OSError(_of_the_hub(name, problem))
    if isinstance(problem, TypeError) and _OF_ARGUMENTS.search(str(problem)):  # the user's
        return TypeError(f"{name}: {brief(problem)}.")
    if what == "tokenizer":
        return _of_tokenizers(name, problem)
    if isinstance(problem, TypeError) and _pickled(name) and not _has_safetensors(name):
        return _of_weights(name, problem)
    where = ""
    if "quantization" in str(problem):
        where = " as its config.json says, in quantization_config"
    elif (Path(name) / "adapter_config.json").is_file():
        where = " with its adapter_config.json"
    kind = OSError if isinstance(problem, OSError) else ValueError
    return kind(
        f"{name} cannot be loaded{where}: {brief(problem)}: get its files again, or try another "
        "version of transformers."
    )


def _of_foreign_code(name: str, problem: Exception) -> Exception | None:
    if "trust_remote_code" not in str(problem):
        return None
    return ValueError(
        f"{name} needs code that comes with it, which is not run unasked: read it and, if you "
        f"trust it, load the model in Python with flocking.load({name!r}, trust_remote_code=True)."
    )


def _of_memory(name: str, problem: Exception) -> Exception | None:
    if not is_out_of_memory(problem):
        return None
    return MemoryError(
        f"{name} does not fit in memory ({brief(problem)}): load it with dtype='bfloat16', "
        "spread it with device_map='auto', or take a smaller model."
    )


def _of_files(name: str, problem: Exception) -> Exception | None:
    """Of files that are damaged or not there."""
    text = str(problem)
    if isinstance(problem, SafetensorError | pickle.UnpicklingError | EOFError) or (
        "PytorchStreamReader" in text
    ):
        return _of_weights(name, problem)
    if "Error no file named" in text:
        return FileNotFoundError(
            f"{name} has no weights (model.safetensors or pytorch_model.bin): get them too."
        )
    if isinstance(problem, FileNotFoundError) and os.path.isdir(name):
        return FileNotFoundError(f"{name}: {brief(problem)}: get its files again.")
    return None


def _of_kinds(name: str, problem: Exception) -> Exception | None:
    """Of models that this version of transformers does not know."""
    text = str(problem)
    if "does not recognize this architecture" in text or "Unrecognized configuration" in text:
        return ValueError(
            f"{name} is not a causal language model that transformers knows "
            f"({brief(problem, 140)}): try a newer transformers, or another model."
        )
    return None


def _pickled(name: str) -> list[str]:
    return sorted(path.name for path in Path(name).glob("*.bin"))


def _has_safetensors(name: str) -> bool:
    return any(Path(name).glob("*.safetensors"))


def _of_weights(name: str, problem: Exception) -> OSError:
    files = f" ({listed(_pickled(name))})" if _pickled(name) else ""
    return OSError(
        f"{name}: its weights{files} cannot be read ({brief(problem)}): get its files again, "
        "for they are damaged or not whole."
    )


def of_suspect(folder: str | os.PathLike[str], found: Suspect, problem: Exception) -> ValueError:
    """An error that names the file, and the field of it, that another one comes from."""
    file = Path(folder) / found.file
    if not found.field:
        return ValueError(f"{file} cannot be used ({brief(problem)}): get it again.")
    value = repr(found.value)
    value = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]} ..."
    return ValueError(
        f"{file}: {found.field} is {value}, which cannot be used ({brief(problem)}): correct it, "
        "or get the file again."
    )


def brief(problem: Exception, length: int = 200) -> str:
    """The first sentence or so of an error, in one line and without a full stop."""
    first = str(problem).strip().split("\n\n")[0].split(". ")[0].split("Exception raised from")[0]
    text = _OF_CHECKS.sub("", " ".join(first.split())) or type(problem).__name__
    if isinstance(problem, KeyError | ZeroDivisionError | AttributeError):
        text = f"{type(problem).__name__}: {text}"
    text = text.rstrip(".")
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def listed(names: Sequence[object], most: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def is_out_of_memory(problem: Exception) -> bool:
    """Whether an error says that there is no more memory, of the machine or of a device."""
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or (
        isinstance(problem, RuntimeError)
        and any(words in str(problem) for words in ("not enough memory", "allocate memory"))
    )


def _of_the_hub(name: str, problem: Exception) -> str:
    if "connect" in str(problem) or "offline" in str(problem):
        return (
            f"{name} is no folder here, and the Hugging Face hub cannot be reached nor has its "
            "cache all of the files: name a model's folder, or try again with a network."
        )
    return (
        f"{name} is no folder here, and cannot be had from the Hugging Face hub "
        f"({brief(problem, 120)}): check the name, and log in with `hf auth login` if it is "
        "private or gated."
    )


def _of_tokenizers(name: str, problem: Exception) -> Exception:
    if "instantiate the backend tokenizer" in str(problem):
        return FileNotFoundError(
            f"{name} has no tokenizer: save it there with tokenizer.save_pretrained({name!r})."
        )
    return UnexplainedError(
        f"{name}: its tokenizer cannot be read ({brief(problem)}): get its files again."
    )
