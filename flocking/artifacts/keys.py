"""Keys: what a result depends on, so that it is computed again when that has changed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from flocking.artifacts.code import code_digest

Part = Literal["code", "inputs", "versions"]
PARTS: tuple[Part, ...] = ("code", "inputs", "versions")


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
