"""Kills each long command at random moments, and counts in which state its outputs were left.

``make crash-test`` runs it. Commands run in forks of a process that has imported everything, so
that most kills meet the work and not the imports. Their models are tiny, but for the conversion
of the embedded model. What is printed is the table in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}

import helpers
import pandas as pd
import torch
import xarray as xr
from PIL import Image

import flocking
import flocking.cli.evaluating
import flocking.evaluation.harness
import flocking.evaluation.runner
import flocking.experiments
from flocking.artifacts import read_content
from flocking.artifacts.claims import OLD
from flocking.cli import app
from flocking.cli.ending import ended_by_signals
from flocking.models import embedded
from flocking.models.origins import NOTE as ORIGIN

TASKS = Path(__file__).parent / "tasks"
KILLS_A_RUN = 3  # before the command may end


@dataclass
class Command:
    """A command that is killed.

    Attributes
    ----------
    name : str
    run : callable
        Runs it, as the trial of this number, of which some write something else than others.
    state : callable
        Of its outputs: "absent", or what they are of; raises if something is not whole.
    folder : Path
        Where it writes, and may leave nothing else.
    begin : callable
        Called before each trial, with its number.
    """

    name: str
    run: Callable[[int], None]
    state: Callable[[], str]
    folder: Path
    begin: Callable[[int], None] = lambda trial: None
    counts: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        chosen = commands(Path(name))
        for command in chosen:
            few = command.name == "first load"
            trials(command, max(3, options.kills // 10) if few else options.kills, rng)
    print(table(chosen))
    bad = ("incomplete", "lost", "litter", "failed")
    sys.exit(any(command.counts[name] for command in chosen for name in bad))


def commands(folder: Path) -> list[Command]:
    """The long commands, each with a tiny model and a folder of its own."""
    model = folder / "model"
    in_fork(lambda: make_model(model))
    text = folder / "birds.txt"
    text.write_text("Birds of a feather flock together. " * 8)
    made = []
    for name in ("record", "demo", "figures", "evaluate", "cache"):
        (folder / name).mkdir()
    common = ["--model", str(model)]

    def record(trial: int) -> None:
        window = ["--window", str(2 + trial % 2)]
        app(
            [
                "record",
                str(text),
                "-o",
                str(folder / "record/x.zarr"),
                "--overwrite",
                *window,
                *common,
            ]
        )

    def recorded() -> str:
        return recording(folder / "record/x.zarr", "window")

    made.append(Command("record", record, recorded, folder / "record"))

    def demo(trial: int) -> None:
        app(["demo", "--out", str(folder / "demo"), *common])

    def shown() -> str:
        pictures([folder / "demo/demo.png"])
        return recording(folder / "demo/demo.zarr", "architecture")

    made.append(Command("demo", demo, shown, folder / "demo"))

    def figures(trial: int) -> None:
        seed = ["--seed", str(trial % 2), "--only", "scores", "--only", "sequence_overlap"]
        app(["figures", "--out", str(folder / "figures"), *seed, *common])

    def drawn() -> str:
        pictures((folder / "figures").glob("*.png"))
        found = [read_content(path) for path in sorted((folder / "figures").glob("*.json"))]
        return ", ".join(str(one["attrs"]["seed"]) for one in found) or "absent"

    made.append(Command("figures", figures, drawn, folder / "figures"))

    def evaluate(trial: int) -> None:
        out = ["--out", str(folder / "evaluate"), "--data-dir", str(TASKS), "--limit", "1"]
        seed = ["--methods", "random", "--seed", str(trial // KILLS_A_RUN)]
        app(["evaluate", "--tasks", "piqa,copa", *out, *seed, *common])

    def evaluated() -> str:
        out = folder / "evaluate"
        pictures(out.glob("*.png"))
        cells = [read_content(path, ("cells",)) for path in out.glob("cells/*.json.gz")]
        if not (out / "items.parquet").exists():
            return "absent" if not cells else f"{len(cells)} cells"
        return f"{len(cells)} cells, {len(pd.read_parquet(out / 'items.parquet'))} items"

    made.append(Command("evaluate", evaluate, evaluated, folder / "evaluate"))

    def convert(trial: int) -> None:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        with ended_by_signals():
            embedded()

    def emptied(trial: int) -> None:
        if trial % KILLS_A_RUN == 1:
            for path in (folder / "cache").glob("flocking/*"):
                shutil.rmtree(path)

    def converted() -> str:
        found = list((folder / "cache").glob("flocking/*/*/model.safetensors"))
        sizes = [sum(f.stat().st_size for f in path.parent.iterdir()) for path in found]
        return str(sizes) if sizes else "absent"

    made.append(Command("first load", convert, converted, folder / "cache", emptied))
    return made


def make_model(folder: Path) -> None:
    _, tokenizer = flocking.load()
    model = helpers.build("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recording(store: Path, attribute: str) -> str:
    """What a recording is of, if all of it can be read."""
    if not store.exists():
        return "absent"
    with xr.open_zarr(store) as found:
        found.load()
        assert {"energy", "mass", "norm", "l1", "tokens"} <= set(found.variables)
        return str(found.attrs[attribute])


def pictures(paths: object) -> None:
    for path in paths:  # type: ignore[attr-defined]
        if path.exists():
            with Image.open(path) as image:
                image.load()


# --------------------------------------------------------------------------------------
# Killing


def trials(command: Command, kills: int, rng: random.Random) -> None:
    """Kill a command again and again, and let it end after every few kills."""
    finished(command, 0)
    command.begin(1)
    takes = finished(command, 0)  # (The first run takes longer.)
    for trial in range(1, kills + 1):
        command.begin(trial)
        before = state_of(command)
        process = fork(lambda trial=trial: command.run(trial))
        time.sleep(rng.random() * takes)
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        os.kill(process, number)
        _, status = os.waitpid(process, 0)
        ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        command.counts["ended before" if ended else signal.Signals(number).name] += 1
        after = state_of(command)
        if after == "absent" and before != "absent":
            aside = list(command.folder.glob(f".*.{OLD}/*.zarr"))
            after = "set aside" if aside else "lost"
        elif after not in ("incomplete", "absent"):
            after = "as before" if after == before else "new"
        command.counts[after] += 1
        if number == signal.SIGTERM and not ended:
            command.counts["left by SIGTERM"] += bool(litter(command))
        if trial % KILLS_A_RUN == 0:
            finished(command, trial)
    print(command.name, dict(command.counts), f"({takes:.1f} s a run)", file=sys.stderr)


def finished(command: Command, trial: int) -> float:
    """Let a command end, which it has to, and leave nothing but what it writes; gives seconds."""
    started = time.monotonic()
    _, status = os.waitpid(fork(lambda: command.run(trial)), 0)
    takes = time.monotonic() - started
    command.counts["runs to the end"] += 1
    command.counts["failed"] += status != 0 or state_of(command) in ("absent", "incomplete")
    if left := litter(command):
        command.counts["litter"] += 1
        print(command.name, "left", left, file=sys.stderr)
    return takes


def state_of(command: Command) -> str:
    try:
        return command.state()
    except Exception as problem:  # whatever is wrong with what is there
        print(command.name, "incomplete:", repr(problem), file=sys.stderr)
        return "incomplete"


def litter(command: Command) -> list[str]:
    """What is in a command's folder and not an output; all of ours begins with a dot."""
    hidden = (path for path in command.folder.rglob("*") if path.name.startswith("."))
    found = (path for path in hidden if path.name != ORIGIN)  # a note in the copy of the model
    return [str(path) for path in found if not path.name.startswith(".z")]


def fork(run: Callable[[], None]) -> int:
    """The number of a new process that runs a function, and prints nothing."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        run()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    finally:
        os._exit(code)


def in_fork(run: Callable[[], None]) -> None:
    _, status = os.waitpid(fork(run), 0)
    assert status == 0


def table(chosen: list[Command]) -> str:
    columns = [
        *("SIGKILL", "SIGTERM", "absent", "as before", "set aside", "new", "incomplete", "lost"),
        *("left by SIGTERM", "runs to the end", "failed", "litter"),
    ]
    lines = [f"| command | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for command in chosen:
        cells = (str(command.counts[name]) for name in columns)
        lines.append(f"| {command.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
