"""Recordings that a user has chunked: read with dask, block by block, in bounded memory.

The rule: what a recording says about its tokens (labels, counts, norms) is read when a measure is
called, some sequences at a time, so that errors and warnings come as they do in memory; energies,
masses, ranks and relative activations are read when the result's values are asked for. Nothing
here imports dask: xarray does, where it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import xarray as xr

from flocking.recording import COORDINATES, VARIABLES, canonical
from flocking.recording import measure as measure_in_memory

# By token or of a text's length, so that they grow with the number of texts: left unread.
_BY_TOKEN = ("norm", "l1", "token_id", "token_window", "token_text", "text")
_UNREAD = ("token_text", "text")  # which no check looks at
BLOCK = 2**25  # bytes of these that are checked at a time

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_chunked(data: object) -> bool:
    """Whether a DataArray or Dataset, or a part of it, is in chunks that dask reads."""
    if isinstance(data, xr.DataArray):
        return data.chunks is not None
    if not isinstance(data, xr.Dataset):
        return False
    return any(variable.chunks is not None for variable in data.variables.values())


def measure(*names: str, **optional: tuple[str, ...]) -> Callable[[_Function], _Function]:
    """As :func:`flocking.recording.measure`, without reading what is chunked.

    The function gets a canonical recording whose chunked variables are chunked still; what it
    returns may be so, too.
    """

    def wrapping(function: _Function) -> _Function:
        in_memory = measure_in_memory(*names, **optional)(function)

        @functools.wraps(function)
        def measured(recording: xr.Dataset, *args: Any, **kwargs: Any) -> Any:
            if not (isinstance(recording, xr.Dataset) and is_chunked(recording)):
                return in_memory(recording, *args, **kwargs)
            more = [name for option in optional if kwargs.get(option) for name in optional[option]]
            needed = [*names, *more]
            by_token = {
                name: recording.variables[name]
                for name in _BY_TOKEN
                if name in recording.variables and recording.variables[name].chunks is not None
            }
            unread = [name for name in by_token if name in _UNREAD and name not in needed]
            for rows in _blocks(recording, by_token):
                canonical(recording.isel(rows).drop_vars(unread), *needed)
            others = [name for name in needed if name not in by_token]
            whole = canonical(recording.drop_vars(list(by_token)), *others)
            taken = whole.recording.drop_vars("prompt_tokens", errors="ignore")
            kept = {name: by_token[name] for name in by_token if name in (*needed, "text")}
            taken = _with(taken, kept, whole.single)
            return whole.restored(function(taken, *args, **kwargs))

        return cast(_Function, measured)

    return wrapping


def _blocks(
    recording: xr.Dataset, by_token: Mapping[str, xr.Variable]
) -> Iterator[dict[Hashable, slice]]:
    """Places of some sequences at a time, which hold few enough bytes for each token."""
    read = [v for name, v in by_token.items() if name not in _UNREAD and "sequence" in v.dims]
    sequences = recording.sizes.get("sequence", 0)
    if not read or not sequences:
        yield {}
        return
    begin = end = 0
    room = max(1, BLOCK * sequences // max(1, sum(variable.nbytes for variable in read)))
    for size in max((v.chunksizes["sequence"] for v in read), key=max):
        if begin < end and end + size - begin > room:
            yield {"sequence": slice(begin, end)}
            begin = end
        end += size
    yield {"sequence": slice(begin, end)}


def _with(
    data: xr.Dataset, variables: dict[str, xr.Variable], single: tuple[str, ...]
) -> xr.Dataset:
    """The canonical recording with these variables again, in the schema's dimensions."""
    for name, variable in variables.items():
        dims = (VARIABLES | COORDINATES)[name].dims
        missing = [dim for dim in dims if dim not in variable.dims]
        if not ({*variable.dims} <= {*dims} and {*missing} <= {*single}):
            continue  # a coordinate in another form, which no measure needs
        shaped = (variable.set_dims((*missing, *variable.dims)) if missing else variable).transpose(
            *dims
        )
        if name in COORDINATES:
            data = data.assign_coords({name: shaped})
        else:
            data = data.assign({name: shaped})
    return data


def by_chunk(
    function: Callable[..., np.ndarray],
    *variables: xr.Variable,
    inner: list[list[str]],
    outer: list[str],
    sizes: dict[str, int],
    dtype: Any,
) -> xr.Variable:
    """A numpy function of whole rows along `inner`, of each chunk where there are several.

    Parameters
    ----------
    function : callable
        From arrays whose last dimensions are those of `inner` to one whose last are `outer`.
    *variables : xarray.Variable
    inner : list of list of str
        Dimensions that the function needs whole, of each variable.
    outer : list of str
        Last dimensions of the result.
    sizes : dict of str to int
        Sizes of those that no variable has.
    dtype : dtype
        Of the result.
    """
    options: dict[str, Any] = {"allow_rechunk": True, "output_sizes": sizes}
    result = xr.apply_ufunc(
        function,
        *variables,
        input_core_dims=inner,
        output_core_dims=[outer],
        dask="parallelized",
        output_dtypes=[dtype],
        dask_gufunc_kwargs=options,
    )
    return cast(xr.Variable, result)
