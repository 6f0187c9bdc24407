"""A recording on disk that grows by blocks of texts, and what says which of them are there.

The arrays are those of a recording (:mod:`flocking.recording.dataset`), with three more along
``sequence``, which :func:`flocking.open_recording` takes away again: ``recorded`` is 1 where the
text's values are complete and 2 where it was left out, ``problem`` why it was, and ``text_digest``
tells the text from others. Blocks of texts are blocks of chunks, so that processes never write the
same file, and ``recorded`` is written last: whatever ends a process, a block is there or it is not.
What was asked for stands in the attributes of ``recorded``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr

from flocking.recording.chunking import chunk_sizes, touched
from flocking.recording.dataset import COORDINATES, GENERATION, VARIABLES, Field, dimensions
from flocking.recording.locations import Location

LAYOUT = 1  # of the attributes of ``recorded``; another number is another layout
RECORDED, DIGEST, PROBLEM = "recorded", "text_digest", "problem"
FILE = "file"
BOOKKEEPING = (RECORDED, DIGEST, PROBLEM)
DONE, LEFT_OUT = 1, 2  # values of ``recorded``

_PADDED = ("token_id", "token_window")  # whole numbers, whose padding is not 0
_ZARR = {"array.write_empty_chunks": True}  # so that a chunk that is absent is one that was lost


class Sizes(NamedTuple):
    """How large the arrays are, besides what the fixed coordinates say.

    Attributes
    ----------
    sequence : int or None
        None where it is not known how many texts there are: it grows.
    prompt_windows : int
        Windows of a prompt, the first token's among them, at most.
    routed_expert : int
    """

    sequence: int | None
    prompt_windows: int
    routed_expert: int


class GrowingStore:
    """The store of a recording of which blocks are written, each by one process.

    Attributes
    ----------
    place : Location
    asked : dict
        What was asked for: ``arguments`` by name, ``block`` (texts in one), ``texts`` (their
        number, or None), ``tokens`` (in all of them, or None) and ``prompt_windows``.
    """

    def __init__(self, place: Location) -> None:
        self.place = place
        self._group = place.opened("r+")
        self.asked: dict[str, Any] = dict(self._array(RECORDED).attrs)

    @classmethod
    def create(
        cls,
        place: Location,
        names: list[str],
        fixed: Mapping[str, np.ndarray],
        sizes: Sizes,
        attributes: Mapping[str, Any],
        asked: Mapping[str, Any],
        *,
        with_files: bool = False,
    ) -> GrowingStore:
        """An empty store.

        Parameters
        ----------
        place : Location
            Where nothing is.
        names : list of str
            Variables of the recording.
        fixed : dict of numpy.ndarray
            Coordinates that are the same for all sequences.
        sizes : Sizes
        attributes : dict
            Of the recording.
        asked : dict
            ``arguments``, ``block``, ``texts`` and ``tokens``.
        with_files : bool
            Whether there is coordinate ``file``, the name of the file that a text is from.
        """
        group = place.opened("w-")
        block = asked["block"]
        extents = {
            **{name: len(values) for name, values in fixed.items()},
            "sequence": sizes.sequence or 0,
            "routed_expert": sizes.routed_expert,
        }
        texts = Field(("sequence",), "object")
        with zarr.config.set(_ZARR):
            for name, values in fixed.items():
                field = COORDINATES[name]
                described = _described(field.dims, field)
                group.create_array(name, data=values, fill_value=None, attributes=described)
            for name in names:
                _allocate(group, name, dimensions(name, fixed), VARIABLES[name], extents, block)
            for name, field in COORDINATES.items():
                if "sequence" in field.dims:
                    _allocate(group, name, field.dims, field, extents, block)
            for name in (PROBLEM, *([FILE] if with_files else [])):
                _allocate(group, name, texts.dims, texts, extents, block)
            digest = Field(("sequence",), "uint64")
            _allocate(group, DIGEST, digest.dims, digest, extents, block)
            others = [n for n, each in COORDINATES.items() if n in group and each.dims != (n,)]
            others += [FILE] if with_files else []
            group.attrs.put({**attributes, "coordinates": " ".join(others)})
            field = Field(("sequence",), "int8")
            array = _allocate(group, RECORDED, ("sequence",), field, extents, block)
            windows = {"prompt_windows": sizes.prompt_windows}
            array.attrs.update({"layout": LAYOUT, "finished": False, **asked, **windows})
        return cls(place)

    # ----------------------------------------------------------------------------------
    # What is there

    @property
    def is_finished(self) -> bool:
        """Whether nothing is missing, the list of files included."""
        return bool(self.asked["finished"]) and self.place.is_finished()

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the recording."""
        return {name: value for name, value in self._group.attrs.items() if name != "coordinates"}

    def state(self, rows: slice) -> np.ndarray:
        """Which of these texts are recorded: 0, ``DONE`` or ``LEFT_OUT``, of shape (text,)."""
        return self._along(RECORDED, rows)

    def digests(self, rows: slice) -> np.ndarray:
        """What tells these texts from others, of shape (text,)."""
        return self._along(DIGEST, rows)

    @property
    def sequences(self) -> int:
        """How many texts there is room for."""
        return int(self._array(RECORDED).shape[0])

    def tokens_recorded(self) -> int:
        """Tokens of all texts that are recorded."""
        return sum(int(counts.sum()) for counts in self._counts())

    def _along(self, name: str, rows: slice) -> np.ndarray:
        values = np.asarray(self._array(name)[rows])
        missing = rows.stop - rows.start - len(values)
        return np.pad(values, (0, missing)) if missing else values

    def _array(self, name: str) -> zarr.Array:
        found = self._group[name]
        assert isinstance(found, zarr.Array)
        return found

    def _counts(self) -> Iterator[np.ndarray]:
        """Tokens by text and window, block by block."""
        array, block = self._array("tokens"), self.asked["block"]
        for start in range(0, array.shape[0], block):
            yield np.asarray(array[start : start + block])

    # ----------------------------------------------------------------------------------
    # Writing

    def write(
        self,
        rows: slice,
        recording: xr.Dataset | None,
        digests: np.ndarray,
        problems: Mapping[int, str],
        files: Sequence[str] | None = None,
    ) -> None:
        """Write a block.

        Parameters
        ----------
        rows : slice
            Numbers of the block's texts.
        recording : xarray.Dataset or None
            Of those that could be recorded, in their order; None if there are none.
        digests : numpy.ndarray of uint64
        problems : dict of str
            Why a text was left out, by its place in the block.
        files : list of str, optional
            Names of the files that they are from, if there is room for these.
        """
        count = rows.stop - rows.start
        if recording is not None:
            self._refuse_long(rows, recording)
        self._make_room(rows.stop)
        good = [place for place in range(count) if place not in problems]
        with zarr.config.set(_ZARR):
            self._array("sequence")[rows] = np.arange(rows.start, rows.stop)
            if recording is not None:
                for name in self._by_sequence():
                    self._put(name, rows, good, recording)
            if files is not None:
                self._array(FILE)[rows] = np.array(files, dtype=object)
            self._array(DIGEST)[rows] = digests
            told = [problems.get(place, "") for place in range(count)]
            self._array(PROBLEM)[rows] = np.array(told, dtype=object)
            state = np.full(count, DONE, np.int8)
            state[list(problems)] = LEFT_OUT
            self._array(RECORDED)[rows] = state

    def _of_texts(self) -> Iterator[tuple[str, zarr.Array]]:
        """Arrays that have values for each text."""
        for name, array in self._group.arrays():
            if array.attrs["_ARRAY_DIMENSIONS"][0] == "sequence":
                yield name, array

    def _by_sequence(self) -> list[str]:
        """Those of them that a recording gives, but for the text's number."""
        apart = (*BOOKKEEPING, FILE, "sequence")
        return [name for name, _ in self._of_texts() if name not in apart]

    def _put(self, name: str, rows: slice, good: list[int], recording: xr.Dataset) -> None:
        array = self._array(name)
        dims = list(array.attrs["_ARRAY_DIMENSIONS"])
        values = recording.variables[name].transpose(*dims).values
        if name == "token_window":
            values = self._windows_here(values, recording)
        if (count := rows.stop - rows.start) > len(good):
            field = VARIABLES[name] if name in VARIABLES else COORDINATES[name]
            fill = "" if field.dtype == "object" else field.fill
            whole = np.full((count, *values.shape[1:]), fill, values.dtype)
            whole[good] = values
            values = whole
        if name in _PADDED:
            missing = array.shape[1] - values.shape[1]
            values = np.pad(values, ((0, 0), (0, missing)), constant_values=-1)
        pieces = [(slice(None), slice(None))]
        axis = dims.index("window") if "window" in dims else None
        if axis is not None:
            pieces = self._pieces(recording)
        for place, taken in pieces:
            where = [slice(0, size) for size in values.shape]
            source: list[slice] = [slice(None)] * values.ndim
            where[0] = rows
            if axis is not None:
                where[axis], source[axis] = place, taken
            array[tuple(where)] = values[tuple(source)]

    def _refuse_long(self, rows: slice, recording: xr.Dataset) -> None:
        """Raise a ValueError for texts that there is no room for: zarr drops what is beyond."""
        new = int((recording.phase.values == GENERATION).sum())
        prompt, first = recording.sizes["window"] - new, self.asked["prompt_windows"]
        windows, tokens = self._array("window").shape[0], self._array("token").shape[0]
        if recording.sizes["token"] > tokens or prompt > first or first + new > windows:
            raise ValueError(
                f"a text from {rows.start} to {rows.stop - 1}, or its prompt or continuation, is "
                f"longer than those that {self.place} was made for: give the same texts and "
                "arguments, or record into another store."
            )

    def _pieces(self, recording: xr.Dataset) -> list[tuple[slice, slice]]:
        """Windows of the store, and those of a block's recording that belong there."""
        new = int((recording.phase.values == GENERATION).sum())
        prompt = recording.sizes["window"] - new
        first = self.asked["prompt_windows"]
        pieces = [(slice(0, prompt), slice(0, prompt))]
        if new:
            pieces.append((slice(first, first + new), slice(prompt, None)))
        return pieces

    def _windows_here(self, values: np.ndarray, recording: xr.Dataset) -> np.ndarray:
        """Windows of tokens, by the store's numbers of windows."""
        prompt = int((recording.phase.values != GENERATION).sum())
        return np.where(values >= prompt, values + self.asked["prompt_windows"] - prompt, values)

    def _make_room(self, sequences: int) -> None:
        if self.sequences >= sequences:
            return
        self._resize({"sequence": sequences})

    def _resize(self, sizes: Mapping[str, int]) -> None:
        # (``recorded`` last: where it has room, so do the others.)
        arrays = sorted(self._group.arrays(), key=lambda pair: pair[0] == RECORDED)
        for _, array in arrays:
            dims = array.attrs["_ARRAY_DIMENSIONS"]
            shape = tuple(sizes.get(dim, size) for dim, size in zip(dims, array.shape, strict=True))
            if shape != array.shape:
                array.resize(shape)

    def expect(self, texts: int) -> None:
        """Let it be known how many texts there are, if that was not right or not known.

        There is room for all of them afterwards, so that no two processes make it.
        """
        if texts != self.asked["texts"]:
            self._make_room(texts)
            self._array(RECORDED).attrs["texts"] = self.asked["texts"] = texts

    def forget_losses(self) -> None:
        """Let blocks be recorded again of which a file is missing or empty, and tidy up.

        What there is of blocks that are not recorded is taken away, so that they are written as if
        for the first time: their texts may be others by then, and shorter.
        """
        self.place.tidy()
        found, block = self.place.chunks(), self.asked["block"]
        begun = self._begun(found)
        for start in range(0, self.sequences, block):
            rows = slice(start, min(start + block, self.sequences))
            state = self.state(rows)
            if (
                found is not None
                and (state == DONE).any()
                and not all(chunk in found for chunk in self._chunks_of(start // block))
            ):
                self._array(RECORDED)[rows] = state = np.zeros(len(state), np.int8)
            if start // block in begun and not state.any():
                self._clear(rows)

    def _begun(self, found: set[str] | None) -> set[int]:
        """Numbers of the blocks of which anything may be written.

        `found` are the chunks that are there, if that is known.
        """
        block = self.asked["block"]
        if found is None:  # their numbers are written first; that of the first text is 0 anyhow
            written = np.flatnonzero(np.asarray(self._array("sequence")[:]))
            return {0, *(written // block).tolist()}
        begun: set[int] = set()
        texts = {name: array.chunks[0] for name, array in self._of_texts()}
        for name, _, chunk in (each.partition("/") for each in found):
            if name in texts and chunk[:1].isdigit():
                begun.add(int(chunk.split(".")[0]) * texts[name] // block)
        return begun

    def _clear(self, rows: slice) -> None:
        """Let a block be as if it had never been written, without its files."""
        with zarr.config.set({"array.write_empty_chunks": False}):
            for name, array in self._of_texts():
                if name != RECORDED:
                    is_text = array.dtype.kind in "OTU"
                    array[rows] = "" if is_text else (array.fill_value or 0)

    def _chunks_of(self, number: int) -> Iterator[str]:
        """Files that a recorded block of texts has."""
        block = self.asked["block"]
        counts = np.asarray(self._array("tokens")[number * block : (number + 1) * block])
        written = self._written(counts)
        for name, array in self._of_texts():
            dims = array.attrs["_ARRAY_DIMENSIONS"]
            along = []
            for dim, size, chunk in zip(dims, array.shape, array.chunks, strict=True):
                pieces = [(0, size)]
                if dim == "sequence":
                    pieces = [(number * block, min((number + 1) * block, size))]
                elif dim in written and name not in _PADDED:
                    pieces = written[dim]
                along.append(touched(pieces, size, chunk))
            for place in itertools.product(*along):
                yield f"{name}/{'.'.join(map(str, place))}"

    def _written(self, counts: np.ndarray) -> dict[str, list[tuple[int, int]]]:
        """What a block has along windows and tokens, as (from, to).

        `counts` are its tokens, of shape (text, window).
        """
        first = self.asked["prompt_windows"]
        used = np.flatnonzero(counts.any(axis=0))
        prompt, new = used[used < first], used[used >= first]
        # (The first window is there in any case, also where the file with the counts is lost.)
        windows = [(0, int(prompt.max(initial=0)) + 1)]
        if len(new):
            windows.append((first, int(new.max()) + 1))
        return {"window": windows, "token": [(0, max(1, int(counts.sum(axis=1).max(initial=0))))]}

    def finish(self, texts: int, generation: str) -> None:
        """Cut the arrays to what was needed, and note which files there are.

        Parameters
        ----------
        texts : int
            How many there are.
        generation : str
            Attribute of the recording.

        Raises
        ------
        ValueError
            If all of them were left out: what was wrong is wrong with all. They are tried again by
            the same call then.
        """
        state = self.state(slice(0, texts))
        if not (state == DONE).any():
            problem = next(filter(None, self._array(PROBLEM)[:1].tolist()), "")
            self._array(RECORDED)[:] = 0
            raise ValueError(f"no text can be recorded: {problem}")
        self._resize({"sequence": texts})
        first = self.asked["prompt_windows"]
        used, longest, any_new = 1, 1, False
        for counts in self._counts():
            places = np.flatnonzero(counts.any(axis=0))
            used = max(used, int(places.max(initial=0)) + 1)
            longest = max(longest, int(counts.sum(axis=1).max()))
            any_new |= bool(counts[:, first:].any())
        self._resize({"window": used, "token": longest})
        self._group.attrs["generation"] = (
            "none" if generation == "as given" and not any_new else generation
        )
        self._array(RECORDED).attrs.update({"finished": True, "texts": texts})
        self.asked = dict(self._array(RECORDED).attrs)
        zarr.consolidate_metadata(self._group.store, zarr_format=2)
        self.place.tidy()
        self.place.finish()


def _allocate(
    group: zarr.Group,
    name: str,
    dims: tuple[str, ...],
    field: Field,
    sizes: Mapping[str, int],
    block: int,
) -> zarr.Array:
    """An array with room for all texts, of which no chunk is written yet."""
    shape = tuple(sizes[dim] for dim in dims)
    is_text = field.dtype == "object"
    item = 16 if is_text else np.dtype(field.dtype).itemsize  # (of a text: a guess)
    return group.create_array(
        name,
        shape=shape,
        chunks=chunk_sizes(dims, shape, item, block),
        dtype=str if is_text else field.dtype,
        # (xarray takes another one than NaN for the sign of a missing value.)
        fill_value=math.nan if math.isnan(field.fill) else None,
        attributes=_described(dims, field),
    )


def _described(dims: tuple[str, ...], field: Field) -> dict[str, Any]:
    return {**field.attributes, "_ARRAY_DIMENSIONS": list(dims)}
