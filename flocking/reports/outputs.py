"""What outputs hold: evaluations and numbers of figures, by the model that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import xarray as xr

from flocking.evaluation.sources import Source


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What ``flocking evaluate`` wrote into one folder.

    Attributes
    ----------
    folder : Path
    source : Source
        What is known of the model and of what it was asked.
    items : pandas.DataFrame
        As :func:`flocking.evaluation.runner.evaluate` returns it, with ``older``.
    complete : bool
        Whether a ``source.json`` says what was asked; earlier versions of flocking wrote none.
    """

    folder: Path
    source: Source
    items: pd.DataFrame
    complete: bool = True


@dataclass(frozen=True, eq=False)
class Numbers:
    """Numbers of one figure of one model, as ``flocking figures`` wrote them.

    Attributes
    ----------
    path : Path
    data : xarray.Dataset
        As the experiment returned it.
    code : str
        Digest of the code that computed them.
    versions : dict of str to str
    """

    path: Path
    data: xr.Dataset
    code: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The figure's, such as ``scores``."""
        return self.path.stem


@dataclass(frozen=True, eq=False)
class Measured:
    """All outputs of one model.

    Attributes
    ----------
    label : str
        Its name; with its dtype or folder where several models have the same.
    parameters : int or None
        None if no output says it.
    evaluations : tuple of Evaluation
    figures : dict of str to Numbers
        By the name of the figure.
    """

    label: str
    parameters: int | None
    evaluations: tuple[Evaluation, ...]
    figures: Mapping[str, Numbers]

    def items(self) -> pd.DataFrame:
        """Of all its evaluations, one or more; what was measured twice counts once."""
        key = ["task", "protocol", "metric", "method", "density", "item"]
        return pd.concat([one.items for one in self.evaluations]).drop_duplicates(key)


@dataclass(frozen=True)
class Difference:
    """One way in which outputs are unlike, which does not keep them from being put together.

    Attributes
    ----------
    what : str
        Such as ``torch``, ``seed``, or ``code of scores``.
    values : dict of str to str
        By the model's label.
    """

    what: str
    values: Mapping[str, str]

    def others(self) -> list[str]:
        """Labels of the models that are unlike the first one."""
        first = next(iter(self.values.values()))
        return [label for label, value in self.values.items() if value != first]

    def __str__(self) -> str:
        """In a sentence."""
        groups: dict[str, list[str]] = {}
        for label, value in self.values.items():
            groups.setdefault(value, []).append(label)
        told = "; ".join(f"{value} of {', '.join(labels)}" for value, labels in groups.items())
        return f"Outputs differ in {self.what}: {told}."


@dataclass(frozen=True, eq=False)
class Outputs:
    """Outputs of several models that can be put together.

    Attributes
    ----------
    models : tuple of Measured
        The smallest first; those whose size is not known last.
    differences : tuple of Difference
        What is unlike among them.
    """

    models: tuple[Measured, ...]
    differences: tuple[Difference, ...] = ()

    def marked(self) -> list[str]:
        """Labels of the models of which something is unlike the first one's."""
        found = {label for one in self.differences for label in one.others()}
        return [one.label for one in self.models if one.label in found]


def refuse_no_outputs(outputs: object) -> None:
    """Raise a TypeError for anything but what ``collect`` returns, such as a folder."""
    if not isinstance(outputs, Outputs):
        raise TypeError(
            f"outputs is of type {type(outputs).__name__}: give what flocking.reports.collect "
            "returns for the folders."
        )
