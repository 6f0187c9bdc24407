"""What a Zarr store can hold: whatever would not come back as it was is refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core.indexing import (
    IndexingSupport,
    LazilyIndexedArray,
    explicit_indexing_adapter,
)
from zarr.storage import MemoryStore

from flocking.recording.dataset import COORDINATES, VARIABLES

_FIELDS = VARIABLES | COORDINATES
_LONGEST_NAME = 255  # bytes that file systems allow
_TEXT, _NUMBERS = "OTU", "biufc"  # kinds of dtypes


def refuse_unstorable(recording: xr.Dataset) -> None:
    """Raise a ValueError that names what a Zarr store cannot hold, before anything is written.

    Names and texts are looked at; of the rest, a store in memory shows what comes back.
    """
    for name in {*recording.variables, *recording.dims}:
        if why := _unfit(name):
            raise ValueError(f"the recording has the name {name!r}, which {why}: rename it.")
    for name in recording.xindexes:
        if len(recording.xindexes.get_all_coords(name)) > 1:
            raise ValueError(
                f"coordinate {name!r} has an index of several levels, which Zarr cannot hold: "
                "reset it, with reset_index, or drop it."
            )
    plain = _small(recording.drop_encoding())
    for name, variable in recording.variables.items():
        if variable.dtype.kind in _TEXT and isinstance(variable.dtype, np.dtype):
            _check_texts(str(name), variable.values)
    if _comes_back(plain):
        return
    for name, variable in plain.variables.items():
        bare = xr.Dataset({name: variable.copy(deep=False)}).drop_attrs()
        if not _comes_back(bare):
            raise ValueError(
                f"{_kind(recording, name)} {name!r} is of {variable.dtype}, which Zarr does not "
                "give back as it is: convert it to numbers or texts, or drop it."
            )
        _check_attributes(bare, variable.attrs, f"{name!r}", str(name))
    _check_attributes(xr.Dataset(), plain.attrs, "the recording", None)
    raise ValueError("the recording does not come back from Zarr as it is: drop what is your own.")


def _unfit(name: object) -> str:
    """Why a name is not one of a folder in a store; empty if it is."""
    if not isinstance(name, str):
        return f"is a {type(name).__name__} instead of a str"
    if not name or name.startswith((".", "__")) or name == "zarr.json":
        return "Zarr uses itself" if name else "is empty"
    for character, told in (("/", "a slash"), ("\\", "a backslash"), ("\0", "the character NUL")):
        if character in name:
            return f"has {told}, as no folder of a store has"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "has half of a character"
    return "is too long for a file system" if length > _LONGEST_NAME else ""


def _check_texts(name: str, texts: np.ndarray) -> None:
    """Refuse what is no text, and halves of characters, which no file can hold."""
    for text in texts.flat:
        if not isinstance(text, str):
            raise ValueError(
                f"{name!r} has {text!r} among its texts, which is a {type(text).__name__} and does "
                "not come back from Zarr: give texts only, or numbers only."
            )
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ValueError(
                f"{name!r} has {text[problem.start]!r} in a text, which is half of a character and "
                "cannot be stored: replace it."
            ) from problem


def _small(data: xr.Dataset) -> xr.Dataset:
    """Each variable, with dimensions that no other has; of numbers, which come back, the first."""
    variables = {}
    for name, variable in data.variables.items():
        numbers = isinstance(variable.dtype, np.dtype) and variable.dtype.kind in _NUMBERS
        few = variable.isel({dim: slice(1) for dim in variable.dims}) if numbers else variable
        plain = few.to_base_variable()
        values = plain.values if isinstance(plain.dtype, np.dtype) else plain.data
        variables[name] = xr.Variable([f"{dim} of {name}" for dim in few.dims], values, few.attrs)
    return xr.Dataset(variables, attrs=data.attrs)


def _kind(recording: xr.Dataset, name: Any) -> str:
    return "coordinate" if name in recording.coords else "variable"


def _check_attributes(bare: xr.Dataset, attributes: dict[Any, Any], of: str, name: Any) -> None:
    for key, value in attributes.items():
        one = bare.copy()
        (one.attrs if name is None else one[name].attrs)[key] = value
        if not _comes_back(one):
            raise ValueError(
                f"attribute {key!r} of {of} is {value!r}, a {type(value).__name__}, which Zarr "
                "does not give back as it is under this name: convert it to a text or a number, "
                "rename it, or drop it."
            )


def _comes_back(data: xr.Dataset) -> bool:
    """Whether a store in memory gives back the same names, values, kinds and attributes."""
    store = MemoryStore()
    try:
        data.to_zarr(store, zarr_format=2, consolidated=False)
        found = xr.open_zarr(store, chunks=None, consolidated=False).load()
        return with_python_strings(found).identical(with_python_strings(data)) and all(
            _same_kind(data.variables[name].dtype, found.variables[name].dtype)
            for name in data.variables
        )
    except (OSError, MemoryError):
        raise
    except Exception:  # of many kinds, zarr's, xarray's and numpy's
        return False


def _same_kind(one: Any, other: Any) -> bool:
    if not (isinstance(one, np.dtype) and isinstance(other, np.dtype)):
        return False
    return one == other or (one.kind in _TEXT and other.kind in _TEXT)


def with_python_strings(data: xr.Dataset) -> xr.Dataset:
    """Texts as Python's strings, as they were: numpy and xarray have other types for them."""
    ours = {name for name, field in _FIELDS.items() if field.dtype == "object"}
    found = {
        name: _as_python(variable) if name not in data.xindexes else variable.astype(object)
        for name, variable in data.variables.items()
        if variable.dtype.kind == "T" or (name in ours and variable.dtype.kind == "U")
    }
    return data.assign_coords({name: v for name, v in found.items() if name in data.coords}).assign(
        {name: v for name, v in found.items() if name in data.data_vars}
    )


def _as_python(variable: xr.Variable) -> xr.Variable:
    """A variable of texts as Python's strings; what is on disk stays there until it is used."""
    if variable.chunks is not None:
        return variable.astype(object)
    lazy = LazilyIndexedArray(_PythonStrings(variable))
    return xr.Variable(variable.dims, lazy, variable.attrs, variable.encoding)


class _PythonStrings(BackendArray):
    """Texts of another array, of any kind, as Python's strings."""

    def __init__(self, variable: xr.Variable) -> None:
        self._variable = variable
        self.shape, self.dtype = variable.shape, np.dtype(object)

    def __getitem__(self, key: Any) -> np.ndarray:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        return np.asarray(self._variable[key].values, dtype=object)
