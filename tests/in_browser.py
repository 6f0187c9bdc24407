"""Run a notebook in JupyterLab as a person would, in headless Chromium, and keep a picture.

What ``make browser`` calls. Not a pytest module: it needs Debian's ``chromium`` and
``chromium-driver``, and takes as long as the notebook does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from executed import NOTEBOOKS, tidied, told

_CHROMIUM = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
]


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """JupyterLab on `folder`; gives its address, with the token in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    # All cells are laid out, also those out of view, so that one picture holds them.
    settings = folder / ".settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(
        json.dumps({"windowingMode": "none", "recordTiming": True})
    )
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.expose_app_in_browser=True", "--allow-root"]
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings")}
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(folder / ".workspaces")  # opens nothing else
    with (folder / ".lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: listens(port), 60, "JupyterLab to start")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def chromium() -> Iterator:
    """A headless Chromium under selenium's control."""
    try:
        from selenium import webdriver
    except ImportError:
        sys.exit("selenium is missing: pip install '.[browser]'.")
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not browser:
        sys.exit("Chromium is missing: apt-get install chromium chromium-driver.")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in _CHROMIUM:
        options.add_argument(argument)
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield page
    finally:
        page.quit()


def wait_for(done: object, seconds: float, what: str, pause: float = 1) -> object:
    """What `done()` gives, as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = done()
        if found:
            return found
        time.sleep(pause)
    sys.exit(f"waited {seconds:.0f} s for {what}: give up.")


def copy_without_outputs(source: Path, target: Path, quick: bool) -> None:
    """A fresh copy, so that old outputs cannot be taken for new ones."""
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if quick:
                cell.source = cell.source.replace("QUICK = False", "QUICK = True")
    nbformat.write(notebook, target)


def read(path: Path) -> nbformat.NotebookNode | None:
    """The notebook, or None while JupyterLab is writing it, which it does in place."""
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except (ValueError, OSError):  # half of a file is no JSON, or no notebook
        return None


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Outputs that no reader should see."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {number} ended in {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number} wrote to stderr: {output.text[:200]}")
    return found


def run(page: object, address: str, path: Path, timeout: float) -> list[str]:
    """Open, run all cells, wait for the last; gives the problems."""
    page.get(address.format(path.name))
    # JupyterLab first opens what was open before, and that has a kernel already: "run all cells"
    # went to the notebook before this one if asked then.
    ready = (
        "const app = window.jupyterapp; const shell = app && app.shell.currentWidget;"
        f"return !!(shell && shell.context && shell.context.path === {json.dumps(path.name)}"
        " && shell.context.isReady && shell.sessionContext"
        " && shell.sessionContext.session && shell.sessionContext.session.kernel"
        " && shell.sessionContext.session.kernel.status === 'idle')"
    )
    wait_for(lambda: page.execute_script(ready), 120, f"{path.name} to open")
    page.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells'); return 0")
    seen = -1

    def finished() -> bool:
        nonlocal seen
        page.execute_script("window.jupyterapp.commands.execute('docmanager:save'); return 0")
        notebook = read(path)
        if notebook is None:
            return False
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        done = sum(cell.execution_count is not None for cell in code)
        if done != seen:
            print(f"{path.name}: {done} of {len(code)} cells", flush=True)
            seen = done
        return done == len(code) or bool(problems(notebook))

    # (Each look saves the notebook, pictures and all, which takes time from its cells.)
    wait_for(finished, timeout, f"the cells of {path.name}", pause=5)
    time.sleep(3)  # for outputs that are still on their way
    page.execute_script("return window.jupyterapp.commands.execute('docmanager:save')")
    return problems(wait_for(lambda: read(path), 60, f"{path.name} to be written"))


def picture(page: object, path: Path) -> None:
    """The whole notebook in one picture."""
    height = page.execute_script(
        "return Math.max(...[...document.querySelectorAll('.jp-Notebook, .jp-Notebook *')]"
        ".map(element => element.scrollHeight))"
    )
    page.set_window_size(1200, min(height + 200, 16000))
    page.execute_script(
        "document.querySelectorAll('.jp-WindowedPanel-outer').forEach(e => e.scrollTo(0, 0))"
    )
    time.sleep(3)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save_screenshot(str(path))
    print(f"wrote {path}")


def main() -> None:
    """Parse the arguments; exit 1 with one sentence where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", default=["flocking.ipynb"])
    parser.add_argument("--quick", action="store_true", help="the notebooks' own quick pass")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a notebook may take")
    keep = "write what was run to notebooks/, as it is committed"
    parser.add_argument("--keep", action="store_true", help=keep)
    arguments = parser.parse_args()
    if arguments.keep and arguments.quick:
        parser.error("--keep and --quick: a quick pass is not what is committed.")
    failed = False
    with tempfile.TemporaryDirectory(prefix="flocking-browser-") as made, chromium() as page:
        folder = Path(made)
        for name in arguments.notebooks:
            source = NOTEBOOKS / Path(name).name
            copy_without_outputs(source, folder / source.name, arguments.quick)
        with lab(folder) as address:
            for name in arguments.notebooks:
                path = folder / Path(name).name
                shot = arguments.out / f"browser-{path.stem}.png"
                try:
                    found = run(page, address, path, arguments.timeout)
                except BaseException:
                    with contextlib.suppress(Exception):  # what went wrong is what counts
                        picture(page, shot)
                    raise
                picture(page, shot)
                notebook = read(path)
                if notebook is not None:
                    print(f"{path.name}: {told(notebook)}", flush=True)
                if arguments.keep and notebook is not None and not found:
                    nbformat.write(tidied(notebook), NOTEBOOKS / path.name)
                errors = [
                    entry["message"]
                    for entry in page.get_log("browser")
                    if entry["level"] == "SEVERE" and entry["source"] == "javascript"
                ]
                for problem in found + [f"the browser's console: {json.dumps(e)}" for e in errors]:
                    print(f"{path.name}: {problem}", file=sys.stderr)
                failed |= bool(found)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
