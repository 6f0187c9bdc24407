"""The widget in JupyterLab, as a person sees it; half a minute, where there is a browser."""

from __future__ import annotations

import time
from pathlib import Path

import in_browser
import nbformat
import numpy as np
import pytest
import xarray as xr
from nbformat.v4 import new_code_cell, new_notebook

import flocking

_LAYER = """
const slider = document.querySelector(".flocking-explorer input[type=range]");
slider.value = 1;
slider.dispatchEvent(new Event("input", { bubbles: true }));
"""


def test_a_layer_is_sent_when_it_is_asked_for(
    recording: xr.Dataset, chromium: None, tmp_path: Path
) -> None:
    pytest.importorskip("anywidget")
    pytest.importorskip("jupyterlab")
    flocking.save_recording(recording, tmp_path / "some.zarr")
    code = "import flocking\nflocking.explore(flocking.open_recording('some.zarr'))"
    path = tmp_path / "some.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=kernel), path)
    with in_browser.lab(tmp_path) as address, in_browser.chromium() as browser:
        assert in_browser.run(browser, address, path, 120) == []
        ready = "return document.querySelector('.flocking-explorer')?.dataset.ready"
        in_browser.wait_for(lambda: browser.execute_script(ready) == "0/0", 30, "the widget")
        browser.execute_script(_LAYER)
        in_browser.wait_for(lambda: browser.execute_script(ready) == "0/1", 30, "the layer")
        time.sleep(0.2)
        shown = browser.execute_script(
            "return document.querySelector('dd[data-number=captured]').dataset.value"
        )
        errors = [e for e in browser.get_log("browser") if e["source"] == "javascript"]
    one = recording.isel(sequence=0, layer=1)
    kept = flocking.select(flocking.statistic(one, phase="prompt"), 0.5)
    expected = flocking.captured_energy(kept, flocking.statistic(one, phase="generation"))
    assert float(shown) == pytest.approx(np.asarray(expected).item(), rel=1e-9)
    assert errors == []
