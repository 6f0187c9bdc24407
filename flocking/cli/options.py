"""Options that commands share, and what their texts stand for."""

from __future__ import annotations

import functools
import importlib
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import platformdirs
import typer

import flocking
from flocking.cli import choices
from flocking.cli.choices import one_of, several_of
from flocking.cli.ending import Ended, ended_by_signals, left_behind
from flocking.cli.printing import USAGE_ERROR, complain
from flocking.texts import (
    STDIN,
    dangling,
    decoded,
    expanded,
    has_lines,
    in_lines,
    read_bytes,
    read_stdin,
    why_no_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GO_ON = ("evaluate", "figures")  # commands that do only what is not there yet
_Number = TypeVar("_Number", int, float, str)


def one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Let bad input end in one sentence and exit code 2, and an interruption in its exit code.

    In either case what the command began to write is removed, and no traceback is shown: that of
    an error that nobody foresaw is in a file, which the sentence names. A ``~`` in paths stands for
    the user's folder.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        written: list[Path] = []
        try:
            with ended_by_signals(), _noted(written):
                command(*args, **{name: _usable(name, value) for name, value in kwargs.items()})
        except BrokenPipeError:  # whoever read the output has enough of it
            raise
        except (ValueError, OSError, MemoryError) as problem:
            complain(_of_the_system(problem) or problem)
            raise typer.Exit(2) from None
        except (typer.Exit, typer.Abort, USAGE_ERROR):
            raise
        except Exception as problem:
            complain(_of_a_package(problem) or _unforeseen(problem))
            raise typer.Exit(2) from None
        except (KeyboardInterrupt, Ended) as ending:
            notes = getattr(ending, "__notes__", [])  # what the command itself says of it
            complain(left_behind(written, command.__name__ in _GO_ON, *notes))
            raise typer.Exit(getattr(ending, "code", 130)) from None

    return run


@contextmanager
def _noted(written: list[Path]) -> Iterator[None]:
    """List what a command has written, but for the cache, which is nobody's output."""
    from flocking.artifacts import noting  # takes a second, which help need not wait for

    with noting() as places:
        try:
            yield
        finally:
            cache = platformdirs.user_cache_path("flocking")
            written += [path for path in places if not path.is_relative_to(cache)]


def _usable(name: str, value: object) -> object:
    """An option's value, with ``~`` expanded in paths; what cannot be a value is refused."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name}={value}: give a number below 2 ** 63.")
    if not isinstance(value, Path):
        return value
    path = expanded(value)
    if why := dangling(path):
        raise ValueError(f"{path} {why}: name another place, or make what the link names.")
    return path


def _of_the_system(problem: Exception) -> str:
    """What to say of an error as the system raises it, with a number and a name."""
    if isinstance(problem, OSError) and problem.errno is not None:
        where = f"{problem.filename}: " if problem.filename is not None else ""
        return f"{where}{problem.strerror}: name another file or place, or make room for it there."
    return ""


def _of_a_package(problem: Exception) -> str:
    """What a library says of a package that it needs here, and that is not installed."""
    said = " ".join(str(problem).split())
    return said if isinstance(problem, ImportError) and "install" in said else ""


def _unforeseen(problem: Exception) -> str:
    """What to say of an error that is a fault of ours, or of a library."""
    said = f"{type(problem).__name__}: {problem}"
    with tempfile.NamedTemporaryFile(
        "w", prefix="flocking-", suffix=".txt", encoding="utf-8", errors="replace", delete=False
    ) as file:
        file.writelines(traceback.format_exception(problem))
    return (
        f"{said} (not foreseen; {file.name} has the traceback): check what you gave and the "
        "model's files, and report it with that file if they are right."
    )


_MODEL = "Folder, GGUF file or hub id; the embedded model by default."
Model = Annotated[str | None, typer.Option(help=_MODEL)]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=_MODEL),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Such as cpu (the default), cuda or cuda:1.", autocompletion=one_of(choices.DEVICES)
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Such as float32 or bfloat16.", autocompletion=one_of(choices.DTYPES)),
]

# Of `flocking record`.
PromptTokens = Annotated[
    int | None,
    typer.Option(
        help="This many tokens of each text are the prompt, and the rest is its continuation."
    ),
]
Continuations = Annotated[
    list[str] | None,
    typer.Option(
        "--continuation",
        metavar="FILE",
        help="Text file with what follows a text; repeat it, in the order of the texts.",
    ),
]
OnError = Annotated[
    str,
    typer.Option(
        help="What a text that cannot be recorded does: end the run, or be left out (skip).",
        autocompletion=one_of(choices.ON_ERROR),
    ),
]

# Of `flocking generate`.
Method = Annotated[
    str,
    typer.Option(
        help="A method of flocking.griffin, such as topk or magnitude.",
        autocompletion=one_of(choices.METHODS),
    ),
]
Scope = Annotated[
    str, typer.Option(help="shared or sequence.", autocompletion=one_of(choices.SCOPES))
]

# Of `flocking evaluate`.
Tasks = Annotated[
    str,
    typer.Option(
        help="Such as hellaswag,piqa,wikitext: the paper's tasks, or any of the harness.",
        autocompletion=several_of(choices.TASKS),
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        help="Methods of flocking.griffin, such as topk,static,magnitude, each at all densities or "
        "at one, as in topk@0.25; static-domain, static from each task's own documents beyond "
        "those scored; refreshed-64, topk that selects anew after every 64 new tokens; shared-4, "
        "topk with one selection for each four prompts. The full model comes first.",
        autocompletion=several_of(choices.EVALUATED),
    ),
]
Densities = Annotated[str, typer.Option(help="Fractions of FF neurons kept.")]
ProtocolByTask = Annotated[
    str,
    typer.Option(
        help="For likelihoods, context or last-token; TASK=... for one. With context, answers of "
        "one token are the full model's. Or authors, or authors-greedy, for all tasks: as in the "
        "program of GRIFFIN's authors.",
        autocompletion=several_of(choices.PROTOCOLS, equals=choices.TASKS),
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
        help="Text file, file of JSON lines or folder of such, for static and global-local; the "
        "packaged passages by default."
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

# Of `flocking prune`.
SourceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="Folder, GGUF file or hub id; the embedded model by default.",
    ),
]
CalibrationTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--texts",
        metavar="FILE",
        help="Text file, file of JSON lines or folder of such, of the kind that the smaller model "
        "is for; repeat it for more; - is standard input. The packaged passages by default.",
    ),
]
OwnSamples = Annotated[
    bool,
    typer.Option(
        "--own-samples",
        help="Select from what the model writes itself; the texts only say what is lost.",
    ),
]
FixedMethod = Annotated[
    str,
    typer.Option(
        help="static (the neurons that matter most over the texts), global-local (the same, "
        "together with what the model writes itself) or magnitude (of the weights).",
        autocompletion=one_of(choices.FIXED_METHODS),
    ),
]
KeepMultiple = Annotated[
    int | None,
    typer.Option(
        help="Keep a multiple of this many neurons in each layer, rounded down, for programs that "
        "are faster then; 32 by default in GGUF files, and at least."
    ),
]
DownType = Annotated[
    str | None,
    typer.Option(
        help="Of GGUF files: the type of the down-projections, which have to be quantised again: "
        "Q8_0 (by default), Q5_0, Q4_0, F16, BF16 or F32.",
        autocompletion=one_of(choices.DOWN_TYPES),
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
    place = _of_this_process("cpu" if device is None else device)
    try:
        tried = torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as problem:
        raise ValueError(
            f"--device {device} cannot be used here: give cpu, or cuda or cuda:1 with a GPU and a "
            "build of torch for it."
        ) from problem
    if tried.is_meta:
        raise ValueError(f"--device {device} holds no values: give cpu or cuda.")
    loaded, tokenizer = flocking.load(model, **({"dtype": dtype} if dtype else {}))
    with reading(model or "the embedded model"):
        # (Decorated by transformers such that mypy does not see a method.)
        moved = loaded.to(place)  # type: ignore[arg-type]
    return moved, tokenizer


def _of_this_process(device: str) -> str:
    """The device; of processes that torchrun starts on a machine, each has a GPU to itself.

    Where there are fewer GPUs, as where each process sees its own alone, that is left to torch.
    """
    import torch

    own = int(os.environ.get("LOCAL_RANK", "0"))
    has_own = device == "cuda" and is_one_of_several() and own < torch.cuda.device_count()
    return f"cuda:{own}" if has_own else device


def is_one_of_several() -> bool:
    """Whether torchrun, or another program like it, started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process says what came out: alone, or the first of several."""
    return not is_one_of_several() or os.environ.get("RANK", "0") == "0"


def read(name: str) -> str:
    """Text of a file, or of standard input, which is ``-``; with any line endings."""
    if name == STDIN:
        return read_stdin()
    if not name:
        raise ValueError("the name of a text file is empty: name text files, or - for stdin.")
    path = expanded(Path(name))
    why = why_no_file(path)
    if why == "is a folder":
        raise ValueError(f"{name} is a folder: name the text files in it.")
    if why:
        raise ValueError(f"{name} {why}: name text files, or - for standard input.")
    if has_lines(path):
        raise ValueError(f"{name} has JSON lines, and one text is read here: give a text file.")
    text = in_lines(decoded(read_bytes(path), name))
    if not text:
        raise ValueError(f"{name} is empty: give some text.")
    return text


def argument(text: str, what: str) -> str:
    """Text that was given as an argument; bytes that are no characters are refused."""
    return decoded(text.encode("utf-8", "surrogatepass"), what)


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


def at_least_one(value: int | None, option: str) -> None:
    """Refuse a number of things that is 0 or less, if it was given."""
    if value is not None and value < 1:
        raise ValueError(f"{option} {value}: give 1 or more.")


def number(text: str, option: str, kind: type[_Number]) -> _Number:
    """The number that an option's text stands for; with `kind` str, the text."""
    try:
        found = kind(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number.") from None
    if isinstance(found, int) and abs(found) >= 2**63:
        raise ValueError(f"{option} {text}: give a number below 2 ** 63.")
    return found


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
