"""What an evaluation says of itself in ``source.json``: its model, versions, and what was asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "source.json"
FORMAT = 1
# Of what is told in a line of words; digests are for programs.
_TOLD = ("model", "parameters", "dtype", "device", "calibration", "seed")


@dataclass(frozen=True)
class Asked:
    """One task, as a model was asked it.

    Attributes
    ----------
    protocol : str
        Of likelihoods, as in :func:`flocking.score`.
    limit : int, optional
        How many items were wanted at most.
    digest : str
        SHA-256 of the task's definition, its documents and these settings; empty if not known.
    items : int, optional
        How many were scored.
    """

    protocol: str
    limit: int | None = None
    digest: str = ""
    items: int | None = None


@dataclass(frozen=True)
class Source:
    """Where an evaluation's numbers come from. What a file does not say is None or empty.

    Attributes
    ----------
    model : str
        Its name, without the folder it was read from.
    identity : str
        What tells the model from every other: a digest of its files, or a hub id's commit.
    parameters, ff_parameters : int, optional
        Of the whole model, and of the projections of its FF blocks.
    layers : int, optional
        FF blocks.
    d_ff : tuple of int
        Neurons of each of them.
    tokenizer : str
        SHA-256 of what makes tokens of text, by which models are known to read the same tokens.
    dtype, device : str
    calibration, calibration_digest : str
        What static selections were made from, in words, and SHA-256 of the texts.
    seed : int, optional
        Of the methods that draw.
    code : str
        Digest of the code that computed the items.
    versions : dict of str to str
        Of Python and the packages that the numbers depend on.
    tasks : dict of str to Asked
    """

    model: str
    identity: str = ""
    parameters: int | None = None
    ff_parameters: int | None = None
    layers: int | None = None
    d_ff: tuple[int, ...] = ()
    tokenizer: str = ""
    dtype: str = ""
    device: str = ""
    calibration: str = ""
    calibration_digest: str = ""
    seed: int | None = None
    code: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, Asked] = field(default_factory=dict)


def in_words(source: Mapping[str, Any]) -> str:
    """What ``source.json`` says of a model and versions, in a line."""
    told = {key: source[key] for key in _TOLD if key in source}
    told |= source.get("versions", {})
    others = (key for key in source if key not in told and isinstance(source[key], str))
    told |= {key: source[key] for key in others if key not in _FOR_PROGRAMS}
    return "; ".join(
        f"{key} {value:,}" if key == "parameters" else f"{key} {value}"
        for key, value in told.items()
    )


_FOR_PROGRAMS = ("identity", "tokenizer", "code", "calibration_digest")


def written(source: Mapping[str, Any]) -> str:
    """The text of ``source.json``."""
    return json.dumps({"format": FORMAT, **source}, indent=1) + "\n"


def read(path: Path) -> Source:
    """What ``source.json`` says.

    Raises
    ------
    ValueError
        If it is not what :func:`written` gives, or a later version of flocking wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError("it has no number of a format")
        if content["format"] <= FORMAT:
            return _source(content)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(
            f"{path} cannot be read as what flocking evaluate writes ({problem}): remove it, and "
            "run flocking evaluate again with the same --out, where finished cells are kept."
        ) from problem
    raise ValueError(
        f"{path} has format {content['format']}, and this version of flocking reads {FORMAT}: "
        "read it with the version that wrote it, or a later one."
    )


def _source(content: Mapping[str, Any]) -> Source:
    """The same, of the kinds that it should be; raises a ValueError or TypeError otherwise."""
    if not isinstance(content.get("model"), str):
        raise ValueError("it names no model")
    numbers = {
        name: None if content.get(name) is None else int(content[name])
        for name in ("parameters", "ff_parameters", "layers", "seed")
    }
    texts = (
        *("identity", "tokenizer", "dtype", "device"),
        *("calibration", "calibration_digest", "code"),
    )
    return Source(
        model=content["model"],
        parameters=numbers["parameters"],
        ff_parameters=numbers["ff_parameters"],
        layers=numbers["layers"],
        seed=numbers["seed"],
        d_ff=tuple(map(int, content.get("d_ff", ()))),
        versions={str(k): str(v) for k, v in content.get("versions", {}).items()},
        tasks={str(name): Asked(**asked) for name, asked in content.get("tasks", {}).items()},
        **{name: str(content.get(name, "")) for name in texts},
    )
