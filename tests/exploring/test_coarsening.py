"""How fine a page is, for the sizes that docs/exploring.md names."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from flocking.exploring.coarsening import CELLS, Coarse, for_a_notebook, for_a_page
from flocking.exploring.page import MOST


def sizes_of(texts: int, layers: int, neurons: int, tokens: int, window: int) -> xr.Dataset:
    """What sizes are read from, without the arrays."""
    starts = [0, *range(1, tokens, window)]
    counts = np.diff([*starts, tokens])
    return xr.Dataset(
        {"tokens": (("sequence", "window"), np.tile(counts, (texts, 1)))},
        {
            "layer": np.arange(layers),
            "neuron": np.arange(neurons),
            "phase": ("window", ["first"] + ["prompt"] * (len(starts) - 1)),
        },
    )


@pytest.mark.parametrize(
    ("sizes", "relative", "expected"),
    [
        ((1, 30, 1536, 2048, 64), 1, Coarse(1, 1, 1, False)),
        ((1, 30, 1536, 2048, 64), 30, Coarse(1, 1, 16, True)),
        ((12, 30, 1536, 2048, 64), 0, Coarse(4, 2, None, False)),
        ((1, 32, 14336, 2048, 64), 0, Coarse(1, 5, None, False)),
        ((2, 80, 28672, 2048, 64), 0, None),
    ],
)
def test_pages_of_ordinary_sizes(
    sizes: tuple[int, int, int, int, int], relative: int, expected: Coarse | None
) -> None:
    assert for_a_page(sizes_of(*sizes), relative, 3 * MOST // 4) == expected


@pytest.mark.parametrize(
    ("sizes", "windows", "tokens"),
    [
        ((1, 30, 1536, 2048, 64), 1, 1),
        ((1, 32, 14336, 1024, 64), 1, 4),
        ((1, 32, 14336, 2048, 1), 8, None),
    ],
)
def test_a_notebook_is_sent_what_it_can_hold(
    sizes: tuple[int, int, int, int, int], windows: int, tokens: int | None
) -> None:
    recording = sizes_of(*sizes)
    found = for_a_notebook(recording)
    assert found.windows == windows
    assert recording.sizes["window"] / windows * recording.sizes["neuron"] <= CELLS + 14336
    if tokens:
        assert found.tokens == tokens
