"""What outputs have in common: what must be, and what is only noted where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from flocking.evaluation.summary import label, parts_of
from flocking.reports.outputs import Difference, Evaluation, Measured, Numbers

_SAME = {"rtol": 1e-4, "atol": 1e-6}  # of a value that two runs computed
# Attributes of a figure that must be the same, and what they are in words.
_SETTINGS = {
    "texts": "the texts",
    "tokens": "tokens of a text",
    "density": "density",
    "prompt": "tokens of the prompt",
}


def refuse_unlike(models: Sequence[Measured]) -> None:
    """Raise a ValueError if two outputs were not asked the same."""
    first: dict[tuple[str, bool], Evaluation] = {}
    for model in models:
        for evaluation in model.evaluations:
            for task in map(str, evaluation.items["task"].unique()):
                asked = evaluation.source.tasks.get(task)
                # (What an older one does not say of its documents, the next may not agree in.)
                for known in {False, bool(asked and asked.digest)}:
                    other = first.setdefault((task, known), evaluation)
                    _refuse_other_items(task, other, evaluation)
    before: dict[str, Numbers] = {}
    for model in models:
        for name, numbers in model.figures.items():
            _refuse_other_texts(before.setdefault(name, numbers), numbers)


def _refuse_other_items(task: str, one: Evaluation, two: Evaluation) -> None:
    parts = [each.items[each.items["task"] == task] for each in (one, two)]
    where = f"{one.folder} and {two.folder}"
    protocols = [", ".join(map(str, part["protocol"].unique())) for part in parts]
    if protocols[0] != protocols[1]:
        raise ValueError(
            f"{where} were asked {task} with unlike protocols ({protocols[0]}; {protocols[1]}): "
            "evaluate both with the same --protocol, or leave one out."
        )
    asked = [each.source.tasks.get(task) for each in (one, two)]
    digests = [each.digest if each is not None else "" for each in asked]
    items = [set(part["item"]) for part in parts]
    # (Of the same documents, those that both have are put together: see on_common_items.)
    common = all(digests) and items[0] & items[1]
    if items[0] != items[1] and not common:
        counts = " and ".join(f"{len(each):,}" for each in items)
        raise ValueError(
            f"{where} do not have the same items of {task} ({counts}): evaluate both with the "
            "same --limit and documents, or leave one out."
        )
    if all(digests) and digests[0] != digests[1]:
        harness = {each.source.versions.get("lm-eval", "") for each in (one, two)}
        unlike = f"; lm-eval {' and '.join(sorted(harness))}" if len(harness) > 1 else ""
        raise ValueError(
            f"{where} were not asked the same {task} (its definition or documents differ"
            f"{unlike}): evaluate both with the same documents and settings, or leave one out."
        )


def on_common_items(
    models: Sequence[Measured],
) -> tuple[tuple[Measured, ...], tuple[Difference, ...]]:
    """The models with the items of each task that all have been asked, and where some had more."""
    every = [one for model in models for one in model.evaluations]
    tasks = dict.fromkeys(task for one in every for task in one.items["task"])
    common: dict[str, set[int]] = {}
    found = []
    for task in tasks:
        counts: dict[str, set[int]] = {}
        for model in models:
            for one in model.evaluations:
                if items := set(one.items.loc[one.items["task"] == task, "item"]):
                    counts.setdefault(model.label, set()).update(items)
                    common[task] = common.get(task, items) & items
        if not common[task]:
            raise ValueError(
                f"no item of {task} was asked of all of {', '.join(counts)}: evaluate them with "
                "the same --limit and documents, or leave one out."
            )
        if any(items != common[task] for items in counts.values()):
            told = {name: f"{len(items)}" for name, items in counts.items()}
            found.append(Difference(f"items of {task} ({len(common[task])} are compared)", told))

    def cut(one: Evaluation) -> Evaluation:
        pairs = zip(one.items["task"], one.items["item"], strict=True)
        keep = [item in common[task] for task, item in pairs]
        return replace(one, items=one.items[keep].reset_index(drop=True))

    cuts = [replace(model, evaluations=tuple(map(cut, model.evaluations))) for model in models]
    return tuple(cuts), tuple(found)


def refuse_contradictions(models: Sequence[Measured]) -> None:
    """Raise a ValueError if one model has different values of the same items."""
    for model in models:
        _refuse_contradictions(model.evaluations)


def _refuse_contradictions(evaluations: Sequence[Evaluation]) -> None:
    """Of one model: where the same was measured twice, it must be the same."""
    seen: dict[tuple[str, ...], tuple[Evaluation, pd.Series]] = {}
    for evaluation in evaluations:
        named = evaluation.items.assign(
            variant=list(map(label, evaluation.items["method"], evaluation.items["density"]))
        )
        for key, part in parts_of(named, ["task", "variant", "metric"]):
            values = part.set_index("item")["value"].sort_index()
            other, before = seen.setdefault(key, (evaluation, values))
            if not np.allclose(before, values, equal_nan=True, **_SAME):
                raise ValueError(
                    f"{other.folder} and {evaluation.folder} are of one model and have different "
                    f"values of {key[1]} on {key[0]}, {key[2]}: leave one of the two out."
                )


def _refuse_other_texts(one: Numbers, two: Numbers) -> None:
    for name, words in _SETTINGS.items():
        values = [each.data.attrs.get(name) for each in (one, two)]
        if values[0] != values[1]:
            raise ValueError(
                f"{one.path} and {two.path} differ in {words} ({_short(values[0])}; "
                f"{_short(values[1])}): run flocking figures --only {one.name} with the same "
                "--texts for both models, or leave one out."
            )


def _short(value: object) -> str:
    """A setting in a few words."""
    if isinstance(value, list):
        return ", ".join(map(str, value[:4])) + (f" and {len(value) - 4} more" * (len(value) > 4))
    return str(value)


def differences(models: Sequence[Measured]) -> tuple[Difference, ...]:
    """In what outputs are unlike that can be put together all the same."""
    told: dict[str, dict[str, set[str]]] = {}
    for model in models:
        for what, value in _settings_of(model):
            told.setdefault(what, {}).setdefault(model.label, set()).add(value)
    found = []
    for what, by_label in told.items():
        values = {name: " and ".join(sorted(each)) for name, each in by_label.items()}
        if len(set().union(*by_label.values())) > 1:
            found.append(Difference(what, values))
    return tuple(found)


def _settings_of(model: Measured) -> Iterator[tuple[str, str]]:
    """What may differ, and what it is; without what an output does not say."""
    for one in model.evaluations:
        source = one.source
        said = {
            "dtype": source.dtype,
            "tokenizer (by digest)": source.tokenizer[:8],
            "device": source.device,
            "seed": "" if source.seed is None else str(source.seed),
            "calibration texts (by digest)": source.calibration_digest[:8],
            "code of the evaluation": source.code[:8],
            **source.versions,
        }
        yield from ((what, value) for what, value in said.items() if value)
        for older in filter(None, one.items["older"].unique()):
            yield "code of the evaluation", f"older ({older})"
    for numbers in model.figures.values():
        about = numbers.data.attrs
        said = {
            "dtype": str(about.get("dtype", "")),
            "seed": str(about.get("seed", "")),
            f"code of {numbers.name}": numbers.code[:8],
            **numbers.versions,
        }
        yield from ((what, value) for what, value in said.items() if value)
