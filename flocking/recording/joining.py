"""``concat``: several recordings of one model as one, along their sequences."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from flocking.models import split_place, warn
from flocking.recording.dataset import (
    ATTRIBUTES,
    COORDINATES,
    FIRST,
    GENERATION,
    NOT_TOLD,
    PROMPT,
    SCHEMA_VERSION,
    VARIABLES,
)
from flocking.recording.entrance import Canonical, canonical

_FIELDS = VARIABLES | COORDINATES
# What must be equal, since measures compare sequences with each other: other weights, another
# precision, another first token or other windows would be taken for a difference between texts.
_EQUAL = (
    *("model", "model_path", "revision", "architecture", "dtype", "special_tokens", "window"),
    *("adapter", "autocast"),
)
_BY_LAYER = ("module", "d_ff", "experts")

_Spans = list[tuple[slice, slice]]


class _Layout(NamedTuple):
    """Starts of windows: of the prompt, the first token's included, and of the generation."""

    prompt: list[int]
    generation: list[int]

    @property
    def windows(self) -> int:
        return len(self.prompt) + len(self.generation)

    def spans(self, own: _Layout) -> _Spans:
        """Windows of a recording with another layout, and where they lie in this one."""
        prompt, new = slice(0, len(own.prompt)), slice(len(own.prompt), own.windows)
        begin = len(self.prompt)
        return [(prompt, prompt), (new, slice(begin, begin + len(own.generation)))]


def concat(recordings: Iterable[xr.Dataset]) -> xr.Dataset:
    """Put recordings of one model together, along dimension ``sequence``.

    The result is what :func:`flocking.record` gives for all texts at once. Texts of different
    lengths, with more or fewer windows, with or without a generation, are padded as there; xarray's
    own ``concat`` would pad them so that windows of one prompt fall on another's generation.

    Parameters
    ----------
    recordings : iterable of xarray.Dataset
        From :func:`flocking.record`, or sequences and layers selected from it. All must be of one
        model, in one dtype, with the same windows, special tokens, layers and variables.

    Returns
    -------
    xarray.Dataset
        In memory, with a copy of the values, or in chunks as they are; a single recording is given
        back as it is. Labels of ``sequence`` are kept if all are distinct, and otherwise are 0, 1,
        2, ... Coordinates of your own are kept if all recordings have them. An attribute that
        differs, such as ``seed`` or ``torch_version``, becomes the list of its values. Attribute
        ``skipped``, where texts were left out, says of which recording each was.

    Raises
    ------
    TypeError
        If something is not a recording, or one is given instead of several.
    ValueError
        If there is none, or they differ in what would make measures of the result wrong: the
        message names it.

    Warns
    -----
    UserWarning
        If a coordinate of your own, or names of sequences that are not distinct, are left out.

    Examples
    --------
    >>> first = flocking.record(model, "Birds of a feather", progress=False)
    >>> texts = ["The starlings turned as one.", "They turned again."]
    >>> second = flocking.record(model, texts, progress=False)
    >>> both = flocking.concat([first, second])
    >>> both.sequence.values.tolist(), both.text.values.tolist()[:2]
    ([0, 1, 2], ['Birds of a feather', 'The starlings turned as one.'])
    >>> flocking.flocking_score(both).sizes["sequence"]
    3
    """
    if isinstance(recordings, xr.Dataset | xr.DataArray | str) or not isinstance(
        recordings, Iterable
    ):
        raise TypeError(
            f"recordings is a {type(recordings).__name__}: give a list of recordings, as in "
            "concat([first, second])."
        )
    given = list(recordings)
    if not given:
        raise ValueError("there is no recording in the list: give one or more.")
    taken = [_taken(number, recording) for number, recording in enumerate(given)]
    if len(given) == 1:
        return given[0]
    first = taken[0].recording
    members = [first]
    attributes = [each.recording.attrs for each in reversed(taken)]
    told = {name: value for each in attributes for name, value in each.items() if name in NOT_TOLD}
    known = first.assign_attrs(told)  # as of the first recording that tells, if the first does not
    members += [_like(known, each.recording, n) for n, each in enumerate(taken[1:], 1)]
    layouts = [_layout(number, member) for number, member in enumerate(members)]
    layout = _common(layouts)
    sizes = {
        **{dim: max(member.sizes[dim] for member in members) for dim in first.sizes},
        "sequence": sum(member.sizes["sequence"] for member in members),
        "window": layout.windows,
    }
    spans = [layout.spans(own) for own in layouts]
    joined = {
        name: _joined(name, [member[name].variable for member in members], sizes, spans)
        for name, field in _FIELDS.items()
        if "sequence" in field.dims and all(name in member.variables for member in members)
        if name != "sequence"
    }
    own = _own_coordinates([(each.recording, "sequence" in each.single) for each in taken])
    result = _labelled(members, joined, own, layout)
    result = result.reset_coords([name for name in given[0].data_vars if name in own])
    single = set(taken[0].single).intersection(*(each.single for each in taken[1:]))
    return Canonical(result, tuple(single - {"sequence", "window"})).restored(result)


# --------------------------------------------------------------------------------------
# What may be put together


def _taken(number: int, recording: object) -> Canonical:
    """A recording in canonical form with all that it has; the user's own data as coordinates."""
    wanted = ["tokens", "start", "token_window"]
    if isinstance(recording, xr.Dataset):
        wanted += [name for name in VARIABLES if name in recording]
        recording = recording.set_coords([n for n in recording.data_vars if n not in VARIABLES])
    try:
        whole = canonical(recording, *wanted, some_layers=True, in_chunks=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"recording {number}: {error}") from None
    data = whole.recording
    if "token" in data.coords:
        data = data.isel(token=np.argsort(data.token.values, kind="stable"))
    if "model_path" not in data.attrs:  # an older recording, whose model's name is a path
        name, path = split_place(str(data.attrs.get("model", "")))
        data = data.assign_attrs(model=name, model_path=path)
    return Canonical(data, whole.single)


def _like(first: xr.Dataset, other: xr.Dataset, number: int) -> xr.Dataset:
    """Another recording with the first one's order of layers, if the two can be put together."""
    for name in _EQUAL:
        mine, theirs = first.attrs.get(name), other.attrs.get(name)
        if name in NOT_TOLD and None in (mine, theirs):
            continue
        if not _same(mine, theirs):
            raise ValueError(_differ(name, mine, theirs, number))
    kinds = [[name for name in VARIABLES if name in each] for each in (first, other)]
    if kinds[0] != kinds[1]:
        (name, *_) = sorted({*kinds[0]} ^ {*kinds[1]})
        lacking = number if name in kinds[0] else 0
        option = VARIABLES[name].option or "the same options"
        raise ValueError(
            f"recording {lacking} has no {name!r}: record all of them with record(..., {option}), "
            f"or leave it out with drop_vars({name!r})."
        )
    for dim in ("layer", "relative_layer"):
        mine, theirs = (
            each[dim].values.tolist() if dim in each.dims else [] for each in (first, other)
        )
        if len({*mine}) < len(mine) or sorted(mine, key=str) != sorted(theirs, key=str):
            raise ValueError(_differ(dim, mine, theirs, number))
        if mine != theirs:
            other = other.isel({dim: [theirs.index(label) for label in mine]})
    for name in _BY_LAYER:
        mine, theirs = (
            each[name].values.tolist() if name in each.coords else None for each in (first, other)
        )
        if mine != theirs:
            raise ValueError(_differ(name, mine, theirs, number))
    return other


def _differ(name: str, mine: object, theirs: object, number: int) -> str:
    return (
        f"recording {number} has {name} {theirs!r}, and recording 0 has {mine!r}: only recordings "
        "of one model, made in the same way, can be put together."
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):  # whose text may leave values out
        return bool(np.array_equal(a, b))
    return (type(a) is type(b) and bool(np.array_equal(a, b))) or str(a) == str(b)


def _layout(number: int, member: xr.Dataset) -> _Layout:
    """A recording's windows, which must be all that it was made with."""
    phase = member.phase.values.tolist()
    prompt, new = phase.count(PROMPT), phase.count(GENERATION)
    complete = (
        phase == [FIRST] + [PROMPT] * prompt + [GENERATION] * new
        and member.window.values.tolist() == list(range(len(phase)))
        and member.token_window.values.max(initial=-1) < len(phase)
    )
    if not complete:
        raise ValueError(
            f"recording {number} has a part of its windows only: put recordings together first, "
            "and select windows of the result."
        )
    starts = member.start.values.tolist()
    return _Layout(starts[: 1 + prompt], starts[1 + prompt :])


def _common(layouts: list[_Layout]) -> _Layout:
    """The windows of all recordings together."""
    prompt = max((own.prompt for own in layouts), key=len)
    generation = max((own.generation for own in layouts), key=len)
    for number, own in enumerate(layouts):
        for mine, longest in ((own.prompt, prompt), (own.generation, generation)):
            if mine != longest[: len(mine)]:
                raise ValueError(
                    f"windows of recording {number} begin at {mine}, and those of others at "
                    f"{longest[: len(mine)]}: record all with the same window."
                )
    return _Layout(prompt, generation)


# --------------------------------------------------------------------------------------
# Putting together


def _joined(
    name: str, parts: list[xr.Variable], sizes: dict[Any, int], spans: list[_Spans]
) -> xr.Variable:
    """A variable of all recordings: each one's values in its rows and windows, the rest filled."""
    field = _FIELDS[name]
    if name == "token_window":
        parts = [_renumbered(part, span) for part, span in zip(parts, spans, strict=True)]
    fill: Any = "" if field.dtype == "object" else field.fill
    if any(part.chunks is not None for part in parts):  # stays chunked, and on disk
        padded = [_padded(p, sizes, span, fill) for p, span in zip(parts, spans, strict=True)]
        return xr.Variable.concat(padded, "sequence")
    dims = parts[0].dims
    kind = np.dtype(field.dtype).kind
    dtype = np.result_type(*(p.dtype for p in parts)) if kind == "f" else np.dtype(field.dtype)
    whole = np.full([sizes[dim] for dim in dims], fill, dtype)
    row = 0
    for part, span in zip(parts, spans, strict=True):
        place = {dim: slice(size) for dim, size in part.sizes.items()}
        place["sequence"] = slice(row, row + part.sizes["sequence"])
        row += part.sizes["sequence"]
        values = part.values
        for here, there in span if "window" in dims else [(slice(None), slice(None))]:
            place["window"] = there
            mine = tuple(here if dim == "window" else slice(None) for dim in dims)
            whole[tuple(place[dim] for dim in dims)] = values[mine]
    return xr.Variable(dims, whole, parts[0].attrs)


def _renumbered(window: xr.Variable, spans: _Spans) -> xr.Variable:
    """Each token's window, by the number that the window has in all recordings together."""
    numbers = [n for _, there in spans for n in range(there.start, there.stop)]
    return window.copy(data=np.array([*numbers, -1])[window.values.astype(np.int64)])


def _padded(part: xr.Variable, sizes: dict[Any, int], spans: _Spans, fill: Any) -> xr.Variable:
    """A chunked variable with the sizes of all recordings together."""
    if "window" in part.dims:
        (prompt, _), (new, there) = spans
        gap = {"window": (0, there.start - prompt.stop)}
        pieces = [part.isel(window=prompt).pad(gap, constant_values=fill), part.isel(window=new)]
        part = xr.Variable.concat(pieces, "window")
    room = {d: sizes[d] - n for d, n in part.sizes.items() if d != "sequence" and sizes[d] > n}
    if part.dtype.kind in "OTU":
        return _padded_texts(part, room, fill)
    return part.pad({d: (0, more) for d, more in room.items()}, constant_values=fill)


def _padded_texts(part: xr.Variable, room: dict[Hashable, int], fill: str) -> xr.Variable:
    """A chunked variable of texts with more room at the ends: dask pads numbers only."""
    for dim, more in room.items():
        sizes = {**part.sizes, dim: more}
        gap = xr.Variable(part.dims, np.full(list(sizes.values()), fill, part.dtype))
        chunks = {d: sizes for d, sizes in part.chunksizes.items() if d != dim}
        part = xr.Variable.concat([part, gap.chunk(chunks)], dim)
    return part


def _labelled(
    members: list[xr.Dataset],
    joined: dict[str, xr.Variable],
    own: dict[Hashable, xr.Variable],
    layout: _Layout,
) -> xr.Dataset:
    """The Dataset of the joined variables, with the labels of all recordings."""
    first = members[0]
    windows = layout.prompt + layout.generation
    phase = [FIRST] + [PROMPT] * (len(layout.prompt) - 1) + [GENERATION] * len(layout.generation)
    widest = max(members, key=lambda member: member.sizes.get("neuron", 0))
    longest = max(members, key=lambda member: member.sizes["token"])
    made = {
        "sequence": xr.Variable("sequence", _labels(members)),
        "window": xr.Variable("window", np.arange(len(windows))),
        "phase": xr.Variable("window", np.array(phase, dtype=str)),
        "start": xr.Variable("window", np.array(windows), first.start.attrs),
    }
    for name, source in (("neuron", widest), ("expert", widest), ("token", longest)):
        if name in source.coords:
            made[name] = source[name].variable
    coordinates = {}
    for name, field in COORDINATES.items():
        # (What is not in all recordings is in none of the result's sequences.)
        common = None if "sequence" in field.dims else first.variables.get(name)
        coordinates[name] = made.get(name, joined.get(name, common))
    attributes = _attributes(members)
    return xr.Dataset(
        {name: joined[name] for name in VARIABLES if name in joined},
        {name: values for name, values in (coordinates | own).items() if values is not None},
        attributes,
    )


def _labels(members: list[xr.Dataset]) -> np.ndarray:
    """Labels of the sequences: their own if all are distinct, else their numbers."""
    labels = [label for member in members for label in member["sequence"].values.tolist()]
    for kind in (int, str):
        if all(isinstance(label, kind) for label in labels) and len({*labels}) == len(labels):
            return np.array(labels)
    if any(isinstance(label, str) for label in labels):
        warn("Names of sequences repeat: they are numbered in the result.")
    return np.arange(len(labels))


def _attributes(members: list[xr.Dataset]) -> dict[Hashable, Any]:
    """Attributes that are equal; the schema's, where they differ, as lists of their values."""
    result: dict[Hashable, Any] = {}
    for name in dict.fromkeys([*ATTRIBUTES, *(n for member in members for n in member.attrs)]):
        if name == "schema_version":
            result[name] = SCHEMA_VERSION
        elif all(_same(member.attrs.get(name), members[0].attrs.get(name)) for member in members):
            result |= {name: members[0].attrs[name]} if name in members[0].attrs else {}
        elif name in ATTRIBUTES:
            values = _distinct([member.attrs.get(name) for member in members])
            result[name] = values[0] if name in NOT_TOLD else values  # (they are equal)
    skipped = [
        f"recording {number}, text {text}"
        for number, member in enumerate(members)
        for text in member.attrs.get("skipped", [])
    ]
    return {**result, "skipped": skipped} if skipped else result


def _distinct(values: list[Any]) -> list[Any]:
    """Values of an attribute, each once; of those that are lists already, what is in them."""
    found: list[Any] = []
    for value in values:
        value = value.tolist() if isinstance(value, np.ndarray) else value
        several = value if isinstance(value, list) else [value]
        found += [each for each in several if each is not None and each not in found]
    return found


def _own_coordinates(members: list[tuple[xr.Dataset, bool]]) -> dict[Hashable, xr.Variable]:
    """Coordinates of the user's own that all recordings have; those that differ, by sequence.

    Parameters
    ----------
    members : list of (xarray.Dataset, bool)
        Recordings, and whether each is of one sequence that was selected.
    """
    kept: dict[Hashable, xr.Variable] = {}
    left = []
    for name in dict.fromkeys(name for member, _ in members for name in member.coords):
        if not all(name in member.coords for member, _ in members):
            left.append(str(name))
        if name in _FIELDS or name in left:
            continue
        parts = [member[name].variable.to_base_variable() for member, _ in members]
        equal = all(part.equals(parts[0]) for part in parts)
        by_sequence = any("sequence" in part.dims for part in parts) or any(
            single and not part.dims for part, (_, single) in zip(parts, members, strict=True)
        )
        if equal and not by_sequence:
            kept[name] = parts[0]
            continue
        rows = [
            part
            if "sequence" in part.dims
            else part.set_dims({"sequence": member.sizes["sequence"], **part.sizes})
            for part, (member, _) in zip(parts, members, strict=True)
        ]
        shapes = {tuple((d, n) for d, n in part.sizes.items() if d != "sequence") for part in rows}
        if len(shapes) > 1 or {"window", "token"} & {*rows[0].dims}:
            left.append(str(name))
        else:
            kept[name] = xr.Variable.concat(rows, "sequence")
    if left:
        warn(f"Not all recordings have {', '.join(sorted(left))} in the same form: left out.")
    return kept
