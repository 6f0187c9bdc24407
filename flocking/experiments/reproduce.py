"""Figures as files: each with its numbers next to it, so that a redraw needs no model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import (
    Key,
    UnreadableError,
    from_json,
    read_content,
    replacing,
    set_aside,
    to_json,
)
from flocking.drawing import described, save, titled
from flocking.experiments import (
    activations,
    allocations,
    distances,
    kinds,
    lengths,
    losses,
    orders,
    overlaps,
    references,
)
from flocking.experiments.common import names_of
from flocking.experiments.comparing import changes, committed
from flocking.experiments.figures import FIGURES
from flocking.feedforward import UnsupportedModelError
from flocking.models import require_model, require_tokenizer
from flocking.recording import whole_number

_Experiment = Callable[..., xr.Dataset]
_Subject = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def _asked(experiment: _Experiment) -> _Experiment:
    """An experiment that says what to give where it is given something else."""

    @functools.wraps(experiment)
    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        **options: Any,
    ) -> xr.Dataset:
        if require_tokenizer(tokenizer) is None:
            raise TypeError("tokenizer is None: give the model's own, as flocking.load returns it.")
        require_model(model)
        for name, value in options.items():
            if name != "progress":
                whole_number(name, value, 0 if name == "seed" else 1)
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            kind = type(texts).__name__
            raise TypeError(
                f"texts is of type {kind}: give a list of texts, as flocking.passages()."
            )
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise TypeError(f"text {number} is of type {kind}: give each text as a string.")
        return experiment(model, tokenizer, texts, **options)

    return run


EXPERIMENTS = {
    name: _asked(experiment)
    for room in (
        *(activations, overlaps, orders, kinds),
        *(losses, references, allocations, distances, lengths),
    )
    for name, experiment in room.EXPERIMENTS.items()
}


class Outcome(NamedTuple):
    """What became of one figure.

    Attributes
    ----------
    name : str
    why : str or None
        Why its numbers had to be computed, or have to be; None if they were there and up to date,
        or were not asked about.
    changed : list of str
        What is different in its numbers since the last commit, in words; only of a check.
    picture : Path
    problem : str or None
        Why it could not be made; None if it was.
    """

    name: str
    why: str | None
    changed: list[str]
    picture: Path
    problem: str | None = None


_SUFFIXES = (".json", ".png", ".svg", ".md")


def regenerate(
    out: Path,
    load: Callable[[], _Subject],
    identity: str,
    texts: Sequence[str],
    *,
    only: Iterable[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the experiments whose numbers are missing or out of date, and draw all figures.

    Parameters
    ----------
    out : Path
        Folder for ``NAME.png``, ``NAME.svg``, ``NAME.json`` (the numbers) and ``NAME.md`` (the
        caption).
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

    Returns
    -------
    list of Outcome
        Of each figure that was asked for, also of those that cannot be made of these texts or this
        model.

    Raises
    ------
    ValueError
        For an unknown name, or if there is a file of that name that is not a figure's.
    OSError
        If `out` cannot be written, or another process is writing a figure there.
    """
    keys = _keys(out, identity, texts, only, seed)
    subject: _Subject | None = None
    done = []
    for name, key in keys.items():
        path = out / f"{name}.json"
        # The numbers are in their place before they are drawn: whatever ends the drawing, the
        # next run draws from them.
        try:
            with replacing(path, check=_refuse_foreign) as partial:
                if (why := _stale(path, key, say)) is None:
                    say(f"{name}: numbers are there ({path}), redrawing")
                    written = path.read_text(encoding="utf-8")
                else:
                    say(f"{name}: {why}; running")
                    subject = subject or load()
                    about = {
                        # By which numbers of several models are put together: without dtype, device
                        "identity": identity.partition(" ")[0],
                        "parameters": subject[0].num_parameters(),
                    }
                    written = to_json(_run(name, subject, texts, seed).assign_attrs(about), key)
                partial.write_text(written, encoding="utf-8")
        except _ImpossibleError as problem:
            say(f"{name}: cannot be made: {problem}\n")
            done.append(Outcome(name, why, [], out / f"{name}.png", str(problem)))
            continue
        caption = _drawn(name, written, out)
        say(f"{out / name}.png  {caption}\n")
        done.append(Outcome(name, why, [], out / f"{name}.png"))
    return done


class _ImpossibleError(Exception):
    """What a figure cannot be made from; others may."""


def _run(name: str, subject: _Subject, texts: Sequence[str], seed: int) -> xr.Dataset:
    try:
        return EXPERIMENTS[name](*subject, texts, seed=seed)
    except UnsupportedModelError:  # no figure can be made
        raise
    except ValueError as problem:
        raise _ImpossibleError(str(problem)) from problem


def unmade(done: Sequence[Outcome]) -> str:
    """Which figures cannot be made, and why; empty if all are."""
    impossible = [each for each in done if each.problem is not None]
    reasons = "; ".join(dict.fromkeys(str(each.problem) for each in impossible))
    if len(impossible) in (0, len(done)):
        return reasons
    names = ", ".join(each.name for each in impossible)
    which = f"{len(impossible)} of {len(done)} figures cannot be made ({names}), all others are"
    return f"{which}: {reasons}"


def redraw(
    out: Path, *, only: Iterable[str] | None = None, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Draw figures again from the numbers that are there, however old; run no model.

    Numbers are out of date where their key says so (:func:`check`); a change of how they are drawn
    makes none so.

    Parameters
    ----------
    out : Path
        Folder with ``NAME.json``; the pictures and pages beside it are replaced.
    only : iterable of str, optional
        Names of experiments; by default, those whose numbers are there.
    say : callable
        Takes each line of the report.

    Returns
    -------
    list of Outcome
        Of each figure that was drawn.

    Raises
    ------
    ValueError
        For an unknown name, for numbers that are not there, cannot be read or were changed, or if
        there is a file of that name that is not a figure's.
    OSError
        If `out` cannot be written, or another process is writing a figure there.
    """
    there = [name for name in EXPERIMENTS if (out / f"{name}.json").exists()]
    names = there if only is None else _known(only)
    if not names:
        raise ValueError(f"{out} has no numbers of figures: run flocking figures without --redraw.")
    for name in names:
        path = out / f"{name}.json"
        _refuse_foreign(path)
        read_content(path)  # refuses what is not as it was written
        _drawn(name, path.read_text(encoding="utf-8"), out)
        say(f"{out / name}.png  drawn again")
    return [Outcome(name, None, [], out / f"{name}.png") for name in names]


def _drawn(name: str, written: str, out: Path) -> str:
    """Put a figure's numbers and pictures into a folder, all or none; its caption."""
    places = [out / f"{name}{suffix}" for suffix in _SUFFIXES]
    with replacing(*places, check=_refuse_foreign) as partial:
        return _draw(name, written, partial)


def _draw(name: str, written: str, numbers: Path) -> str:
    """Write numbers, and beside them what is drawn from exactly these; their caption."""
    numbers.write_text(written, encoding="utf-8")
    data = from_json(written)
    model, caption = data.attrs["model"], data.attrs["caption"]
    save(FIGURES[name](data), numbers.parent, name, model, caption)
    about = data.attrs
    source = (
        f"Numbers: [{name}.json]({name}.json), made with flocking {about['flocking_version']}, "
        f"transformers {about['transformers_version']} and torch {about['torch_version']} in "
        f"{about['dtype']}, seed {about['seed']}; texts: {', '.join(about['texts'])}."
    )
    page = described(name, model, caption, source)
    numbers.with_suffix(".md").write_text(page, encoding="utf-8")
    return str(caption)


def check(
    out: Path,
    identity: str,
    texts: Sequence[str],
    *,
    only: Iterable[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Say which figures are out of date, and what changed in their numbers since git's HEAD.

    Runs no model and writes nothing. Parameters are those of :func:`regenerate`.

    Returns
    -------
    list of Outcome
        Of each figure; all are up to date if each one's ``why`` is None.

    Raises
    ------
    ValueError
        As :func:`regenerate`.
    """
    found = []
    keys = _keys(out, identity, texts, only, seed)
    for name, key in keys.items():
        path = out / f"{name}.json"
        why, changed = _stale(path, key), _since_commit(path)
        say(f"{name}: {why or 'up to date'}")
        for line in changed:
            say(line)
        found.append(Outcome(name, why, [line.strip() for line in changed], out / f"{name}.png"))
    return found


def _keys(
    out: Path, identity: str, texts: Sequence[str], only: Iterable[str] | None, seed: int
) -> dict[str, Key]:
    """Of the figures that are asked for; refuses unknown names, and files that are not ours."""
    names = list(EXPERIMENTS) if only is None else _known(only)
    names_of(texts)  # what they refuse, before a model is loaded
    named = [(getattr(text, "name", ""), str(text)) for text in texts]
    keys = {}
    for name in names:
        _refuse_foreign(out / f"{name}.json")
        module = EXPERIMENTS[name].__module__
        keys[name] = Key.of(module, [name, identity, named, seed], packages=["xarray"])
    return keys


def _known(names: Iterable[str]) -> list[str]:
    """Names of experiments; others are refused."""
    wanted = list(names)
    for name in wanted:
        if name not in EXPERIMENTS:
            raise ValueError(f"there is no figure {name!r}: choose from {', '.join(EXPERIMENTS)}.")
    return wanted


def _since_commit(path: Path) -> list[str]:
    """What changed in a figure's numbers since the last commit, in words."""
    before = committed(path) if path.exists() else None
    try:
        if before is None or before == (now := path.read_text(encoding="utf-8")):
            return []
        found = changes(from_json(before), from_json(now))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return [f"  cannot be compared with the last commit ({problem})"]
    told = "  drawn again since the last commit; " + ("changed:" if found else "same numbers")
    return [told, *(f"    {line}" for line in found)]


def _stale(path: Path, key: Key, say: Callable[[str], None] | None = None) -> str | None:
    """Why a figure has to run again; None if its numbers are there and up to date.

    With `say`, a file that cannot be read gets another name, so that nothing in it is lost.
    """
    if not path.exists():
        return "not there"
    try:
        content = read_content(path)
        from_json(json.dumps(content))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        if say is not None and not getattr(problem, "changed", False):
            say(f"{path} is set aside as {set_aside(path).name}")
        return str(problem) if isinstance(problem, UnreadableError) else f"{path} is no figure's"
    stored = Key.read(content["key"])
    return None if stored == key else f"stale in {key.told(stored)}"


def _refuse_foreign(path: Path) -> None:
    """Replace nothing but a figure that an earlier run wrote, whichever of its files there are."""
    numbers, *pictures = (path.with_suffix(suffix) for suffix in _SUFFIXES)
    keyed = _has_key(numbers)
    foreign = [numbers] if keyed is False else []
    # Beside numbers of ours, pictures are ours; a page may be somebody's notes.
    asked = [one for one in pictures if not keyed or one.suffix == ".md"]
    foreign += [one for one in asked if one.exists() and not _is_ours(one)]
    if foreign:
        raise ValueError(
            f"{foreign[0]} exists and is not a figure of flocking: choose another --out."
        )


def _has_key(path: Path) -> bool | None:
    """Whether a file is of a figure's numbers; None without one, and for one that is broken."""
    if not path.is_file():
        return False if path.exists() else None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None  # it is set aside before another is written
    return isinstance(content, dict) and "key" in content


def _is_ours(picture: Path) -> bool:
    return picture.is_file() and (picture.stat().st_size == 0 or titled(picture, picture.stem))
