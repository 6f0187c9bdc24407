"""Run the notebooks top to bottom, each in a fresh kernel, and write them as they are committed.

``python tests/executed.py`` does it where no browser is at hand (a quarter of an hour and more);
``in_browser.py --keep`` does it in JupyterLab. Not a pytest module.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a reader without a kernel should see it.

    Progress bars are widgets. Without a kernel (on GitHub) all that is left of one is its first
    line, at 0%: they are left out, and so is the state that belongs to them.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    return notebook


def seconds(cell: nbformat.NotebookNode) -> float:
    """How long a cell ran; 0 if that was not noted."""
    noted = cell.metadata.get("execution", {})
    begin, end = (noted.get(name) for name in ("iopub.status.busy", "shell.execute_reply"))
    if begin is None or end is None:
        return 0.0
    begin, end = (datetime.fromisoformat(text) for text in (begin, end))
    return (end - begin).total_seconds()


def told(notebook: nbformat.NotebookNode) -> str:
    """Seconds of the cells that took longest, and of all."""
    every = [seconds(cell) for cell in notebook.cells]
    long = [f"cell {number}: {took:.0f}" for number, took in enumerate(every) if took >= 5]
    return f"{sum(every):.0f} s ({', '.join(long)})"


def main(names: list[str]) -> None:
    """Run those that are named, or all."""
    from nbclient import NotebookClient

    for name in names or sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")):
        path = NOTEBOOKS / Path(name).name
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": path.parent}}
        NotebookClient(notebook, timeout=None, resources=resources).execute()
        nbformat.write(tidied(notebook), path)
        print(f"{path.name}: {told(notebook)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
