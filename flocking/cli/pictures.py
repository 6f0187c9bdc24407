"""A text's relative activations beside the control's, for ``flocking demo`` and ``heatmap``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from flocking.analysis import flocking_score
from flocking.drawing import brightest, save_grain
from flocking.plotting import heatmap

_Function = TypeVar("_Function", bound=Callable[..., Any])

SHOWN = 256  # tokens and neurons, unless others are asked for
_DPI = 100
_PANEL = 512  # pixels of a heat map, at least
_READABLE = 8  # pixels of a row, at least, that is named by its token
_LEFT, _NAMES, _RIGHT, _GAP, _BELOW, _STRIP, _ABOVE = 70, 90, 100, 24, 50, 14, 64  # pixels


def name_of(recording: xr.Dataset) -> str:
    """The name of the recorded model, without its folder or organisation."""
    return str(recording.attrs["model"].rstrip("/").rpartition("/")[2])


def _in_defaults(function: _Function) -> _Function:
    """Let a picture look the same everywhere, whatever is in the user's matplotlibrc."""

    @functools.wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        with mpl.rc_context():
            mpl.rcdefaults()
            return function(*args, **kwargs)

    return cast(_Function, drawn)


@_in_defaults
def beside_control(
    recording: xr.Dataset,
    control: xr.Dataset,
    layer: int,
    sequence: int | str,
    told: str,
    *,
    tokens: int = SHOWN,
    neurons: int = SHOWN,
) -> plt.Figure:
    """Heat maps of a text at one layer, of the model and of random weights.

    Parameters
    ----------
    recording, control : xarray.Dataset
        The same tokens, with ``relative`` of the layer.
    layer : int
    sequence : int or str
        The text's label.
    told : str
        What the text is called in the title.
    tokens, neurons : int
        How many are shown, from the first on; the text's first token is left out.

    Returns
    -------
    matplotlib.figure.Figure
        Each cell is whole pixels wide and high, so that heat maps have 512 or some more; above
        them, the mean over these tokens. Rows are named by their tokens where there is room.
    """
    parts, scores = [], []
    for given in (recording, control):
        dim = "relative_layer" if "relative_layer" in given.relative.dims else "layer"
        relative = given.relative.sel({dim: layer, "sequence": sequence})
        parts.append(relative.isel(neuron=slice(neurons), token=slice(1, 1 + tokens)))
        scores.append(float(flocking_score(given).sel(layer=layer, sequence=sequence)))
    values = [part.values.astype(np.float32) for part in parts]
    most = brightest(values[0])  # one scale for both, so that they compare
    means = [each.mean(axis=0, keepdims=True) for each in values]
    rows, columns = values[0].shape
    high, wide = rows * _pixels(rows), columns * _pixels(columns)
    named = _pixels(rows) >= _READABLE
    left = _LEFT + named * _NAMES
    figure, placed = _sized(left + 2 * wide + _GAP + _RIGHT, _BELOW + high + _STRIP + _ABOVE)
    for number, (part, name) in enumerate(zip(parts, ("model", "random weights"), strict=True)):
        at = left + number * (wide + _GAP)
        ax = placed(at, _BELOW, wide, high)
        shown = part if named and not number else part.drop_vars("token_text")
        heatmap(shown, ax=ax, vmax=most, colorbar=False)
        ax.images[0].set_interpolation("none")
        strip = placed(at, _BELOW + high + 6, wide, _STRIP)
        cmap, highest = ax.images[0].get_cmap(), max(float(each.max()) for each in means)
        strip.imshow(
            means[number], aspect="auto", interpolation="none", cmap=cmap, vmin=0, vmax=highest / 2
        )
        strip.set_xticks([])
        strip.set_yticks([0], ["mean"] if number == 0 else [""])
        strip.set_title(f"{name}: flocking score {scores[number]:.2f} (chance 0)")
        if number:
            ax.set_ylabel("")
            ax.set_yticklabels([])
    bar = placed(left + 2 * wide + _GAP + 16, _BELOW, 14, high)
    image = figure.axes[0].images[0]
    figure.colorbar(image, cax=bar, extend="max", label="relative activation $|z|/\\|z\\|_2$")
    title = figure.suptitle(
        f"{name_of(recording)}, layer {layer}, {told}: {rows} tokens by {columns} of "
        f"{int(recording.d_ff.sel(layer=layer))} neurons. Streaks are neurons that flock.",
        parse_math=False,
    )
    room = 0.98 * figure.bbox.width / title.get_window_extent().width
    title.set_fontsize(min(1, room) * float(title.get_fontsize()))
    return figure


def _pixels(cells: int) -> int:
    """How many pixels a cell is wide, or high."""
    return -(-_PANEL // cells)


def _sized(width: int, height: int) -> tuple[plt.Figure, Callable[[int, int, int, int], Axes]]:
    """A figure, and a function that puts axes on it, all in pixels."""
    figure = plt.figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def placed(left: int, bottom: int, wide: int, high: int) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    return figure, placed


@_in_defaults
def save_picture(figure: plt.Figure, path: Path, about: dict[str, str]) -> None:
    """Write a picture as PNG or SVG, as its name says, with what it is of as metadata."""
    if path.suffix == ".png":
        save_grain(figure, path, about, dpi=_DPI)
        return
    with mpl.rc_context({"svg.hashsalt": "flocking"}):
        figure.savefig(path, format="svg", dpi=_DPI, metadata={**about, "Date": None})
    plt.close(figure)
