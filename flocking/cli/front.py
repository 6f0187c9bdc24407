"""The ``flocking`` command itself, on which the commands are put."""

from __future__ import annotations

from typing import Annotated

import typer

import flocking
from flocking.cli.group import Commands

_HELP = "Record and measure flocking, the consistency of feed-forward activations in a text."

app = typer.Typer(
    cls=Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    # Plain help, which breaks lines between words at any width; boxes cut long names of options.
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(flocking.__version__)
        raise typer.Exit


@app.callback(help=_HELP)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Show the help where no command is named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
