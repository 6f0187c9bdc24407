"""How the arrays of a recording on disk are cut into chunks, each of which is a file."""

from __future__ import annotations

import math

_CHUNK = 8 * 2**20  # bytes in a chunk, uncompressed, at most


def chunk_sizes(
    dims: tuple[str, ...], shape: tuple[int, ...], item: int, block: int
) -> tuple[int, ...]:
    """One layer of some texts, so that reading a layer and reading a text are both cheap."""
    chunk = dict(zip(dims, (max(1, size) for size in shape), strict=True))
    for dim in ("layer", "relative_layer"):
        if dim in chunk:
            chunk[dim] = 1

    def size() -> int:
        return math.prod(chunk.values()) * item

    # What a block has must be a multiple of what a chunk has: no two blocks share a file.
    for texts in (count for count in range(block, 0, -1) if block % count == 0):
        chunk["sequence"] = texts
        if size() <= _CHUNK:
            break
    for dim in ("window", "token"):
        if dim in chunk and size() > _CHUNK:
            chunk[dim] = max(1, chunk[dim] * _CHUNK // size())
    return tuple(chunk[dim] for dim in dims)


def touched(pieces: list[tuple[int, int]], size: int, chunk: int) -> list[int]:
    """Numbers of the chunks along a dimension that pieces of it, as (from, to), lie in."""
    found: set[int] = set()
    for start, stop in pieces:
        found.update(range(start // max(1, chunk), -(-min(stop, size) // max(1, chunk))))
    return sorted(found)
