"""One HTML file around the module, with the data in it; it loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import seaborn as sns
import xarray as xr
from matplotlib.colors import to_hex

from flocking.drawing import BLUE, GREEN, ORANGE
from flocking.exploring.coarsening import for_a_page
from flocking.exploring.packing import Source, relative_of, told_of
from flocking.texts import dangling, expanded

MOST = 20_000_000  # bytes of a page
_BEGINS = "<!doctype html>\n<!-- A page of flocking.explore. -->\n"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


def asset(name: str) -> str:
    """The text of a file that is part of the package."""
    return (files("flocking.exploring") / name).read_text(encoding="utf-8")


def described(source: Source) -> dict[str, Any]:
    """What the page is told once, with the colours of the project's pictures."""
    shades = (to_hex(sns.color_palette("rocket", as_cmap=True)(n)) for n in range(256))
    colours = {
        "kept": to_hex(BLUE),
        "best": to_hex(GREEN),
        "cursor": to_hex(ORANGE),
        "map": "".join(shade.removeprefix("#") for shade in shades),
    }
    return {**told_of(source), "colours": colours}


def as_json(content: object) -> str:
    r"""JSON in ASCII, in which no tag of HTML begins or ends: ``<`` is ``\u003c``."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_of(recording: xr.Dataset) -> bytes:
    """The whole page, of at most `MOST` bytes: coarser where it would be larger.

    Parameters
    ----------
    recording : xarray.Dataset
        In its canonical form.

    Raises
    ------
    ValueError
        If nothing of it is small enough.
    """
    room, layers = 3 * MOST // 4, len(relative_of(recording))
    while (coarse := for_a_page(recording, layers, room)) is not None:
        parts, size = [], 0
        for part in _parts(Source(recording, coarse)):
            parts.append(part.encode("ascii", "xmlcharrefreplace"))
            size += len(parts[-1])
            if size > MOST:
                break
        if size <= MOST:
            return b"".join(parts)
        room -= MOST // 50
    raise ValueError(
        f"a page of {recording.sizes['layer']} layers of {recording.sizes['neuron']} neurons would "
        f"be larger than {MOST // 1_000_000} MB: select layers first, as in "
        "explore(recording.sel(layer=[0, 1])).save(...)."
    )


def _parts(source: Source) -> Iterator[str]:
    told = described(source)
    title = f"{told['model']}: tokens and neurons" if told["model"] else "Tokens and neurons"
    yield _BEGINS
    yield '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{html.escape(title)}</title>\n<style>\n"
    yield f"body {{ margin: 0; }}\n{asset('explorer.css')}</style>\n</head>\n"
    yield '<body>\n<main id="flocking"></main>\n<noscript>This page needs JavaScript.</noscript>\n'
    yield _data("about", as_json(told))
    for key in source.keys:
        packet = source.packet(key)
        yield _data(key, as_json(packet.content))
        for number, buffer in enumerate(packet.buffers):
            yield _data(f"{key}/{number}", base64.b64encode(buffer).decode("ascii"))
    yield f'<script type="module">\n{asset("explorer.js")}\nfromPage();\n</script>\n'
    yield "</body>\n</html>\n"


def _data(key: str, text: str) -> str:
    return f'<script type="text/plain" data-key="{key}">{text}</script>\n'


# --------------------------------------------------------------------------------------
# Where it is written


def place_of(path: object) -> Path:
    """Where a page is to be written, from what a user gives as its name.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it has another suffix than ``.html``, or is a URL.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path is a {type(path).__name__}: give the name of a file.")
    name = os.fspath(path)
    if "\0" in name:
        raise ValueError(f"path={name!r} has a NUL character, which no name has: remove it.")
    if re.match(r"[a-z0-9+]{2,}:/", name):
        raise ValueError(f"path {name}: name a file on a disk, and no URL.")
    place = Path(expanded(name))
    if place.suffix.lower() != ".html":
        wanted = place.with_suffix(".html").name if place.name else "page.html"
        raise ValueError(f"path {name} has no suffix .html: name it {wanted}.")
    return place


def refuse_page(found: Path, place: Path, overwrite: bool) -> None:
    """Raise a ValueError where something is, unless it is such a page that may be replaced."""
    if why := dangling(found):
        raise ValueError(f"{place} {why}: choose another name, or make what the link names.")
    if not _is_a_page(found):
        raise ValueError(f"{place} exists and is no page of flocking.explore: choose another name.")
    if not overwrite:
        raise ValueError(f"{place} exists: choose another name, or give overwrite=True.")


def _is_a_page(found: Path) -> bool:
    try:
        with found.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS.encode("ascii")
    except OSError:
        return False
