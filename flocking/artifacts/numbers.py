"""Numbers of figures as JSON, with a checksum by which a change of a digit is noticed."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from flocking.artifacts.keys import Key

_PARTS = ("attrs", "coords", "data_vars")  # of a figure's file: all but its key


class UnreadableError(ValueError):
    """A file of numbers that is not what was written; the message says why.

    Attributes
    ----------
    changed : bool
        Whether it can be read, and its numbers are not those that were written.
    """

    def __init__(self, message: str, changed: bool = False) -> None:
        super().__init__(message)
        self.changed = changed


def checksum(content: object) -> str:
    """SHA-256 of what ``json.dumps`` takes, the same for every layout of the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_content(path: Path, parts: tuple[str, ...] = _PARTS) -> dict[str, Any]:
    """The JSON object in a file, if it is whole.

    Parameters
    ----------
    path : Path
        With a name that ends in ".gz" if it is compressed.
    parts : tuple of str
        Those that the checksum in it, if any, is of. (Earlier versions wrote none.)

    Raises
    ------
    UnreadableError
        If it is not JSON, a part is missing, or the parts are not those that were written.
    """
    try:
        written = path.read_bytes()
        content = json.loads(gzip.decompress(written) if path.suffix == ".gz" else written)
    except (OSError, ValueError, RecursionError, EOFError, zlib.error) as problem:
        raise UnreadableError(f"{path} cannot be read ({problem})") from problem
    if not isinstance(content, dict) or not {"key", *parts} <= content.keys():
        raise UnreadableError(f"{path} does not have the parts {', '.join(('key', *parts))}")
    now = checksum({part: content[part] for part in parts})
    if content.get("checksum", now) != now:
        raise UnreadableError(f"{path} was changed after it was written", changed=True)
    return content


def to_json(data: xr.Dataset, key: Key) -> str:
    """A Dataset and its key as JSON: NaN as null, float32 with three significant digits."""

    def plain(values: np.ndarray) -> object:
        if values.ndim:
            return [plain(value) for value in values]
        value = values.item()
        if values.dtype == np.float32:
            value = float(f"{value:.3g}")
        return None if value != value else value

    def array(values: np.ndarray) -> np.ndarray:
        # (Labels that were put together are objects, each a text.)
        return np.array(values.tolist()) if values.dtype == object else values

    def variables(which: Mapping[Any, xr.DataArray]) -> dict[str, Any]:
        return {
            name: {"dims": list(v.dims), "attrs": v.attrs, "data": plain(array(np.asarray(v)))}
            for name, v in which.items()
        }

    numbers = {
        "attrs": data.attrs,
        "coords": variables(data.coords),
        "data_vars": variables(data.data_vars),
    }
    content: dict[str, Any] = {"key": key.plain(), "checksum": checksum(numbers), **numbers}
    # One variable a line, so that the file is easy to read and to compare with another version.
    parts = []
    for part, value in content.items():
        if part in ("coords", "data_vars"):
            lines = [f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in value.items()]
            parts.append(f"{json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n}")
        else:
            parts.append(f"{json.dumps(part)}: {json.dumps(value, indent=1)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def from_json(text: str) -> xr.Dataset:
    """The Dataset that :func:`to_json` wrote."""
    content = json.loads(text)

    def variables(which: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, v in which.items():
            values = np.array(v["data"])
            if values.dtype == object:  # a null among numbers
                values = values.astype(float)
            found[name] = (v["dims"], values, v["attrs"])
        return found

    return xr.Dataset(
        variables(content["data_vars"]), variables(content["coords"]), content["attrs"]
    )
