"""The examples in docstrings of the room run, in a folder with outputs of two models."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import model_outputs as made
import pytest

from flocking import reports

FUNCTIONS = ["by_layer", "collect", "compared", "contrasted", "missing", "write"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, size, layers, torch in (("small", 1, 2, "2.13.0"), ("large", 9, 3, "2.14.0")):
        full_name = f"{model}-model"
        about = {"layers": layers, "d_ff": [8] * layers}
        versions = made.VERSIONS | {"torch": torch}
        folder = tmp_path / model
        made.evaluated(folder, full_name, size * 10**6, versions=versions, **about)
        made.drawn(folder, full_name, "scores", layers=layers, versions={"torch": torch})
    monkeypatch.chdir(tmp_path)
    doc = inspect.getdoc(getattr(reports, name)) or ""
    test = doctest.DocTestParser().get_doctest(doc, {}, name, name, 0)
    assert test.examples
    problems: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=problems.append)
    assert not problems, "".join(problems)


def test_every_function_of_the_room_has_an_example() -> None:
    functions = {name for name in reports.__all__ if inspect.isfunction(getattr(reports, name))}
    assert functions == {*FUNCTIONS}
