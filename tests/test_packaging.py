"""What is promised about the package agrees with what is in it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import flocking

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.parent.name for path in (ROOT / "flocking").glob("*/__init__.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {
    path.relative_to(ROOT / "flocking").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "flocking").rglob("*.py"))
}
LINES = 60  # of a function, from its decorators on, without its docstring
PHRASES = r"in force|foret(ell|old)|\balike\b|of its own|as far as a trial|choos\w+ (the )?experts"


def normal(name: str) -> str:
    """A package's name, however it is written."""
    return re.sub("[-_.]+", "-", name).lower()


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name to lower bound."""
    pairs = (requirement.split(">=") for requirement in requirements)
    return {normal(name): bound for name, bound in pairs}


def test_environment_yml_agrees_with_pyproject() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    theirs = bounds([item for item in conda if isinstance(item, str) and item != "pip"])
    assert theirs.pop("python") == PYPROJECT["project"]["requires-python"].removeprefix(">=")
    aliases = {"pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}
    extras = PYPROJECT["project"]["optional-dependencies"]
    ours = bounds(PYPROJECT["project"]["dependencies"] + extras["notebook"] + extras["dev"])
    assert {aliases.get(name, name): bound for name, bound in theirs.items()} == ours


def test_constraints_are_within_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {normal(name): pin for name, pin in pinned.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    ours = bounds(
        PYPROJECT["project"]["dependencies"] + extras["notebook"] + extras["dev"] + extras["eval"]
    )
    for name, bound in ours.items():
        pin = names[name]
        as_numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (pin, bound)]
        assert as_numbers[0] >= as_numbers[1], name


def test_hooks_are_registered_in_one_place() -> None:
    """By `observe`; accelerate's are put where weights are offloaded, and nowhere else."""
    found = {
        file
        for file, source in SOURCES.items()
        if re.search(
            r"_hook\(|hook_to_module\(", source.replace("def hook", "").replace("cache_hook(", "")
        )
    }
    assert found == {"feedforward/hooks.py", "pruning/offloading.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_what_they_are_for_and_what_they_give(room: str) -> None:
    module = importlib.import_module(f"flocking.{room}")
    assert re.search("[Ii]mports", module.__doc__)
    for name in module.__all__:
        if not hasattr(module, name):  # a file, imported by its own name
            pytest.importorskip("lm_eval")
            importlib.import_module(f"flocking.{room}.{name}")


def test_no_module_bears_the_name_of_what_it_defines() -> None:
    """Otherwise a function would hide the module, or the module the function."""
    for file, source in SOURCES.items():
        defined = {node.name for node in ast.parse(source).body if hasattr(node, "name")}
        assert Path(file).stem not in defined, file
        assert Path(file).stem not in flocking.__all__, file
    assert not {path.name for path in (ROOT / "flocking").iterdir()} & {*flocking.__all__}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, decorators and signature included, without its docstring."""
    lines = function.end_lineno - function.lineno + 1 + len(function.decorator_list)
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def test_no_function_is_long() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        f"{file}:{node.name}"
        for file, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and length(node) > LINES
    }
    assert not long


def test_words_have_one_meaning_and_sentences_are_plain() -> None:
    assert not {file for file, source in SOURCES.items() if re.search(PHRASES, source)}


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    code = f"""
import sys, importlib, types
import flocking
assert dir(flocking) == sorted([*flocking.__all__, "__version__"])
assert len(flocking.passages()) == 12
assert not {{"torch", "transformers", "xarray"}} & sys.modules.keys()
for room in {ROOMS}:
    importlib.import_module("flocking." + room)
import flocking.checking, flocking.evaluation.runner
modules = {{n for n in flocking.__all__ if isinstance(getattr(flocking, n), types.ModuleType)}}
assert modules == {{"plot"}}  # whose functions are called as flocking.plot.heatmap
assert flocking.plot is sys.modules["flocking.plotting"]
assert dir(flocking) == sorted([*flocking.__all__, "__version__"])
"""
    pytest.importorskip("lm_eval")
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'flocking' has no attribute 'grifin'"):
        flocking.grifin  # noqa: B018


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_wait_for_no_torch(option: str) -> None:
    code = f"""
import sys
from flocking.cli import main
sys.argv = ["flocking", "{option}"]
try:
    main()
finally:
    assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ("Usage" in ran.stdout) == (option == "--help")


def test_the_package_brings_all_of_its_rooms_and_data() -> None:
    setuptools = pytest.importorskip("setuptools")
    options = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert not options["namespaces"]
    found = setuptools.find_packages(str(ROOT), include=options["include"])
    assert {*found} == {"flocking", *(f"flocking.{room}" for room in ROOMS)}


def test_the_wheel_brings_what_is_not_python() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["flocking"]
    package = ROOT / "flocking"
    brought = {path for pattern in patterns for path in package.glob(pattern)}
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert {path for path in there if "__pycache__" not in path.parts} == brought
    assert {"explorer.js", "explorer.css"} <= {path.name for path in brought}


def test_everything_public_is_there_and_documented() -> None:
    for name in flocking.__all__:
        assert getattr(flocking, name).__doc__, name
    assert flocking.__version__ == version("flocking") == PYPROJECT["project"]["version"]
    assert (ROOT / "flocking" / "py.typed").exists()


def test_passages(embedded: tuple) -> None:
    _, tokenizer = embedded
    passages = flocking.passages()
    assert len({passage.name for passage in passages}) == len(passages) >= 10
    for passage in passages:
        assert len(tokenizer(passage)["input_ids"]) >= 1536
        assert 10 < len(passage.description) < 100
        assert "\n" not in passage.description
    by_name = {passage.name: passage for passage in passages}
    compile(by_name["code"], "code", "exec")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/models.md"]
)
def test_pages_are_there(page: str) -> None:
    assert (ROOT / page).read_text().strip()


def test_the_python_of_the_page_about_models_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert names["same"].dims == ("sequence", "layer")
    assert ((names["same"] >= 0) & (names["same"] <= 1)).all()
    assert names["neurons"].sizes["neuron"] == 40
