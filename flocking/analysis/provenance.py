"""What an array says it was made from, and whether it is still what was made.

xarray keeps attributes through ``~``, ``any``, ``-`` and many others, which make them untrue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from flocking.analysis.chunks import is_chunked

_TEXT, _MARKS = "made_from", "made_from_marks"
_MOST = 1024  # marks are left out where there are more slices


def made_of(values: xr.DataArray, text: str) -> xr.DataArray:
    """An array with the attribute ``made_from``, and with what tells later if it was changed.

    Parameters
    ----------
    values : xarray.DataArray, (..., [layer,] neuron)
        Each slice along its leading dimensions may be taken out, and is still what was made.
    text : str

    Where they are many, or in chunks that are not read yet, nothing tells whether it was changed.
    """
    return values.assign_attrs(marked(text, *_marks_in(values)))


def _marks_in(values: xr.DataArray) -> list[str]:
    """Marks of all slices, in which layers are in ascending order; none if there are too many.

    There are none either of what is in chunks, which would all be read.
    """
    if is_chunked(values):
        return []
    dims = [dim for dim in values.dims if dim not in ("layer", "neuron")]
    inner = [dim for dim in ("layer", "neuron") if dim in values.dims]
    if "layer" in values.dims and "layer" in values.coords:
        order = np.argsort(values["layer"].values, kind="stable")
        if not np.array_equal(order, np.arange(len(order))):
            values = values.isel(layer=order)
    rows = values.transpose(*dims, *inner).values
    lead = rows.shape[: len(dims)]
    return [mark_of(rows[place]) for place in np.ndindex(lead)] if np.prod(lead) <= _MOST else []


def marked(text: str, *marks: str) -> dict[str, str]:
    """The attributes of what was made from something, and looks like one of `marks`."""
    return {_TEXT: text, _MARKS: " ".join((_digest(text.encode()), *marks))}


def mark_of(values: np.ndarray) -> str:
    """A mark that tells a mask or statistic, ([layer,] neuron), from others.

    For a mask, it does not count how many neurons there are beyond the last that is kept.
    """
    if values.dtype == bool:
        return _digest(np.argwhere(np.atleast_2d(values)).astype("<i8").tobytes())
    return _digest(np.ascontiguousarray(values, "<f8").tobytes())


def is_changed(attributes: Mapping[Any, Any], mark: str) -> bool:
    """Whether something of this mark is not what the text in its attributes was written for.

    A text that somebody put in its place is of what it is given with.
    """
    of_text, *marks = str(attributes.get(_MARKS) or "").split() or [""]
    ours = of_text == _digest(str(attributes.get(_TEXT) or "").encode())
    return ours and bool(marks) and mark not in marks


def said_by(values: xr.DataArray) -> str:
    """What a statistic says that it was made from; empty if nothing."""
    text = str(values.attrs.get(_TEXT) or "")
    if not text:
        return ""
    changed = any(is_changed(values.attrs, mark) for mark in _marks_in(values))
    return f"numbers that were computed from another statistic ({text})" if changed else text


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
