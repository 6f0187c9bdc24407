"""What one run of a command says, and where: results, notices and progress."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from flocking.cli.options import one_sentence
from flocking.cli.printing import broken, printable, say, width_of

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print results, errors and warnings only: no progress, no notices."
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the results as one JSON document, in full precision; all else goes to "
        "standard error.",
    ),
]


@dataclass
class Session:
    """One run of a command.

    Attributes
    ----------
    quiet : bool
        Notices and progress are left out.
    as_json : bool
        Results are a document for programs.
    document : dict or None
        That document, when there is one; it is printed at the end.
    """

    quiet: bool = False
    as_json: bool = False
    document: Mapping[str, Any] | None = field(default=None)


_sessions = [Session()]  # the innermost is last; the first one is of no command


def notice(line: object) -> None:
    """Print what is good to know and no result: how it goes, and what can be done next."""
    if not _sessions[-1].quiet:
        say(line)


def progress(line: object) -> None:
    """Print how far a long run is, on standard error, as progress bars are."""
    if not _sessions[-1].quiet:
        for one in str(line).split("\n"):
            typer.echo(broken(printable(one), width_of(sys.stderr)), err=True)


def is_quiet() -> bool:
    """Whether notices and progress are left out."""
    return _sessions[-1].quiet


def as_json() -> bool:
    """Whether results are a document for programs."""
    return _sessions[-1].as_json


def result(document: Mapping[str, Any], shown: Callable[[], None]) -> None:
    """Give a result to programs or to people, whichever was asked for.

    Parameters
    ----------
    document : mapping
        The whole result. What JSON has no word for becomes what it has: NaN becomes null.
    shown : callable
        Prints it for people.
    """
    if as_json():
        _sessions[-1].document = document
    else:
        shown()


def reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options ``--quiet`` and ``--json``, and end it in one sentence."""

    def begun(*args: object, quiet: bool, as_json: bool, **kwargs: object) -> None:
        with _session(Session(quiet, as_json)):
            command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("as_json", Json))
    ]
    taken = signature.replace(parameters=[*signature.parameters.values(), *more])
    begun.__name__, begun.__doc__ = command.__name__, command.__doc__
    begun.__module__ = command.__module__
    run = one_sentence(begun)
    run.__signature__ = taken  # type: ignore[attr-defined]  # typer reads both
    run.__annotations__ = {name: one.annotation for name, one in taken.parameters.items()}
    return run


@contextmanager
def _session(session: Session) -> Iterator[None]:
    """Let one session be the current one; print its document at the end, however it ends well."""
    output, before = sys.stdout, warnings.formatwarning
    _sessions.append(session)
    warnings.formatwarning = _as_sentence
    try:
        with ExitStack() as stack:
            if session.quiet:
                stack.enter_context(_without_bars())
            if session.as_json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            try:
                yield
            except typer.Exit:  # with a result, such as that a check has failed
                _write(session, output)
                raise
        _write(session, output)
    finally:
        warnings.formatwarning = before
        _sessions.pop()


def _write(session: Session, output: TextIO) -> None:
    if session.document is not None:
        typer.echo(json.dumps(plain(session.document), indent=2, allow_nan=False), file=output)


def plain(value: Any) -> Any:
    """A value in what JSON has: NaN, infinity and pandas' NA become None, paths text."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, bool | int | str) else None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Draw no progress bars, and print no lines beside them, whichever library they are of."""
    from tqdm import tqdm

    before, write = tqdm.__init__, tqdm.write

    def hidden(self: Any, *args: Any, **options: Any) -> None:
        before(self, *args, **options | {"disable": True})

    tqdm.__init__ = hidden  # type: ignore[method-assign]
    tqdm.write = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = before  # type: ignore[method-assign]
        tqdm.write = write  # type: ignore[method-assign]


def _as_sentence(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as it is printed: a sentence, without the line of code that it arose in."""
    return f"flocking: warning: {printable(message)}\n"
