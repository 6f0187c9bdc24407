"""Tasks by methods by densities: each a cell that is computed once and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.evaluation.cells import Cell, Cells, Found
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.plan import Plan
from flocking.evaluation.tasks import quiet


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    batch_size: int = 8,
    cells: Cells | None = None,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Ask a model, and its twins, the items of tasks.

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
        Takes each line of the report.

    Returns
    -------
    pandas.DataFrame
        A row for each task, variant, metric and item: ``value``; ``chance``, what it would be by
        chance (one by the number of choices; of a generated text, its score as the answer to the
        next item; missing for losses); ``prompt_tokens``, from which kept neurons were selected;
        ``left_out``, tokens that did not fit; ``scored`` and ``pruned``, tokens whose likelihood
        was asked for, and that were computed with the kept neurons alone; ``older``, the code
        that a cell of older code is from, empty for today's. Losses are means in nats a token.

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
    with quiet():
        lm = GriffinLM(
            model,
            method="full",
            tokenizer=tokenizer,
            batch_size=batch_size,
            calibration=plan.calibration,
            seed=plan.seed,
        )
    wanted = [
        Cell.of(lm, asked, variant, cells) for variant in plan.variants for asked in questions
    ]
    seconds: dict[str, float] = {}
    tables = _kept(wanted, cells is not None and cells.keep_older, seconds, say)
    for cell in wanted:
        if cell in tables:
            continue
        if (other := cell.finished()) is not None:
            tables[cell] = other.table.assign(older="")
            name = f"{cell.variant} on {cell.question.name}"
            say(f"[{len(tables)}/{len(wanted)}] {name}: another run has finished it meanwhile.")
            continue
        cell.prune(lm)
        started = time.monotonic()
        table = cell.run(lm, say)
        took = seconds[cell.question.name] = time.monotonic() - started
        cell.write(table, took)
        tables[cell] = table.assign(older="")
        left = [other for other in wanted if other not in tables]
        say(f"[{len(tables)}/{len(wanted)}] {cell.said(table)}; {_remaining(left, seconds)}")
    return pd.concat([tables[cell] for cell in wanted], ignore_index=True)


def _kept(
    wanted: Sequence[Cell],
    keep_older: bool,
    seconds: dict[str, float],
    say: Callable[[str], None],
) -> dict[Cell, pd.DataFrame]:
    """The cells that need not be computed; says what is there, and notes how long each took."""
    tables: dict[Cell, pd.DataFrame] = {}
    older, unread = 0, 0
    for cell in wanted:
        found = cell.found(say)
        if found:
            seconds[cell.question.name] = found[-1].seconds
        same = [one for one in found if one.key == cell.key]
        before = [one for one in found if one.key and cell.key.differing(one.key) == ["code"]]
        if same:
            tables[cell] = same[-1].table.assign(older="")
        elif before:
            older += 1
            if keep_older:
                tables[cell] = before[-1].table.assign(older=_code(before[-1]))
        elif any(one.key is None for one in found):
            unread += 1
    if tables:
        said = f", {older} of them of older code" if keep_older and older else ""
        say(f"{len(tables)} of {len(wanted)} cells are there already{said}.")
    if older and not keep_older:
        say(
            f"{older} cells differ in the code part of their key alone and are computed again: "
            "--keep-older (keep_older=True) accepts them."
        )
    if unread:
        say(
            f"{unread} cells have a key that is not in three parts, which an earlier version of "
            "flocking wrote: they count as stale in all parts and are computed again."
        )
    return tables


def _code(found: Found) -> str:
    """Which code a kept cell is from."""
    assert found.key is not None
    return f"{found.key.code[:8]}, run {found.finished[:10]}"


def _remaining(left: Sequence[Cell], seconds: Mapping[str, float]) -> str:
    """How long what is left may take, from what each task took last."""
    if not left:
        return "done"
    names = [cell.question.name for cell in left]
    known = [seconds[name] for name in names if name in seconds]
    more = "at least " if len(known) < len(left) else "about "
    return f"{more}{sum(known) / 60:.0f} min left"
