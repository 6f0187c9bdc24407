"""The command that puts outputs of several models side by side: compare.

It runs no model; what needs torch is imported inside of it, so that help and version are quick.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flocking.cli.front import app
from flocking.cli.printing import say
from flocking.cli.session import notice, reporting, result
from flocking.cli.tables import Column, Row, print_table

if TYPE_CHECKING:
    from flocking.reports import Outputs, Written


@app.command(epilog="Example: flocking compare out/135m out/500m out/1500m -o out/sizes")
@reporting
def compare(
    outputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT",
            help="Folder that flocking evaluate, flocking figures or both wrote, or a folder of "
            "such folders; give one for each model, or several.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the table and figures."),
    ],
    density: Annotated[
        float, typer.Option(help="At which the figures show methods; the table has all.")
    ] = 0.5,
) -> None:
    """Put outputs of several models into one table and three figures, by the models' size.

    Loss by size and method; loss against captured energy; flocking score and specificity by size.
    A second table has methods, prompts and models in pairs, each item against itself.
    What was not asked the same is refused; versions, code and settings that differ are named.
    """
    from flocking.artifacts import refuse_unwritable
    from flocking.cli.outputs import refuse_nothing
    from flocking.reports import collect, missing, write
    from flocking.reports.writing import COMPARISON

    refuse_nothing("output", output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder.")
    if not 0 < density <= 1:
        raise ValueError(f"--density {density:g}: give a density above 0 and at most 1.")
    COMPARISON.refuse_foreign(output)
    refuse_unwritable(COMPARISON.paths(output)[0])
    found = collect(outputs)
    written = write(found, output, density=density)
    lacking = missing(found, written.rows)
    models: list[Row] = [
        {
            "model": one.label,
            "parameters": one.parameters,
            "tasks": [task for each in one.evaluations for task in each.items["task"].unique()],
            "figures": list(one.figures),
        }
        for one in found.models
    ]
    document = {
        "out": output,
        "files": written.files,
        "models": models,
        "differences": [str(one) for one in found.differences],
        "missing": lacking,
        "not_drawn": list(written.not_drawn.values()),
        "summary": written.rows.to_dict("records"),
        "contrasts": written.contrasts.to_dict("records"),
    }
    result(document, functools.partial(_print, models, found, written, lacking))


def _print(models: list[Row], found: Outputs, written: Written, lacking: list[str]) -> None:
    print_table(_MODELS, models)
    for line in (*map(str, found.differences), *lacking, *written.not_drawn.values()):
        say(line)
    names = ", ".join(path.name for path in written.files)
    say(f"wrote {names} in {written.files[0].parent}")
    notice(f"Next: read {written.files[2]}, which has all of it.")


def _size(row: Row) -> str:
    return "not known" if row["parameters"] is None else f"{row['parameters']:,}"


_MODELS = (
    Column("model", lambda row: row["model"], text=True),
    Column("parameters", _size),
    Column("tasks", lambda row: len(set(row["tasks"]))),
    Column("figures", lambda row: ", ".join(row["figures"]), text=True),
)
