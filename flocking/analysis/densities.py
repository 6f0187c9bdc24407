"""Densities: the fraction of neurons that is kept, one for all layers or one for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from typing import Any

import numpy as np
import xarray as xr


def several_densities(densities: Iterable[float]) -> list[float]:
    """Densities to compare, as numbers.

    Raises
    ------
    TypeError
        If `densities` is not one number or more in a list.
    """
    try:
        each = [float(density) for density in densities]
    except (TypeError, ValueError):
        each = []
    if isinstance(densities, str) or not each:
        raise TypeError(f"densities={densities!r}: give a list of numbers, such as [0.25, 0.5].")
    return each


def density_by_layer(
    density: float | Iterable[float], layers: int, labels: Iterable[object] | None = None
) -> list[float]:
    """The density of each layer, from one number for all or one for each.

    What names its layers (a DataArray with coordinate ``layer``, a Series, a dict) counts by
    `labels`, everything else in order.

    Raises
    ------
    ValueError
        If there are as many numbers as neither one nor the layers, or they are of other layers.
    TypeError
        If `density` is not a number, or several.
    """
    if not (isinstance(density, Iterable) and getattr(density, "ndim", 1) > 0):
        return _numbers(density, [density], layers) * layers
    named, values = _named(density)
    each = _numbers(density, values, layers)
    if len(each) != layers:
        raise ValueError(
            f"density: expected one number, or one for each of {layers} layers, got {len(each)}."
        )
    if named is None or labels is None:
        return each
    wanted = list(labels)
    if len({*named}) < len(named) or {*named} != {*wanted}:
        raise ValueError(
            f"density is for layers {', '.join(map(str, named))}, and the layers here are "
            f"{', '.join(map(str, wanted))}: give one for each of these."
        )
    by_label = dict(zip(named, each, strict=True))
    return [by_label[label] for label in wanted]


def _named(density: Any) -> tuple[list[Any] | None, list[Any]]:
    """Labels of the layers that several densities are for, if they name them, and the densities."""
    if isinstance(density, xr.DataArray):
        if density.dims != ("layer",):
            dims = ", ".join(map(str, density.dims))
            raise ValueError(
                f"density has dimensions ({dims}): give one number for each layer, along 'layer'."
            )
        labels = density["layer"].values.tolist() if "layer" in density.coords else None
        return labels, density.values.tolist()
    if isinstance(density, Set | xr.Dataset):
        return None, [None]  # without an order, or of several things
    if hasattr(density, "items"):  # a dict, or a Series
        pairs = list(density.items())
        return [label for label, _ in pairs], [value for _, value in pairs]
    return None, list(density)


def _numbers(density: object, values: list[Any], layers: int) -> list[float]:
    try:
        each = [float(value) for value in values]
    except (TypeError, ValueError):
        each = []
    no_numbers = isinstance(density, str) or any(isinstance(x, bool | np.bool_) for x in values)
    if no_numbers or (not each and layers):
        raise TypeError(f"density={density!r}: give a number, or one for each of {layers} layers.")
    return each


def kept_count(density: float, d_ff: int) -> int:
    """Number of neurons kept at a density: ``floor(density * d_ff + 1e-9)``.

    Parameters
    ----------
    density : float
        Fraction to keep, in (0, 1].
    d_ff : int
        Number of neurons to select from.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If `density` is not in (0, 1], or keeps no neuron at all.
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"density={density}: give the fraction of neurons to keep, above 0 and at most 1."
        )
    count = math.floor(density * d_ff + 1e-9)
    if count == 0:
        raise ValueError(
            f"density={density} keeps none of {d_ff} neurons: give {_rounded_up(1 / d_ff)} or more."
        )
    return count


def _rounded_up(value: float) -> str:
    """A number above 0 to two digits, not below it."""
    digits = 1 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.2g}"


def densities_in_words(densities: list[float]) -> str:
    """One density or the range of several."""
    least, most = min(densities), max(densities)
    return f"density {least:g}" if least == most else f"densities from {least:g} to {most:g}"
