"""Which files a store was saved with: Zarr reads zeros or NaN in the place of a lost chunk.

The list stands in ``.zmetadata``, beside what Zarr keeps there. Whatever else changes the store
writes that file anew, without the list, and nothing is checked from then on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_LIST, _KEY = ".zmetadata", "flocking_files"


def note_files(store: Path) -> None:
    """Note the size in bytes of each file of a store that was just written."""
    file = store / _LIST
    described = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**described, _KEY: _files(store)}), encoding="utf-8")


def refuse_losses(store: Path) -> None:
    """Raise a ValueError if a file that was noted is lost or of another size.

    Stores without a list, such as xarray's, are taken as they are.
    """
    try:
        noted = json.loads((store / _LIST).read_text(encoding="utf-8")).get(_KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # what opens the store says so
    if not isinstance(noted, dict):
        return
    found = _files(store)
    wrong = [name for name in noted if found.get(name) != noted[name]]
    if not wrong:
        return
    name, more = wrong[0], f" ({len(wrong)} files are)" if len(wrong) > 1 else ""
    what = f"{found[name]} bytes long instead of {noted[name]}" if name in found else "lost"
    raise ValueError(
        f"{store} is not as it was saved: {name} is {what}{more}. Copy the store again, or record "
        "again."
    )


def _files(store: Path) -> dict[str, int]:
    """Sizes of the files of all arrays, by their paths within the store."""
    sizes = {}
    for folder, _, names in os.walk(store):
        for name in names:
            path = Path(folder, name)
            if name != _LIST and path.is_file():
                sizes[path.relative_to(store).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))
