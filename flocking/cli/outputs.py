"""What commands write, and which earlier outputs they may replace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flocking.drawing import titled
from flocking.recording import not_a_recording, open_recording, refuse_store
from flocking.texts import dangling, passages


def refuse_nothing(option: str, path: Path) -> None:
    """Refuse an empty name, which stands for the folder that the command runs in."""
    if not path.name:
        raise ValueError(f"--{option} names no file or folder: give it a name.")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Replace only a recording, and only if asked to."""
    refuse_store(path, overwrite, "--overwrite")


def refuse_other_than_demos(path: Path) -> None:
    """Replace only what an earlier ``flocking demo`` wrote."""
    _refuse_dangling(path)
    why = _not_of_demo(path) if path.suffix == ".png" else not_a_recording(path)
    if why is None and path.suffix != ".png" and not _is_of_passages(path):
        why = "it is a recording of other texts"
    if why is not None:
        raise ValueError(
            f"{path} exists and is not from flocking demo ({why}): choose another --out."
        )


def refuse_other_than_heatmaps(path: Path) -> None:
    """Replace only what an earlier ``flocking heatmap`` wrote."""
    _refuse_dangling(path)
    if path.exists() and not (path.is_file() and titled(path, "heatmap")):
        raise ValueError(
            f"{path} exists and is not from flocking heatmap: choose another --output."
        )


def _refuse_dangling(path: Path) -> None:
    if why := dangling(path):
        raise ValueError(f"{path} {why}: choose another name, or make what the link names.")


def _is_of_passages(store: Path) -> bool:
    try:
        with open_recording(store) as recording:
            named = recording.sequence.values.tolist() == [one.name for one in passages()]
            return named and "relative_layer" in recording.coords
    except Exception:  # whatever is wrong with it, it is not the demo's
        return False


def _not_of_demo(picture: Path) -> str | None:
    """Why something is not the demo's picture; None if it is."""
    from PIL import Image

    if not picture.is_file():
        return "it is a folder"
    try:
        with Image.open(picture) as image:
            ours = {"Source", "architecture", "flocking_version"} <= image.info.keys()
    except (OSError, ValueError, SyntaxError):  # PIL's for a broken PNG
        ours = False
    return None if ours else "it is another picture, or none"


@contextmanager
def naming(output: Path, partial: Path) -> Iterator[None]:
    """Let errors about what is being written name the place that was asked for."""
    try:
        yield
    except OSError as problem:
        if str(partial) not in str(problem):
            raise
        if problem.errno is not None and problem.filename is not None:
            problem.filename = str(problem.filename).replace(str(partial), str(output))
            raise
        raise OSError(said_of(problem, partial, output)) from problem
    except ValueError as problem:
        if str(partial) not in str(problem):
            raise
        raise ValueError(said_of(problem, partial, output)) from problem


def said_of(problem: Exception, partial: Path, output: Path) -> str:
    """What an error says, with the place that was asked for."""
    return str(problem).replace(str(partial), str(output))
