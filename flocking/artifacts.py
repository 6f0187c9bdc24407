"""Numbers as files: what they depend on, writing them whole or not at all, reading them again."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

Part = Literal["code", "inputs", "versions"]
PARTS: tuple[Part, ...] = ("code", "inputs", "versions")

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Key:
    """What a result depends on, in three parts.

    Attributes
    ----------
    code : str
        :func:`code_digest` of the module that computed the result.
    inputs : str
        Digest of the model's files, texts, seed and arguments.
    versions : dict of str to str
        Of Python and of the packages that the numbers depend on, by name.
    """

    code: str
    inputs: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, module: str, inputs: Any, packages: Iterable[str] = ()) -> Key:
        """The key of a result that is computed now.

        Parameters
        ----------
        module : str
            Dotted name of the module that computes it.
        inputs : object
            All that it is computed from, for ``json.dumps``.
        packages : iterable of str
            Those that matter in addition to torch, transformers, numpy and flocking.
        """
        names = ("torch", "transformers", "numpy", "flocking", *packages)
        python = ".".join(platform.python_version_tuple()[:2])
        versions = {"python": python} | {name: version(name) for name in names}
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        return cls(code_digest(module), digest, versions)

    @classmethod
    def read(cls, stored: object) -> Key | None:
        """The key in a file; None for other forms, such as the one string of earlier files."""
        if not isinstance(stored, dict) or not set(PARTS) <= stored.keys():
            return None
        return cls(*(stored[part] for part in PARTS))

    def plain(self) -> dict[str, Any]:
        """As it is written into a file."""
        return {"code": self.code, "inputs": self.inputs, "versions": dict(self.versions)}

    def differing(self, stored: Key | None) -> list[Part]:
        """The parts in which a stored key differs from this one; all of them if it is None."""
        return [p for p in PARTS if stored is None or getattr(self, p) != getattr(stored, p)]

    def told(self, stored: Key | None) -> str:
        """The parts in which a stored key differs, in words, with the versions before and now."""
        if stored is None:
            return "all parts (its key is not in three parts: an earlier version wrote it)"
        parts: list[str] = list(self.differing(stored))
        if "versions" in parts:
            names = sorted(self.versions.keys() | stored.versions.keys())
            pairs = [
                (n, stored.versions.get(n, "none"), self.versions.get(n, "none")) for n in names
            ]
            changes = (f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
            parts[-1] = f"versions ({', '.join(changes)})"
        return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))

    def digest(self) -> str:
        """SHA-256 of all three parts."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 of all files in a model's folder, those in its subfolders included.

    The version of transformers that wrote the folder does not count, nor do files and folders
    whose names start with a dot, such as the notes of a download.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"{name.as_posix()}\n".encode())
        digest.update(_file_digest(path))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    if path.name in ("config.json", "generation_config.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            pass  # not for us to say what is wrong with it
        else:
            plain = json.dumps(_without_version(content), sort_keys=True)
            return hashlib.sha256(plain.encode()).digest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _without_version(value: Any) -> Any:
    """A config, and the configs in it, without the version of transformers that wrote them."""
    if not isinstance(value, dict):
        return value
    return {k: _without_version(v) for k, v in value.items() if k != "transformers_version"}


def sources(module: str) -> list[Path]:
    """Files of a module of this package, and of all that it imports from the package.

    From a room, only the files in which the imported names are defined. This file is left out,
    since it keeps numbers and computes none.
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


@contextmanager
def replacing(path: Path, *more: Path, overwrite: bool = True) -> Iterator[Path]:
    """Give a path to write to, and move it to `path` when it is complete.

    Parameters
    ----------
    path : Path
        Of a file or folder.
    *more : Path
        Others in the same folder: they are written next to the first one under their own names,
        and are moved to their places together with it.
    overwrite : bool
        If false, a file that exists by the time that all are complete stays.

    Yields
    ------
    Path
        In a temporary folder.
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


def to_json(data: xr.Dataset, key: Key) -> str:
    """A Dataset and its key as JSON: NaN as null, float32 with three significant digits."""

    def plain(values: np.ndarray) -> object:
        if values.ndim:
            return [plain(value) for value in values]
        value = values.item()
        if values.dtype == np.float32:
            value = float(f"{value:.3g}")
        return None if value != value else value

    def variables(which: Mapping[Any, xr.DataArray]) -> dict[str, Any]:
        return {
            name: {"dims": list(v.dims), "attrs": v.attrs, "data": plain(np.asarray(v.values))}
            for name, v in which.items()
        }

    content = {
        "key": key.plain(),
        "attrs": data.attrs,
        "coords": variables(data.coords),
        "data_vars": variables(data.data_vars),
    }
    # One variable a line, so that the file is easy to read and to compare with another version.
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

    def variables(which: dict[str, Any]) -> dict[str, Any]:
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
