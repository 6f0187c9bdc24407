"""Completion of command lines in three shells, which may not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flocking
from flocking.cli import app, choices

# What each shell's script sets, for a line up to the cursor.
SHELLS = {
    "bash": lambda line: {
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_FLOCKING_COMPLETE": "complete_bash",
    },
    "zsh": lambda line: {
        "_TYPER_COMPLETE_ARGS": line,
        "_FLOCKING_COMPLETE": "complete_zsh",
    },
    "fish": lambda line: {
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_FLOCKING_COMPLETE": "complete_fish",
    },
}
LINES = [
    ("flocking rec", ["record"]),
    ("flocking figures --only sc", ["scores"]),
    ("flocking evaluate --tasks piqa,bo", ["piqa,boolq"]),
    ("flocking evaluate --methods topk,static", ["topk,static", "topk,static-domain"]),
    ("flocking evaluate --protocol context,boolq=l", ["context,boolq=last-token"]),
    ("flocking evaluate --protocol context,boo", ["context,boolq="]),
    ("flocking generate x --method half", ["half-sampled"]),
    ("flocking generate x --scope s", ["shared", "sequence"]),
    ("flocking prune --method glo", ["global-local"]),
    ("flocking prune --down Q", ["Q8_0", "Q4_0"]),
    ("flocking inspect --dtype b", ["bfloat16"]),
    ("flocking check --js", ["--json"]),
    ("flocking comp", ["compare"]),
    ("flocking compare --den", ["--density"]),
]


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
@pytest.mark.parametrize("shell", SHELLS)
def test_lines_are_completed(shell: str, line: str, expected: list[str]) -> None:
    result = CliRunner().invoke(app, [], env=SHELLS[shell](line), prog_name="flocking")
    assert result.exit_code == 0, result.output
    found = result.output.replace('"', "\n").replace("\t", "\n").splitlines()
    assert all(name in found for name in expected), result.output
    others = {*choices.FIGURES, *choices.TASKS, *choices.DTYPES} - {*expected}
    assert not others & {*found}


def test_completion_waits_for_no_torch() -> None:
    for shell, variables in SHELLS.items():
        code = f"""
import os, sys
os.environ |= {variables("flocking figures --only sc")}
sys.argv = ["flocking"]
from flocking.cli import main
try:
    main()
except SystemExit:
    pass
assert not {{"torch", "transformers", "xarray", "pandas", "matplotlib"}} & sys.modules.keys()
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "scores" in ran.stdout, shell


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_shown(shell: str) -> None:
    command = [sys.executable, "-m", "flocking.cli", "--show-completion", shell]
    # (Otherwise the shell is that in which the tests run, if that is one.)
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=named)
    assert ran.returncode == 0, ran.stderr
    assert "_COMPLETE" in ran.stdout


def test_names_are_those_that_are_accepted() -> None:
    from flocking.experiments import EXPERIMENTS
    from flocking.pruning import FIXED, METHODS, check_scope
    from flocking.pruning.gguf_cuts import STEPS

    assert {*choices.FIGURES} == {*EXPERIMENTS}
    assert {*choices.METHODS} == {*METHODS}
    assert {*choices.FIXED_METHODS} == {*FIXED}
    for scope in choices.SCOPES:
        check_scope(scope)
    assert {*choices.DOWN_TYPES} == {kind.name for kind in STEPS}


def test_names_of_evaluation_are_those_that_are_accepted(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from flocking.evaluation.definitions import DEFINITIONS
    from flocking.evaluation.plan import Plan
    from flocking.evaluation.tasks import ARTICLE_TASKS
    from flocking.evaluation.variants import CHOICES, OF_DOMAIN, variants_of

    assert {*choices.TASKS} == {*DEFINITIONS, *(t for t in ARTICLE_TASKS if "_" not in t)}
    numbered = {name for name in choices.EVALUATED if name[-1].isdigit()}
    assert {*choices.EVALUATED} - numbered == {*CHOICES, *OF_DOMAIN}
    assert len(variants_of(numbered, [0.5])) == 1 + len(numbered)
    for protocol in choices.PROTOCOLS:
        Plan(["piqa"], methods=["topk"], densities=[0.5], protocol=protocol)


def test_version_in_short() -> None:
    assert CliRunner().invoke(app, ["-V"]).output == f"{flocking.__version__}\n"
