"""The private names that the package relies on exist, and it relies on no others."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import parse

import flocking
from flocking.models.private import PRIVATE, Private

PACKAGE = Path(flocking.__file__).parent
LIST = PACKAGE / "models" / "private.py"
# Of named tuples, whose names Python documents; and ends of names in GGUF files.
PUBLIC = {"_ARRAY_DIMENSIONS", "_asdict", "_fields", "_replace", "_exps", "_shexp"}


def sources() -> Iterator[ast.Module]:
    for path in PACKAGE.rglob("*.py"):
        if path != LIST:
            yield ast.parse(path.read_text("utf-8"))


def names_in(module: ast.Module) -> Iterator[str]:
    """Names of attributes, of imports from other packages, and strings that may be names."""
    pieces = {
        id(part) for n in ast.walk(module) if isinstance(n, ast.JoinedStr) for part in n.values
    }
    for node in ast.walk(module):
        match node:
            case ast.Attribute():
                yield node.attr
            case ast.FunctionDef():
                yield node.name
            case ast.Constant(value=str(value)) if id(node) not in pieces:
                yield value
            case ast.ImportFrom(module=str(path)) if not path.startswith("flocking"):
                yield from (*path.split("."), *(alias.name for alias in node.names))


def defined_in(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                yield node.attr


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: private.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about itself
def test_exists_in_the_installed_version(private: Private) -> None:
    library = private.where.partition(".")[0]
    pytest.importorskip(library)
    if private.since and parse(version(library)) < parse(private.since):
        pytest.skip(f"{library} {version(library)} lacks it, and the package can do without")
    where = importlib.import_module(private.where)
    if not hasattr(where, private.name):  # an attribute of what the module defines
        assert re.search(rf"\b{private.name}\b", inspect.getsource(where))


def test_every_private_name_in_use_is_listed() -> None:
    modules = list(sources())
    ours = {name for module in modules for name in defined_in(module)}
    used = {name for module in modules for name in names_in(module)}
    private = {name for name in used - ours if re.fullmatch(r"_[A-Za-z]\w*", name)}
    listed = {part for each in PRIVATE for part in (each.name, *each.where.split("."))}
    assert private - listed - PUBLIC == set()
    assert {each.name for each in PRIVATE} <= used, "what is not used any more leaves the list"
