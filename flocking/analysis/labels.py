"""Statistics and selections that a function is given: over all neurons, and of the same labels."""

from __future__ import annotations

import numpy as np
import xarray as xr

from flocking.recording import whole_neurons


def checked(name: str, values: xr.DataArray) -> xr.DataArray:
    """A statistic over neurons, all of them and in ascending order.

    Raises
    ------
    TypeError
        If it is not a DataArray of numbers.
    ValueError
        If it has no neurons, or a part of them.
    """
    if isinstance(values, xr.Dataset) and "energy" in values and "phase" in values.coords:
        raise TypeError(f"{name} is a recording: give flocking.statistic(recording, ...).")
    if not isinstance(values, xr.DataArray):
        raise TypeError(
            f"{name} is a {type(values).__name__}: give a DataArray over neurons, as "
            "flocking.statistic and flocking.select return."
        )
    values = whole_neurons(values)
    if "neuron" not in values.dims:
        raise ValueError(f"{name} has dimensions {values.dims}: give a statistic over neurons.")
    if values.dtype.kind not in "iuf":
        kind = "a selection" if values.dtype == bool else f"of dtype {values.dtype}"
        raise TypeError(f"{name} is {kind}: give a statistic, a number for each neuron.")
    return values


def checked_selection(name: str, values: xr.DataArray, dim: str) -> xr.DataArray:
    """A selection along `dim`, checked."""
    if not isinstance(values, xr.DataArray):
        raise TypeError(
            f"{name} is a {type(values).__name__}: give the DataArray that flocking.select returns."
        )
    if values.dtype != bool or dim not in values.dims:
        raise ValueError(
            f"{name} is not a selection along {dim!r}: give what flocking.select returns, or "
            "another bool array and its dim."
        )
    return whole_neurons(values) if dim == "neuron" else values


def aligned(pair: dict[str, xr.DataArray]) -> tuple[xr.DataArray, xr.DataArray]:
    """Two arrays whose common dimensions have the same labels in the same order."""
    (first, a), (second, b) = pair.items()
    if "layer" in a.coords and "layer" in b.coords and "layer" not in {*a.dims} & {*b.dims}:
        layers = [{*np.atleast_1d(values["layer"].values).tolist()} for values in (a, b)]
        if layers[0] != layers[1]:
            raise ValueError(
                f"{first} and {second} are of different layers ({_listed(layers[0])}; "
                f"{_listed(layers[1])}), whose neurons have nothing in common: select the same "
                "layer of both."
            )
    for dim in set(a.dims) & set(b.dims):
        same = a.sizes[dim] == b.sizes[dim]
        if dim in a.indexes and dim in b.indexes and not a.indexes[dim].equals(b.indexes[dim]):
            mine, theirs = a.indexes[dim], b.indexes[dim]
            same = mine.is_unique and theirs.is_unique and {*mine} == {*theirs}
            if same:
                b = b.isel({dim: theirs.get_indexer(mine)})
        if not same:
            raise ValueError(
                f"{first} and {second} cannot be aligned along {dim!r}, where their labels differ: "
                "select the same ones of both."
            )
    return a, b


def _listed(values: set) -> str:
    return ", ".join(map(str, sorted(values, key=str)))
