"""Tasks by methods by densities: each a cell that is run once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import code_digest, replacing
from flocking.evaluation.harness import CHOICES, GriffinLM
from flocking.evaluation.items import ask, foretell
from flocking.evaluation.summary import label
from flocking.evaluation.tasks import Articles, find, quiet
from flocking.pruning import WITH_REFERENCE

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


class Variant(NamedTuple):
    """A method at a density."""

    method: str
    density: float

    def __str__(self) -> str:
        """As it is asked for."""
        return label(*self)


FULL = Variant("full", 1.0)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str],
    *,
    methods: Iterable[str] = ("topk",),
    densities: Iterable[float] = (0.5,),
    protocol: str | Mapping[str, str] = "context",
    limit: int | Mapping[str, int] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | Iterable[str] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    kept: str | os.PathLike[str] | None = None,
    identity: str | None = None,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Ask a model, and its twins, the items of tasks.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    tasks : list of str
        See :func:`flocking.evaluation.tasks.find`.
    methods : list of str
        Of :func:`flocking.griffin`, at each of `densities`, or with a density of their own as in
        "topk@0.25". The full model always comes first.
    densities : list of float
    protocol : {"context", "last-token"} or dict of str to str
        Of likelihoods, as in :func:`flocking.score`; by task or group, with ``""`` for the others.
        With "context", answers of one token are the full model's own.
    limit : int or dict of str to int, optional
        How many items of each task, the first ones; by task or group, with ``""`` for the others.
    data_dir : path, optional
        Folder with the documents as JSON lines; the hub by default.
    calibration : path or list of str, optional
        See :class:`flocking.evaluation.harness.GriffinLM`.
    batch_size : int
        Results do not depend on it, but for rounding.
    seed : int
        Of the methods that draw.
    kept : path, optional
        Folder in which each finished cell is kept, so that an interrupted run goes on.
    identity : str, optional
        What tells the model from every other; needed with `kept`.
    say : callable
        Takes each line of the report.

    Returns
    -------
    pandas.DataFrame
        A row for each task, variant, metric and item: ``value``; ``chance``, what it would be by
        chance (one by the number of choices; of a generated text, its score as the answer to the
        next item; missing for losses); ``prompt_tokens``, from which experts were chosen;
        ``left_out``, tokens that did not fit; ``scored`` and ``pruned``, tokens whose likelihood
        was asked for, and that were computed with the experts alone. Losses are means in nats a
        token.

    Raises
    ------
    ValueError
        For an unknown task, method or protocol, documents that cannot be had or read, or as
        :class:`flocking.evaluation.harness.GriffinLM`.
    """
    variants = variants_of(methods, densities)
    if limit is not None and (low := min(_values(limit), default=1)) < 1:
        raise ValueError(f"limit={low}: give 1 item or more.")
    if odd := set(_values(protocol)) - {"context", "last-token"}:
        raise ValueError(f"protocol={odd.pop()!r}: give 'context' or 'last-token'.")
    if isinstance(protocol, Mapping):
        protocol = {"": "context", **protocol}
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more.")
    if kept is not None and identity is None:
        raise ValueError("kept needs identity: say what tells this model from every other.")
    folder = None if kept is None else Path(kept)
    groups = {name: find([name], None if data_dir is None else Path(data_dir)) for name in tasks}
    found = {name: task for group in groups.values() for name, task in group.items()}
    for name in {*_names(protocol), *_names(limit)} - {*groups, *found}:
        raise ValueError(
            f"{name} has a limit or protocol and is none of the tasks: {', '.join(found)}."
        )
    how = {
        name: (
            _of_task(protocol, name, group) if _has_protocol(task) else "context",
            _of_task(limit, name, group),
        )
        for group, members in groups.items()
        for name, task in members.items()
    }

    with quiet():
        lm = GriffinLM(
            model,
            method="full",
            tokenizer=tokenizer,
            batch_size=batch_size,
            calibration=calibration,
            seed=seed,
        )
    digests = {name: _digest(task, *how[name]) for name, task in found.items()}
    cells = []
    for variant in variants:
        for name, task in found.items():
            key = _key(lm, identity, digests[name], variant)
            path = None if folder is None else folder / f"{name}-{variant}-{key[:8]}.json"
            cells.append(_Cell(name, task, variant, *how[name], key, path))
    seconds: dict[str, float] = {}
    tables = {}
    for cell in cells:
        if (table := cell.read(seconds)) is not None:
            tables[cell] = table
    if tables:
        say(f"{len(tables)} of {len(cells)} cells are there already.")
    for cell in cells:
        if cell in tables:
            continue
        if (lm.method, lm.density) != cell.variant:
            lm.prune(*cell.variant)
        started = time.monotonic()
        tables[cell] = cell.run(lm, say)
        seconds[cell.name] = time.monotonic() - started
        cell.write(tables[cell], seconds[cell.name])
        left = [other for other in cells if other not in tables]
        say(f"[{len(tables)}/{len(cells)}] {cell.said(tables[cell])}; {_due(left, seconds)}")
    return pd.concat([tables[cell] for cell in cells], ignore_index=True)


def variants_of(methods: Iterable[str], densities: Iterable[float]) -> list[Variant]:
    """What methods stand for at densities, the full model first.

    Raises
    ------
    ValueError
        For an unknown method, or a density that is none.
    """
    densities = list(densities)
    found = [FULL]
    for text in methods:
        name, at, own = text.partition("@")
        if name not in CHOICES:
            raise ValueError(f"there is no method {name!r}: choose from {', '.join(CHOICES)}.")
        try:
            wanted = [float(own)] if at else densities
        except ValueError:
            wanted = [0.0]
        if any(not 0 < density <= 1 for density in wanted):
            said = f"method {text!r}" if at else f"densities {densities}"
            raise ValueError(f"{said}: give a density above 0 and at most 1.")
        if name != "full":
            found += [Variant(name, density) for density in wanted]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, eq=False)
class _Cell:
    """One task, asked of one variant."""

    name: str
    task: Task | Articles
    variant: Variant
    protocol: str
    limit: int | None
    key: str
    path: Path | None

    def read(self, seconds: dict[str, float]) -> pd.DataFrame | None:
        """What an earlier run found, if it was about the very same; notes how long it took."""
        if self.path is None or not self.path.exists():
            return None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            table = pd.DataFrame(content["rows"]).astype(COLUMNS)
            seconds[self.name] = content["seconds"]
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(
                f"{self.path} is no cell of an evaluation: choose another folder."
            ) from problem
        return table if content.get("key") == self.key else None

    def write(self, table: pd.DataFrame, seconds: float) -> None:
        """Keep it, in its place only when it is complete."""
        if self.path is None:
            return
        rows = table.astype(object).where(table.notna(), None).to_dict("list")
        content = {"key": self.key, "seconds": round(seconds, 2), "rows": rows}
        with replacing(self.path) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    def run(self, lm: GriffinLM, say: Callable[[str], None]) -> pd.DataFrame:
        """Rows of ``COLUMNS``."""
        if isinstance(self.task, Articles):
            rows = foretell(lm, self.task, self.limit)
        else:
            lm.protocol = self.protocol
            rows = ask(lm, self.name, self.task, self.limit, say)
        table = pd.DataFrame(rows).assign(
            task=self.name,
            protocol=self.protocol,
            method=self.variant.method,
            density=self.variant.density,
        )
        return table[list(COLUMNS)].astype(COLUMNS)

    def said(self, table: pd.DataFrame) -> str:
        """What came out, in a few words."""
        means = table.groupby("metric", sort=False)["value"].mean()
        return f"{self.variant} on {self.name}: " + ", ".join(
            f"{name} {value:.3f}" for name, value in means.items()
        )


def _has_protocol(task: Task | Articles) -> bool:
    """Generation has a prompt and goes on from it, whatever the protocol of likelihoods."""
    return not isinstance(task, Articles) and task.OUTPUT_TYPE != "generate_until"


def _digest(task: Task | Articles, protocol: str, limit: int | None) -> str:
    """Of what is asked."""
    if isinstance(task, Articles):
        asked: Any = [task.texts, task.prompt_length]
    else:
        # What is shown before the items is drawn from more of the documents.
        shown = limit if not task.config.num_fewshot else None
        asked = [task.dump_config(), list(task.eval_docs)[:shown]]
    # (A function's address differs from process to process, its name does not.)
    text = json.dumps(
        [asked, protocol, limit], default=lambda x: getattr(x, "__qualname__", str(x))
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _key(lm: GriffinLM, identity: str | None, digest: str, variant: Variant) -> str:
    """Of all that a cell's numbers depend on, the code and the versions included."""
    versions = [version(name) for name in ("torch", "transformers", "numpy", "lm-eval")]
    versions += [version(name) for name in ("tokenizers", "rouge-score")]
    texts = lm.calibration if variant.method in WITH_REFERENCE else None
    ran = [
        str(lm.full.dtype),
        lm.full.device.type,
        lm.seed,
        code_digest("flocking.evaluation.items"),
    ]
    inputs = json.dumps([identity, digest, variant, texts, versions, ran])
    return hashlib.sha256(inputs.encode()).hexdigest()


def _due(left: list[_Cell], seconds: Mapping[str, float]) -> str:
    """How long what is left may take, from what each task took last."""
    if not left:
        return "done"
    known = [seconds[cell.name] for cell in left if cell.name in seconds]
    more = "at least " if len(known) < len(left) else "about "
    return f"{more}{sum(known) / 60:.0f} min left"


def _values(setting: Any) -> list:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def _names(setting: Any) -> list[str]:
    return [name for name in setting if name] if isinstance(setting, Mapping) else []


def _of_task(setting: Any, name: str, group: str) -> Any:
    """The task's own, its group's, or that of all others, whose name is empty."""
    if not isinstance(setting, Mapping):
        return setting
    return setting.get(name, setting.get(group, setting.get("")))
