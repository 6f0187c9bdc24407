"""What ``flocking evaluate`` checks before it runs, and what it says about its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.artifacts import Key, checksum, refuse_unwritable
from flocking.evaluation import report
from flocking.evaluation.cells import tokenizer_digest
from flocking.evaluation.plan import Plan
from flocking.feedforward import feedforwards
from flocking.pruning import calibration_texts


def refuse_foreign(out: Path) -> None:
    """Refuse to write over anything but a report of an earlier evaluation, or where one cannot."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder.")
    report.REPORT.refuse_foreign(out)
    for name in (report.FILES[0], "cells/any.json"):
        refuse_unwritable(out / name)


def digests(plan: Plan) -> dict[str, str]:
    """What each task asks, in a digest; to be taken first, since the harness changes its tasks."""
    return {asked.name: asked.digest() for asked in plan.questions()}


def source_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    identity: str,
    plan: Plan,
    asked: Mapping[str, str],
    items: pd.DataFrame,
) -> dict[str, Any]:
    """Where the numbers come from: what :class:`flocking.evaluation.sources.Source` has."""
    blocks = feedforwards(model)
    modules = [module for block in blocks for module in (block.up, block.gate, block.down)]
    own = {id(p): p.numel() for module in filter(None, modules) for p in module.parameters()}
    key = Key.of("flocking.evaluation.items", None, ["lm-eval", "tokenizers", "rouge-score"])
    texts = [str(text) for text in calibration_texts(plan.calibration)]
    counts = items.groupby("task")["item"].nunique()
    return {
        "model": str(model.name_or_path).rstrip("/").rpartition("/")[2],
        "identity": identity,
        "parameters": model.num_parameters(),
        "ff_parameters": sum(own.values()),
        "layers": len(blocks),
        "d_ff": [block.d_ff for block in blocks],
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "calibration": str(plan.calibration or "the packaged passages"),
        "calibration_digest": checksum(texts),
        "seed": plan.seed,
        "code": key.code,
        "versions": dict(key.versions),
        "tasks": {
            question.name: {
                "protocol": question.protocol,
                "limit": question.limit,
                "digest": asked[question.name],
                "items": int(counts[question.name]),
            }
            for question in plan.questions()
        },
    }
