"""Options that commands share, and what their texts stand for."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import flocking
from flocking.cli.ending import ended_by_signals
from flocking.cli.printing import complain
from flocking.texts import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Number = TypeVar("_Number", int, float, str)


def one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Let bad input end in one sentence and exit code 2, and an interruption in its exit code.

    In either case what the command began to write is removed, and no traceback is shown.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            with ended_by_signals():
                command(*args, **kwargs)
        except (ValueError, OSError, MemoryError) as problem:
            complain(problem)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("interrupted.")
            raise typer.Exit(130) from None

    return run


Model = Annotated[str | None, typer.Option(help="Folder or hub id; the embedded model by default.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Folder or hub id; the embedded model by default."),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu, cuda or cuda:1.")]
Dtype = Annotated[str | None, typer.Option(help="Such as float32 or bfloat16.")]

# Of `flocking evaluate`.
Tasks = Annotated[
    str,
    typer.Option(help="Such as hellaswag,piqa,wikitext: the paper's tasks, or any of the harness."),
]
Methods = Annotated[
    str,
    typer.Option(
        help="Methods of flocking.griffin, such as topk,static,magnitude, each at all densities or "
        "at one, as in topk@0.25; or static-domain, static from each task's own documents beyond "
        "those scored. The full model comes first."
    ),
]
Densities = Annotated[str, typer.Option(help="Fractions of FF neurons kept.")]
ProtocolByTask = Annotated[
    str,
    typer.Option(
        help="For likelihoods, context or last-token; TASK=... for one. With context, answers of "
        "one token are the full model's."
    ),
]
LimitByTask = Annotated[
    str | None, typer.Option(help="At most this many items of each task; TASK=... for one.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the items as JSON lines, such as piqa.jsonl; the hub by default."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="Text file, or folder of .txt files, for static and global-local; the packaged "
        "passages by default."
    ),
]
KeepOlder = Annotated[
    bool,
    typer.Option(
        "--keep-older",
        help="Accept cells that other code computed from the same inputs with the same versions; "
        "tables mark them.",
    ),
]


def load(
    model: str | None, device: str | None, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, on the device and in the dtype asked for."""
    import torch

    from flocking.models import reading

    if dtype not in (None, "float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}: give float32, bfloat16 or float16.")
    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(
            f"--device {device} cannot be used here: give cpu, or cuda or cuda:1 with a GPU and a "
            "build of torch for it."
        ) from problem
    loaded, tokenizer = flocking.load(model, **({"dtype": dtype} if dtype else {}))
    with reading(model or "the embedded model"):
        # (Decorated by transformers such that mypy does not see a method.)
        moved = loaded.to(device or "cpu")  # type: ignore[arg-type]
    return moved, tokenizer


def read(name: str) -> str:
    """Text of a file, or of standard input, which is ``-``."""
    path = Path(name)
    if name == "-":
        raw = sys.stdin.buffer.read()
    elif not path.exists():
        raise ValueError(f"{name} does not exist: name text files, or - for standard input.")
    elif path.is_dir():
        raise ValueError(f"{name} is a folder: name the text files in it.")
    else:
        raw = path.read_bytes()
    where = "standard input" if name == "-" else name
    text = decoded(raw, where)
    if not text:
        raise ValueError(f"{where} is empty: give some text.")
    return text


def numbers_of(layers: str | None) -> list[int] | None:
    """Layer numbers from text such as ``0,5,10-12``."""
    if layers is None:
        return None
    numbers: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip())
        span = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not span:
            raise ValueError(f"--layers {layers}: give numbers and ranges, such as 0,5,10-12.")
        numbers += span
    return numbers


def need_harness() -> None:
    """Register the harness's model, or say how to get the harness."""
    try:
        importlib.import_module("flocking.evaluation.harness")
    except ModuleNotFoundError as problem:
        raise ValueError(
            f"{problem.name} is not installed: pip install 'flocking[eval]' brings the harness."
        ) from problem


def listed(text: str) -> list[str]:
    """Parts of text such as ``piqa,boolq``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{text!r} names nothing: give names, separated by commas.")
    return parts


def at_least_one(value: int, option: str) -> None:
    """Refuse a number of things that is 0 or less."""
    if value < 1:
        raise ValueError(f"{option} {value}: give 1 or more.")


def number(text: str, option: str, kind: type[_Number]) -> _Number:
    """The number that an option's text stands for; with `kind` str, the text."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number.") from None


def by_task(text: str, option: str, kind: type[_Number]) -> dict[str, _Number]:
    """Settings from text such as ``400,xsum=30``: for the task xsum, and for all others ("")."""
    found: dict[str, _Number] = {}
    for part in listed(text):
        task, equals, value = part.rpartition("=")
        if task in found or (equals and not task):
            raise ValueError(f"{option} {text}: give one for all and TASK=... for single ones.")
        found[task] = number(value, option, kind)
    return found


def passage(name: str) -> flocking.Passage:
    """A text file as a passage with a name."""
    found = flocking.Passage(read(name))
    found.name, found.description = Path(name).stem, name
    return found
