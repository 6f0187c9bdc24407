"""Cells of an evaluation: one block of items asked of one variant, computed once and kept."""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import Key, UnreadableError, checksum, read_content, replacing, set_aside
from flocking.evaluation.blocks import Block
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.items import Row
from flocking.evaluation.twins import Texts
from flocking.evaluation.variants import Variant
from flocking.models import tokenizer_beside

_PATIENCE = 60.0  # seconds to wait for another run that is writing the same cells
_SUFFIX = ".json.gz"

COLUMNS = {
    "task": str,
    "protocol": str,
    "method": str,
    "density": float,
    "metric": str,
    "item": int,
    "value": float,
    "chance": float,
    "prompt_tokens": int,
    "left_out": int,
    "scored": int,
    "pruned": int,
}

_OF_ITEMS = [name for name in COLUMNS if name not in ("task", "protocol", "method", "density")]


@dataclass(frozen=True)
class Cells:
    """Where finished cells are kept, so that an interrupted evaluation continues.

    Attributes
    ----------
    folder : path
    identity : str
        What tells the model from every other, such as a digest of its files.
    keep_older : bool
        Accept cells that differ in the code part of their key alone.
    """

    folder: str | os.PathLike[str]
    identity: str
    keep_older: bool = False


@dataclass(frozen=True)
class Found:
    """A cell that an earlier run kept.

    Attributes
    ----------
    variant : str
        As it is written in a plan.
    key : Key
    finished : str
        When it was computed; empty if that is not known.
    seconds : float
        How long it took, with the cells that were computed together with it as one.
    table : pandas.DataFrame
        Rows of ``COLUMNS``.
    """

    variant: str
    key: Key
    finished: str
    seconds: float
    table: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Cell:
    """One block of items, asked of one variant.

    Attributes
    ----------
    block : Block
    variant : Variant
    texts : list of str or of list of int
        What a static statistic is made from.
    key : Key
        What it has when it is computed now.
    """

    block: Block
    variant: Variant
    texts: Texts
    key: Key

    def table(self, rows: Sequence[Row]) -> pd.DataFrame:
        """Rows of ``COLUMNS``, of what was answered."""
        asked = self.block.question
        # (Without rows, if no item of the block could be asked.)
        table = pd.DataFrame(rows, columns=_OF_ITEMS).assign(
            task=asked.name,
            protocol=asked.protocol,
            method=self.variant.method,
            density=self.variant.density,
        )
        return table[list(COLUMNS)].astype(COLUMNS)

    def taken(self, one: Found, older: str) -> pd.DataFrame:
        """Rows of what was found, as this question's; with the older code that they are of.

        (Both of the authors' protocols ask the same of tasks with choices.)
        """
        asked = self.block.question
        return one.table.assign(task=asked.name, protocol=asked.protocol, older=older)

    def of(self, found: Sequence[Found], keep_older: bool) -> tuple[Found | None, bool]:
        """The newest of what was found that is this cell; and whether it is of older code.

        Older code is looked at last, and returned with `keep_older` alone.
        """
        mine = [one for one in found if one.variant == str(self.variant)]
        same = [one for one in mine if one.key == self.key]
        older = [one for one in mine if self.key.differing(one.key) == ["code"]]
        if same or not older:
            return (same[-1] if same else None), False
        return (older[-1] if keep_older else None), True

    def of_other_versions(self, found: Sequence[Found]) -> str:
        """How the newest of what was found differs, if it is this cell but for versions; or ""."""
        mine = [one.key for one in found if one.variant == str(self.variant)]
        others = [key for key in mine if "inputs" not in self.key.differing(key)]
        if not others or "versions" not in self.key.differing(others[-1]):
            return ""
        return self.key.told(others[-1])


def cells_of(
    lm: GriffinLM,
    blocks: Sequence[Block],
    wanted: Mapping[Variant, Texts],
    identity: str | None,
    tokenizer: str | None,
) -> list[list[Cell]]:
    """Of each block, its cells with the keys that they have when they are computed now.

    Parameters
    ----------
    lm : GriffinLM
    blocks : sequence of Block
    wanted : mapping of Variant to texts
        With what a static statistic is made from.
    identity, tokenizer : str, optional
        Of the model, and of a tokenizer that is not its own.
    """
    found = []
    for block in blocks:
        scorers = ("rouge" if block.question.authors else "rouge-score",)
        packages = ("lm-eval", "tokenizers", *(scorers if block.question.generates else ()))
        digest = block.digest()
        cells = []
        for variant, texts in wanted.items():
            inputs = [
                identity,
                digest,
                variant,
                list(texts) if variant.twinned.needs_texts else None,
                str(lm.full.dtype),
                lm.full.device.type,
                lm.seed if variant.twinned.draws else None,
                *([] if tokenizer is None else [tokenizer]),
            ]
            key = Key.of("flocking.evaluation.items", inputs, packages)
            cells.append(Cell(block, variant, texts, key))
        found.append(cells)
    return found


def digest_of_another(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of the tokenizer; None if it is the model's own, which the model's identity has.

    What was changed in it since it was read makes it another one. (It is not the harness's copy,
    which may have been given a token for padding.)
    """
    own, digest = tokenizer_beside(model), tokenizer_digest(tokenizer)
    return None if own is not None and tokenizer_digest(own) == digest else digest


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what makes tokens of text, whatever files it was read from."""
    told: list[Any] = [type(tokenizer).__name__, str(tokenizer.special_tokens_map)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        told.append(sorted(tokenizer.get_vocab().items()))
    else:
        state = json.loads(backend.to_str())
        told.append({**state, "truncation": None, "padding": None})  # the last call's
    return checksum(told)


class Store:
    """The files of cells: one for each block, of all variants that were computed together.

    Parameters
    ----------
    cells : Cells, optional
        Nothing is read and kept without.
    """

    def __init__(self, cells: Cells | None) -> None:
        self._folder = None if cells is None else Path(cells.folder)
        self.keep_older = cells is not None and cells.keep_older

    def read(self, block: Block, say: Callable[[str], None]) -> list[Found]:
        """What earlier runs kept of a block, whatever its key, the newest last.

        Files that are not as they were written are named, and count as not there.
        """
        if self._folder is None:
            return []
        found: list[Found] = []
        for path in sorted(self._folder.glob(f"{glob.escape(_stem(block))}-????????{_SUFFIX}")):
            try:
                found += _read(path)
            except UnreadableError as problem:
                rest = "" if problem.changed else f", and is set aside as {set_aside(path).name}"
                say(f"{problem}: it does not count{rest}.")
        return sorted(found, key=lambda one: one.finished)

    def write(self, cells: Sequence[Cell], tables: Sequence[pd.DataFrame], seconds: float) -> None:
        """Keep cells of one block that were computed together, in place only when complete."""
        if self._folder is None:
            return
        parts = [
            {
                "variant": str(cell.variant),
                "inputs": cell.key.inputs,
                "rows": table.astype(object).where(table.notna(), None).to_dict("list"),
            }
            for cell, table in zip(cells, tables, strict=True)
        ]
        key = cells[0].key.plain()
        content = {
            "key": {"code": key["code"], "versions": key["versions"]},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "checksum": checksum({"cells": parts}),
            "cells": parts,
        }
        name = checksum([cell.key.plain() for cell in cells])[:8]
        path = self._folder / f"{_stem(cells[0].block)}-{name}{_SUFFIX}"
        with replacing(path, wait=_PATIENCE) as partial:
            # (No time of day in it: the same content is the same file.)
            partial.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def _stem(block: Block) -> str:
    return f"{block.question.name}-{block.items.start:05}-{block.items.stop - 1:05}"


def _read(path: Path) -> list[Found]:
    content = read_content(path, ("cells",))
    try:
        finished, seconds = str(content.get("finished", "")), float(content["seconds"])
        common = content["key"]["code"], content["key"]["versions"]
        return [_part(part, *common, finished, seconds) for part in content["cells"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise UnreadableError(f"{path} is not a block of an evaluation ({problem})") from problem


def _part(
    part: Mapping[str, Any], code: str, versions: Mapping[str, str], finished: str, seconds: float
) -> Found:
    """One cell of a file."""
    table = pd.DataFrame(part["rows"]).astype(COLUMNS)
    key = Key(code, part["inputs"], versions)
    return Found(str(part["variant"]), key, finished, seconds, table)
