"""Opening GGUF files: whole, and with a table of tensors that agrees with the file's length.

The reader of the package ``gguf`` believes what a file says: with a wrong count it runs for hours,
with a wrong offset it gives other numbers. Here the file is walked through first, as llama.cpp does
it (``gguf_init_from_file`` in ggml/src/gguf.cpp; ggml/docs/gguf.md describes the format).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    dequantize,
)

from flocking.models.problems import brief
from flocking.texts import expanded, why_no_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# What files begin with that people take for GGUF files.
_OTHERS = {
    b"GGJT": "an older format of llama.cpp, GGJT",
    b"TJGG": "an older format of llama.cpp, GGJT",
    b"FMGG": "an older format of llama.cpp, GGMF",
    b"LMGG": "an older format of llama.cpp, GGML",
    b"FUGG": "a GGUF file in the other byte order",
    b"PK\3\4": "a zip archive, as pytorch_model.bin is one",
    b"vers": "a note of Git LFS in place of the file, which `git lfs pull` gets",
    b"<!DO": "a page of the web",
    b"<htm": "a page of the web",
}
_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
# Kinds of values by their number, with the letters of `struct`.
_LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_SIZES = {kind: struct.calcsize(letter) for kind, letter in _LETTERS.items()}
# More than any model has; gguf's reader takes some microseconds for each.
_MOST_VALUES = 2**22
_MOST_TENSORS = 2**18
_LONGEST_NAME = 200  # characters; llama.cpp has room for 64 in tensors' names
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_ALIGNMENT = 32  # where the file says no other
_AGAIN = "get the file again"


class Tensor(NamedTuple):
    """What a file's table says of a tensor."""

    name: str
    shape: tuple[int, ...]  # as in the file: the dimension that is contiguous comes first
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of all data
    size: int  # bytes


class Contents(NamedTuple):
    """What a file says of itself: it takes a fraction of a second where the reader takes many."""

    file: Path
    metadata: dict[str, Any]
    tensors: list[Tensor]
    start: int  # bytes before the data of the tensors


def open_gguf(path: str | os.PathLike[str]) -> GGUFReader:
    """Open a GGUF file of one part whose table of tensors agrees with the file.

    Parameters
    ----------
    path : str or path
        ``~`` at its start is the user's folder.

    Returns
    -------
    gguf.GGUFReader
        Of a file that has each tensor once, of a type that the installed ``gguf`` knows, one
        behind the other and within the file.

    Raises
    ------
    OSError
        If there is no such file, it cannot be read, or it is damaged or not whole: what its
        table says is not what there is.
    ValueError
        If it is in another format, version or byte order, is one part of a model that was split,
        or has tensors of unknown types.
    TypeError
        If `path` is neither a string nor a path.
    """
    with _telling(path) as file:
        _walked(file)
        return GGUFReader(file)


def contents_of(path: str | os.PathLike[str]) -> Contents:
    """What a GGUF file says of itself, if :func:`open_gguf` would open it; it raises the same."""
    with _telling(path) as file:
        return _walked(file)


def looks_like_gguf(path: str) -> bool:
    """Whether a path is of a GGUF file, or of one that is meant to be."""
    if path.lower().endswith(".gguf"):
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == _MAGIC
    except OSError:
        return False


def values_of(contents: Contents, name: str) -> np.ndarray:
    """The values of one of the file's tensors, in float32, flat."""
    tensor = next(one for one in contents.tensors if one.name == name)
    with contents.file.open("rb") as stream:
        stream.seek(contents.start + tensor.offset)
        raw = np.frombuffer(stream.read(tensor.size), dtype=np.uint8)
    kinds = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if tensor.kind in kinds:
        return raw.view(kinds[tensor.kind]).astype(np.float32)
    return np.asarray(dequantize(raw, tensor.kind), dtype=np.float32)


class _FileError(Exception):
    """What is wrong with a damaged file, and the remedy; the file's name is added."""


class _FormatError(Exception):
    """What is wrong with a file of another kind, and the remedy; the file's name is added."""


@contextmanager
def _telling(path: object) -> Iterator[Path]:
    """Give the path of a file, and tell in a sentence what fails while it is read."""
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise TypeError(f"the GGUF file's path is a {type(path).__name__}: give a string or path.")
    file = Path(expanded(text))
    if why := why_no_file(file):
        raise FileNotFoundError(f"{file} {why}: give a GGUF file.")
    try:
        yield file
    except _FileError as problem:
        raise OSError(f"{file} {problem}.") from None
    except _FormatError as problem:
        raise ValueError(f"{file} {problem}.") from None
    except OSError as problem:
        raise OSError(
            f"{file} cannot be read ({problem.strerror or brief(problem)}): {_AGAIN}."
        ) from problem
    except Exception as problem:  # the reader raises whatever NumPy does with what it was told
        raise OSError(
            f"{file} cannot be read as GGUF ({brief(problem)}): {_AGAIN}, or try another version "
            "of gguf."
        ) from problem


def _walked(file: Path) -> Contents:
    """What is in a file, unless its header or table cannot be."""
    length = file.stat().st_size
    if not length:
        raise _FileError(f"is empty: {_AGAIN}")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        tensors, pairs = _header(walk)
        metadata = dict(_metadata(walk, pairs))
        _check_split(metadata)
        alignment = _alignment(metadata)
        table = list(_tensors(walk, tensors))
        start = -(-walk.at // alignment) * alignment
        _check_places(table, start, alignment, length)
    return Contents(file, metadata, table, start)


@dataclass
class _Walk:
    """A place in the bytes of a file, from which one value after the other is read."""

    data: mmap.mmap
    at: int = 0
    within: str = "its header"
    values: int = 0  # in arrays so far

    def left(self) -> int:
        return len(self.data) - self.at

    def need(self, count: int) -> None:
        if count > self.left():
            raise _FileError(f"ends within {self.within}, or is damaged: {_AGAIN}")

    def number(self, letter: str) -> Any:
        size = struct.calcsize(letter)
        self.need(size)
        (found,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += size
        return found

    def string(self) -> str:
        length = self.number("Q")
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _FileError(f"has a string that is not UTF-8 in {self.within}: {_AGAIN}") from None

    def name(self) -> str:
        found = self.string()
        if len(found) > _LONGEST_NAME:
            raise _FileError(f"has a name of {len(found):,} characters in {self.within}: {_AGAIN}")
        return found

    def skip(self, count: int) -> None:
        self.need(count)
        self.at += count


def _header(walk: _Walk) -> tuple[int, int]:
    """How many tensors and how many values of metadata a file says that it has."""
    magic = walk.data[:4]
    if magic != _MAGIC:
        what = _OTHERS.get(magic, f"another format (it begins with {magic!r})")
        raise _FormatError(f"is no GGUF file but {what}: give a GGUF file")
    walk.at = 4
    number = walk.number("I")
    if number & 0xFFFF == 0:
        raise _FormatError(
            "is written in the other byte order: convert it with gguf's gguf-convert-endian, or "
            "get the file for this one"
        )
    if number not in _VERSIONS:
        remedy = "write it again with a current llama.cpp" if number == 1 else _AGAIN
        raise _FormatError(
            f"is in version {number} of GGUF, and versions {_VERSIONS[0]} and {_VERSIONS[1]} are "
            f"read: {remedy}"
        )
    tensors, pairs = walk.number("Q"), walk.number("Q")
    # (An entry has a name's length, a number of dimensions or a kind, and more.)
    if tensors > min(_MOST_TENSORS, walk.left() // 24):
        raise _FileError(f"says that it has {tensors:,} tensors, which it cannot hold: {_AGAIN}")
    if pairs > min(_MOST_VALUES, walk.left() // 13):
        raise _FileError(
            f"says that it has {pairs:,} values of metadata, which it cannot hold: {_AGAIN}"
        )
    return tensors, pairs


def _metadata(walk: _Walk, pairs: int) -> Iterator[tuple[str, Any]]:
    """The metadata of a file, name by name."""
    seen = set()
    for _ in range(pairs):
        walk.within = "its metadata"
        name = walk.name()
        if name in seen:
            raise _FileError(f"has the metadata {name!r} twice: {_AGAIN}")
        seen.add(name)
        walk.within = f"the metadata {name!r}"
        kind = walk.number("I")
        yield name, _array(walk) if kind == _ARRAY else _value(walk, kind)


def _value(walk: _Walk, kind: int) -> Any:
    if kind == _STRING:
        return walk.string()
    if kind not in _LETTERS:
        raise _FileError(f"has a value of the unknown kind {kind} in {walk.within}: {_AGAIN}")
    return walk.number(_LETTERS[kind])


def _array(walk: _Walk) -> list[Any]:
    kind, count = walk.number("I"), walk.number("Q")
    if kind != _STRING and kind not in _SIZES:
        what = "an array of arrays" if kind == _ARRAY else f"an array of the unknown kind {kind}"
        raise _FileError(f"has {what} in {walk.within}, which no reader knows: {_AGAIN}")
    walk.values += count
    if walk.values > _MOST_VALUES or count * _SIZES.get(kind, 8) > walk.left():
        raise _FileError(
            f"says that it has {count:,} values in {walk.within}, which it cannot hold: {_AGAIN}"
        )
    if kind == _STRING:
        return [walk.string() for _ in range(count)]
    start = walk.at
    walk.skip(count * _SIZES[kind])
    return list(struct.unpack_from(f"<{count}{_LETTERS[kind]}", walk.data, start))


def _check_split(known: dict[str, Any]) -> None:
    count = known.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        number = known.get("split.no", 0)
        part = f"part {number + 1}" if isinstance(number, int) else "one part"
        raise _FormatError(
            f"is {part} of a model in {count} files: join them first, with `llama-gguf-split "
            "--merge FIRST OUT` of llama.cpp"
        )


def _alignment(known: dict[str, Any]) -> int:
    found = known.get("general.alignment", _ALIGNMENT)
    if type(found) is not int or found < 1 or found & (found - 1):
        raise _FileError(f"has the general.alignment {found!r}, which is no power of two: {_AGAIN}")
    return found


def _tensors(walk: _Walk, count: int) -> Iterator[Tensor]:
    seen = set()
    for _ in range(count):
        walk.within = "its table of tensors"
        name = walk.name()
        if name in seen or not name:
            what = f"the tensor {name!r} twice" if name else "a tensor without a name"
            raise _FileError(f"has {what}: {_AGAIN}")
        seen.add(name)
        walk.within = f"what it says of the tensor {name!r}"
        dimensions = walk.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _FileError(
                f"has the tensor {name!r} with {dimensions:,} dimensions, where no more than "
                f"{_MOST_DIMENSIONS} can be: {_AGAIN}"
            )
        shape = tuple(walk.number("Q") for _ in range(dimensions))
        kind, offset = walk.number("I"), walk.number("Q")
        known, size = _size(name, shape, kind)
        yield Tensor(name, shape, known, offset, size)


def _size(name: str, shape: tuple[int, ...], kind: int) -> tuple[GGMLQuantizationType, int]:
    """The type of a tensor, and the bytes that it takes: rows are of whole blocks."""
    try:
        known = GGMLQuantizationType(kind)
        block, in_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise _FormatError(
            f"has the tensor {name!r} of type {kind}, which gguf {version('gguf')} does not know: "
            "try a newer gguf, or get the model in another quantisation"
        ) from None
    elements = 1
    for one in shape:
        elements *= one
    if not elements or not shape or shape[0] % block:
        sizes = " x ".join(map(str, reversed(shape))) or "no size"
        raise _FileError(
            f"has the tensor {name!r} of {sizes}, which type {known.name} cannot have: {_AGAIN}"
        )
    return known, elements // block * in_bytes


def _check_places(table: list[Tensor], start: int, alignment: int, length: int) -> None:
    """Refuse tensors that overlap, leave gaps, as llama.cpp does, or end elsewhere than the file.

    (Where the table lacks a tensor, all data would be taken from too far in front.)
    """
    expected = 0
    for tensor in sorted(table, key=lambda one: one.offset):
        if tensor.offset != expected:
            raise _FileError(
                f"has the tensor {tensor.name!r} at byte {tensor.offset:,} of its data, where it "
                f"should be at {expected:,}, so that sizes in its table are wrong: {_AGAIN}"
            )
        if (end := start + tensor.offset + tensor.size) > length:
            raise _FileError(
                f"has {length:,} bytes, and its tensor {tensor.name!r} would end at byte {end:,}: "
                f"it is damaged or not whole, {_AGAIN}"
            )
        expected += -(-tensor.size // alignment) * alignment
    if table and length > start + expected:
        raise _FileError(
            f"has {length - start - expected:,} bytes behind its last tensor, so that sizes in its "
            f"table are wrong: {_AGAIN}"
        )
