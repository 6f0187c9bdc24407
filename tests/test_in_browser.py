"""What runs notebooks in a browser reads them while JupyterLab writes them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import in_browser
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook


def test_half_a_notebook_is_read_again_later(tmp_path: Path) -> None:
    path = tmp_path / "some.ipynb"
    assert in_browser.read(path) is None
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), path)
    whole = path.read_bytes()
    for length in range(len(whole) - 2):
        path.write_bytes(whole[:length])
        assert in_browser.read(path) is None
    path.write_bytes(whole)
    assert in_browser.read(path).cells[0].source == "1 + 1"


def test_a_failure_leaves_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def nothing(*args: object) -> object:
        yield "address"

    def gives_up(*args: object) -> None:
        raise SystemExit("waited 900 s: give up.")

    pictures = []
    monkeypatch.setattr(in_browser, "chromium", nothing)
    monkeypatch.setattr(in_browser, "lab", nothing)
    monkeypatch.setattr(in_browser, "run", gives_up)
    monkeypatch.setattr(in_browser, "picture", lambda page, path: pictures.append(path))
    monkeypatch.setattr("sys.argv", ["in_browser.py", "flocking.ipynb", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="give up"):
        in_browser.main()
    assert pictures == [tmp_path / "browser-flocking.png"]


def test_each_notebook_runs_itself_and_not_the_one_before(
    chromium: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for = in_browser.wait_for

    def at_once(done: object, seconds: float, what: str, pause: float = 1) -> object:
        return wait_for(done, seconds, what, 0.005 if what.endswith("to open") else pause)

    monkeypatch.setattr(in_browser, "wait_for", at_once)
    paths = [tmp_path / "first.ipynb", tmp_path / "second.ipynb"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for path in paths:
        cells = [new_code_cell("1 + 1")]
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    with in_browser.chromium() as page, in_browser.lab(tmp_path) as address:
        for path in paths:
            assert in_browser.run(page, address, path, timeout=60) == []
            assert in_browser.read(path).cells[0].outputs[0].data["text/plain"] == "2"
