"""The form in which measures take a recording, whatever was selected from it; and what they refuse.

xarray's users transpose, select single layers, permute and put together. Every measure goes through
:func:`measure`, which brings a recording to the schema's dimensions, gives the result those that
the user's recording had, and refuses what contradicts the sums that a recording is made of. The
checks read labels, counts and norms, and never the large arrays.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import xarray as xr

from flocking.recording.dataset import (
    COORDINATES,
    FIRST,
    FLOCKING_VERSION,
    GENERATION,
    PROMPT,
    SCHEMA_VERSION,
    VARIABLES,
)

_FIELDS = VARIABLES | COORDINATES
_SINGLE = ("sequence", "layer", "window", "relative_layer")  # dimensions of which one may be taken
_ALWAYS = ("window", "phase", "d_ff")  # what every measure needs
_LARGE = ("neuron", "routed_expert")  # dimensions of arrays that may stay on disk
_TEXTS = ("text", "token_text")  # so may these, which no measure reads
_BY_TOKEN = ("token_id", "token_window")  # and these, which grow with each text, if none asks
_TOKENS = 2**20  # that are looked at together
# Whole numbers that are checked wherever a recording has them.
_WHOLE = (
    "window",
    "layer",
    "start",
    "tokens",
    "token_window",
    "prompt_tokens",
    "d_ff",
    "experts",
)
_REMEDY = (
    "measure before averaging or grouping, select with isel and sel without drop=True, and put "
    "recordings together with flocking.concat"
)

_Data = TypeVar("_Data", xr.DataArray, xr.Dataset)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Canonical(NamedTuple):
    """A recording with all of the schema's dimensions, in its order.

    Attributes
    ----------
    recording : xarray.Dataset
        The variables that were asked for and ``tokens``, all coordinates; windows and neurons in
        ascending order. What has no neurons is in memory, but for what there is of each token and
        was not asked for.
    single : tuple of str
        Dimensions of size 1 that the user's recording has as scalars.
    """

    recording: xr.Dataset
    single: tuple[str, ...]

    def restored(self, result: _Data) -> _Data:
        """A measure's result without the dimensions that the user's recording does not have."""
        return result.squeeze([dim for dim in self.single if dim in result.dims])


def measure(*names: str, **optional: tuple[str, ...]) -> Callable[[_Function], _Function]:
    """Make a function of a canonical recording one of any selection from a recording.

    Parameters
    ----------
    *names : str
        Variables and coordinates that the function needs.
    **optional : tuple of str
        What it needs, too, if the keyword argument of this name is true.
    """

    def wrapping(function: _Function) -> _Function:
        @functools.wraps(function)
        def measured(recording: xr.Dataset, *args: Any, **kwargs: Any) -> Any:
            more = [name for option in optional if kwargs.get(option) for name in optional[option]]
            whole = canonical(recording, *names, *more)
            taken = whole.recording.drop_vars("prompt_tokens", errors="ignore")  # checked by now
            return whole.restored(function(taken, *args, **kwargs))

        return cast(_Function, measured)

    return wrapping


def require(recording: object, *names: str, phase: str | None = None) -> xr.Dataset:
    """Check that something is a recording, and has what a measure needs.

    Parameters
    ----------
    recording : xarray.Dataset
        From :func:`flocking.record`, or what was selected from it.
    *names : str
        Variables and coordinates that are needed, for every layer.
    phase : str, optional
        A phase that is needed.

    Returns
    -------
    xarray.Dataset
        The recording.

    Raises
    ------
    TypeError
        If it is not a recording.
    ValueError
        If it is of another schema version, lacks something, or was changed so that its parts
        contradict each other. The message says what to do.
    """
    whole = canonical(recording, *names).recording
    if phase is not None and not (whole.phase == phase).any():
        option = ""
        if phase == GENERATION:
            option = "(..., max_new_tokens=...), or with prompt_tokens or continuation"
        raise ValueError(f"the recording has no phase {phase!r}: make it with record{option}.")
    return cast(xr.Dataset, recording)


def canonical(
    recording: object, *names: str, some_layers: bool = False, in_chunks: bool = False
) -> Canonical:
    """The canonical form of a recording; see :func:`require` for the arguments and errors.

    With `some_layers`, ``relative`` may be of some layers only, and is left as it is. With
    `in_chunks`, all that is in chunks stays there, also what there is of each token.
    """
    if not isinstance(recording, xr.Dataset) or "phase" not in recording.variables:
        without = f" without 'phase': {_REMEDY}" if isinstance(recording, xr.Dataset) else ""
        raise TypeError(
            "expected a recording (the Dataset that flocking.record returns), got a "
            f"{type(recording).__name__}{without}."
        )
    _check_version(recording)
    recording = recording.set_coords([name for name in COORDINATES if name in recording.data_vars])
    needed = list(dict.fromkeys((*names, *_ALWAYS)))
    _check_presence(recording, needed)
    if "token" in recording.coords and "token" not in recording.dims:
        raise ValueError(_of_tokens("it has one token only"))
    single = tuple(d for d in _SINGLE if d in recording.coords and d not in recording.dims)
    data = whole_neurons(_shaped(recording, needed, single, in_chunks))
    _check_values(data)
    labels = data.window.values
    if len(np.unique(labels)) < len(labels):
        raise ValueError("labels of 'window' repeat: their tokens would be counted twice.")
    if (np.diff(labels) < 0).any():
        data = data.isel(window=np.argsort(labels))
    _check_tokens(data)
    _check_missing(data, needed)
    if "relative" in needed and not some_layers and "relative_layer" in data["relative"].dims:
        data = _for_all_layers(data)
    return Canonical(data, single)


# --------------------------------------------------------------------------------------
# The version, and what is there


def _check_version(recording: xr.Dataset) -> None:
    found = recording.attrs.get("schema_version", SCHEMA_VERSION)
    number: int | None
    try:
        number = operator.index(found)
    except TypeError:
        number = None
    if number == SCHEMA_VERSION:
        return
    writer = recording.attrs.get("flocking_version")
    by = f", written by flocking {writer}" if writer else ""
    newer = number is not None and number > SCHEMA_VERSION
    raise ValueError(
        f"the recording has schema version {found!r}{by}, and flocking {FLOCKING_VERSION} reads "
        f"version {SCHEMA_VERSION}: {'update flocking' if newer else 'record again'}."
    )


def _check_presence(recording: xr.Dataset, names: Iterable[str]) -> None:
    for name in names:
        if name in recording.variables:
            continue
        if name in VARIABLES:
            option = VARIABLES[name].option
            remedy = f"make it with record(..., {option})" if option else "make it with record"
            raise ValueError(f"the recording has no variable {name!r}: {remedy}.")
        raise ValueError(
            f"the recording has no coordinate {name!r}, which record gives it: {_REMEDY}."
        )


def _shaped(
    recording: xr.Dataset, needed: list[str], single: tuple[str, ...], in_chunks: bool
) -> xr.Dataset:
    """What is needed and all coordinates, with the schema's dimensions."""
    wanted = {*needed, *_WHOLE}
    data = recording.drop_vars([name for name in recording.data_vars if name not in wanted])
    shaped: dict[str, xr.Variable] = {}
    unfit = []
    for name, field in _FIELDS.items():
        if name not in data.variables or name in data.xindexes:
            continue
        dims = field.dims
        if name == "relative" and "relative_layer" in data.coords:
            dims = tuple("relative_layer" if dim == "layer" else dim for dim in dims)
        variable = data.variables[name]
        if _fits(variable, dims, single):
            stays = bool({*dims} & {*_LARGE}) or name in _TEXTS
            stays |= name in _BY_TOKEN and (name not in needed or name == "token_window")
            stays |= in_chunks and variable.chunks is not None
            shaped[name] = _with_dimensions(variable, dims, stays)
        elif name in wanted:
            raise ValueError(_of_dimensions(name, variable.dims, dims))
        else:
            unfit.append(name)
    data = data.drop_vars([*shaped, *unfit])
    data = data.assign_coords({name: v for name, v in shaped.items() if name in COORDINATES})
    return data.assign({name: v for name, v in shaped.items() if name in VARIABLES})


def _fits(variable: xr.Variable, dims: tuple[str, ...], single: tuple[str, ...]) -> bool:
    """Whether a variable has these dimensions, but for those of which one was taken."""
    return {*variable.dims} <= {*dims} and {*dims} - {*variable.dims} <= {*single}


def _with_dimensions(variable: xr.Variable, dims: tuple[str, ...], stays: bool) -> xr.Variable:
    """A variable with these dimensions in this order; in memory, unless it stays where it is."""
    if not stays:
        variable = xr.Variable(variable.dims, variable.values, variable.attrs)
    missing = [dim for dim in dims if dim not in variable.dims]
    if missing:
        variable = variable.set_dims((*missing, *variable.dims))
    return variable if variable.dims == dims else variable.transpose(*dims)


def _for_all_layers(data: xr.Dataset) -> xr.Dataset:
    """The recording whose ``relative`` has ``layer`` again, if it has all layers that are left."""
    kept, labels = data.relative_layer.values.tolist(), data.layer.values.tolist()
    if not set(labels) <= set(kept):
        raise ValueError(
            "the recording has 'relative' of some layers only: make it with record(..., "
            "relative=True), or select these layers."
        )
    part = data["relative"].variable.isel(relative_layer=[kept.index(label) for label in labels])
    dims = VARIABLES["relative"].dims
    relative = xr.Variable(dims, part.data, part.attrs)
    return data.drop_vars(["relative", "relative_layer"]).assign(relative=relative)


# --------------------------------------------------------------------------------------
# What the values say


def whole_neurons(data: _Data) -> _Data:
    """What has all neurons, in ascending order; a part of them is refused.

    Parameters
    ----------
    data : xarray.DataArray or xarray.Dataset
        A recording, a statistic or a selection; where it has no coordinates ``neuron`` and
        ``d_ff``, there is nothing to tell a part by.
    """
    if "neuron" not in data.dims:
        if "neuron" in data.coords:
            raise ValueError(_of_neurons("it has one neuron only"))
        return data
    size = data.sizes["neuron"]
    labels = data["neuron"].values if "neuron" in data.coords else np.arange(size)
    order = np.argsort(labels, kind="stable")
    if labels.dtype.kind not in "iuf" or not np.array_equal(labels[order], np.arange(size)):
        raise ValueError(_of_neurons(f"its labels of 'neuron' are not 0 to {size - 1}"))
    widest = float(np.max(data["d_ff"].values, initial=0)) if "d_ff" in data.coords else 0
    if widest > size:
        raise ValueError(_of_neurons(f"it has {size} neurons of {widest:.0f}"))
    return data if np.array_equal(labels, np.arange(size)) else data.isel(neuron=order)


def _check_values(data: xr.Dataset) -> None:
    """Whole numbers where the schema has them, and the schema's phases."""
    for name in _WHOLE:
        if name not in data.variables or data[name].dtype.kind in "iu":
            continue
        values = data[name].values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name!r} has no value in some places, {_as_after_where()}.")
        if name == "layer" and values.dtype.kind not in "iuf":
            continue  # labels of the user's
        if values.dtype.kind not in "iuf" or (values != np.trunc(values)).any():
            raise ValueError(f"{name!r} is not whole numbers, as in a recording: {_REMEDY}.")
    if (data["d_ff"].values < 1).any():
        raise ValueError("'d_ff' is below 1 at some layers, which have a neuron or more each.")
    known = {FIRST, PROMPT, GENERATION}
    if not set(data.phase.values.tolist()) <= known:
        raise ValueError(f"'phase' is not first, prompt or generation, {_as_after_where()}.")


def _check_missing(data: xr.Dataset, needed: Iterable[str]) -> None:
    """Values at all tokens of a window, in whatever is needed of each token."""
    if "token_window" not in data.coords:
        return
    for name in needed:
        dims = _FIELDS[name].dims
        if "token" not in dims or set(dims) & set(_LARGE):
            continue
        missing = data[name].isnull() & (data.token_window >= 0)
        if bool(missing.any()):
            raise ValueError(f"{name!r} has no value at some tokens, {_as_after_where()}.")


def _check_tokens(data: xr.Dataset) -> None:
    """The tokens are those that the windows sum over, and lie where the windows begin."""
    if "token_window" not in data.coords or "tokens" not in data:
        return
    if not data.sizes["window"] or not data.sizes["token"]:
        return
    count = max(1, _TOKENS // data.sizes["token"])
    for start in range(0, data.sizes["sequence"], count):
        _check_tokens_of(data.isel(sequence=slice(start, start + count)))


def _check_tokens_of(data: xr.Dataset) -> None:
    """The same, of some sequences."""
    labels, counts = data.window.values, data["tokens"].values
    window = data.token_window.values
    number = np.minimum(np.searchsorted(labels, window), len(labels) - 1)
    sequence, token = np.nonzero(labels[number] == window)
    place = (sequence * len(labels)) + number[sequence, token]
    found = np.bincount(place, minlength=counts.size).reshape(counts.shape)
    if not np.array_equal(found, counts):
        at, where = np.argwhere(found != counts)[0]
        raise ValueError(
            _of_tokens(
                f"it has {found[at, where]} tokens in window {labels[where]:.0f} of sequence "
                f"{_label(data, at)}, which sums over {counts[at, where]:.0f}"
            )
        )
    positions = data.token.values if "token" in data.coords else None
    if positions is None or positions.dtype.kind not in "iu" or "start" not in data.coords:
        return
    first = np.full(counts.size, np.iinfo(np.int64).max)
    np.minimum.at(first, place, positions[token])
    offset = first.reshape(counts.shape) - data.start.values
    _check_offsets(data, np.ma.masked_array(offset, counts == 0))


def _check_offsets(data: xr.Dataset, offset: np.ma.MaskedArray) -> None:
    """Windows begin at their ``start``; those of a generation at the end of the prompt after it."""
    new = data.phase.values == GENERATION
    wrong = (offset[:, ~new] != 0).filled(False).any(axis=1)
    if new.any():
        end = offset[:, new].min(axis=1)
        if "prompt_tokens" in data.coords:
            end = data.prompt_tokens.values
        wrong |= (offset[:, new] != end[:, None]).filled(False).any(axis=1)
    if wrong.any():
        raise ValueError(
            f"windows of sequence {_label(data, int(np.argmax(wrong)))} do not begin where "
            "'start', 'phase' and 'prompt_tokens' say, as after xarray's concat or append of "
            "recordings with other windows: put recordings together with flocking.concat."
        )


def _label(data: xr.Dataset, number: int) -> str:
    return repr(data.sequence.values.tolist()[number])


def _of_dimensions(name: str, dims: tuple[Hashable, ...], expected: tuple[str, ...]) -> str:
    if set(expected) - set(dims) == {"neuron"}:
        return _of_neurons(f"{name!r} has no dimension 'neuron'")
    return (
        f"{name!r} has dimensions ({', '.join(map(str, dims))}), and in a recording "
        f"({', '.join(expected)}): {_REMEDY}."
    )


def _of_neurons(what: str) -> str:
    return (
        f"a part of the neurons cannot be measured, and {what}: relative activations are relative "
        "to all d_ff neurons of a layer, so measure first and select neurons from the result."
    )


def _of_tokens(what: str) -> str:
    return (
        f"tokens do not fit the windows, which are summed already: {what}. Select windows instead "
        "of tokens, as in recording.isel(window=[2, 3])."
    )


def _as_after_where() -> str:
    return (
        "as after where, reindex, or xarray's concat of recordings of different lengths: put "
        "recordings together with flocking.concat, and select with isel or sel"
    )
