"""What ``flocking evaluate`` checks before it runs, and what it says about its numbers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel

from flocking.artifacts import refuse_unwritable
from flocking.evaluation import report


def refuse_foreign(out: Path) -> None:
    """Refuse to write over anything but a report of an earlier evaluation, or where one cannot."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder.")
    for path in report.files_in(out):
        report.refuse_foreign(path)
    for name in (report.FILES[0], "cells/any.json"):
        refuse_unwritable(out / name)


def source_of(model: PreTrainedModel, calibration: Path | None, seed: int) -> dict[str, str]:
    """Where the numbers come from, as the report says it."""
    packages = ("flocking", "transformers", "torch", "lm-eval")
    return {
        "model": str(model.name_or_path).rstrip("/").rpartition("/")[2],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "calibration": str(calibration or "the packaged passages"),
        "seed": str(seed),
        **{name: version(name) for name in packages},
    }
