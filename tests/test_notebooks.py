"""The notebooks run top to bottom in a fresh kernel, and were committed that way."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from executed import NOTEBOOKS, WIDGET, seconds, tidied
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = NOTEBOOKS.parent
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
# Folders of whoever ran something; "/tmp" and the like in a sentence begin no path.
PRIVATE = re.compile(r"(?<![\w.~/-])/(root|home|work|tmp|Users|mnt)/|[A-Z]:\\+Users\\")
DATA = {".ipynb", ".json", ".jsonl", ".csv", ".svg", ".txt", ".md"}


def cells_of(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
def test_runs_in_a_fresh_kernel(path: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the notebook's own switch for a quick pass, and a few layers of the model."""
    monkeypatch.delenv("MPLBACKEND")  # a kernel shows its figures inline
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.count("QUICK = False") == 1
    first.source = first.source.replace("QUICK = False", "QUICK = True")
    assert first.source.count("\nMODEL = None ") == 1
    folder = shallow[0].name_or_path
    first.source = first.source.replace("\nMODEL = None ", f"\nMODEL = {folder!r} ")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    bars = [o.data["text/plain"] for o in outputs if WIDGET in o.get("data", {})]
    assert any(bar.startswith("recording") for bar in bars)  # and not those of transformers alone
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"figures\.|flocking\.plot\.", cell.source):
            assert any("image/png" in o.get("data", {}) for o in cell.outputs), cell.source


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_was_committed_after_a_clean_run(path: Path) -> None:
    cells = cells_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_takes_long_shows_progress_and_says_how_long(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert sum(map(seconds, notebook.cells)) > 10  # it was noted
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert "progress=False" not in cell.source
        if seconds(cell) > 10:
            assert re.search(r"[Aa]bout (\w+ ){1,3}(seconds?|minutes?)", before.source), cell.source


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_read_without_a_kernel(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    for cell in cells_of(path):
        assert max(map(len, cell.source.splitlines())) < 85
        for output in cell.outputs:
            assert WIDGET not in output.get("data", {})
            assert output.get("name") != "stderr"


def test_progress_bars_are_left_out_of_what_is_committed() -> None:
    bar = new_output("display_data", {WIDGET: {"model_id": "1"}, "text/plain": "recording:   0%|"})
    printed = new_output("stream", name="stdout", text="30 FF blocks")
    notebook = new_notebook(
        cells=[new_code_cell("1", outputs=[bar, printed])], metadata={"widgets": {"state": {}}}
    )
    assert tidied(notebook).cells[0].outputs == [printed]
    assert "widgets" not in notebook.metadata


def test_nothing_committed_names_a_private_folder() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    names = [name for name in listed.stdout.decode().split("\0") if Path(name).suffix in DATA]
    assert len(names) > 50
    found = {
        name: match[0]
        for name in names
        if (ROOT / name).is_file()
        and (match := PRIVATE.search((ROOT / name).read_text(encoding="utf-8")))
    }
    assert not found
    for name in ("/root/.cache/x", '"/tmp/turns"', "/home/me/model", r"C:\\Users\\me"):
        assert PRIVATE.search(name)
