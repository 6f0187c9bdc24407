"""What ``flocking demo`` shows of a recording: a table by layer, and two texts as pictures."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from rich.table import Table
from rich.text import Text

from flocking.analysis import chance_consistency, consistency, effective_neurons, flocking_score
from flocking.cli.printing import add_row, printable
from flocking.drawing import heatmap


def table(recording: xr.Dataset) -> Table:
    """Means over the passages, by layer, with their standard errors."""
    columns = {
        "consistency": (consistency(recording), 3),
        "chance\nlevel": (chance_consistency(recording), 3),
        "flocking\nscore": (flocking_score(recording), 3),
        "eff.\nneurons": (effective_neurons(recording), 0),
    }
    n = recording.sizes["sequence"]
    tokens = int(recording.tokens.where(recording.phase != "first", 0).sum())
    table = Table(
        title=Text(f"How {printable(name_of(recording))} flocks, by layer"),
        caption=f"Mean over {n} passages ± standard error; the first token of each is left out.\n"
        "Random weights can score higher, and few effective neurons alone give a high score.",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for name in ("layer", "module", "d_ff", "tokens", *columns):
        table.add_column(name, justify="left" if name == "module" else "right")
    for layer in recording.layer.values:
        mine = recording.sel(layer=layer)
        cells = []
        for values, digits in columns.values():
            mean = float(values.sel(layer=layer).mean())
            error = float(values.sel(layer=layer).std("sequence", ddof=1)) / n**0.5
            cells.append(f"{mean:.{digits}f}±{error:.{digits}f}".replace("±0.", "±."))
        add_row(table, layer, mine.module.item(), mine.d_ff.item(), tokens, *cells)
    return table


def name_of(recording: xr.Dataset) -> str:
    """The name of the recorded model, without its folder or organisation."""
    return recording.attrs["model"].rstrip("/").rpartition("/")[2]


def two_passages(recording: xr.Dataset, layer: int, names: list[str]) -> plt.Figure:
    """Heat maps of two passages at one layer, the first 512 neurons, as in the paper."""
    relative = recording.relative.sel(relative_layer=layer, sequence=names)
    relative = relative.isel(neuron=slice(512), token=slice(1, None))
    vmax = float(relative.astype(np.float32).quantile(0.99))
    scores = flocking_score(recording).sel(layer=layer, sequence=names)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True, layout="constrained")
    for number, (ax, name) in enumerate(zip(axes, names, strict=True)):
        heatmap(relative.sel(sequence=name), ax, vmax=vmax, colorbar=number == 1)
        ax.set_title(f"{name}: flocking score {float(scores.sel(sequence=name)):.2f} (chance 0)")
    axes[1].set_ylabel("")
    d_ff = int(recording.d_ff.sel(layer=layer))
    figure.suptitle(
        f"Relative activations in layer {layer} of {name_of(recording)}, "
        f"{relative.sizes['neuron']} of {d_ff} neurons"
    )
    return figure
