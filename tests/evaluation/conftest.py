"""What several files use: evaluations of a few layers of the model on the items of tests/tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pandas as pd
import pytest

TASKS = Path(__file__).parents[1] / "tasks"


@pytest.fixture(scope="package")
def evaluate(shallow: tuple) -> Callable[..., pd.DataFrame]:
    """Evaluate that model: settings of the plan by name, others as `evaluate` has them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from flocking.evaluation import plan, runner

    def run(
        tasks: list[str],
        *,
        subject: tuple = shallow,
        batch_size: int = 1,
        cells: object = None,
        say: Callable[[str], None] = lambda line: None,
        **settings: object,
    ) -> pd.DataFrame:
        wanted = plan.Plan(tasks, **{"data_dir": TASKS, **settings})
        return runner.evaluate(*subject, wanted, batch_size=batch_size, cells=cells, say=say)

    return run


@pytest.fixture(scope="package")
def several() -> pd.DataFrame:
    """Made-up items of several tasks and variants."""
    rng = np.random.default_rng(0)
    variants = ("full", "topk@0.25", "topk@0.5", "static@0.5", "magnitude@0.5")
    tasks = [
        helpers.made_up({v: (rng.random(30) < 0.6) * 1.0 for v in variants}, task)
        for task in ("piqa", "boolq", "copa")
    ]
    losses = [
        helpers.made_up(
            {v: 3 + rng.random(12) for v in variants},
            f"wikitext_{length}",
            metric=f"loss_{horizon}",
            prompt_tokens=length,
            chance=np.nan,
        )
        for length in (16, 256)
        for horizon in (64, 256)
    ]
    return pd.concat(tasks + losses, ignore_index=True)
