"""Code that comes with a model runs if the user says so, and at no other time."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf
from helpers import build, random_ids, record
from typer.testing import CliRunner

import flocking
from flocking.cli import app
from flocking.models import identity

PACKAGE = Path(flocking.__file__).parent
CODE = """
{imports}
from pathlib import Path
from transformers import {base}
Path({marker!r}).write_text("it ran")
class Foreign({base}):
    {body}
"""


def foreign(folder: Path, file: str, base: str, body: str = "pass", imports: str = "") -> str:
    code = CODE.format(base=base, marker=str(folder / "marker"), body=body, imports=imports)
    (folder / f"{file}.py").write_text(code)
    return f"{file}.Foreign"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies code to; one place, since Python remembers a package's."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def folder(tmp_path: Path, modules: Path, embedded: tuple, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose tokenizer needs code; a "yes" waits on standard input."""
    path = tmp_path / "model"
    build("llama", vocab_size=len(embedded[1])).save_pretrained(path)
    embedded[1].save_pretrained(path)
    file = path / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content["tokenizer_class"] = "Foreign"
    tokenizer = foreign(path, "foreign_tokenizer", "PreTrainedTokenizerFast")
    content["auto_map"] = {"AutoTokenizer": [None, tokenizer]}
    file.write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    return path


@pytest.fixture
def foreign_model(folder: Path) -> Path:
    """The same, of a kind that needs code too."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["model_type"] = "foreign"
    content["auto_map"] = {
        "AutoConfig": foreign(folder, "foreign_config", "LlamaConfig", "model_type = 'foreign'"),
        "AutoModelForCausalLM": foreign(
            folder,
            "foreign_model",
            "LlamaForCausalLM",
            "config_class = Config",
            "from .foreign_config import Foreign as Config",
        ),
    }
    file.write_text(json.dumps(content))
    return folder


REMEDY = r"needs code that comes with it.*flocking\.load\(.*trust_remote_code=True\)"


@pytest.mark.parametrize("kind", ["folder", "foreign_model"])
@pytest.mark.parametrize("said", [{}, {"trust_remote_code": None}, {"trust_remote_code": False}])
def test_load_does_not_run_it(kind: str, said: dict, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match=REMEDY):
        flocking.load(path, **said)
    assert not (path / "marker").exists()


@pytest.mark.parametrize("said", ["False", "yes", 1, 0, object()])
def test_only_true_is_a_yes(folder: Path, said: object) -> None:
    with pytest.raises(TypeError, match="give True or False"):
        flocking.load(folder, trust_remote_code=said)
    assert not (folder / "marker").exists()


def test_a_model_that_others_loaded_does_not_run_it(folder: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = random_ids(12)
    assert record(model, ids).token.size
    with pytest.raises(ValueError, match=f"No tokenizer was found.*{REMEDY}"):
        record(model, "Birds of a feather")
    with pytest.raises(ValueError, match=REMEDY):
        flocking.score(flocking.griffin(model), "Birds of a", " feather")
    assert flocking.check(model).passed.dropna().all()
    assert identity(folder)
    assert not (folder / "marker").exists()


def test_what_the_user_said_is_remembered(folder: Path, tmp_path: Path) -> None:
    model, _ = flocking.load(folder, trust_remote_code=True)
    (folder / "marker").unlink()
    attributes = record(model, "Birds of a feather").attrs
    assert (attributes["model"], attributes["model_path"]) == (folder.name, str(folder))
    twin = flocking.griffin(model)
    assert flocking.score(twin, "Birds of a", " feather").size
    model.name_or_path = str(shutil.copytree(folder, tmp_path / "other"))
    with pytest.raises(ValueError, match=REMEDY):  # it was said of another folder
        record(model, "Birds of a feather")
    forgetful = tf.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=REMEDY):
        record(forgetful, "Birds of a feather")


def test_a_foreign_model_runs_when_trusted(foreign_model: Path) -> None:
    model, _ = flocking.load(foreign_model, trust_remote_code=True)
    assert type(model).__name__ == "Foreign"
    assert (foreign_model / "marker").exists()


def harness(path: Path) -> None:
    pytest.importorskip("lm_eval")
    from flocking.evaluation.harness import GriffinLM

    GriffinLM(pretrained=str(path), trust_remote_code=None)


@pytest.mark.parametrize("kind", ["folder", "foreign_model"])
@pytest.mark.filterwarnings("default")
def test_the_harness_does_not_run_it(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match=REMEDY):
        harness(path)
    assert not (path / "marker").exists()


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "check": lambda path, out: ["check", str(path)],
    "record": lambda path, out: ["record", str(out), "--model", str(path), "-o", f"{out}.zarr"],
    "generate": lambda path, out: ["generate", "--model", str(path), "Birds of a"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["folder", "foreign_model"])
def test_the_command_line_does_not_run_it(
    command: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    (tmp_path / "text.txt").write_text("Birds of a feather flock together. " * 20)
    arguments = COMMANDS[command](path, tmp_path / "text.txt")
    result = CliRunner().invoke(app, arguments, input="y\n" * 100)
    assert result.exit_code == 2, result.output
    assert "trust_remote_code=True" in result.stderr
    assert not (path / "marker").exists()


def calls_without_a_word(tree: ast.AST) -> list[int]:
    """Lines of calls that transformers would ask on standard input about."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = {keyword.arg for keyword in node.keywords}
            if node.func.attr in ("from_pretrained", "from_config") and (
                "trust_remote_code" not in said
            ):
                found.append(node.lineno)
    return found


def test_every_call_says_whether_code_is_trusted() -> None:
    assert calls_without_a_word(ast.parse("AutoConfig.from_pretrained(name, **kwargs)")) == [1]
    files = [*PACKAGE.rglob("*.py")]
    missing = {
        str(file.relative_to(PACKAGE)): lines
        for file in files
        if (lines := calls_without_a_word(ast.parse(file.read_text(encoding="utf-8"))))
    }
    assert missing == {}
    cells = [
        "".join(cell["source"])
        for notebook in (PACKAGE.parent / "notebooks").glob("*.ipynb")
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert not [cell for cell in cells if ".from_pretrained(" in cell]
