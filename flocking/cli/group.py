"""The group of commands: its help, whole at any width, and its complaints, in one sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from flocking.cli.printing import USAGE_ERROR, complain

_UNBREAKABLE = str.maketrans("-", "\u2011")  # a hyphen at which no line ends
_BREAKABLE = str.maketrans("\u2011", "-")


class _Formatter(typer.Context.formatter_class):  # type: ignore[misc,valid-type]
    """Help in which no name such as ``--max-tokens`` is broken at a hyphen."""

    def write_text(self, text: str) -> None:
        """As click does; a command can be copied whole, however many lines it takes."""
        if not text.startswith("Example: "):
            super().write_text(text.translate(_UNBREAKABLE))
            return
        room = self.width - self.current_indent - len(" \\")
        lines = textwrap.wrap(
            text, room, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for number, line in enumerate(lines, 1):
            more = " \\" if number < len(lines) else ""
            self.write(f"{'':>{self.current_indent}}{line}{more}\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **options: Any) -> None:
        """As click does; older versions of typer write ``[required]`` for rich to read."""
        kept = [(name, text.replace("\\[", "[").translate(_UNBREAKABLE)) for name, text in rows]
        super().write_dl(kept, *args, **options)

    def getvalue(self) -> str:
        """All that was written."""
        return str(super().getvalue()).translate(_BREAKABLE)


class _Context(typer.Context):
    formatter_class = _Formatter


class Commands(TyperGroup):
    """The commands, whose complaints about their options are one sentence."""

    context_class = _Context

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """As click does."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.context_class = _Context
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands, each with the whole first sentence of its help."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            first = (command.help or "").partition("\n\n")[0]
            rows.append((name, " ".join(first.split())))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """As click does."""
        with _in_one_sentence():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """As click does."""
        with _in_one_sentence():
            return super().invoke(ctx)


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Say what is wrong with a command line as all errors are said."""
    try:
        yield
    except USAGE_ERROR as problem:
        context = getattr(problem, "ctx", None)
        path = context.command_path if context is not None else "flocking"
        said = problem.format_message().rstrip(".")  # type: ignore[attr-defined]
        said = said.partition(", unable to parse")[0].replace("argument(s)", "arguments")
        complain(f"{said} (see {path} --help).")
        raise typer.Exit(2) from None
