"""Where an export is written: what may be replaced there, and whether there is room."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flocking.pruning.exported import in_words
from flocking.texts import dangling, expanded

# What models' folders have in them, by the ends of the names; anything else is somebody's own.
_OF_MODELS = (
    ".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken",
    "license",
)  # fmt: skip


def place_of_folder(folder: object) -> Path:
    """Where a folder is to be written, from what a user gives as its name."""
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise TypeError(f"folder is a {type(folder).__name__}: give the name of a folder.")
    place = Path(expanded(os.fspath(folder)))
    if not place.name:
        raise ValueError(f"folder={os.fspath(folder)!r} names no folder: give it a name.")
    if is_gguf(place):
        raise ValueError(
            f"folder={os.fspath(folder)!r}: this writes a folder; flocking.export_gguf writes GGUF "
            "files."
        )
    return place


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
    if source and os.path.exists(source) and os.path.samefile(source, found):
        raise ValueError(f"{path} is where the model itself is from: choose another name.")
    if is_gguf(path):
        kind, why_not = "GGUF file", _not_a_gguf(found)
    else:
        kind, why_not = "model's folder", _not_a_model(found)
    if why_not is not None:
        raise ValueError(f"{path} exists and is no {kind} ({why_not}): choose another name.")
    if not overwrite:
        raise ValueError(f"{path} exists: choose another name, or {how}.")


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
    if not any(path.name == "config.json" for path in inside):
        return "it has no config.json" if inside else None
    for path in inside:
        known = path.is_file() and path.name.lower().endswith(_OF_MODELS)
        if not known and not path.name.startswith("."):
            return f"there is {path.name} in it"
    return None


def refuse_without_room(place: Path, folder: Path, size: int) -> None:
    """Raise an OSError if a number of bytes does not fit on a folder's disk, for `place`."""
    room = shutil.disk_usage(folder)
    if room.total and room.free < size:  # (some file systems do not tell)
        raise OSError(
            f"{place} cannot be written: {in_words(size)} are needed, and "
            f"{in_words(room.free)} are free: make room, or name another place."
        )
