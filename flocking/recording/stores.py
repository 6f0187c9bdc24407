"""Recordings on disk: Zarr stores, written whole or not at all, and opened lazily."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from flocking.artifacts import replacing
from flocking.models import warn
from flocking.recording.arguments import require_bool
from flocking.recording.entrance import canonical
from flocking.recording.growing import RECORDED
from flocking.recording.grown import is_growing, refuse_appended, without_bookkeeping
from flocking.recording.inventory import note_files, refuse_losses
from flocking.recording.locations import Folder, Url, is_url
from flocking.recording.storable import refuse_unstorable, with_python_strings
from flocking.texts import dangling, expanded

# Variables that every recording has, and attributes that tell its store from any other.
_VARIABLES = ("energy", "mass", "tokens")
_ATTRIBUTES = ("flocking_version", "architecture", "window")
# Files of a store, in version 2 and 3 of the format: descriptions, and chunks named by numbers; and
# what their names end in before they are complete. (A process that is killed leaves such a file.)
_FILES = re.compile(
    r"(\.zgroup|\.zattrs|\.zmetadata|zarr\.json)"
    r"|[^/]+/(\.zarray|\.zattrs|zarr\.json|(c/)?\d+([./]\d+)*|c)"
)
_PARTIAL = re.compile(r"\.([0-9a-f]{32}\.)?partial$")


def save_recording(
    recording: xr.Dataset, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Save a recording as a Zarr store, whole or not at all.

    What :func:`flocking.record` gives is read back by :func:`open_recording` as it was, in every
    name, value and dtype. (``recording.to_zarr`` of xarray writes a store that is read, too, with
    ``zarr_format=2``; an interruption leaves a part, and files that are lost later are not missed.)

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`, or what was selected from it or put together; in memory or
        opened lazily.
    path : str or Path
        Of a folder that ends in ``.zarr``; ``~`` is the user's folder. The folder that it is in is
        made if there is none.
    overwrite : bool
        Replace a recording that is there. Nothing else is replaced.

    Raises
    ------
    TypeError
        If `recording` is not a recording, or `overwrite` not a bool.
    ValueError
        If it was changed so that its parts contradict each other, or holds what Zarr cannot; if
        `path` has another suffix, is a URL, exists or is inside of another store.
    OSError
        If `path` cannot be written, or another process is writing it.

    Examples
    --------
    >>> recording = flocking.record(model, "The starlings turned as one.", progress=False)
    >>> flocking.save_recording(recording, "starlings.zarr")
    >>> flocking.open_recording("starlings.zarr").identical(recording)
    True
    >>> flocking.save_recording(recording, "starlings.zarr", overwrite=True)
    """
    canonical(recording)
    place = new_store_path(path)
    overwrite = require_bool("overwrite", overwrite)
    refuse_unstorable(recording)
    refuse = functools.partial(refuse_store, overwrite=overwrite, remedy="overwrite=True")
    with replacing(place, check=refuse) as partial:
        write_store(recording, partial)


def open_recording(
    path: str | os.PathLike[str], *, chunks: Mapping[Any, int] | None = None
) -> xr.Dataset:
    """Open a recording that was saved; arrays stay on disk until they are used.

    Every measure takes it as it is, and reads what it needs. ``.load()`` reads all of it.

    Parameters
    ----------
    path : str or Path
        From :func:`save_recording`, ``record(out=...)``, ``flocking record`` or xarray's
        ``to_zarr``; or an address that fsspec knows, such as ``s3://bucket/corpus.zarr``.
    chunks : dict, optional
        Read it with dask, where that is installed: in the store's own chunks, ``{}``, or in chunks
        of so many entries by dimension, as of ``xarray.open_zarr``. Memory does not grow with the
        number of texts then.

    Returns
    -------
    xarray.Dataset
        As :func:`flocking.record` returned it.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is something else than a recording, or one of another schema version; if files that
        :func:`save_recording` wrote are lost or cut; for `chunks` without dask.

    Warns
    -----
    UserWarning
        If :func:`flocking.record` has not finished it: what is there so far is opened.

    Examples
    --------
    >>> recording = flocking.record(model, flocking.passages()[:2], progress=False)
    >>> flocking.save_recording(recording, "passages.zarr")
    >>> saved = flocking.open_recording("passages.zarr")
    >>> flocking.flocking_score(saved).equals(flocking.flocking_score(recording))
    True
    """
    place = Url(str(path)) if is_url(path) else store_path(path)
    if isinstance(place, Url):
        recording = _in_object_store(place, chunks)
    else:
        recording = _in_folder(place, chunks)
    recording = with_python_strings(recording)
    if RECORDED in recording.variables:
        recording, missing = without_bookkeeping(recording)
        if missing:
            warn(f"{place} is not finished: {missing}. The command that began it goes on with it.")
    try:
        canonical(recording)
    except TypeError:
        variables = ", ".join(map(str, recording.data_vars)) or "none"
        raise ValueError(
            f"{place} is not a recording: it has no 'phase' (its variables: {variables})."
        ) from None
    return recording


def _in_folder(place: Path, chunks: Any) -> xr.Dataset:
    """What is stored in a folder."""
    if not os.path.lexists(place):
        raise FileNotFoundError(f"there is no {place}: save a recording there first.")
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder, as the store of a recording is.")
    if attributes_of_store(place) is None:
        raise ValueError(f"{place} is not a Zarr store: give a recording's.")
    refuse_appended(Folder(place))
    refuse_losses(place)
    # (Of other paths, zarr and xarray would expand "~" themselves.)
    return _opened(str(place), place.absolute(), chunks, consolidated=_is_consolidated(place))


def _in_object_store(place: Url, chunks: Any) -> xr.Dataset:
    """What is stored at an address."""
    if not place.is_there():
        raise FileNotFoundError(f"there is no {place}: record into it first.")
    refuse_appended(place)
    consolidated = place.opened("r").metadata.consolidated_metadata is not None
    options = {"storage_options": place.options, "consolidated": consolidated}
    return _opened(str(place), place.address, chunks, **options)


def _opened(name: str, place: Any, chunks: Any, **options: Any) -> xr.Dataset:
    if chunks is not None and importlib.util.find_spec("dask") is None:
        raise ValueError(
            f"chunks={chunks!r} needs dask, which is not installed: pip install 'flocking[corpus]'."
        )
    try:
        return xr.open_zarr(place, chunks=chunks, **options)
    except Exception as problem:
        # Of many kinds, zarr's, xarray's and the file system's.
        growing = (
            isinstance(place, Path) and is_growing(Folder(place)) and not options["consolidated"]
        )
        more = (
            " It is being written, or a run has ended: the same command goes on." if growing else ""
        )
        raise ValueError(f"{name} cannot be read ({_first_line(problem)}).{more}") from problem


def write_store(recording: xr.Dataset, folder: Path) -> None:
    """Write a recording into a folder that is not there yet."""
    refuse_unstorable(recording)
    # How an earlier file was laid out says nothing about this one.
    plain = recording.drop_encoding()
    for name, variable in plain.variables.items():
        if variable.dtype.kind in "OTU":
            plain[name] = plain[name].compute()
        elif variable.chunks is not None:  # dask's may differ in size, and Zarr's do not
            sizes = {dim: sizes[0] for dim, sizes in variable.chunksizes.items()}
            plain[name] = plain[name].chunk(sizes)
    # (Chunks that hold nothing but zeros, too, so that one that is absent is one that was lost.)
    plain.to_zarr(folder.absolute(), zarr_format=2, write_empty_chunks=True)
    note_files(folder)


def store_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The place of a store.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is a URL, or has another suffix than ``.zarr``.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} is a {type(path).__name__}: give the name of a folder.")
    if "\0" in os.fsdecode(path):
        raise ValueError(f"{name} has the character NUL, which no path has: leave it out.")
    if is_url(str(path)):
        raise ValueError(
            f"{name} {path}: name a folder on a disk, since URLs are left to record(out=...) and "
            "xarray's to_zarr."
        )
    place = Path(expanded(os.fsdecode(path)))
    if place.suffix.lower() != ".zarr":
        wanted = place.with_suffix(".zarr").name if place.name else "recording.zarr"
        raise ValueError(
            f"{name} {path}: recordings are Zarr stores, whose names end in .zarr, such as "
            f"{wanted}."
        )
    return place


def new_store_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The place of a store that is to be written: as :func:`store_path`, inside of no other."""
    place = store_path(path, name)
    for folder in Path(os.path.realpath(place)).parents:
        if attributes_of_store(folder) is not None:
            raise ValueError(
                f"{name} {path} is inside of {folder}, which is a store: choose another folder."
            )
    return place


def refuse_store(path: Path, overwrite: bool, remedy: str) -> None:
    """Raise a ValueError where something is, unless it is a recording that may be replaced."""
    if why := dangling(path):
        raise ValueError(f"{path} {why}: choose another name, or make what the link names.")
    if not os.path.lexists(path):
        return
    if (other := not_a_recording(path)) is not None:
        raise ValueError(f"{path} exists and is not a recording ({other}): choose another name.")
    if not overwrite:
        raise ValueError(f"{path} exists: choose another name, or pass {remedy}.")


def not_a_recording(store: Path) -> str | None:
    """Why something is not the store of a recording and nothing else; None if it is."""
    if not store.is_dir():
        return "it is a file"
    attributes = attributes_of_store(store) or {}
    lacking = [name for name in _ATTRIBUTES if name not in attributes]
    lacking += [name for name in _VARIABLES if not (store / name).is_dir()]
    if lacking:
        return f"it has no {lacking[0]}"
    for path in sorted(store.rglob("*")):
        name = _PARTIAL.sub("", path.relative_to(store).as_posix())
        first, _, rest = name.partition("/")
        known = _FILES.fullmatch(name) and (not rest or _is_array(store / first))
        if path.is_symlink() or (path.is_file() and not known):
            return f"there is {name} in it"
    return None


def attributes_of_store(store: Path) -> dict[str, Any] | None:
    """Attributes of a Zarr group in either version of the format; None if there is no group."""
    if isinstance(found := _json(store / "zarr.json"), dict):
        attributes = found.get("attributes", {})
        return attributes if isinstance(attributes, dict) else {}
    if not isinstance(_json(store / ".zgroup"), dict):
        return None
    attributes = _json(store / ".zattrs")
    return attributes if isinstance(attributes, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_array(folder: Path) -> bool:
    """Whether a folder in a store is one of its arrays: other folders may have numbers in them."""
    return (folder / ".zarray").is_file() or (folder / "zarr.json").is_file()


def _is_consolidated(store: Path) -> bool:
    """Whether all descriptions are in one file: xarray warns where it has to find out."""
    described = _json(store / "zarr.json")
    if isinstance(described, dict):
        return described.get("consolidated_metadata") is not None
    return (store / ".zmetadata").is_file()


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
