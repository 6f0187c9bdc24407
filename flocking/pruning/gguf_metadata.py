"""The metadata of a GGUF file in its bytes, so that another file has the very same."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue, WriterState

if TYPE_CHECKING:
    from flocking.models.gguf import Tensor

_HEADER = 24  # bytes: magic, version, number of tensors, number of values
_LETTERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


class Pair(NamedTuple):
    """One value of a file's metadata.

    Attributes
    ----------
    name : str
        Its key.
    raw : bytes
        All that the file has of it: the key, the kind, the value.
    kind : int
        Of the value, of `gguf.GGUFValueType`; of an array, that of its elements.
    at : int
        Where in `raw` the value, or the first element, begins.
    """

    name: str
    raw: bytes
    kind: int
    at: int

    def numbers(self) -> tuple[int, ...]:
        """The numbers that it holds."""
        letter = _LETTERS[self.kind]
        count = (len(self.raw) - self.at) // struct.calcsize(letter)
        return struct.unpack_from(f"<{count}{letter}", self.raw, self.at)

    def with_numbers(self, numbers: tuple[int, ...]) -> Pair:
        """The same with other numbers, as many of them and of the same kind."""
        packed = struct.pack(f"<{len(numbers)}{_LETTERS[self.kind]}", *numbers)
        return self._replace(raw=self.raw[: self.at] + packed)


def pairs_of(data: memoryview) -> list[Pair]:
    """The metadata of a file that was found to be whole, from its bytes."""
    (count,) = struct.unpack_from("<Q", data, 16)
    walk = _walked(data, _HEADER)
    return [next(walk) for _ in range(count)]


def _walked(data: memoryview, start: int) -> Iterator[Pair]:
    while True:
        value = _after_string(data, start) + 4
        name = bytes(data[start + 8 : value - 4]).decode()
        (kind,) = struct.unpack_from("<I", data, value - 4)
        first, count = value, 1
        if kind == GGUFValueType.ARRAY:
            kind, count = struct.unpack_from("<IQ", data, value)
            first += 12
        end = first
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                end = _after_string(data, end)
        else:
            end += count * struct.calcsize(_LETTERS[kind])
        yield Pair(name, bytes(data[start:end]), kind, first - start)
        start = end


def _after_string(data: memoryview, start: int) -> int:
    (length,) = struct.unpack_from("<Q", data, start)
    return int(start + 8 + length)


class Writer(GGUFWriter):
    """The writer of the package ``gguf``, with metadata that is given in bytes.

    By itself it refuses empty arrays, leaves out empty strings, and guesses the kinds of numbers.
    """

    def __init__(self, path: Path, architecture: str, pairs: list[Pair], alignment: int) -> None:
        super().__init__(path, architecture)
        self.data_alignment = alignment
        self._raw = b"".join(pair.raw for pair in pairs)
        # Of these it writes how many there are.
        self.kv_data = [{pair.name: GGUFValue(pair.raw, GGUFValueType.ARRAY) for pair in pairs}]

    def write_kv_data_to_file(self) -> None:
        """Write the metadata as it was given."""
        for file in self.fout or ():
            file.write(self._raw)
        self.flush()
        self.state = WriterState.KV_DATA

    def announce(self, tensor: Tensor) -> None:
        """Add a tensor to the table, in bytes."""
        *more, columns = reversed(tensor.shape)
        block, size = GGML_QUANT_SIZES[tensor.kind]
        in_bytes = (*more, columns // block * size)
        self.add_tensor_info(
            tensor.name, in_bytes, np.dtype(np.uint8), tensor.size, raw_dtype=tensor.kind
        )
