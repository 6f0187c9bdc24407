"""What numbers depend on: code, versions, and every file of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flocking import artifacts
from flocking.artifacts import code

HOUSE = {
    "__init__.py": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from flocking.low import thing
""",
    "low/__init__.py": "from flocking.low.one import thing\nfrom flocking.low.two import other\n",
    "low/one.py": "import math\ndef thing():\n    'Give it.'\n    return math.pi\n",
    "low/two.py": "def other():\n    return 2\n",
    "high/__init__.py": "",
    "high/user.py": """
from typing import TYPE_CHECKING
from flocking.low import thing
if TYPE_CHECKING:
    from flocking.low.two import other
def use():
    from flocking.high import late
    return thing(), late
""",
    "high/late.py": "X = 1\n",
    "high/public.py": "from flocking import thing\nprint(thing)\n",
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Another package of that name."""
    monkeypatch.setattr(code, "_PACKAGE", tmp_path / "flocking")

    def build(changes: dict[str, str]) -> None:
        artifacts.code_digest.cache_clear()
        for name, text in (HOUSE | changes).items():
            path = tmp_path / "flocking" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield build
    artifacts.code_digest.cache_clear()


def test_sources_are_followed_across_rooms(house: Callable) -> None:
    """To where a name is made, not to all that its room passes on; nor to types alone."""
    house({})

    def names(module: str) -> list[str]:
        return [path.stem for path in artifacts.sources(module)]

    assert names("flocking.high.user") == ["late", "user", "one"]
    assert names("flocking.high.public") == ["public", "one"]
    assert names("flocking.low") == ["one", "two"]


def test_what_makes_no_numbers_is_in_no_digest(house: Callable) -> None:
    def digest(changes: dict[str, str]) -> str:
        house(changes)
        return artifacts.code_digest("flocking.high.user")

    before = digest({})
    one, user = HOUSE["low/one.py"], HOUSE["high/user.py"]
    bare = one.replace("import math", "")
    assert digest({"low/one.py": bare.replace("Give it.", "Give pi.")}) == before
    assert digest({"low/two.py": "def other():\n    return 3\n"}) == before
    # Moved to another file of the same sources.
    moved = {"low/__init__.py": "from flocking.high.late import thing\n"}
    assert digest({**moved, "high/late.py": HOUSE["high/late.py"] + bare}) == before
    assert digest({"low/one.py": one.replace("math.pi", "math.e")}) != before
    assert digest({"high/user.py": user.replace("thing(), late", "thing()")}) != before


def test_the_package_itself_is_followed() -> None:
    """Every source of a figure is a file with code; what only keeps numbers is none."""
    for module in ("flocking.experiments.activations", "flocking.evaluation.items"):
        paths = artifacts.sources(module)
        assert len(paths) > 15
        assert "__init__" not in {path.stem for path in paths}
        assert "artifacts" not in {path.parent.name for path in paths}


def test_a_key_says_which_parts_differ() -> None:
    key = artifacts.Key.of("flocking.texts", ["one", 2], packages=["xarray"])
    names = {"python", "torch", "transformers", "numpy", "flocking", "xarray"}
    assert set(key.versions) == names
    assert artifacts.Key.read(json.loads(json.dumps(key.plain()))) == key
    assert key.differing(key) == []
    other = artifacts.Key.of("flocking.texts", ["one", 3], packages=["xarray"])
    assert key.differing(other) == ["inputs"]
    assert key.digest() != other.digest()
    older = artifacts.Key("0", other.inputs, {**key.versions, "torch": "1", "scipy": "1"})
    assert key.differing(older) == ["code", "inputs", "versions"]
    now = key.versions["torch"]
    assert key.told(older) == f"code, inputs and versions (scipy 1 -> none, torch 1 -> {now})"
    for stored in ("0123", None, 3, {"code": "0", "inputs": "0"}):
        assert artifacts.Key.read(stored) is None
    assert key.differing(None) == list(artifacts.PARTS)


def test_a_model_is_told_by_every_file_of_its_folder(tmp_path: Path) -> None:
    def digest(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return artifacts.folder_digest(tmp_path)

    config = {"layers": 2, "transformers_version": "5.1", "text": {"transformers_version": "5.1"}}
    seen = [digest("config.json", json.dumps(config))]
    for name in (
        *("model.safetensors", "tokenizer.json", "merges.txt", "vocab.txt", "tokenizer.model"),
        *("chat_template.jinja", "modeling_mine.py", "additional_chat_templates/tools.jinja"),
    ):
        seen += [digest(name, "one"), digest(name, "two")]
    assert len(set(seen)) == len(seen)
    newer = json.dumps(config).replace("5.1", "5.2")
    assert digest("config.json", newer) == seen[-1]
    assert digest(".cache/download.lock", "mine") == seen[-1]
    assert digest("config.json", newer.replace("2,", "3,")) != seen[-1]
    digest("config.json", "not JSON")


def test_links_and_what_an_adapter_adapts_count(tmp_path: Path) -> None:
    blobs, base, folder = tmp_path / "blobs", tmp_path / "base", tmp_path / "model"
    for path in (blobs, base, folder):
        path.mkdir()
    (blobs / "0").write_text("weights")
    (folder / "model.safetensors").symlink_to(blobs / "0")
    (folder / "templates").symlink_to(blobs)
    (blobs / "up").symlink_to(tmp_path / "model")  # a link that leads back
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    seen = [artifacts.folder_digest(folder)]
    (blobs / "0").write_text("other weights")
    seen.append(artifacts.folder_digest(folder))
    (blobs / "tools.jinja").write_text("tools")  # in a linked folder only
    seen.append(artifacts.folder_digest(folder))
    adapter = {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    seen.append(artifacts.folder_digest(folder))
    (base / "merges.txt").write_text("a b")
    seen.append(artifacts.folder_digest(folder))
    assert len(set(seen)) == len(seen)
    assert artifacts.folder_digest(folder) == seen[-1]
    for odd in ("not JSON", "[1]", '{"base_model_name_or_path": 3}', json.dumps("[" * 9)):
        (folder / "adapter_config.json").write_text(odd)
        artifacts.folder_digest(folder)
    (folder / "config.json").write_text("[" * 100_000)
    artifacts.folder_digest(folder)
