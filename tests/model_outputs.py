"""Made-up outputs of models: what `flocking evaluate` and `flocking figures` write, without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pandas as pd
import xarray as xr

from flocking.artifacts import Key, to_json
from flocking.evaluation import sources

VERSIONS = {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0", "lm-eval": "0.4.13"}
TEXTS = ["code", "essay", "log"]
METHODS = ("full", "hindsight", "static", "GRIFFIN", "random")
_METHODS_OF_EVALUATIONS = ("full", "topk@0.5", "static@0.5", "topk@0.25")


def items_of(seed: int, worse: float = 1.0, items: int = 16) -> pd.DataFrame:
    """Items of a multiple choice, and of losses with how near the full model is."""
    rng = np.random.default_rng(seed)
    shift = dict(zip(_METHODS_OF_EVALUATIONS, (0, 0.6, 0.9, 1.5), strict=True))
    full = 3 + rng.random(items)
    losses = {v: full + worse * s + 0.1 * rng.random(items) * (s > 0) for v, s in shift.items()}
    near = {v: worse * s * (0.5 + rng.random(items)) for v, s in shift.items()}
    parts = [
        helpers.made_up(
            {v: (rng.random(30) < 0.7 - 0.1 * s) * 1.0 for v, s in shift.items()}, "piqa"
        )
    ]
    for length in (16, 256):
        common = {"task": f"wikitext_{length}", "chance": np.nan, "prompt_tokens": length}
        agreed = {v: np.exp(-values) for v, values in near.items()}
        for metric, values in (
            *((f"loss_{horizon}", losses) for horizon in (64, 256)),
            ("divergence_64", near),
            ("agreement_64", agreed),
        ):
            parts.append(helpers.made_up(values, metric=metric, **common))
    return pd.concat(parts, ignore_index=True).assign(older="")


def source_of(items: pd.DataFrame, name: str, parameters: int, **more: Any) -> dict[str, Any]:
    """What `source.json` says of an evaluation."""
    counts = items.groupby("task")["item"].nunique()
    source = {
        "model": name,
        "identity": f"identity of {name}",
        "parameters": parameters,
        "ff_parameters": parameters // 2,
        "layers": 2,
        "d_ff": [8, 8],
        "dtype": "float32",
        "device": "cpu",
        "calibration": "the packaged passages",
        "calibration_digest": "c" * 64,
        "seed": 0,
        "code": "e" * 64,
        "versions": VERSIONS,
        "tasks": {
            str(task): {
                "protocol": "context",
                "limit": None,
                "digest": f"digest of {task}",
                "items": int(count),
            }
            for task, count in counts.items()
        },
    }
    return source | more


def evaluated(
    folder: Path, name: str, parameters: int, items: pd.DataFrame | None = None, **more: Any
) -> Path:
    """Write what `flocking evaluate` writes, without tables and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    items = items_of(parameters % 97) if items is None else items
    items.to_parquet(folder / "items.parquet", index=False)
    text = sources.written(source_of(items, name, parameters, **more))
    (folder / "source.json").write_text(text, encoding="utf-8")
    return folder


def _finished(data: xr.Dataset, name: str, **more: Any) -> xr.Dataset:
    about = {"model": name, "dtype": "float32", "texts": TEXTS, "token_ids_sha256": "t" * 64}
    return data.assign_attrs({**about, "tokens": 65, "seed": 0, "caption": "made up", **more})


def _three(values: np.ndarray, spread: float = 0.05) -> np.ndarray:
    return np.stack([values, values - spread, values + spread])


def figure_data(name: str, figure: str, seed: int = 0, layers: int = 2, **more: Any) -> xr.Dataset:
    """Numbers as an experiment returns them."""
    rng = np.random.default_rng(seed)
    axes = {
        "interval": ["estimate", "low", "high"],
        "weights": ["trained", "control"],
        "layer": np.arange(layers),
    }
    dims = ("interval", "weights", "layer")
    shape = (2, layers)
    if figure == "scores":
        data = xr.Dataset(
            {
                "flocking_score": (dims, _three(rng.random(shape))),
                "rank_consistency": (dims, _three(rng.random(shape))),
                "effective_neurons": (dims, _three(1 + 7 * rng.random(shape))),
            },
            axes,
        )
        return _finished(data.assign_coords(d_ff=("layer", [8] * layers)), name, **more)
    if figure == "sequence_overlap":
        names = ("within", "between", "specificity", "different_tokens")
        data = xr.Dataset({one: (dims, _three(rng.random(shape))) for one in names}, axes)
        return _finished(data, name, **{"density": 0.5, "chance": 1 / 3, **more})
    if figure == "token_order":
        orders = ["in order", "permuted", "drawn"]
        short = ("interval", "weights", "order")
        values = {}
        for one in ("flocking_score", "rank_consistency"):
            means = rng.random(shape).mean(1)  # as of `scores`, and two other orders
            values[f"{one}_mean"] = (
                short,
                _three(np.stack([means, means / 2, means / 3], 1), 0.02),
            )
        return _finished(xr.Dataset(values, {**axes, "order": orders}), name, **more)
    above = rng.random((len(TEXTS), 2, len(METHODS))) + np.arange(len(METHODS))
    above -= above[..., :1]
    means = 3 + above.mean((0, 1))
    data = xr.Dataset(
        {
            "perplexity": (("interval", "selection"), np.exp(_three(means))),
            "relative": (("interval", "selection"), np.exp(_three(above.mean((0, 1)), 0.1))),
            "excess": (("text", "excerpt", "selection"), above),
            "captured": (("text", "excerpt", "selection"), 1 - above / 10),
        },
        {"interval": axes["interval"], "selection": list(METHODS), "text": TEXTS},
    )
    return _finished(data.assign_coords(excerpt=[0, 1]), name, density=0.5, prompt=33, **more)


def drawn(
    folder: Path,
    name: str,
    *figures: str,
    seed: int = 0,
    versions: dict[str, str] | None = None,
    **more: Any,
) -> Path:
    """Write the numbers that `flocking figures` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        key = Key("f" * 64, "i" * 64, VERSIONS if versions is None else versions)
        text = to_json(figure_data(name, figure, seed, **more), key)
        (folder / f"{figure}.json").write_text(text, encoding="utf-8")
    return folder


def changed(path: Path, **more: Any) -> None:
    """Change what a JSON file says."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | more), encoding="utf-8")
