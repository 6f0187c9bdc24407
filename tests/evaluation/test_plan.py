"""Plans of evaluations: settings by task, and digests of what is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from flocking.evaluation.definitions import DEFINITIONS
from flocking.evaluation.plan import Plan

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"


def test_what_is_asked_is_known_again_by_another_process() -> None:
    """Functions in a task's definition have other addresses there."""
    code = (
        "from flocking.evaluation.definitions import DEFINITIONS;"
        "from flocking.evaluation.plan import Plan;"
        f"plan = Plan([*DEFINITIONS], limit=2, data_dir={str(TASKS)!r});"
        "print(*(question.digest() for question in plan.questions()))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    assert len(set(first.stdout.split())) == len(DEFINITIONS)


def test_items_that_are_shown_are_asked_about_too(tmp_path: Path) -> None:
    lines = (TASKS / "gsm8k.jsonl").read_text().splitlines()

    def digest() -> str:
        (tmp_path / "gsm8k.jsonl").write_text("\n".join(lines))
        (question,) = Plan(["gsm8k"], limit=1, data_dir=tmp_path).questions()
        return question.digest()

    first = digest()
    lines[-1] = lines[-1].replace("pens", "cups")
    assert digest() != first


def test_only_likelihoods_have_a_protocol(evaluate: Callable) -> None:
    found = evaluate(["piqa", "qasper"], methods=[], protocol="last-token", limit=1)
    protocols = found.drop_duplicates("task").set_index("task")["protocol"]
    assert dict(protocols) == {"piqa": "last-token", "qasper": "context"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"calibration": ["a text"]}, "none of topk is made from it"),
        ({"calibration": "news", "methods": ["static-domain"]}, "none of static-domain is made"),
        ({"seed": 1, "methods": ["topk", "static"]}, "none of topk, static draws"),
    ],
)
def test_what_no_method_uses_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(["piqa"], data_dir=TASKS, **settings)
    Plan(["piqa"], data_dir=TASKS, calibration=["a text"], methods=["static"])
    Plan(["piqa"], data_dir=TASKS, seed=1, methods=["random"])
