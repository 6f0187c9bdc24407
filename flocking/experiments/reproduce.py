"""Figures as files: each with its numbers next to it, so that a redraw needs no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import Key, from_json, replacing, to_json
from flocking.drawing import save
from flocking.experiments import activations, losses
from flocking.experiments.comparing import changes, committed
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
    """Run the experiments whose numbers are missing or out of date, and draw all figures.

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
        For an unknown name, or if there is a file of that name that is not a figure's.
    """
    keys = _keys(out, identity, texts, only, seed)
    out.mkdir(parents=True, exist_ok=True)
    subject = None
    for name, key in keys.items():
        path = out / f"{name}.json"
        if (why := _stale(path, key)) is None:
            say(f"{name}: numbers are there ({path}), redrawing")
            written = path.read_text(encoding="utf-8")
        else:
            say(f"{name}: {why}; running")
            subject = subject or load()
            written = to_json(EXPERIMENTS[name](*subject, texts, seed=seed), key)
        # Drawn from what was written, so that the picture shows exactly those numbers.
        data = from_json(written)
        _write(out, name, data, written)
        say(f"{out / name}.png  {data.attrs['caption']}\n")


def check(
    out: Path,
    identity: str,
    texts: Sequence[str],
    *,
    only: Iterable[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> bool:
    """Say which figures are out of date, and what changed in their numbers since git's HEAD.

    Runs no model and writes nothing. Parameters are those of :func:`regenerate`.

    Returns
    -------
    bool
        Whether all figures are up to date.

    Raises
    ------
    ValueError
        As :func:`regenerate`.
    """
    stale = {}
    keys = _keys(out, identity, texts, only, seed)
    for name, key in keys.items():
        path = out / f"{name}.json"
        why = stale[name] = _stale(path, key)
        say(f"{name}: {why or 'up to date'}")
        before = committed(path) if path.exists() else None
        if before is None or before == (now := path.read_text(encoding="utf-8")):
            continue
        found = changes(from_json(before), from_json(now))
        say("  drawn again since the last commit; " + ("changed:" if found else "same numbers"))
        for line in found:
            say(f"    {line}")
    return not any(stale.values())


def _keys(
    out: Path, identity: str, texts: Sequence[str], only: Iterable[str] | None, seed: int
) -> dict[str, Key]:
    """Of the figures that are asked for; refuses unknown names, and files that are not ours."""
    names = list(EXPERIMENTS) if only is None else list(only)
    named = [(getattr(text, "name", ""), str(text)) for text in texts]
    keys = {}
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"there is no figure {name!r}: choose from {', '.join(EXPERIMENTS)}.")
        _refuse_foreign(out, name)
        module = EXPERIMENTS[name].__module__
        keys[name] = Key.of(module, [name, identity, named, seed], packages=["xarray"])
    return keys


def _stale(path: Path, key: Key) -> str | None:
    """Why a figure has to run again; None if its numbers are there and up to date."""
    if not path.exists():
        return "not there"
    stored = Key.read(json.loads(path.read_text(encoding="utf-8"))["key"])
    return None if stored == key else f"stale in {key.told(stored)}"


def _refuse_foreign(out: Path, name: str) -> None:
    """Replace nothing but what an earlier run wrote."""
    there = [path for path in (out / f"{name}{s}" for s in _SUFFIXES) if path.exists()]
    if not there:
        return
    try:
        known = "key" in json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"{there[0]} exists and is not a figure of flocking: choose another --out."
        )


def _write(out: Path, name: str, data: xr.Dataset, written: str) -> None:
    """Write the three files, and put them in their places when all are complete."""
    with replacing(*(out / f"{name}{suffix}" for suffix in _SUFFIXES)) as partial:
        save(FIGURES[name](data), partial.parent, name, data.attrs["model"], data.attrs["caption"])
        partial.with_suffix(".json").write_text(written, encoding="utf-8")
