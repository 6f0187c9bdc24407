"""What ``flocking evaluate`` reads from its options, checks first, and says about its numbers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from flocking.cli.options import by_task, listed, number
from flocking.evaluation import report, runner


class Settings(NamedTuple):
    """What is asked, and of which variants of the model."""

    methods: list[str]
    densities: list[float]
    protocol: dict[str, str]
    limit: dict[str, int] | None


def settings_of(methods: str, densities: str, protocol: str, limit: str | None) -> Settings:
    """Read the options' texts, and refuse an unknown method before a model is loaded."""
    settings = Settings(
        listed(methods),
        [number(text, "--densities", float) for text in listed(densities)],
        by_task(protocol, "--protocol", str),
        None if limit is None else by_task(limit, "--limit", int),
    )
    runner.variants_of(settings.methods, settings.densities)
    return settings


def refuse_foreign(out: Path) -> None:
    """Refuse to write over anything but a report of an earlier evaluation."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder.")
    there = [out / name for name in report.FILES if (out / name).exists()]
    if 0 < len(there) < len(report.FILES) and not (out / "cells").is_dir():
        raise ValueError(
            f"{there[0]} exists and is not a report of flocking: choose another --out."
        )


def source_of(model: PreTrainedModel, calibration: Path | None, seed: int) -> dict[str, str]:
    """Where the numbers come from, as the report says it."""
    packages = ("flocking", "transformers", "torch", "lm-eval")
    return {
        "model": model.name_or_path.rstrip("/").rpartition("/")[2],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "calibration": str(calibration or "the packaged passages"),
        "seed": str(seed),
        **{name: version(name) for name in packages},
    }
