"""Pruned GGUF files, made from GGUF files: for llama.cpp and everything that is built on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType
from tqdm.auto import tqdm

from flocking.analysis import kept_count
from flocking.artifacts import replacing
from flocking.models import contents_of, is_readable
from flocking.pruning.chosen import masks_of
from flocking.pruning.exported import Exported
from flocking.pruning.fixed import rounded_densities
from flocking.pruning.gguf_blocks import Block, blocks_of
from flocking.pruning.gguf_cuts import (
    AGAIN,
    STEPS,
    Narrower,
    difference,
    narrower,
    pieces,
)
from flocking.pruning.gguf_metadata import Pair, Writer, pairs_of
from flocking.pruning.places import (
    is_gguf,
    refuse_existing,
    refuse_nul,
    refuse_without_room,
)
from flocking.recording import require_bool
from flocking.texts import expanded

if TYPE_CHECKING:
    from flocking.models.gguf import Contents, Tensor

_MULTIPLE = 32  # of widths: a quantisation block, and what kernels like
_AT_ONCE = 2**24  # bytes that are compared at a time


def export_gguf(
    source: str | os.PathLike[str],
    selection: Any,
    path: str | os.PathLike[str],
    *,
    down: str = "Q8_0",
    overwrite: bool = False,
    progress: bool = True,
) -> Exported:
    """Write a GGUF file with the selected neurons of another one, which llama.cpp runs unchanged.

    The rows of the gate and up-projections that are kept are copied in their quantised bytes, and
    lose nothing. The columns of a down-projection cross its quantisation blocks: they are
    dequantised, cut, and quantised again. A down-projection in F32, F16 or BF16 is cut without
    loss and stays in its type, whatever `down` is, and so does that of a layer that is kept whole.
    All other tensors and all metadata but the width stay as they are.

    Parameters
    ----------
    source : str or path
        A GGUF file of one part, of an architecture that llama.cpp and transformers both read. It
        is not changed.
    selection : dict or xarray.DataArray
        One selection for all texts, of the model that ``flocking.load(source)`` gives: the
        ``selection`` of a twin, or what :func:`flocking.select` returns for one statistic. Its
        layers are the file's blocks, ``blk.0`` and so on. (Where layers have routed experts and a
        shared one, they count as two layers each, in this order.)
    path : str or path
        Of the file to write.
    down : str
        Type of the down-projections that are quantised again: ``"Q8_0"``, ``"Q5_0"``,
        ``"Q4_0"``, ``"F16"``, ``"BF16"`` or ``"F32"``. The package ``gguf`` has no quantiser for
        K-quants (Q4_K and others), so that they are possible for all tensors but this one; Q4_1
        and Q5_1 do not keep a zero.
    overwrite : bool
        Whether to replace a file at `path`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Exported
        How much smaller the new file is, and how many neurons of each layer it has.

    Raises
    ------
    TypeError
        If `selection` is no selection, `down` no string, `overwrite` no bool, or a path no path.
    ValueError
        If the selection is not of this model or of several sequences; if the file is of an
        architecture that cannot be pruned, or has a tensor that is not known; if `down` is no type
        that can be written; if `path` exists, or is `source`.
    OSError
        If `source` cannot be read or is damaged, or `path` cannot be written, for lack of room on
        the disk, for example. Nothing is left behind then.

    See Also
    --------
    flocking.select : Makes selections from statistics.
    flocking.global_statistic : A statistic of texts.

    Notes
    -----
    A file has one width for all layers, unless its metadata lists them: that of the widest, rounded
    up to a multiple of 32, or to the whole width. Narrower layers are filled with neurons that add
    nothing, since their columns of the down-projection are exactly zero; the result counts them
    (``zeros``).

    The new file is read again before it takes its place: kept rows are compared byte by byte,
    down-projections within one step of the quantiser.

    Examples
    --------
    Half of the neurons, by the statistic of texts of the kind that the model is to be used for::

        model, tokenizer = flocking.load("model.gguf")
        statistic = flocking.global_statistic(model, texts, tokenizer=tokenizer)
        selection = flocking.select(statistic, 0.5)
        flocking.export_gguf("model.gguf", selection, "pruned.gguf")

    >>> try:
    ...     flocking.export_gguf("no-such-file.gguf", {}, "pruned.gguf")
    ... except FileNotFoundError as error:
    ...     print(error)
    no-such-file.gguf does not exist: give a GGUF file.
    """
    kind, place = type_of_down(down), _place(path)
    overwrite = require_bool("overwrite", overwrite)
    contents = contents_of(source)
    whole = Path(expanded(os.fspath(source)))
    blocks = blocks_of(contents, str(whole))
    masks = masks_of(selection, [block.wide() for block in blocks])
    plan = _planned(contents, whole, blocks, masks, kind)

    def check(found: Path) -> None:
        refuse_existing(found, place, overwrite, whole)

    with replacing(place, check=check) as partial:
        refuse_without_room(place, partial.parent, plan.size() + plan.contents.start)
        if progress and (told := _told_of_types(plan, kind)):
            tqdm.write(told, file=sys.stderr)
        with tqdm(desc="pruning", total=2 * plan.size(), unit="B", unit_scale=True,
                  disable=not progress) as bar:  # fmt: skip
            with _told_of_failure(place):
                _write(plan, partial, bar)
            _check(plan, partial, place, bar)
        size = partial.stat().st_size
    return Exported(
        path=place,
        parameters=_parameters(plan.tensors()),
        parameters_before=_parameters(contents.tensors),
        bytes=size,
        bytes_before=whole.stat().st_size,
        kept={layer: int(mask.sum()) for layer, mask in masks.items()},
        stored={block.layer: block.experts * plan.widths[block.layer] for block in blocks},
    )


# --------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class _Plan:
    """What is written, before anything is."""

    contents: Contents
    data: np.ndarray  # bytes of the whole file, as they are on the disk
    pairs: list[Pair]
    cuts: dict[str, Narrower]
    widths: dict[int, int]  # neurons of one expert that are stored, by layer

    def tensors(self) -> list[Tensor]:
        """The table of the new file; the places of tensors follow from their order."""
        return [
            self.cuts[tensor.name].after if tensor.name in self.cuts else tensor
            for tensor in self.contents.tensors
        ]

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors())

    def bytes_of(self, tensor: Tensor) -> np.ndarray:
        """What the source has of a tensor, uint8 (n,)."""
        return _bytes_of(self.data, self.contents, tensor)


def _bytes_of(data: np.ndarray, contents: Contents, tensor: Tensor) -> np.ndarray:
    start = contents.start + tensor.offset
    return data[start : start + tensor.size]


def _planned(
    contents: Contents,
    source: Path,
    blocks: list[Block],
    masks: dict[int, np.ndarray],
    down: GGMLQuantizationType,
) -> _Plan:
    kept = {block.layer: masks[block.layer].reshape(block.experts, -1) for block in blocks}
    widths = _widths(blocks, kept, contents)
    table = {tensor.name: tensor for tensor in contents.tensors}
    cuts = {}
    for block in blocks:
        for name, how in block.cuts.items():
            own = kept[block.layer], widths[block.layer]
            cuts[name] = cut = narrower(table[name], how, *own, down)
            if cut.again and not is_readable(cut.before.kind):
                raise ValueError(
                    f"{source} has the tensor {name} in {cut.before.kind.name}, which the "
                    "installed gguf cannot dequantise: get the model in another quantisation."
                )
    data = np.memmap(source, np.uint8, "r")
    pairs = [_changed(pair, blocks, widths) for pair in pairs_of(data.data)]
    return _Plan(contents, data, pairs, cuts, widths)


def _widths(blocks: list[Block], kept: dict[int, np.ndarray], contents: Contents) -> dict[int, int]:
    """Neurons to store by layer: one number for all layers whose width is told by one number."""
    widths = {}
    for block in blocks:
        count = int(kept[block.layer][0].sum())
        widths[block.layer] = min(-(-count // _MULTIPLE) * _MULTIPLE, block.d_ff)
    for key in {block.key for block in blocks}:
        told = [block.layer for block in blocks if block.key == key]
        if not isinstance(contents.metadata[key], list):
            widths |= dict.fromkeys(told, max(widths[layer] for layer in told))
    return widths


def _changed(pair: Pair, blocks: list[Block], widths: dict[int, int]) -> Pair:
    """A value of the metadata, with the new widths if it tells those of blocks."""
    told = {block.number: widths[block.layer] for block in blocks if block.key == pair.name}
    if not told:
        return pair
    before = pair.numbers()
    if len(before) == 1:
        return pair.with_numbers((next(iter(told.values())),))
    return pair.with_numbers(tuple(told.get(n, width) for n, width in enumerate(before)))


def _told_of_types(plan: _Plan, down: GGMLQuantizationType) -> str:
    """What becomes of the types of down-projections; empty if all stay as they are."""
    before = {cut.before.kind.name for cut in plan.cuts.values() if cut.again}
    if not before:
        return ""
    return (
        f"down-projections: {down.name} in the new file, {' and '.join(sorted(before))} before "
        "(their columns are quantised again, and gguf has no quantiser for K-quants)"
    )


def _parameters(tensors: list[Tensor]) -> int:
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors)


# --------------------------------------------------------------------------------------
# Refusals


def refuse_unexportable_gguf(
    source: Path, density: float, multiple: int, down: str, place: Path, folder: Path
) -> None:
    """Raise what :func:`export_gguf` would, before a selection is made for it.

    Parameters
    ----------
    source : Path
        The whole file.
    density : float
        Fraction of neurons that will be kept in each layer.
    multiple : int
        Of what widths will be multiples.
    down : str
        Type of the down-projections.
    place, folder : Path
        Where the file is to be written, and a folder on the disk where it is written first.

    Raises
    ------
    OSError, ValueError
        As :func:`export_gguf`.
    """
    contents = contents_of(source)
    blocks = blocks_of(contents, str(source))
    densities = rounded_densities([block.wide() for block in blocks], density, multiple)
    masks = {}
    for block, one in zip(blocks, densities, strict=True):
        first = np.arange(block.d_ff) < kept_count(one, block.d_ff)
        masks[block.layer] = np.tile(first, block.experts)
    plan = _planned(contents, source, blocks, masks, type_of_down(down))
    refuse_without_room(place, folder, plan.size() + contents.start)


def type_of_down(down: object) -> GGMLQuantizationType:
    """The type of that name, if columns can be quantised to it."""
    if not isinstance(down, str):
        raise TypeError(f"down is a {type(down).__name__}: give the name of a type, as 'Q8_0'.")
    known = {kind.name: kind for kind in STEPS}
    if (name := down.upper()) in known:
        return known[name]
    why = ""
    if name in ("Q4_1", "Q5_1"):
        why = " (it does not keep the zeros that fill layers up)"
    elif name in GGMLQuantizationType.__members__:
        why = " (the package gguf has no quantiser for it)"
    raise ValueError(
        f"down={down!r} is no type that a down-projection can be quantised to{why}: give one of "
        f"{', '.join(known)}."
    )


def _place(path: object) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise TypeError(f"path is a {type(path).__name__}: give the name of a file.")
    refuse_nul("path", text)
    place = Path(expanded(text))
    if not place.name:
        raise ValueError(f"path={text!r} names no file: give it a name.")
    if not is_gguf(place):
        raise ValueError(f"path={text!r}: let it end in .gguf, by which programs know such files.")
    return place


@contextmanager
def _told_of_failure(path: Path) -> Iterator[None]:
    """NumPy does not say why it could not write all bytes of an array."""
    try:
        yield
    except OSError as problem:
        if problem.errno is not None and problem.strerror:
            raise
        raise OSError(
            f"{path} cannot be written ({problem}): make room on the disk, or name another place."
        ) from problem


# --------------------------------------------------------------------------------------
# Writing, and reading again


def _write(plan: _Plan, path: Path, bar: tqdm) -> None:
    """Write the new file, one tensor after the other."""
    architecture = plan.contents.metadata["general.architecture"]
    alignment = plan.contents.metadata.get("general.alignment", 32)
    writer = Writer(path, architecture, plan.pairs, alignment)
    try:
        for tensor in plan.tensors():
            writer.announce(tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for before, after in zip(plan.contents.tensors, plan.tensors(), strict=True):
            writer.write_tensor_data(_cut(plan, before))
            bar.update(after.size)
    finally:
        writer.close()


def _cut(plan: _Plan, tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor in the new file."""
    data = plan.bytes_of(tensor)
    if tensor.name not in plan.cuts:
        return data
    cut = plan.cuts[tensor.name]
    found, start = np.empty(cut.after.size, np.uint8), 0
    for piece in pieces(cut, data):
        found[start : start + piece.size] = piece.reshape(-1)
        start += piece.size
    return found


def _check(plan: _Plan, partial: Path, path: Path, bar: tqdm) -> None:
    """Read the new file, and refuse it if it is not what was meant."""
    contents = contents_of(partial)
    data = np.memmap(partial, np.uint8, "r")
    if [pair.raw for pair in pairs_of(data.data)] != [pair.raw for pair in plan.pairs]:
        raise OSError(_not_written(path, f"its metadata differs: {AGAIN}"))
    for before, after in zip(plan.contents.tensors, contents.tensors, strict=True):
        new, old = _bytes_of(data, contents, after), plan.bytes_of(before)
        cut = plan.cuts.get(before.name)
        why = difference(cut, old, new) if cut is not None else _bytes_differ(old, new)
        if why:
            kind = ValueError if cut is not None and cut.again else OSError
            raise kind(_not_written(path, f"the tensor {before.name} {why}"))
        bar.update(after.size)


def _bytes_differ(old: np.ndarray, new: np.ndarray) -> str:
    parts = range(0, max(old.size, new.size), _AT_ONCE)
    equal = all(np.array_equal(old[n : n + _AT_ONCE], new[n : n + _AT_ONCE]) for n in parts)
    return "" if equal else f"is not what it was: {AGAIN}"


def _not_written(path: Path, why: str) -> str:
    return f"{path} was not written, since in what was read again {why}."
