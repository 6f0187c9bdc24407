"""Tasks by methods by densities: each block of items of each is computed once and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.evaluation.authors import check_room, opens
from flocking.evaluation.blocks import Block, block_size, blocks_of
from flocking.evaluation.cells import Cell, Cells, Found, Store, cells_of, digest_of_another
from flocking.evaluation.domain import documents
from flocking.evaluation.estimate import (
    Speed,
    Work,
    copies_of,
    in_words,
    memory_of,
    speed_of,
    work_of,
)
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.items import ask, left_out
from flocking.evaluation.plan import Plan, Question
from flocking.evaluation.summary import refuse_not_finite
from flocking.evaluation.tasks import Articles, quiet
from flocking.evaluation.twins import Texts, Twins, in_memory, refuse_without_memory
from flocking.evaluation.variants import Variant
from flocking.models import warn
from flocking.pruning import refuse_unscorable

Say = Callable[[str], None]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    batch_size: int = 8,
    cells: Cells | None = None,
    say: Say = print,
) -> pd.DataFrame:
    """Ask a model, and its twins, the items of tasks.

    The full model reads each prompt once, for all methods and densities.

    Parameters
    ----------
    model, tokenizer
        As :func:`flocking.load` returns them.
    plan : Plan
        Which tasks, methods and densities, and the settings of each task.
    batch_size : int
        Results do not depend on it, but for rounding.
    cells : Cells, optional
        Where finished cells are kept, so that an interrupted run continues, and whether those of
        older code are accepted. By default nothing is kept.
    say : callable
        Takes each line of the report: first what there is to do, and how long it may take.

    Returns
    -------
    pandas.DataFrame
        A row for each task, variant, metric and item: ``value``; ``chance``, what it would be by
        chance (one by the number of choices; of a generated text, its score as the answer to the
        next item; missing for losses); ``prompt_tokens``, from which kept neurons were selected;
        ``left_out``, tokens that did not fit; ``scored`` and ``pruned``, tokens whose likelihood
        was asked for, and that were computed with the kept neurons alone; ``older``, the code
        that a cell of older code is from, empty for today's. Losses are means in nats a token.
        Beside those of articles are ``divergence``, the mean Kullback-Leibler divergence from the
        full model's predictions, in nats, and ``agreement``, the share of tokens whose likeliest
        prediction is the full model's.

    Raises
    ------
    ValueError
        For an unknown task, documents that cannot be read, or as
        :class:`flocking.evaluation.harness.GriffinLM`.

    Examples
    --------
    Cells of the code before a change are accepted with ``keep_older=True``::

        plan = Plan(["piqa", "boolq"], methods=["topk", "static"], limit=200)
        cells = Cells("out/cells", identity(model.name_or_path), keep_older=True)
        items = evaluate(model, tokenizer, plan, cells=cells)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more.")
    questions = plan.questions()
    training = [(module, module.training) for module in model.modules()]
    try:
        return _evaluated(model, tokenizer, plan, questions, batch_size, cells, say)
    finally:
        for module, was in training:  # the harness puts the model in eval mode
            module.training = was


def _evaluated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    questions: Sequence[Question],
    batch_size: int,
    cells: Cells | None,
    say: Say,
) -> pd.DataFrame:
    """What :func:`evaluate` returns, of a model that the harness puts in eval mode."""
    with quiet():
        lm = GriffinLM(
            model,
            method="full",
            tokenizer=tokenizer,
            batch_size=batch_size,
            calibration=plan.calibration,
            seed=plan.seed,
            # (The authors open no prompt with a token but those of Gemma.)
            add_bos_token=opens(model) if plan.authors else None,
        )
    if not all(asked.generates for asked in questions):
        refuse_unscorable(lm.full, [])
    known = (None, None) if cells is None else (cells.identity, digest_of_another(model, tokenizer))
    jobs = [job for asked in questions for job in _jobs(lm, asked, plan.variants, known, say)]
    run = _Run(lm, jobs, Store(cells), say)
    run.say_what_is_there()
    for question in questions:
        run.ask(question)
    return run.table()


@dataclass(eq=False)
class _Job:
    """A block, and those of its cells that are computed together.

    Attributes
    ----------
    block : Block
    cells : list of Cell
    texts : int
        How many prompts share a selection.
    copies : int
        How many texts have a selection each at once.
    work : Work
    """

    block: Block
    cells: list[Cell]
    texts: int
    copies: int
    work: Work


def _jobs(
    lm: GriffinLM,
    question: Question,
    variants: Sequence[Variant],
    known: tuple[str | None, str | None],
    say: Say,
) -> list[_Job]:
    """All blocks of a task, by groups of variants whose twins fit in memory together.

    `known` are identities of the model and of a tokenizer that is not its own.
    """
    wanted: dict[Variant, Texts] = {}
    own: Texts = ()
    for variant in variants:
        if variant.twinned.texts > 1 and not question.generates:
            warn(f"{variant} is for tasks that generate: it is not asked of {question.name}.")
            continue
        wanted[variant] = lm.calibration
        if variant.twinned.of_domain:
            own = own or documents(
                question.name,
                question.task,
                question.limit,
                lm.tokenizer,
                lm.max_length,
                lm.encoded,
            )
            wanted[variant] = own
    jobs = []
    for texts in dict.fromkeys(variant.twinned.texts for variant in wanted):
        here = {variant: of for variant, of in wanted.items() if variant.twinned.texts == texts}
        blocks = blocks_of(lm, question, block_size(question, texts))
        if odd := sum(len(block.items) for block in blocks) % texts:
            say(f"{question.name}: the last group of shared-{texts} has {odd} of {texts} prompts.")
        if question.authors and question.generates and (skipped := check_room(lm, blocks)):
            count = 1 + blocks[-1].items[-1]
            say(f"{question.name}: {skipped} of {count} items are too long, and are skipped.")
        work = [work_of(lm, block, texts) for block in blocks]
        copies = copies_of(lm, question, blocks, texts)
        for group in in_memory(lm.full, here, copies):
            cells = cells_of(lm, blocks, {variant: here[variant] for variant in group}, *known)
            jobs += [
                _Job(block, each, texts, copies, cost)
                for block, each, cost in zip(blocks, cells, work, strict=True)
            ]
    return jobs


class _Run:
    """An evaluation under way.

    Parameters
    ----------
    lm : GriffinLM
    jobs : list of _Job
    store : Store
    say : callable
    """

    def __init__(self, lm: GriffinLM, jobs: list[_Job], store: Store, say: Say) -> None:
        self._lm, self._jobs, self._store, self._say = lm, jobs, store, say
        self._twins = Twins(lm)
        self._tables: dict[Cell, pd.DataFrame] = {}
        self._speed: Speed | None = None
        self._expected = self._took = 0.0  # seconds, of what was run

    def say_what_is_there(self) -> None:
        """Take the cells that need not be computed, and say how long the others may take."""
        older, versions = 0, []
        for job in self._jobs:
            found = self._store.read(job.block, self._say)
            older += self._take(job, found)
            versions += [cell.of_other_versions(found) for cell in self._missing(job)]
        total = sum(len(job.cells) for job in self._jobs)
        if self._tables:
            marked = sum(bool((table["older"] != "").any()) for table in self._tables.values())
            said = f", {marked} of them of older code" if marked else ""
            self._say(f"{len(self._tables)} of {total} cells are there already{said}.")
        if older and not self._store.keep_older:
            self._say(
                f"{older} cells differ in the code part of their key alone and are computed "
                "again: --keep-older (keep_older=True) accepts them."
            )
        if told := list(filter(None, versions)):
            self._say(
                f"{len(told)} cells were computed with other versions and are computed again; "
                f"what differs: {told[0]}."
            )
        left = self._left()
        if left:
            refuse_without_memory(self._lm.full, self._groups(left))
            self._speed = speed_of(self._lm)
            self._say_how_long(left)

    def _take(self, job: _Job, found: Sequence[Found]) -> int:
        """Take the cells of a job that were found; how many are there of older code."""
        older = 0
        for cell in job.cells:
            if cell in self._tables:
                continue
            one, is_older = cell.of(found, self._store.keep_older)
            older += is_older
            if one is not None:
                self._tables[cell] = cell.taken(one, _code(one) if is_older else "")
        return older

    def _missing(self, job: _Job) -> list[Cell]:
        return [cell for cell in job.cells if cell not in self._tables]

    def _left(self) -> list[_Job]:
        return [job for job in self._jobs if self._missing(job)]

    def _seconds(self, job: _Job) -> float:
        assert self._speed is not None
        return self._speed.seconds(job.work, len(self._missing(job)))

    def _say_how_long(self, left: Sequence[_Job]) -> None:
        by_task: dict[str, float] = {}
        for job in left:
            name = job.block.question.name
            by_task[name] = by_task.get(name, 0.0) + self._seconds(job)
        cells = [cell for job in left for cell in self._missing(job)]
        if tokens := self._twins.unread((cell.variant, cell.texts) for cell in cells):
            assert self._speed is not None
            by_task["calibration texts"] = self._speed.seconds(Work(shared=tokens), 0)
        told = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in by_task.items())
        self._say(
            f"{len(cells)} cells are to be computed, in about "
            f"{in_words(sum(by_task.values()))} or less ({told}), with "
            f"{memory_of(self._lm.full, self._groups(left))}."
        )

    def _groups(self, left: Sequence[_Job]) -> list[tuple[list[Variant], int]]:
        """Variants whose twins are there at once, and texts of a batch with a selection each."""
        return [([cell.variant for cell in self._missing(job)], job.copies) for job in left]

    def ask(self, question: Question) -> None:
        """Compute what is missing of a task, and say what came out."""
        mine = [job for job in self._jobs if job.block.question is question]
        ran = False
        for job in mine:
            if not self._missing(job):
                continue
            self._take(job, self._store.read(job.block, lambda line: None))
            if not self._missing(job):
                self._say(f"{job.block.name}: another run has finished it meanwhile.")
                continue
            self._compute(job)
            ran = True
        if ran:
            self._say_results(question, mine)

    def _compute(self, job: _Job) -> None:
        missing, expected = self._missing(job), self._seconds(job)
        self._twins.keep((cell.variant, cell.texts) for cell in job.cells)
        self._twins.read((cell.variant, cell.texts) for cell in missing)
        started = time.monotonic()
        models = [self._twins.of(cell.variant, cell.texts) for cell in missing]
        answers = ask(self._lm, job.block, models, job.texts)
        tables = [cell.table(rows) for cell, rows in zip(missing, answers, strict=True)]
        _refuse_unscored(job.block.question, tables)
        took = time.monotonic() - started
        known = [bool(np.isfinite(table["value"]).all()) for table in tables]
        if any(known):
            kept = list(compress(missing, known)), list(compress(tables, known))
            self._store.write(*kept, took)
        refuse_not_finite(pd.concat(tables))
        for cell, table in zip(missing, tables, strict=True):
            self._tables[cell] = table.assign(older="")
        self._expected += expected
        self._took += took
        done, total = len(self._tables), sum(len(each.cells) for each in self._jobs)
        self._say(f"[{done}/{total}] {job.block.name}: {in_words(took)}; {self._remaining()}")

    def _remaining(self) -> str:
        """How long what is left may take, by what was expected and what it took so far."""
        left = sum(map(self._seconds, self._left()))
        if not left:
            return "done"
        return f"about {in_words(left * self._took / self._expected)} left"

    def _say_results(self, question: Question, jobs: Sequence[_Job]) -> None:
        """What came out of each variant, what was cut, and what cannot be compared."""
        name = question.name
        by_variant: dict[Variant, list[pd.DataFrame]] = {}
        for job in jobs:
            for cell in job.cells:
                by_variant.setdefault(cell.variant, []).append(self._tables[cell])
        for variant, tables in by_variant.items():
            table = pd.concat(tables)
            means = table.groupby("metric", sort=False)["value"].mean()
            told = ", ".join(f"{metric} {value:.3f}" for metric, value in means.items())
            self._say(f"{variant} on {name}: {told}")
        items = table.drop_duplicates("item")
        if cut := int((items["left_out"] > 0).sum()):
            self._say(
                f"{name}: {cut} of {len(items)} items are too long, and lost their beginning."
            )
        if not isinstance(question.task, Articles) and (odd := left_out(question.task)):
            self._say(f"{name}: left out {', '.join(odd)}, which are not means over items.")

    def table(self) -> pd.DataFrame:
        """All rows: by variant, then by task, then by item."""
        cells = [cell for job in self._jobs for cell in job.cells]
        variants = list(dict.fromkeys(cell.variant for cell in cells))
        cells.sort(key=lambda cell: variants.index(cell.variant))  # which keeps the order else
        return pd.concat([self._tables[cell] for cell in cells], ignore_index=True)


def _refuse_unscored(question: Question, tables: Sequence[pd.DataFrame]) -> None:
    """Refuse a task whose first answers have no score of their own, before they are kept."""
    # (The authors skip what is too long, which may be a whole block.)
    if question.authors or any(len(table) for table in tables):
        return
    raise ValueError(
        f"{question.name} has no metric that is a number for each item and a mean over items: "
        "leave it out, or run it with flocking lm-eval."
    )


def _code(found: Found) -> str:
    """Which code a kept cell is from."""
    return f"{found.key.code[:8]}, run {found.finished[:10]}"
