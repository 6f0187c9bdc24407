"""Digests of the code behind numbers: what a module computes, wherever it is written down."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_ROOM = "flocking.artifacts"


def sources(module: str) -> list[Path]:
    """Files of a module of this package, and of all that it imports from the package.

    From a room, only the files in which the imported names are defined. This room is left out,
    since it keeps numbers and computes none.
    """
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = _file_of(name)
        if path is None or name in found or name == _ROOM or name.startswith(f"{_ROOM}."):
            continue
        found[name] = path
        pending += _imported(_parsed(path))
    # A room's __init__ only passes on what is defined elsewhere.
    return [found[name] for name in sorted(found) if found[name].name != "__init__.py"]


def _file_of(module: str) -> Path | None:
    """The file of a module of this package; None for other names."""
    first, *rest = module.split(".")
    if first != _PACKAGE.name:
        return None
    path = _PACKAGE.joinpath(*rest)
    if (path / "__init__.py").exists():
        return path / "__init__.py"
    path = path.with_suffix(".py")
    return path if path.exists() else None


def _parsed(path: Path) -> ast.Module:
    """The syntax tree of a file without docstrings and what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    _drop(tree, _only_tells)
    return tree


def _drop(tree: ast.Module, unwanted: Callable[[ast.stmt], bool]) -> None:
    """Remove statements from all bodies in a tree."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [statement for statement in body if not unwanted(statement)]


def _only_tells(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and those in which imported names are defined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield _origin(node.module, alias.name)


def _origin(module: str, name: str) -> str:
    """The module that defines `name` when it is imported from `module`, which may be a room."""
    if _file_of(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    path = _file_of(module)
    if path is None or path.name != "__init__.py":
        return module
    # The package's own __init__ imports its names for type checkers only.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module != module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _origin(node.module or "", alias.name)
    return module


@functools.cache
def code_digest(module: str) -> str:
    """SHA-256 of the statements in :func:`sources`, whichever of these files they are in.

    Comments, docstrings, layout and imports do not count.
    """
    statements: list[str] = []
    for path in sources(module):
        tree = _parsed(path)
        _drop(tree, lambda statement: isinstance(statement, ast.Import | ast.ImportFrom))
        statements += map(ast.unparse, tree.body)
    return hashlib.sha256("\n".join(sorted(statements)).encode()).hexdigest()
