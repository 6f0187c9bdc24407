"""A comparison as files: one table as CSV and Markdown, and three figures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from flocking.artifacts import FileGroup
from flocking.drawing import save, titled
from flocking.evaluation.summary import said, scale_of
from flocking.reports.choosing import of_energy, of_scores, of_sizes, refuse_density, why_none
from flocking.reports.comparison import DIFFERENCES, by_layer, compared
from flocking.reports.contrasts import contrasted
from flocking.reports.figures import FIGURES, in_words
from flocking.reports.outputs import Outputs
from flocking.reports.tables import HEADING, older_code, page_of
from flocking.texts import expanded

FILES = ("compared.csv", "contrasted.csv", "compared.md")
# By these, tables that an earlier version wrote are known, too.
_MARKS = {
    "compared.csv": {"model", "metric", "method", "difference_low"},
    "contrasted.csv": {"of", "than", "difference"},
}
_BARS = "Bars are 95% bootstrap intervals"
_MARKED = 3  # of a caption's numbers: methods that are named


def _is_ours(path: Path) -> bool:
    if path.suffix == ".csv":
        names = path.read_text(encoding="utf-8").partition("\n")[0].split(",")
        return set(names) >= _MARKS[path.name]
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8").startswith(HEADING)
    return titled(path, path.stem)


COMPARISON = FileGroup(
    FILES, tuple(FIGURES), _is_ours, "is not a comparison of flocking: choose another --output"
)


@dataclass(frozen=True, eq=False)
class Written:
    """What :func:`write` wrote.

    Attributes
    ----------
    rows, contrasts : pandas.DataFrame
        As of :func:`compared` and :func:`contrasted`.
    files : list of Path
    not_drawn : dict of str to str
        Why there is no figure of a name, in a sentence.
    """

    rows: pd.DataFrame
    contrasts: pd.DataFrame
    files: list[Path]
    not_drawn: dict[str, str]


def write(outputs: Outputs, out: str | os.PathLike[str], *, density: float = 0.5) -> Written:
    """Write two tables as CSV, ``compared.md``, and the figures that have something to show.

    All are in their places only when all are complete. Files of an earlier comparison are replaced,
    and a figure of it that has nothing to show any more is removed.

    Parameters
    ----------
    outputs : Outputs
        From :func:`collect`.
    out : path
        Folder.
    density : float
        At which the figures show methods; the table has all densities.

    Returns
    -------
    Written

    Raises
    ------
    ValueError
        If nothing was measured at `density` and something at others, or if there is a file of
        that name that is not of a comparison.
    OSError
        If `out` cannot be written, or another process is writing there.

    Examples
    --------
    >>> from flocking.reports import collect, write
    >>> written = write(collect(["small", "large"]), "both")
    >>> [path.name for path in written.files][:3]
    ['compared.csv', 'contrasted.csv', 'compared.md']
    >>> print(*written.not_drawn.values())
    loss_by_energy is not drawn: no output has loss_by_method.json, at density 0.5.
    """
    folder = expanded(Path(out))
    rows, contrasts = compared(outputs), contrasted(outputs)
    refuse_density(rows, density)
    data = {
        "loss_by_size": of_sizes(rows, density),
        "loss_by_energy": of_energy(rows, density),
        "scores_by_size": of_scores(rows, by_layer(outputs)),
    }
    drawn = [name for name in FIGURES if len(data[name])]
    not_drawn = {name: why_none(name, density) for name in FIGURES if name not in drawn}
    title = ", ".join(model.label for model in outputs.models)
    with COMPARISON.replacing(folder, drawn) as partial:
        rows.to_csv(partial / "compared.csv", index=False, float_format="%.6g")
        contrasts.to_csv(partial / "contrasted.csv", index=False, float_format="%.6g")
        captions = {}
        for name in drawn:
            here = data[name]
            captions[name] = here.attrs["caption"] = _CAPTIONS[name](here, density)
            here.attrs["told"] = _told(name, here, outputs, density)
            save(FIGURES[name](here), partial, name, title, captions[name])
        told = [
            *page_of(outputs, rows, contrasts, captions),
            *not_drawn.values(),
            *older_code(rows),
        ]
        (partial / "compared.md").write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return Written(rows, contrasts, COMPARISON.paths(folder, drawn), not_drawn)


def _told(name: str, data: pd.DataFrame, outputs: Outputs, density: float) -> str:
    """The line or two below a figure: which models, and whether they are unlike."""
    sizes = data.drop_duplicates("model")[["model", "parameters"]]
    by_size = name != "loss_by_energy"
    models = ", ".join(
        f"{model} ({in_words(size)})" if by_size else str(model)
        for model, size in sizes.itertuples(index=False)
    )
    at = "" if name == "scores_by_size" else f" Density {density:g}."
    dots = " Dots are layers, marks their means." if name == "scores_by_size" else f" {_BARS}."
    unlike = " Versions or settings differ: see compared.md." if outputs.differences else ""
    return f"{models}.{at}{dots}{unlike}"


def _of_sizes(data: pd.DataFrame, density: float) -> str:
    return (
        f"What is lost at density {density:g} on each task, by the models' number of parameters: "
        "perplexity as a multiple of the full model's, other scores in percentage points above or "
        "below the full model's (divergences in nats), of the same model on the same items. "
        f"{_BARS} of these paired differences. Chance is dotted. Methods that lose over twice as "
        "much as all others are in words, with the ratios of the models. Tasks of one model alone "
        f"are in the tables, if others have several. {_numbers(data)}"
    )


def _numbers(data: pd.DataFrame) -> str:
    """What GRIFFIN, or whichever method there is, loses on the first task, in words."""
    first = data[
        (data["task"] == data["task"].iloc[0]) & (data["metric"] == data["metric"].iloc[0])
    ]
    wanted = [name for name in ("topk", "static", "static-domain") if name in set(first["method"])]
    names = (wanted or first["method"].unique().tolist())[:_MARKED]
    scale = scale_of(data["metric"].iloc[0], first)
    parts = []
    for method in names:
        own = first[first["method"] == method].set_index("model")[DIFFERENCES]
        # (What ratios are the sentence before says: no sign in front of them.)
        told = (f"{name} {said(one, scale, scale is not None)}" for name, one in own.iterrows())
        parts.append(f"{method} {', '.join(told)}")
    return f"On {data['task'].iloc[0]}: {'; '.join(parts)}."


def _of_energy(data: pd.DataFrame, density: float) -> str:
    texts = ", ".join(map(str, sorted(data["items"].unique())))
    return (
        f"Loss above the full model's at density {density:g}, in nats a token, against the share "
        "of the scored tokens' energy that the kept neurons capture in the full model: a point for "
        f"each model and selection, mean over {texts} texts; lines connect the selections of a "
        f"model. {_BARS} over texts. Chance (dotted) is the density."
    )


def _of_scores(data: pd.DataFrame, density: float) -> str:
    means = data[data["layer"].isna()]
    parts = []
    for (metric, model), part in means.groupby(["metric", "model"], sort=False):
        own = part.set_index("method")["estimate"]
        told = " and ".join(f"{own[name]:.2f}" for name in ("trained", "control") if name in own)
        parts.append(f"{str(metric).replace('_', ' ')} of {model} {told}")
    return (
        "Flocking score and specificity by the models' number of parameters, of trained weights "
        "and of random ones in the same architecture; small dots are layers, large marks their "
        "means, with 95% intervals over texts where they are known. Chance (dotted) is a flocking "
        "score of 0; at a specificity of 0, a text is as similar to itself as to another. Trained "
        f"and random weights: {'; '.join(parts)}."
    )


_CAPTIONS = {
    "loss_by_size": _of_sizes,
    "loss_by_energy": _of_energy,
    "scores_by_size": _of_scores,
}
