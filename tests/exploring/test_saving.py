"""The page as a file: whole, of a size that opens, and no text in it is read as HTML."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.exploring import page


class Parts(HTMLParser):
    """Tags of a page, and what its scripts say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag == "script":
            key = attributes.get("data-key") or "module"
            self.scripts[key] = self.scripts.get(key, "") + data


def test_the_page_has_the_data_and_nothing_else(recording: xr.Dataset, tmp_path: Path) -> None:
    path = flocking.explore(recording).save(tmp_path / "some.html")
    assert path == tmp_path / "some.html"
    assert [found.name for found in tmp_path.iterdir()] == ["some.html"]
    text = path.read_bytes().decode("ascii")
    parts = Parts(text)
    tags = [tag for tag, _ in parts.tags]
    assert {*tags} == {
        "html", "head", "meta", "title", "style", "body", "main", "noscript", "script"
    }  # fmt: skip
    assert not [1 for _, attributes in parts.tags if {"src", "href"} & {*attributes}]
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text
    assert (
        json.loads(parts.scripts["text/2"])["tokens"]
        == recording.token_text[2, :45].values.tolist()
    )
    assert json.loads(parts.scripts["about"])["sequences"][1] == "b: </title><script>"
    energy = np.frombuffer(base64.b64decode(parts.scripts["layer/2/1/0"]), "<f4").reshape(-1, 160)
    there = recording.tokens.values[2] > 0
    np.testing.assert_array_equal(energy, recording.energy.values[2, 1, there])
    assert parts.scripts["module"].strip().endswith("fromPage();")


def test_a_strange_name_stays_in_the_title(recording: xr.Dataset, tmp_path: Path) -> None:
    for name, shown in (
        ("</title><script>", "&lt;/title&gt;&lt;script&gt;"),
        ("/home/me/models/Birds-1B", "Birds-1B"),
        ("me/B\u00efrds", "me/B&#239;rds"),
    ):
        named = recording.assign_attrs(model=name)
        text = flocking.explore(named).save(tmp_path / "p.html", overwrite=True).read_text()
        assert f"<title>{shown}: tokens and neurons</title>" in text
        assert "/home/me" not in text


def test_the_module_and_its_style_are_ascii_and_load_nothing() -> None:
    for name in ("explorer.js", "explorer.css"):
        text = (files("flocking.exploring") / name).read_text(encoding="utf-8")
        assert text.isascii()
        assert "</script" not in text
        assert "</style" not in text
        for word in ("innerHTML", "insertAdjacentHTML", "eval(", "fetch(", "import", "url("):
            assert word not in text, word


def test_only_such_a_page_is_replaced(recording: xr.Dataset, tmp_path: Path) -> None:
    explorer, path = flocking.explore(recording), tmp_path / "page.html"
    explorer.save(str(path))
    with pytest.raises(ValueError, match=r"page\.html exists: choose another name, or give overwr"):
        explorer.save(path)
    before = path.read_bytes()
    flocking.explore(recording.isel(sequence=[0])).save(path, overwrite=True)
    assert path.read_bytes() != before
    path.write_text("<!doctype html>\n<p>mine</p>")
    with pytest.raises(ValueError, match=r"exists and is no page of flocking\.explore"):
        explorer.save(path, overwrite=True)
    assert "mine" in path.read_text()
    folder = tmp_path / "folder.html"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"exists and is no page of flocking\.explore"):
        explorer.save(folder, overwrite=True)


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("page.png", ValueError, r"has no suffix \.html: name it page\.html"),
        ("page", ValueError, r"name it page\.html"),
        ("", ValueError, r"name it page\.html"),
        ("a\0.html", ValueError, "NUL"),
        ("s3://bucket/page.html", ValueError, "no URL"),
        (3, TypeError, "path is a int"),
        (None, TypeError, "path is a NoneType"),
        (b"page.html", TypeError, "path is a bytes"),
    ],
)
def test_refuses_other_names(
    recording: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    path: object, error: type[Exception], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        flocking.explore(recording).save(path)
    with pytest.raises(TypeError, match="give True or False"):
        flocking.explore(recording).save("page.html", overwrite="no")
    assert not [*tmp_path.iterdir()]


def test_a_page_is_never_too_large(
    recording: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = flocking.explore(recording)
    whole = explorer.save(tmp_path / "whole.html").stat().st_size
    smallest = len(page.asset("explorer.js")) + len(page.asset("explorer.css"))
    for most in (whole, whole - 1, 400_000, 150_000):
        assert most > smallest
        monkeypatch.setattr(page, "MOST", most)
        text = explorer.save(tmp_path / "page.html", overwrite=True).read_text()
        assert len(text) <= most
        notes = json.loads(Parts(text).scripts["about"])["notes"]
        assert bool(notes) == (most < whole)
    monkeypatch.setattr(page, "MOST", smallest)
    with pytest.raises(ValueError, match=r"larger than 0 MB: select layers first, as in"):
        explorer.save(tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()
