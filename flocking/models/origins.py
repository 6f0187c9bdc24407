"""Where a folder of converted files comes from: a note in it, written when it was complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Hidden, as a download's notes are: it is no part of the model.
NOTE = ".flocking-origin.json"


def write_note(
    folder: Path, digest: str, source: Path | None = None, converter: str | None = None
) -> None:
    """Note in a folder which file it was converted from, and what is in it.

    Parameters
    ----------
    folder : Path
    digest : str
        SHA-256 of the file.
    source : Path, optional
        Where the file was.
    converter : str, optional
        What converted it, for :func:`is_whole`.
    """
    files = {
        name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for name, path in _files(folder).items()
    }
    note: dict[str, Any] = {"converted_from": digest, "converter": converter, "files": files}
    if source is not None:
        note["source"] = str(source.resolve())
    content = json.dumps(note, indent=1)
    (folder / NOTE).write_text(content + "\n", encoding="utf-8")


def is_whole(folder: Path, digest: str, converter: str | None = None) -> bool:
    """Whether a folder was converted from the file of this digest, and no file lacks anything.

    And by this converter: another one may have read the file otherwise. Only sizes are looked at,
    since this is asked at every load.
    """
    note = _note(folder)
    try:
        made = note["converted_from"], note.get("converter")
        return made == (digest, converter) and all(
            (folder / name).stat().st_size == file["size"] for name, file in note["files"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def digest_of(folder: Path) -> str | None:
    """Digest of the file that a folder was converted from; None if that is not known.

    Nor is it where any file was changed, added or removed since.
    """
    note = _note(folder)
    try:
        noted = {name: file["sha256"] for name, file in note["files"].items()}
        there = {name: _sha256(path) for name, path in _files(folder).items()}
        return str(note["converted_from"]) if noted == there else None
    except (OSError, KeyError, TypeError, AttributeError):
        return None


def source_of(folder: Path) -> Path | None:
    """Where the file was that a folder was converted from; None if that is not noted."""
    note = _note(folder)
    source = note.get("source") if isinstance(note, dict) else None
    return Path(source) if isinstance(source, str) else None


def _note(folder: Path) -> Any:
    try:
        return json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return None


def _files(folder: Path) -> dict[str, Path]:
    """Files of a folder by name, without hidden ones."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in paths.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
