"""A model's name, apart from where its files lie."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest

import flocking
from flocking.models import name_and_path, split_place

CASES = {
    "": ("", ""),
    "gpt2": ("gpt2", ""),
    "meta-llama/Llama-3.2-1B": ("meta-llama/Llama-3.2-1B", ""),
    "/home/me/.cache/flocking/b179/Smol-Instruct": (
        "Smol-Instruct",
        "~/.cache/flocking/b179/Smol-Instruct",
    ),
    "/home/me/run/": ("run", "~/run/"),
    "/home/meadow/run": ("run", "/home/meadow/run"),
    "~/models/mine": ("mine", "~/models/mine"),
    "./mine": ("mine", "./mine"),
    "/": ("/", "/"),
    r"C:\Users\me\models\mine": ("mine", r"C:\Users\me\models\mine"),
    "/data/hub/models--org--a--b/snapshots/0a1b": (
        "org/a--b",
        "/data/hub/models--org--a--b/snapshots/0a1b",
    ),
    "random weights (seed 3) like /home/me/mine": ("random weights (seed 3) like mine", ""),
    "random weights (seed -1) like random weights (seed 0) like org/a": (
        "random weights (seed -1) like random weights (seed 0) like org/a",
        "",
    ),
}


@pytest.mark.parametrize("place", CASES)
def test_the_name_says_nothing_of_a_disk(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert split_place(place) == CASES[place]


def test_a_model_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.build("llama")
    assert name_and_path(model) == ("", "")
    folder = tmp_path / "some-model"
    model.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    for name in ("some-model", "./some-model", str(folder)):
        read = type(model).from_pretrained(name)
        assert name_and_path(read) == ("some-model", str(folder))
        attributes = helpers.record(read, [1, 2, 3]).attrs
        assert (attributes["model"], attributes["model_path"]) == ("some-model", str(folder))
        other = helpers.record(flocking.control(read, seed=2), [1, 2, 3]).attrs
        assert (other["model"], other["model_path"]) == (
            "random weights (seed 2) like some-model",
            "",
        )
        assert str(tmp_path) not in str(other)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert name_and_path(read) == ("some-model", "~/some-model")
