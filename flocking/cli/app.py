"""The ``flocking`` command itself, on which the commands are put."""

from __future__ import annotations

from typing import Annotated

import typer

import flocking
from flocking.cli.printing import PrintableErrors

_HELP = "Record and measure flocking, the consistency of feed-forward activations in a text."

app = typer.Typer(
    cls=PrintableErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(flocking.__version__)
        raise typer.Exit


@app.callback(help=_HELP)
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Options of the command itself."""
