"""Putting outputs together by the model that they are of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flocking.reports.agreement import (
    differences,
    on_common_items,
    refuse_contradictions,
    refuse_unlike,
)
from flocking.reports.outputs import Evaluation, Measured, Numbers, Outputs
from flocking.reports.reading import evaluation_in, folders_in, numbers_in
from flocking.texts import expanded


@dataclass(eq=False)
class _Model:
    """A model, as its outputs are found one after the other."""

    name: str
    dtype: str
    identity: str
    outs: set[Path]  # as they were named
    folders: set[Path] = field(default_factory=set)  # that its outputs are in
    evaluations: list[Evaluation] = field(default_factory=list)
    figures: dict[str, Numbers] = field(default_factory=dict)

    @property
    def parameters(self) -> int | None:
        """From whichever output says it."""
        said = [one.source.parameters for one in self.evaluations]
        said += [one.data.attrs.get("parameters") for one in self.figures.values()]
        return next((int(number) for number in said if number is not None), None)


def collect(folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Outputs:
    """Read outputs of models, and check that they can be put together.

    Outputs of the same model, by the digest of its files and its dtype, are one. Numbers of figures
    by earlier versions do not say which files a model was read from: they go with the evaluation of
    the same name and dtype, if there is one, and the numbers of layers and neurons must agree.

    Parameters
    ----------
    folders : path or iterable of path
        Each is the ``--out`` of ``flocking evaluate``, of ``flocking figures``, or of both; or a
        folder of such folders.

    Returns
    -------
    Outputs
        By model, the smallest first. Versions, code, seeds, dtypes and devices that differ are in
        ``differences``, and where some were asked more items of a task, which are left out.

    Raises
    ------
    ValueError
        If a folder is not there or holds no outputs, if a file in it cannot be read, if two
        outputs contradict each other, or were not asked the same: other items, documents or
        protocols of a task, other texts of a figure.

    Examples
    --------
    >>> from flocking.reports import collect
    >>> outputs = collect(["small", "large"])
    >>> [(one.label, one.parameters) for one in outputs.models]
    [('small-model', 1000000), ('large-model', 9000000)]
    >>> print(*outputs.differences)
    Outputs differ in torch: 2.13.0 of small-model; 2.14.0 of large-model.
    """
    named = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    if not named:
        raise ValueError("no outputs are named: give folders that flocking evaluate wrote.")
    found = _found([expanded(Path(one)) for one in named])
    evaluations = [(out, evaluation_in(folder)) for out, folder in found]
    models: list[_Model] = []
    # Those that say which files the model was read from come first, so that others can join them.
    known = [(out, one) for out, one in evaluations if one is not None]
    for out, evaluation in sorted(known, key=lambda pair: not pair[1].source.identity):
        source = evaluation.source
        model = _model_of(models, source.model, source.dtype, source.identity, out, evaluation)
        model.evaluations.append(evaluation)
    for out, folder in found:
        for numbers in numbers_in(folder):
            _add(models, numbers, out)
    ordered = sorted(models, key=lambda one: one.parameters or math.inf)
    labels = _labels(ordered)
    measured = tuple(
        Measured(labels[one], one.parameters, tuple(one.evaluations), one.figures)
        for one in ordered
    )
    refuse_unlike(measured)
    measured, unlike = on_common_items(measured)
    refuse_contradictions(measured)
    return Outputs(measured, (*unlike, *differences(measured)))


def _found(outs: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Folders with outputs, once each, and the one that was named."""
    pairs: dict[str, tuple[Path, Path]] = {}
    for out in outs:
        for folder in folders_in(out):
            pairs.setdefault(os.path.realpath(folder), (out, folder))
    return list(pairs.values())


def _model_of(
    models: list[_Model],
    name: str,
    dtype: str,
    identity: str,
    out: Path,
    output: Evaluation | Numbers,
) -> _Model:
    """The model that an output is of, which is new if no output before is of it."""
    same = [one for one in models if identity and (one.identity, one.dtype) == (identity, dtype)]
    if not same:
        # Without an identity, the name has to do.
        same = [
            one
            for one in models
            if one.name == name
            and (not dtype or not one.dtype or one.dtype == dtype)
            and not (identity and one.identity)
        ]
        near = [one for one in same if out in one.outs]
        same = near if len(same) > 1 and near else same
    if len(same) > 1:
        where = output.folder if isinstance(output, Evaluation) else output.path
        folders = " and ".join(str(one.evaluations[0].folder) for one in same[:2])
        raise ValueError(
            f"{where} is of a model named {name}, and so are {folders}, which are two models: put "
            "it into the folder of the one that it is of."
        )
    if not same:
        same = [_Model(name, dtype, identity, set())]
        models += same
    (model,) = same
    model.identity, model.dtype = model.identity or identity, model.dtype or dtype
    model.outs.add(out)
    model.folders.add(output.folder if isinstance(output, Evaluation) else output.path.parent)
    return model


def _add(models: list[_Model], numbers: Numbers, out: Path) -> None:
    """Put a figure's numbers to the model that they are of."""
    about = numbers.data.attrs
    identity = str(about.get("identity", ""))
    model = _model_of(models, about["model"], about.get("dtype", ""), identity, out, numbers)
    before = model.figures.setdefault(numbers.name, numbers)
    if not before.data.identical(numbers.data):
        raise ValueError(
            f"{before.path} and {numbers.path} are of one model and have different numbers: leave "
            "one of the two out."
        )
    for evaluation in model.evaluations:
        _refuse_other_shape(evaluation, numbers)


def _refuse_other_shape(evaluation: Evaluation, numbers: Numbers) -> None:
    """Refuse to take two models for one by their name."""
    source, coords = evaluation.source, numbers.data.coords
    shapes = []
    if source.layers is not None and "layer" in coords:
        shapes.append(("FF blocks", str(source.layers), str(coords["layer"].size)))
    if source.d_ff and "d_ff" in coords:
        theirs, own = (_widths(each) for each in (source.d_ff, coords["d_ff"].values.ravel()))
        shapes.append(("neurons in a block", theirs, own))
    for what, theirs, own in shapes:
        if theirs != own:
            raise ValueError(
                f"{evaluation.folder} and {numbers.path} are of two models named {source.model} "
                f"({theirs} and {own} {what}): run flocking figures again with the model that was "
                "evaluated, or leave one of the two out."
            )


def _widths(widths: Iterable[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(map(int, widths))))


def _labels(models: Sequence[_Model]) -> Mapping[_Model, str]:
    """Names of models; with their dtype, or else their folder, where several have the same."""
    labels = {}
    for one in models:
        same = [other for other in models if other.name == one.name]
        folders = {other: min(other.folders) for other in same}
        more = (
            dict.fromkeys(same, ""),
            {other: f", {other.dtype}" for other in same},
            {other: f" ({min(other.outs).name})" for other in same},
            {other: f" ({folders[other].name})" for other in same},
            {other: f" ({folders[other]})" for other in same},
            {other: f" ({number})" for number, other in enumerate(same, 1)},
        )
        unlike = next(each for each in more if len({*each.values()}) == len(same))
        labels[one] = one.name + unlike[one]
    return labels
