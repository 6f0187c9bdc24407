"""The widget: what it answers; and what is said where anywidget is not installed."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import xarray as xr

import flocking


def test_without_anywidget_it_says_so_and_still_saves(
    recording: xr.Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "flocking.exploring.live", raising=False)
    explorer = flocking.explore(recording)
    with pytest.raises(
        ImportError, match=r"anywidget is not installed: pip install 'flocking\[not"
    ):
        _ = explorer.widget
    shown = explorer._repr_mimebundle_()
    assert shown["text/plain"].startswith("Explorer of 3 texts and 2 layers of 160 neurons\nanywid")
    assert explorer.save(tmp_path / "page.html").exists()


def test_it_answers_what_the_page_asks_for(recording: xr.Dataset) -> None:
    pytest.importorskip("anywidget")
    explorer = flocking.explore(recording)
    widget = explorer.widget
    assert explorer.widget is widget
    assert json.loads(widget.about)["sequences"][0] == "a: one"
    sent = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    widget._handle_custom_msg({"key": "layer/1/0"}, [])
    content, buffers = sent.pop()
    assert content["key"] == "layer/1/0"
    assert {*json.loads(content["content"])} == {"brightest", "brightest_row"}
    there = recording.tokens.values[1] > 0
    energy = np.frombuffer(buffers[0], np.float32).reshape(-1, 160)
    np.testing.assert_array_equal(energy, recording.energy.values[1, 0, there])
    for message in ({"key": "layer/9/0"}, {"key": None}, {}, "layer/0/0", None):
        widget._handle_custom_msg(message, [])
        content, buffers = sent.pop()
        assert content["error"].startswith("ValueError: there is no")
    widget.close()


def test_a_notebook_shows_the_widget(recording: xr.Dataset) -> None:
    pytest.importorskip("anywidget")
    explorer = flocking.explore(recording.isel(sequence=[0]))
    assert repr(explorer) == "Explorer of 1 text and 2 layers of 160 neurons"
    bundle = explorer._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data
    explorer.widget.close()
