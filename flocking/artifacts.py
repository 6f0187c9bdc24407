"""Numbers as files: the code that they depend on, written whole or not at all, and read again."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

_PACKAGE = Path(__file__).parent


def sources(module: str) -> list[Path]:
    """Files of a module of this package, and of all that it imports of the package.

    Of a room, only the files that the imported names come from. This file, which keeps numbers
    and makes none, is not one of them.
    """
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = _file_of(name)
        if path is None or name in found or name == __name__:
            continue
        found[name] = path
        pending += _imported(_parsed(path))
    # (A room's own file passes on what is made elsewhere.)
    return [found[name] for name in sorted(found) if found[name].name != "__init__.py"]


def _file_of(module: str) -> Path | None:
    """Where a module of this package is; None for other names."""
    first, *rest = module.split(".")
    if first != _PACKAGE.name:
        return None
    path = _PACKAGE.joinpath(*rest)
    if (path / "__init__.py").exists():
        return path / "__init__.py"
    path = path.with_suffix(".py")
    return path if path.exists() else None


def _parsed(path: Path) -> ast.Module:
    """Without what only type checkers read, and, as numbers do not depend on it, docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not _only_tells(statement)]
    return tree


def _only_tells(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported from, and those that the names come from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield _origin(node.module, alias.name)


def _origin(module: str, name: str) -> str:
    """The module that `name` comes from when it is imported from `module`, a room perhaps."""
    if _file_of(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    path = _file_of(module)
    if path is None or path.name != "__init__.py":
        return module
    # (The package itself says where its names are where type checkers read it.)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module != module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _origin(node.module or "", alias.name)
    return module


@functools.cache
def code_digest(module: str) -> str:
    """SHA-256 of what :func:`sources` run, wherever in them each statement stands.

    Comments, docstrings, layout and imports do not count.
    """
    statements = []
    for path in sources(module):
        tree = _parsed(path)
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                kept = [s for s in node.body if not isinstance(s, ast.Import | ast.ImportFrom)]
                node.body = kept
        statements += map(ast.unparse, tree.body)
    return hashlib.sha256("\n".join(sorted(statements)).encode()).hexdigest()


@contextmanager
def replacing(path: Path, *more: Path, overwrite: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the name `path` only when it is complete.

    Parameters
    ----------
    path : Path
        Of a file or folder.
    *more : Path
        Others of the same folder, which are written beside the first, under their own names, and
        take their places with it.
    overwrite : bool
        If false, what stands there when all is complete stays.

    Yields
    ------
    Path
        In a folder that is gone at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        for number, place in enumerate((path, *more)):
            written, old = partial.with_name(place.name), Path(folder, f".replaced-{number}")
            if not overwrite and place.exists():
                continue
            if place.exists() and (place.is_dir() or written.is_dir()):
                place.rename(old)
            try:
                written.replace(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                elif not overwrite and place.exists():  # another process was faster
                    continue
                raise


def to_json(data: xr.Dataset, key: str) -> str:
    """A Dataset as JSON: NaN as null, float32 with three significant digits."""

    def plain(values: np.ndarray) -> object:
        if values.ndim:
            return [plain(value) for value in values]
        value = values.item()
        if values.dtype == np.float32:
            value = float(f"{value:.3g}")
        return None if value != value else value

    def variables(which: dict) -> dict:
        return {
            name: {"dims": list(v.dims), "attrs": v.attrs, "data": plain(np.asarray(v.values))}
            for name, v in which.items()
        }

    content = {
        "key": key,
        "attrs": data.attrs,
        "coords": variables(data.coords),
        "data_vars": variables(data.data_vars),
    }
    # One variable a line: short to look through, and to compare with an earlier version.
    parts = []
    for part, value in content.items():
        if part in ("coords", "data_vars"):
            lines = [f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in value.items()]
            parts.append(f"{json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n}")
        else:
            parts.append(f"{json.dumps(part)}: {json.dumps(value, indent=1)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def from_json(text: str) -> xr.Dataset:
    """The Dataset that :func:`to_json` wrote."""
    content = json.loads(text)

    def variables(which: dict) -> dict:
        found = {}
        for name, v in which.items():
            values = np.array(v["data"])
            if values.dtype == object:  # a null among numbers
                values = values.astype(float)
            found[name] = (v["dims"], values, v["attrs"])
        return found

    return xr.Dataset(
        variables(content["data_vars"]), variables(content["coords"]), content["attrs"]
    )
