"""Outputs of two made-up models."""

from __future__ import annotations

from pathlib import Path

import model_outputs as made
import pytest

pytest.importorskip("pyarrow", reason="items are kept as Parquet")

from flocking.reports import Outputs, collect


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A small model with all outputs, and a larger one that was evaluated with another torch."""
    small = made.evaluated(tmp_path / "small", "small-model", 1_000_000)
    made.drawn(small, "small-model", "scores", "sequence_overlap", "token_order", "loss_by_method")
    newer = made.VERSIONS | {"torch": "2.14.0"}
    large = made.evaluated(
        tmp_path / "large", "large-model", 9_000_000, versions=newer, d_ff=[8, 8, 8], layers=3
    )
    made.drawn(large / "figures", "large-model", "scores", seed=3, layers=3)
    return [small, large, large / "figures"]


@pytest.fixture
def outputs(folders: list[Path]) -> Outputs:
    return collect(folders)
