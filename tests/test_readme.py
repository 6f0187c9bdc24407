"""The README: its lines as a newcomer would paste them, its commands, its numbers."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import helpers
import numpy as np
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from PIL import Image

import flocking
from flocking.cli import app
from flocking.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
(PRINTED,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)

# Reads lines as the interactive interpreter does, one after the other, and stops at an error.
INTERPRETER = """
import code, sys
import flocking

load = flocking.load
flocking.load = lambda: load("gpt2")  # in the place of the embedded model

class Console(code.InteractiveConsole):
    def showtraceback(self):
        raise
    def showsyntaxerror(self, filename=None, **kwargs):
        raise

console = Console()
for line in sys.stdin.read().splitlines():
    waiting = console.push(line)
assert not waiting, "an indented block without an empty line after it"
"""


def colours(picture: Path) -> int:
    """How many different ones there are around the middle of the picture."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    height, width, _ = pixels.shape
    middle = pixels[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5]
    return len(np.unique(middle.reshape(-1, 3), axis=0))


def test_its_lines_pasted_into_a_fresh_interpreter_draw_a_text(tmp_path: Path) -> None:
    """With a GPT-2 of context 1,024; the passages are longer."""
    helpers.build("gpt2", n_positions=1024).save_pretrained(tmp_path / "gpt2")
    helpers.letters("$A").save_pretrained(tmp_path / "gpt2")
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETER],
        input="".join(PYTHON),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    scores, *written = ran.stdout.splitlines()
    assert re.fullmatch(r"\[\s*-?\d?\.\d* +-?\d?\.\d*\s*\]", scores)  # of two layers
    assert len(written) == 2
    assert colours(tmp_path / "scores.png") > 1
    assert colours(tmp_path / "text.png") > 20
    assert colours(ROOT / "figures/ten_lines.png") > 20


def test_it_shows_what_its_lines_print(
    embedded: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flocking, "load", lambda: embedded, raising=False)
    names: dict[str, object] = {}
    exec(PYTHON[0], names)
    shown = np.array([float(number) for number in re.findall(r"\d+\.\d*", PRINTED)])
    scores = names["score"].mean("sequence")
    np.testing.assert_allclose(shown, scores, atol=0.006)  # two digits
    few = flocking.effective_neurons(names["recording"]).sel(layer=28).mean().item()
    said = f"has {scores[28].item():.2f} with {few:.0f} effective neurons of 1,536"
    assert f"layer 28, the last but one, {said}" in PAGE
    capsys.readouterr()
    exec(PYTHON[1], names)
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# ('.*)$", PYTHON[1], re.MULTILINE)


# --------------------------------------------------------------------------------------
# Commands


def commands() -> list[list[str]]:
    """Words of each command, in blocks and in the text."""
    lines = [line for block in SHELL for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    programs = ("make ", "pip ", "conda ", "flocking ", "python ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(programs)]


def test_it_has_the_three_ways_to_install() -> None:
    firsts = [words[:2] for words in commands()]
    for way in (["make", "demo"], ["pip", "install"], ["pip", "wheel"], ["conda", "env"]):
        assert way in firsts


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_name_what_is_there(words: list[str]) -> None:
    program, first, *rest = words
    if program == "make":
        assert re.search(rf"^{first}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "flocking":
        command = typer.main.get_command(app).get_command(None, first)
        assert command is not None
        with click.Context(command) as context:
            command.make_parser(context).parse_args([*rest])
        if "--only" in rest:
            assert rest[rest.index("--only") + 1] in EXPERIMENTS
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for word in [first, *rest]:
            if word.startswith(".["):
                assert {*word[2:-1].split(",")} <= {*extras}
            if word.endswith((".txt", ".yml", ".py")):
                assert (ROOT / word).exists(), word


def test_pip_can_read_its_part_of_the_environment_for_conda() -> None:
    """conda writes it into a requirements file, whose lines know few options."""
    given = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (lines,) = (item["pip"] for item in given if isinstance(item, dict))
    assert "--editable ." in lines
    for line in lines:
        if not re.match(r"(-e|--editable|-r|--requirement|-c|--constraint) \S+$", line):
            Requirement(line)
    assert "pip" in given


# --------------------------------------------------------------------------------------
# Numbers


def test_numbers_are_those_of_the_results() -> None:
    pages = [*(ROOT / "figures").glob("*.md"), ROOT / "docs/costs.md"]
    measured = " ".join(" ".join(path.read_text().split()) for path in pages)
    page = " ".join(PAGE.split())
    numbers = re.findall(r"[\d.,]+ \[[\d., -]+\]|\d+ MiB", page)
    assert len(numbers) >= 10
    assert not {number for number in numbers if number not in measured}
    scores = (ROOT / "figures/scores.md").read_text()
    (both,) = re.findall(r"\*\*: ([\d.]+) over all layers where the model has ([\d.]+) ", page)
    random, model = both
    assert re.search(rf"model {model} \[.*?\], random weights {random} \[", scores)


def test_it_is_short() -> None:
    assert len(PAGE.splitlines()) <= 140
    assert max(map(len, "".join(PYTHON).splitlines())) <= 100
