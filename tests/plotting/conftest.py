"""Every picture is closed again, and drawn before that: drawing must not warn."""

from __future__ import annotations

from collections.abc import Iterator

import helpers
import matplotlib.pyplot as plt
import pytest
import xarray as xr

MODEL = helpers.proved("llama")


@pytest.fixture(autouse=True)
def drawn_and_closed() -> Iterator[None]:
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture(scope="session")
def recording() -> xr.Dataset:
    """Three texts in windows of 8, with everything, and a generation."""
    ids = helpers.random_ids(41, 49, 45, seed=4)
    return helpers.record(
        MODEL, ids, window=8, prompt_tokens=33, relative=True, ranks=True
    ).assign_coords(sequence=["a", "b", "c"])
