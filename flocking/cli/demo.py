"""The table that ``flocking demo`` prints of a recording: how it flocks, by layer."""

from __future__ import annotations

import functools
from typing import Any

import xarray as xr

from flocking.analysis import chance_consistency, consistency, effective_neurons, flocking_score
from flocking.cli.pictures import name_of
from flocking.cli.printing import heading, say
from flocking.cli.tables import Column, Row, print_table

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
