"""Reading outputs: folders that hold some, evaluations in them, numbers of figures in them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import xarray as xr

from flocking.artifacts import Key, UnreadableError, from_json, read_content
from flocking.evaluation import sources
from flocking.models import warn
from flocking.reports.outputs import Evaluation, Numbers
from flocking.texts import why_no_file

ITEMS = "items.parquet"
_CELLS = "cells"  # what an evaluation keeps until it is done, and after
_BEGUN = (
    "an evaluation was begun and not finished there, and is left out: run the same flocking "
    "evaluate again, which goes on."
)
_LAYERS = ("interval", "weights", "layer")
# Figures that are compared, with the variables that are read, and their dimensions.
FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "scores": dict.fromkeys(("flocking_score", "rank_consistency", "effective_neurons"), _LAYERS),
    "sequence_overlap": dict.fromkeys(("within", "between", "specificity"), _LAYERS),
    "token_order": dict.fromkeys(
        ("flocking_score_mean", "rank_consistency_mean"), ("interval", "weights", "order")
    ),
    "loss_by_method": {
        **dict.fromkeys(("perplexity", "relative"), ("interval", "selection")),
        "captured": ("text", "excerpt", "selection"),
    },
}
_ATTRIBUTES = {"sequence_overlap": ("density", "chance"), "loss_by_method": ("density",)}
_COLUMNS = ("task", "protocol", "method", "density", "metric", "item", "value", "chance")
_COUNTS = ("left_out", "scored", "pruned")


def folders_in(out: Path) -> list[Path]:
    """The folder itself if it holds outputs, otherwise the folders in it that do.

    Raises
    ------
    ValueError
        If there is no such folder, or nothing in it that is compared.
    """
    if not out.is_dir():
        why = why_no_file(out) or "is a file"
        raise ValueError(f"{out} {why}: name a folder that flocking evaluate or figures wrote.")
    inside = sorted(one for one in out.iterdir() if one.is_dir() and one.name[0] != ".")
    found = [out] if _holds(out) else list(filter(_holds, inside))
    begun = [str(one) for one in (out, *inside) if _is_begun(one)]
    if begun and found:
        warn(f"{' and '.join(begun)}: {_BEGUN}")
    if begun and not found:
        raise ValueError(f"{' and '.join(begun)}: {_BEGUN}")
    if not found:
        names = ", ".join(f"{name}.json" for name in FIGURES)
        raise ValueError(
            f"{out} holds nothing that is compared, and neither do the folders in it ({ITEMS} of "
            f"flocking evaluate; {names} of flocking figures): name the --out of one of the two."
        )
    return found


def _is_begun(folder: Path) -> bool:
    """Whether an evaluation was begun in a folder, and not finished."""
    return (folder / _CELLS).is_dir() and not (folder / ITEMS).exists()


def _holds(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ITEMS, *(f"{name}.json" for name in FIGURES)))


def evaluation_in(folder: Path) -> Evaluation | None:
    """What ``flocking evaluate`` wrote into a folder; None if it wrote nothing.

    Raises
    ------
    ValueError
        If a file of it cannot be read, or they do not belong together.
    """
    path = folder / ITEMS
    if not path.exists():
        return None
    items = _items(path)
    there = (folder / sources.NAME).exists()
    source = sources.read(folder / sources.NAME) if there else _told(folder)
    complete = bool(source.tasks)
    counts = items.groupby("task")["item"].nunique()
    for name, count in counts.items() if complete else ():
        asked = source.tasks.get(str(name))
        if asked is None or asked.items not in (None, count):
            raise ValueError(
                f"{path} and {folder / sources.NAME} do not belong together ({name} has {count} "
                "items in the first one only): run flocking evaluate again with the same --out."
            )
    return Evaluation(folder, source, items, complete)


def _items(path: Path) -> pd.DataFrame:
    try:
        items = pd.read_parquet(path)
    except ImportError as problem:
        raise ValueError(
            f"{path} cannot be read without pyarrow: pip install 'flocking[eval]' brings it."
        ) from problem
    except Exception as problem:  # whatever is wrong with it; pyarrow has many words for that
        why = str(problem).split("\n")[0]
        raise ValueError(
            f"{path} cannot be read ({why}): run flocking evaluate again with the same --out."
        ) from problem
    lacking = [name for name in (*_COLUMNS, *_COUNTS) if name not in items]
    if lacking or items.empty:
        why = f"no column {lacking[0]!r}" if lacking else "no rows"
        raise ValueError(f"{path} has {why}, so that it is not of flocking evaluate: remove it.")
    return items.assign(older=items.get("older", ""))


def _told(folder: Path) -> sources.Source:
    """What ``tables.md`` says of a model, where earlier versions wrote no ``source.json``."""
    path = folder / "tables.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^\(model (.+)\)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(
            f"{folder} has no {sources.NAME}, nor a tables.md that names the model: run flocking "
            "evaluate again with the same --out, where finished cells are kept."
        )
    told = dict(part.partition(" ")[::2] for part in f"model {found[1]}".split("; "))
    packages = ("python", "flocking", "transformers", "torch", "lm-eval")
    return sources.Source(
        model=told["model"],
        dtype=told.get("dtype", ""),
        device=told.get("device", ""),
        seed=int(told["seed"]) if told.get("seed", "").isdecimal() else None,
        versions={name: told[name] for name in packages if name in told},
    )


def numbers_in(folder: Path) -> list[Numbers]:
    """Numbers of the figures in a folder that are compared.

    Raises
    ------
    ValueError
        If a file cannot be read, was changed, or is of something else.
    """
    paths = (folder / f"{name}.json" for name in FIGURES)
    return [_numbers(path) for path in paths if os.path.lexists(path)]


def _numbers(path: Path) -> Numbers:
    remedy = f"run flocking figures --only {path.stem} again with the same --out"
    try:
        content = read_content(path)
        data = from_json(json.dumps(content))
        if why := _of_another_form(path.stem, data):
            raise ValueError(why)
        key = Key.read(content["key"])
    except UnreadableError as problem:
        raise ValueError(f"{problem}: {remedy}.") from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{path} does not have the numbers of this figure ({problem}): {remedy}."
        ) from problem
    if key is None:  # of an earlier version
        return Numbers(path, data)
    return Numbers(path, data, key.code, {str(k): str(v) for k, v in key.versions.items()})


def _of_another_form(name: str, data: xr.Dataset) -> str:
    """What a figure's numbers lack, or have otherwise; empty if nothing."""
    for variable, dims in FIGURES[name].items():
        if variable not in data:
            return f"no {variable}"
        if {*data[variable].dims} != {*dims}:
            return f"{variable} has other dimensions than {', '.join(dims)}"
    wanted = ("model", "texts", *_ATTRIBUTES.get(name, ()))
    lacking = [attribute for attribute in wanted if attribute not in data.attrs]
    return f"no attribute {lacking[0]}" if lacking else ""
