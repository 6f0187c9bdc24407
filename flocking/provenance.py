"""What numbers depend on beside their inputs: the code that makes them."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path


def sources(module: str) -> list[Path]:
    """Files of a module of this package, and of all that it imports of the package."""
    package = Path(__file__).parent
    found: dict[str, Path] = {}
    pending = [module.rpartition(".")[2]]
    while pending:
        name = pending.pop()
        path = package / f"{name}.py"
        if name in found or not path.exists():  # a name that is no module, such as a function
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == package.name:
                pending.extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                pending.append(node.module.removeprefix(f"{package.name}."))
    return [found[name] for name in sorted(found)]


@functools.cache
def code_digest(module: str) -> str:
    """SHA-256 of what :func:`sources` run: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in sources(module):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if not isinstance(body, list):
                continue
            told = [isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body]
            node.body = [s for s, telling in zip(body, told, strict=True) if not telling]
        digest.update(f"{path.name}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()
