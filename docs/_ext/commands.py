"""The command line's reference, from the commands themselves: the directive ``{commands}``."""

from __future__ import annotations

from typing import Any

import typer.main
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flocking.cli import app


def row(parameter: Any) -> str:
    """A line of the table of options and arguments."""
    names, default = [parameter.metavar or str(parameter.name).upper()], ""
    if parameter.param_type_name == "option":
        names = [*parameter.opts, *parameter.secondary_opts]
        if not parameter.is_flag and parameter.default not in (None, "", ()):
            default = f"`{parameter.default}`"
    said = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    needed = " Must be given." if parameter.required else ""
    named = ", ".join(f"`{name}`" for name in names)
    return f"| {named} | {said}{needed} | {default} |"


def described(command: Any) -> str:
    """What a command does, its example, and its parameters, as Markdown."""
    lines = [command.help or "", ""]
    if command.epilog:
        lines += ["```text", command.epilog.strip(), "```", ""]
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    if shown:
        lines += ["| option or argument | | default |", "| --- | --- | --- |", *map(row, shown)]
    return "\n".join(lines)


class Commands(SphinxDirective):
    """A section for each command."""

    def run(self) -> list[nodes.Node]:
        """One section for each command, in the order of ``flocking --help``."""
        group: Any = typer.main.get_command(app)
        sections: list[nodes.Node] = []
        for name, command in group.commands.items():
            section = nodes.section(ids=[f"flocking-{name}"], names=[name])
            section += nodes.title(text=f"flocking {name}")
            text = StringList(described(command).splitlines(), "commands")
            self.state.nested_parse(text, 0, section)
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
