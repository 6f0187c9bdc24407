"""Figures as files: each with its numbers beside it, so that a redraw needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import code_digest, from_json, replacing, to_json
from flocking.drawing import save
from flocking.experiments import activations, losses
from flocking.experiments.figures import FIGURES

EXPERIMENTS = activations.EXPERIMENTS | losses.EXPERIMENTS
_SUFFIXES = (".png", ".svg", ".json")


def regenerate(
    out: Path,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    identity: str,
    texts: Sequence[str],
    *,
    only: Iterable[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Run the experiments whose numbers are not there yet, and draw all figures.

    Parameters
    ----------
    out : Path
        Folder for ``NAME.png``, ``NAME.svg`` and ``NAME.json``.
    load : callable
        Gives model and tokenizer; called at the first experiment that has to run, if any.
    identity : str
        What tells the model from every other, such as a digest of its files.
    texts : list of str
    only : iterable of str, optional
        Names of experiments; all by default.
    seed : int
    say : callable
        Takes each line of the report.

    Raises
    ------
    ValueError
        For an unknown name, or if a file in the way is no figure of ours.
    """
    names = list(EXPERIMENTS) if only is None else list(only)
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"there is no figure {name!r}: choose from {', '.join(EXPERIMENTS)}.")
        _refuse_foreign(out, name)
    keys = {name: _key(name, identity, texts, seed) for name in names}
    out.mkdir(parents=True, exist_ok=True)
    subject = None
    for name, key in keys.items():
        path = out / f"{name}.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key:
            say(f"{name}: numbers are there ({path}), redrawing")
            written = path.read_text(encoding="utf-8")
        else:
            say(f"{name}: running")
            subject = subject or load()
            written = to_json(EXPERIMENTS[name](*subject, texts, seed=seed), key)
        # Drawn from what was written, so that the picture shows exactly those numbers.
        data = from_json(written)
        _write(out, name, data, written)
        say(f"{out / name}.png  {data.attrs['caption']}\n")


def _key(name: str, identity: str, texts: Sequence[str], seed: int) -> str:
    """Digest of all that an experiment's numbers depend on, the code and the versions included."""
    code = code_digest(EXPERIMENTS[name].__module__)
    named = [(getattr(text, "name", ""), str(text)) for text in texts]
    versions = [m.__version__ for m in (torch, transformers, np, xr)]
    inputs = json.dumps([name, identity, named, seed, versions, code])
    return hashlib.sha256(inputs.encode()).hexdigest()


def _refuse_foreign(out: Path, name: str) -> None:
    """Nothing is replaced but what an earlier run wrote."""
    there = [path for path in (out / f"{name}{s}" for s in _SUFFIXES) if path.exists()]
    if not there:
        return
    try:
        known = "key" in json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{there[0]} exists and is no figure of flocking: choose another --out.")


def _write(out: Path, name: str, data: xr.Dataset, written: str) -> None:
    """The three files, each put in its place only when all are complete."""
    with replacing(*(out / f"{name}{suffix}" for suffix in _SUFFIXES)) as partial:
        save(FIGURES[name](data), partial.parent, name, data.attrs["model"], data.attrs["caption"])
        partial.with_suffix(".json").write_text(written, encoding="utf-8")
