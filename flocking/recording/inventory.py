"""Which files a store was saved with: Zarr reads zeros or NaN in the place of a lost chunk.

The list stands in ``.zmetadata``, beside what Zarr keeps there. Where xarray adds to a store, it
writes that file anew, without the list, and nothing is checked from then on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_HEAD = 16  # bytes of Blosc's head, the last four of which are the length
_LIST, _KEY = ".zmetadata", "flocking_files"


def note_files(store: Path) -> None:
    """Note the size in bytes of each file of a store that was just written."""
    file = store / _LIST
    described = json.loads(file.read_text(encoding="utf-8"))
    partial = file.with_name(f"{_LIST}.partial")
    partial.write_text(json.dumps({**described, _KEY: _files(store)}), encoding="utf-8")
    partial.replace(file)


def has_files_noted(store: Path) -> bool:
    """Whether it was noted which files a store has."""
    return _noted(store) is not None


def refuse_losses(store: Path) -> None:
    """Raise a ValueError if a file that was noted is lost or cut.

    Stores without a list, such as xarray's, are taken as they are. A chunk of another size that
    is whole is taken, too: somebody may have written other values there.
    """
    if (noted := _noted(store)) is None:
        return
    found = _files(store)
    wrong = [
        name
        for name in noted
        if name not in found or (found[name] != noted[name] and not _is_whole(store / name))
    ]
    if not wrong:
        return
    name, more = wrong[0], f" ({len(wrong)} files are)" if len(wrong) > 1 else ""
    what = f"cut ({found[name]} bytes, not {noted[name]})" if name in found else "lost"
    raise ValueError(
        f"{store} is not as it was saved: {name} is {what}{more}. Copy the store again, or record "
        "again."
    )


def _noted(store: Path) -> dict[str, int] | None:
    try:
        noted = json.loads((store / _LIST).read_text(encoding="utf-8")).get(_KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # what opens the store says so
    return noted if isinstance(noted, dict) else None


def _is_whole(file: Path) -> bool:
    """Whether a file is as long as Blosc, the compressor of chunks, says in its head.

    Descriptions have none: what opens the store says what is wrong with them.
    """
    if file.name.startswith("."):
        return True
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    return len(head) == _HEAD and int.from_bytes(head[-4:], "little") == file.stat().st_size


def _files(store: Path) -> dict[str, int]:
    """Sizes of the files of all arrays, by their paths within the store."""
    sizes = {}
    for folder, _, names in os.walk(store):
        for name in names:
            path = Path(folder, name)
            if not name.startswith(_LIST) and path.is_file():
                sizes[path.relative_to(store).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))
