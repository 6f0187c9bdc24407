"""What ``flocking demo`` shows of a recording: a table by layer, and a text beside the control."""

from __future__ import annotations

import functools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from flocking.analysis import chance_consistency, consistency, effective_neurons, flocking_score
from flocking.cli.printing import heading, say
from flocking.cli.tables import Column, Row, print_table
from flocking.plotting import heatmap

_SHOWN = 256  # tokens and neurons
_DPI = 100
_LEFT, _GAP, _BELOW, _STRIP = 70, 24, 50, 14  # pixels
_WIDTH = _LEFT + 4 * _SHOWN + _GAP + 100
_HEIGHT = _BELOW + 2 * _SHOWN + _STRIP + 64


_MEASURES = {
    "consistency": (consistency, "consistency", 3),
    "chance": (chance_consistency, "chance level", 3),
    "flocking_score": (flocking_score, "flocking score", 3),
    "effective_neurons": (effective_neurons, "eff. neurons", 0),
}


def by_layer(recording: xr.Dataset) -> list[dict[str, Any]]:
    """Means over the passages, by layer, with their standard errors."""
    n = recording.sizes["sequence"]
    tokens = int(recording.tokens.where(recording.phase != "first", 0).sum())
    measured = {name: measure(recording) for name, (measure, _, _) in _MEASURES.items()}
    rows = []
    for layer in recording.layer.values.tolist():
        mine = recording.sel(layer=layer)
        row: dict[str, Any] = {"layer": layer, "module": mine.module.item()}
        row |= {"d_ff": mine.d_ff.item(), "tokens": tokens}
        for name, values in measured.items():
            here = values.sel(layer=layer)
            row[name] = float(here.mean())
            row[f"{name}_error"] = float(here.std("sequence", ddof=1)) / n**0.5
        rows.append(row)
    return rows


def print_by_layer(recording: xr.Dataset, rows: list[dict[str, Any]]) -> None:
    """Print them as a table."""
    heading(f"How {name_of(recording)} flocks, by layer")
    columns = [
        Column("layer", lambda row: row["layer"]),
        Column("module", lambda row: row["module"], text=True, spare=3),
        Column("d_ff", lambda row: row["d_ff"], spare=1),
        Column("tokens", lambda row: row["tokens"], spare=2),
    ]
    for name, (_, title, digits) in _MEASURES.items():
        columns.append(Column(title, functools.partial(_with_error, name, digits)))
    print_table(columns, rows)
    say(
        f"Mean over {recording.sizes['sequence']} passages ± standard error; the first token of "
        "each is left out.\nRandom weights can score higher, and few effective neurons alone give "
        "a high score."
    )


def _with_error(name: str, digits: int, row: Row) -> str:
    mean, error = row[name], row[f"{name}_error"]
    return f"{mean:.{digits}f}±{error:.{digits}f}".replace("±0.", "±.")


def name_of(recording: xr.Dataset) -> str:
    """The name of the recorded model, without its folder or organisation."""
    return recording.attrs["model"].rstrip("/").rpartition("/")[2]


def beside_control(
    recording: xr.Dataset, control: xr.Dataset, layer: int, passage: str
) -> plt.Figure:
    """Heat maps of a passage at one layer, of the model and of random weights.

    256 tokens by 256 neurons, the first ones, each two pixels wide and high, under the mean over
    these tokens.
    """
    parts, scores = [], []
    for given in (recording, control):
        relative = given.relative.sel(relative_layer=layer, sequence=passage)
        parts.append(relative.isel(neuron=slice(_SHOWN), token=slice(1, 1 + _SHOWN)))
        scores.append(float(flocking_score(given).sel(layer=layer, sequence=passage)))
    values = [part.values.astype(np.float32) for part in parts]
    most = float(np.percentile(values[0], 99))  # one scale for both, so that they compare
    means = [each.mean(axis=0, keepdims=True) for each in values]
    figure = plt.figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI)
    for number, (part, name) in enumerate(zip(parts, ("model", "random weights"), strict=True)):
        left = _LEFT + number * (2 * _SHOWN + _GAP)
        width = 2 * part.sizes["neuron"]
        ax = figure.add_axes(_place(left, _BELOW, width, 2 * part.sizes["token"]))
        heatmap(part.drop_vars("token_text"), ax=ax, vmax=most, colorbar=False)
        ax.images[0].set_interpolation("nearest")
        strip = figure.add_axes(_place(left, _BELOW + 2 * part.sizes["token"] + 6, width, _STRIP))
        mean = means[number]
        cmap, highest = ax.images[0].get_cmap(), max(float(each.max()) for each in means)
        strip.imshow(
            mean, aspect="auto", interpolation="nearest", cmap=cmap, vmin=0, vmax=highest / 2
        )
        strip.set_xticks([])
        strip.set_yticks([0], ["mean"] if number == 0 else [""])
        strip.set_title(f"{name}: flocking score {scores[number]:.2f} (chance 0)")
        if number:
            ax.set_ylabel("")
            ax.set_yticklabels([])
    left = _LEFT + 4 * _SHOWN + _GAP + 16
    bar = figure.add_axes(_place(left, _BELOW, 14, 2 * _SHOWN))
    image = figure.axes[0].images[0]
    figure.colorbar(image, cax=bar, extend="max", label="relative activation $|z|/\\|z\\|_2$")
    d_ff = int(recording.d_ff.sel(layer=layer))
    figure.suptitle(
        f"{name_of(recording)}, layer {layer}, passage {passage!r}: {parts[0].sizes['token']} "
        f"tokens by {parts[0].sizes['neuron']} of {d_ff} neurons. Streaks are neurons that flock."
    )
    return figure


def _place(left: int, bottom: int, width: int, height: int) -> tuple[float, float, float, float]:
    """A rectangle in pixels, as parts of the figure."""
    return left / _WIDTH, bottom / _HEIGHT, width / _WIDTH, height / _HEIGHT
