"""How figures look: colours, a style, a page with a caption, and the files."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, _, _, _, SKY = sns.color_palette("colorblind")
# Colour and dashes together, so that neither is needed to tell the lines apart.
MODEL: dict[str, Any] = {"color": BLUE, "ls": "-", "label": "model"}
CONTROL: dict[str, Any] = {"color": ORANGE, "ls": "--", "label": "random weights (control)"}
BY_WEIGHTS: dict[str, dict[str, Any]] = {"trained": MODEL, "control": CONTROL}
# What needs no estimate: chance is dotted, any other level thin and whole.
CHANCE: dict[str, Any] = {"color": "0.35", "ls": ":", "lw": 1.2}
LEVEL: dict[str, Any] = {"color": "0.1", "ls": "-", "lw": 0.6}
HINDSIGHT: dict[str, Any] = {"color": GREEN, "ls": (0, (5, 1, 1, 1)), "label": "best in hindsight"}
OTHERS: dict[str, Any] = {"color": PURPLE, "ls": "-.", "label": "static: other texts"}
MAGNITUDE: dict[str, Any] = {"color": RED, "ls": (0, (1, 1)), "label": "static: weight magnitude"}
_DOT = {"ms": 2.5}
BY_SELECTION: dict[str, dict[str, Any]] = {
    "hindsight": {**HINDSIGHT, **_DOT, "marker": "v", "label": "hindsight: scored tokens"},
    "global-local": {
        **_DOT,
        "color": ORANGE,
        "ls": (0, (3, 1)),
        "marker": "D",
        "label": "global-local",
    },
    "static": {**OTHERS, **_DOT, "marker": "s"},
    "static-domain": {
        **_DOT,
        "color": "0.15",
        "ls": (0, (4, 1, 1, 1)),
        "marker": "p",
        "label": "static: same domain",
    },
    "GRIFFIN": {**_DOT, "color": BLUE, "ls": "-", "marker": "o", "label": "GRIFFIN"},
    "every 16": {**_DOT, "color": RED, "ls": "-", "marker": "^", "label": "anew every 16"},
    "every 64": {**_DOT, "color": SKY, "ls": "-", "marker": "D", "label": "anew every 64"},
    "every 256": {**_DOT, "color": BROWN, "ls": "-", "marker": "<", "label": "anew every 256"},
    "hindsight 64": {**HINDSIGHT, **_DOT, "marker": "v", "label": "hindsight, every 64"},
    "half-sampled": {**_DOT, "color": BROWN, "ls": "--", "marker": "<", "label": "half-sampled"},
    "sampled": {**_DOT, "color": SKY, "ls": "--", "marker": ">", "label": "sampled"},
    "random": {**_DOT, "color": "0.5", "ls": ":", "marker": "x", "label": "random (chance)"},
    "magnitude": {**MAGNITUDE, **_DOT, "marker": "P"},
}
_SHARED = "hX*^Pv<>"
_OTHER: dict[str, Any] = {**_DOT, "color": "0.5", "ls": "-", "marker": "d"}


def style_of(method: str) -> dict[str, Any]:
    """How a method of an evaluation is drawn: ``topk``, ``refreshed-64``, ``shared-4``, ..."""
    known = BY_SELECTION | {
        "topk": BY_SELECTION["GRIFFIN"],
        "static": BY_SELECTION["static"] | {"label": "static: calibration texts"},
        "static-domain": BY_SELECTION["static-domain"] | {"label": "static: the task's others"},
    }
    kind, _, number = method.partition("-")
    if kind == "refreshed":
        label = f"GRIFFIN, anew every {number}"
        return known.get(f"every {number}", known["every 256"]) | {"label": label}
    if kind == "shared":
        marker = _SHARED[int(number).bit_length() % len(_SHARED)]  # one for each power of two
        label = f"GRIFFIN, shared by {number}"
        return _OTHER | {"color": BLUE, "ls": ":", "marker": marker, "label": label}
    return known.get(method, _OTHER | {"label": method})


BY_ALLOCATION: dict[str, dict[str, Any]] = {
    "one for all": {**_DOT, "color": ORANGE, "ls": "--", "marker": "o", "label": "one for all"},
    "allocated": {**_DOT, "color": BLUE, "ls": "-", "marker": "s", "label": "allocated"},
    "first layer": {
        **_DOT,
        "color": GREEN,
        "ls": (0, (5, 1, 1, 1)),
        "marker": "v",
        "label": "first layer whole",
    },
    "lower floor": {**_DOT, "color": SKY, "ls": (0, (3, 1)), "marker": "<", "label": "lower floor"},
    "by block error": {
        **_DOT,
        "color": PURPLE,
        "ls": "-.",
        "marker": "D",
        "label": "by block error",
    },
    "shuffled": {**_DOT, "color": "0.5", "ls": ":", "marker": "x", "label": "shuffled (chance)"},
}
# By what static and global-local are made from.
BY_REFERENCE: dict[str, dict[str, Any]] = {
    "global-local-domain": {"color": ORANGE, "marker": "p", "label": "global-local: own beginning"},
    "global-local-sampled": {"color": ORANGE, "marker": "*", "label": "global-local: sampled"},
    "global-local": {"color": ORANGE, "marker": "s", "label": "global-local: other texts"},
    "static-domain": {"color": PURPLE, "marker": "p", "label": "static: own beginning"},
    "static-sampled": {"color": PURPLE, "marker": "*", "label": "static: sampled"},
    "static": {"color": PURPLE, "marker": "s", "label": "static: other texts"},
    "static-one": {"color": PURPLE, "marker": "v", "label": "static: one other text"},
    "GRIFFIN": {"color": BLUE, "marker": "o", "label": "GRIFFIN"},
    "random": {"color": "0.5", "marker": "x", "label": "random (chance)"},
}

_WIDTH = 3.5  # inches: a column of a two-column page
STYLE = mpl.RcParams(
    {
        "font.size": 7,
        "axes.titlesize": 7,
        "axes.labelsize": 7,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "legend.fontsize": 6.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
        "savefig.dpi": 300,
        "svg.fonttype": "none",
        "svg.hashsalt": "flocking",
    }
)


def in_style(
    source: str, *needs: str
) -> Callable[[Callable[[Any, Figure], None]], Callable[[Any], Figure]]:
    """Make a function draw in the project's style, whatever the user's own style is.

    Parameters
    ----------
    source : str
        What the function is given, in words; said where it is given something else.
    *needs : str
        Variables or columns that it draws.
    """

    def styling(draw: Callable[[Any, Figure], None]) -> Callable[[Any], Figure]:
        def styled(data: Any) -> Figure:
            _refuse_others(draw.__name__, data, source, needs)
            # Made before the context: its end would undo a notebook's interactive mode.
            figure = plt.figure()
            try:
                with _style():
                    figure.set(facecolor=mpl.rcParams["figure.facecolor"])
                    draw(data, figure)
            except BaseException:
                plt.close(figure)
                raise
            return figure

        styled.__name__, styled.__doc__ = draw.__name__, draw.__doc__
        return styled

    return styling


@contextmanager
def _style() -> Iterator[None]:
    """The project's style over matplotlib's own, whatever is in the user's matplotlibrc."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def _refuse_others(name: str, data: Any, source: str, needs: tuple[str, ...]) -> None:
    """Say what a figure is drawn from, if it is given something else."""
    told = f"{name} draws {source}. For a recording of your own, use flocking.plot."
    attributes = getattr(data, "attrs", None)
    if not isinstance(attributes, dict) or not hasattr(data, "keys"):
        raise TypeError(f"data is a {type(data).__name__}, and {told}")
    lacking = [each for each in needs if each not in data]
    lacking += ["caption"] if "caption" not in attributes else []
    if lacking:
        raise ValueError(f"data has no {lacking[0]!r}, and {told}")


def page(
    figure: Figure, told: str, rows: int, columns: int, *, height: float, **options: object
) -> tuple[SubFigure, np.ndarray]:
    """Axes a column wide, with a line or two below them; captions stand beside figures."""
    lines = textwrap.wrap(told, 82)
    below = 0.105 * len(lines) + 0.05
    figure.set_size_inches(_WIDTH, height + below)
    figure.set_layout_engine("constrained")
    panels = figure.subfigures(2, 1, squeeze=False, height_ratios=[height, below])
    upper, lower = panels[:, 0]
    lower.text(
        0.01, 0.97, "\n".join(lines), va="top", fontsize=5.6, linespacing=1.15, parse_math=False
    )
    return upper, upper.subplots(rows, columns, squeeze=False, **_gridspec(options))


def _gridspec(options: dict[str, object]) -> dict[str, object]:
    ratios = {key: options.pop(key) for key in ("width_ratios", "height_ratios") if key in options}
    return {**options, "gridspec_kw": ratios}


def save(figure: Figure, folder: Path, name: str, model: str, caption: str) -> None:
    """Write a figure as PNG and SVG with its caption as metadata, and close it."""
    about = {"Title": f"{name}, {model}", "Description": caption}
    try:
        with _style():
            figure.savefig(folder / f"{name}.png", metadata=about)
            figure.savefig(folder / f"{name}.svg", metadata={**about, "Date": None})
    finally:
        plt.close(figure)


def save_grain(figure: Figure, path: Path, about: dict[str, str], dpi: int) -> None:
    """Write a picture of many small cells as a PNG of 256 colours, a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    told = PngInfo()
    for key, text in about.items():
        told.add_text(key, text)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, format="PNG", pnginfo=told, optimize=True, dpi=(dpi, dpi))
    plt.close(figure)


def described(name: str, model: str, caption: str, source: str) -> str:
    """A page of Markdown about a figure that :func:`save` wrote, with its caption."""
    title = f"# {name}, {model}"
    return "\n\n".join([title, f"![{name}]({name}.svg)", caption, source]) + "\n"


def titled(path: Path, name: str) -> bool:
    """Whether a PNG, SVG or page of Markdown is one that was written here under this name."""
    title = f"{name}, "
    try:
        if path.suffix == ".md":
            return path.read_text(encoding="utf-8").startswith(f"# {title}")
        if path.suffix == ".png":
            with Image.open(path) as image:
                return str(image.info.get("Title", "")).startswith(title)
        found = re.search("<title>([^<]*)</title>", path.read_text(encoding="utf-8"))
        return found is not None and found[1].startswith(title)
    except (OSError, ValueError, SyntaxError):  # broken, in the words of either library
        return False
