"""How ``flocking record`` writes its store: anew, in another's place, or on from where it was."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flocking.artifacts import refuse_unwritable, replacing
from flocking.cli import choices
from flocking.cli.ending import Ended
from flocking.cli.options import is_first, is_one_of_several, read
from flocking.cli.outputs import naming, refuse_existing
from flocking.cli.printing import counted
from flocking.cli.session import is_quiet
from flocking.recording import Folder, Options, done_so_far, is_growing, stream
from flocking.texts import TextFiles, refuse_stdin_twice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loading = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def texts_of(
    files: list[str], field: str, following: list[str] | None, on_error: str
) -> tuple[Any, list[str], list[str] | None]:
    """Texts, the names of the files that they are from, and what follows each; None if nothing."""
    if on_error not in choices.ON_ERROR:
        raise ValueError(f"--on-error {on_error}: give {' or '.join(choices.ON_ERROR)}.")
    refuse_stdin_twice([*files, *(following or [])])
    found = TextFiles(files, field)
    # What cannot be read is said before a model is loaded.
    if not next(iter(found)) and on_error == "stop":
        raise ValueError(
            f"{found.names[0]} is empty: leave it out, or give --on-error skip, which does."
        )
    if not following:
        return found, found.names, None
    if len(following) != len(found):
        raise ValueError(
            f"--continuation was given {counted(len(following), 'time')} for "
            f"{counted(len(found), 'text')}: give one for each."
        )
    return found, found.names, [read(name) for name in following]


def record_into(
    output: Path,
    texts: Any,
    names: Sequence[str],
    options: Options,
    on_error: str,
    overwrite: bool,
    loading: Loading,
) -> tuple[dict[str, int], list[str]]:
    """Record texts into a store; gives the sizes of the recording, and what was left out, and why.

    A store that the same command began is gone on with, unless it is to be overwritten: then the
    old one stays until the new one is complete, which begins anew if it is interrupted.
    """
    # (A name may hold bytes that are no characters, which cannot be stored.)
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    replaces = os.path.lexists(output) and not (is_growing(Folder(output)) and not overwrite)
    if replaces and is_one_of_several():
        raise ValueError(
            f"{output} exists, and several processes cannot replace it together: remove it first, "
            "or choose another name."
        )

    def run(path: Path) -> tuple[dict[str, int], list[str]]:
        model, tokenizer = loading()
        recording = stream(
            model,
            texts,
            path,
            tokenizer=tokenizer,
            options=options,
            num_texts=None,
            on_error=on_error,
            progress=not is_quiet(),
            files=shown,
        )
        sizes = {str(dim): size for dim, size in recording.sizes.items()}
        skipped = recording.attrs.get("skipped", [])
        return sizes, [one.partition(": ")[2] for one in skipped]

    if replaces:
        check = functools.partial(refuse_existing, overwrite=overwrite)
        with replacing(output, check=check) as partial, naming(output, partial):
            return run(partial)
    if is_first():  # (the others would meet the first one there)
        refuse_unwritable(output, wait=0)
    try:
        return run(output)
    except (KeyboardInterrupt, Ended) as ending:
        if done := done_so_far(Folder(output)):
            how = ", without --overwrite," if overwrite else ""
            ending.add_note(f"interrupted: {output}: {done}; the same command{how} goes on.")
        raise
