"""Cells of an evaluation: one task asked of one variant, computed once and kept in a file."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import Key, UnreadableError, checksum, read_content, replacing, set_aside
from flocking.evaluation.domain import OF_DOMAIN, documents
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.items import article_losses, ask
from flocking.evaluation.plan import Question, Variant
from flocking.evaluation.tasks import Articles
from flocking.pruning import WITH_REFERENCE

_PATIENCE = 60.0  # seconds to wait for another run that is writing the same cell

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
    key : Key, optional
        None if it is not in three parts: an earlier version of flocking wrote it.
    finished : str
        When it was computed; empty if that is not known.
    seconds : float
        How long it took.
    table : pandas.DataFrame
        Rows of ``COLUMNS``.
    """

    key: Key | None
    finished: str
    seconds: float
    table: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Cell:
    """One task, asked of one variant.

    Attributes
    ----------
    question : Question
    variant : Variant
    key : Key
        What it has when it is computed now.
    folder : Path, optional
        Where it is kept.
    calibration : list of str or of list of int
        What a static statistic is made from: the plan's texts, or the task's own documents.
    """

    question: Question
    variant: Variant
    key: Key
    folder: Path | None
    calibration: Sequence[str] | Sequence[list[int]] = ()

    @classmethod
    def of(cls, lm: GriffinLM, question: Question, variant: Variant, cells: Cells | None) -> Cell:
        """A cell with the key that it has when it is computed now."""
        calibration: Sequence[str] | Sequence[list[int]] = lm.calibration
        if of_domain := variant.method in OF_DOMAIN:
            calibration = documents(
                question.name, question.task, question.limit, lm.tokenizer, lm.max_length
            )
        inputs = [
            cells and cells.identity,
            question.digest(),
            variant,
            calibration if of_domain or variant.method in WITH_REFERENCE else None,
            str(lm.full.dtype),
            lm.full.device.type,
            lm.seed,
        ]
        if _is_another(lm.tokenizer, lm.full):
            inputs.append(_tokenizer_digest(lm.tokenizer))  # the model's identity has its own
        packages = ["lm-eval", "tokenizers", "rouge-score"]
        key = Key.of("flocking.evaluation.items", inputs, packages)
        folder = None if cells is None else Path(cells.folder)
        return cls(question, variant, key, folder, calibration)

    @property
    def _stem(self) -> str:
        return f"{self.question.name}-{self.variant}-"

    def found(self, say: Callable[[str], None]) -> list[Found]:
        """What earlier runs kept of this task and variant, whatever its key, the newest last.

        Files that are not as they were written are named, and count as not there.
        """
        if self.folder is None:
            return []
        kept = []
        for path in sorted(self.folder.glob(f"{glob.escape(self._stem)}????????.json")):
            try:
                kept.append(_read(path))
            except UnreadableError as problem:
                rest = "" if problem.changed else f", and is set aside as {set_aside(path).name}"
                say(f"{problem}: it does not count{rest}.")
        return sorted(kept, key=lambda one: one.finished)

    @property
    def _path(self) -> Path | None:
        return self.folder and self.folder / f"{self._stem}{self.key.digest()[:8]}.json"

    def finished(self) -> Found | None:
        """The cell, if a run has kept it by now."""
        try:
            found = _read(self._path) if self._path else None
        except UnreadableError:  # which found() says
            return None
        return found if found and found.key == self.key else None

    def write(self, table: pd.DataFrame, seconds: float) -> None:
        """Keep the cell, in its place only when it is complete."""
        if self._path is None:
            return
        rows = table.astype(object).where(table.notna(), None).to_dict("list")
        content = {
            "key": self.key.plain(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "checksum": checksum({"rows": rows}),
            "rows": rows,
        }
        with replacing(self._path, wait=_PATIENCE) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    def prune(self, lm: GriffinLM) -> None:
        """Make `lm` answer as the variant does, unless it does already."""
        method = OF_DOMAIN.get(self.variant.method, self.variant.method)
        changed = lm.calibrate(self.calibration) and method in WITH_REFERENCE
        if changed or (lm.method, lm.density) != (method, self.variant.density):
            lm.prune(method, self.variant.density)

    def run(self, lm: GriffinLM, say: Callable[[str], None]) -> pd.DataFrame:
        """Compute rows of ``COLUMNS``, with `lm` as :meth:`prune` leaves it."""
        asked = self.question
        if isinstance(asked.task, Articles):
            rows = article_losses(lm, asked.task, asked.limit)
        else:
            lm.protocol = asked.protocol
            rows = ask(lm, asked.name, asked.task, asked.limit, say)
        table = pd.DataFrame(rows).assign(
            task=asked.name,
            protocol=asked.protocol,
            method=self.variant.method,
            density=self.variant.density,
        )
        return table[list(COLUMNS)].astype(COLUMNS)

    def said(self, table: pd.DataFrame) -> str:
        """What came out, in a few words."""
        means = table.groupby("metric", sort=False)["value"].mean()
        return f"{self.variant} on {self.question.name}: " + ", ".join(
            f"{name} {value:.3f}" for name, value in means.items()
        )


def _read(path: Path) -> Found:
    content = read_content(path, ("rows",))
    try:
        table = pd.DataFrame(content["rows"]).astype(COLUMNS)
        finished, seconds = str(content.get("finished", "")), float(content["seconds"])
        return Found(Key.read(content["key"]), finished, seconds, table)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise UnreadableError(f"{path} is not a cell of an evaluation ({problem})") from problem


def _is_another(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> bool:
    """Whether a tokenizer comes from elsewhere than its model."""
    return str(tokenizer.name_or_path) != str(model.name_or_path)


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what makes tokens of text, whatever files it was read from."""
    told: list[Any] = [type(tokenizer).__name__, str(tokenizer.special_tokens_map)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        told.append(sorted(tokenizer.get_vocab().items()))
    else:
        state = json.loads(backend.to_str())
        told.append({**state, "truncation": None, "padding": None})  # the last call's
    return checksum(told)
