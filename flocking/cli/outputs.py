"""What commands write, and which earlier outputs they may replace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flocking.texts import dangling, passages

# Variables that every recording has, and attributes that tell its store from any other.
_VARIABLES = ("energy", "mass", "tokens")
_ATTRIBUTES = ("flocking_version", "architecture", "window")
# Files of a store, in version 2 and 3 of the format: descriptions, and chunks named by numbers.
_FILES = re.compile(
    r"(\.zgroup|\.zattrs|\.zmetadata|zarr\.json)"
    r"|[^/]+/(\.zarray|\.zattrs|zarr\.json|(c/)?\d+([./]\d+)*|c)"
)


def refuse_nothing(option: str, path: Path) -> None:
    """Refuse an empty name, which stands for the folder that the command runs in."""
    if not path.name:
        raise ValueError(f"--{option} names no file or folder: give it a name.")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Replace only a recording, and only if asked to."""
    _refuse_dangling(path)
    if (why := _not_a_recording(path)) is not None:
        raise ValueError(f"{path} exists and is not a recording ({why}): choose another name.")
    if not overwrite:
        raise ValueError(f"{path} exists: choose another name, or pass --overwrite.")


def refuse_other_than_demos(path: Path) -> None:
    """Replace only what an earlier ``flocking demo`` wrote."""
    _refuse_dangling(path)
    why = _not_of_demo(path) if path.suffix == ".png" else _not_a_recording(path)
    if why is None and path.suffix != ".png" and not _is_of_passages(path):
        why = "it is a recording of other texts"
    if why is not None:
        raise ValueError(
            f"{path} exists and is not from flocking demo ({why}): choose another --out."
        )


def _refuse_dangling(path: Path) -> None:
    if why := dangling(path):
        raise ValueError(f"{path} {why}: choose another name, or make what the link names.")


def _not_a_recording(store: Path) -> str | None:
    """Why something is not the store of a recording and nothing else; None if it is."""
    if not store.is_dir():
        return "it is a file"
    attributes = _attributes(store)
    lacking = [name for name in _ATTRIBUTES if name not in attributes]
    lacking += [name for name in _VARIABLES if not (store / name).is_dir()]
    if lacking:
        return f"it has no {lacking[0]}"
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        first, _, rest = name.partition("/")
        known = _FILES.fullmatch(name) and (not rest or _is_array(store / first))
        if path.is_symlink() or (path.is_file() and not known):
            return f"there is {name} in it"
    return None


def _is_array(folder: Path) -> bool:
    """Whether a folder in a store is one of its arrays: other folders may have numbers in them."""
    return (folder / ".zarray").is_file() or (folder / "zarr.json").is_file()


def _attributes(store: Path) -> dict[str, Any]:
    """Attributes of a Zarr group in either version of the format; empty if there is none."""
    for name, part in ((".zattrs", None), ("zarr.json", "attributes")):
        try:
            found = json.loads((store / name).read_text(encoding="utf-8"))
            found = found[part] if part else found
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _is_of_passages(store: Path) -> bool:
    import xarray as xr

    try:
        with xr.open_zarr(store) as recording:
            named = recording.sequence.values.tolist() == [one.name for one in passages()]
            return named and "relative_layer" in recording.coords
    except Exception:  # whatever is wrong with it, it is not the demo's
        return False


def _not_of_demo(picture: Path) -> str | None:
    """Why something is not the demo's picture; None if it is."""
    from PIL import Image

    if not picture.is_file():
        return "it is a folder"
    try:
        with Image.open(picture) as image:
            ours = {"Source", "architecture", "flocking_version"} <= image.info.keys()
    except (OSError, ValueError, SyntaxError):  # PIL's for a broken PNG
        ours = False
    return None if ours else "it is another picture, or none"
