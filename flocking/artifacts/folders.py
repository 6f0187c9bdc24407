"""What tells a model from every other: the files that it is read from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def folder_digest(folder: Path) -> str:
    """SHA-256 of all files in a model's folder, those in its subfolders included.

    Links are followed, to files as to folders, and so is an adapter to the folder of the model
    that it adapts. The version of transformers that wrote the folder does not count, nor do files
    and folders whose names start with a dot, such as the notes of a download.
    """
    return _folder_digest(folder, frozenset())


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_digest(folder: Path, above: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_files(folder, frozenset())):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode(errors="surrogateescape"))
        digest.update(_content_digest(path))
    above = above | {os.path.realpath(folder)}
    base = _adapted(folder)
    if base is not None and os.path.realpath(base) not in above:
        digest.update(_folder_digest(base, above).encode())
    return digest.hexdigest()


def _files(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """All files below a folder, but for those whose names start with a dot."""
    above = above | {os.path.realpath(folder)}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and os.path.realpath(path) not in above:  # a link may lead back up
            yield from _files(path, above)


def _adapted(folder: Path) -> Path | None:
    """The folder of the model that an adapter's folder names, if it is one of these."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"])
        return base if base.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no adapter, or not for us to say what is wrong with it


def _content_digest(path: Path) -> bytes:
    if path.name in ("config.json", "generation_config.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            plain = json.dumps(_without_version(content), sort_keys=True)
        except (ValueError, RecursionError):
            pass  # not for us to say what is wrong with it
        else:
            return hashlib.sha256(plain.encode()).digest()
    return bytes.fromhex(file_digest(path))


def _without_version(value: Any) -> Any:
    """A config, and the configs in it, without the version of transformers that wrote them."""
    if not isinstance(value, dict):
        return value
    return {k: _without_version(v) for k, v in value.items() if k != "transformers_version"}
