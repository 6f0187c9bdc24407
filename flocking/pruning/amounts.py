"""Amounts in words: bytes, and neurons by layer."""

from __future__ import annotations


def in_words(size: int) -> str:
    """A number of bytes, in the unit that suits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def by_layer(widths: dict[int, int]) -> str:
    """Numbers of neurons of layers, in a few words however many layers there are."""
    different = sorted({*widths.values()})
    if len(different) == 1:
        return f"{different[0]:,} in each of {len(widths)} layers"
    return f"{different[0]:,} to {different[-1]:,} in {len(widths)} layers"
