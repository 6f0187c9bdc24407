"""One long text, read in chunks: how a selection from its beginning serves the rest of it.

    .venv/bin/python benchmarks/book.py BOOK.txt [--model NAME] [--tokens 32768] [--window 256]
        [--prompts 257 1025 4097 16385] [--control] [--out out/book]

Reads the first tokens of the text in one sequence, as far as the model's context reaches, and says
how long that will take and how much memory it took at most. OUT.zarr is the recording (and
OUT-control.zarr that of random weights), which the next run takes if it is complete; OUT.png the
picture, and OUT.json its numbers: captured energy and overlap, means over layers, by distance.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import matplotlib as mpl
import numpy as np
import xarray as xr

import flocking
from flocking.artifacts import replacing
from flocking.models import context
from flocking.texts import read_text


def recorded(model, tokenizer, text: str, store: Path, tokens: int, window: int) -> xr.Dataset:
    """The recording, from the store if it is there."""
    return flocking.record(
        model, [text], tokenizer=tokenizer, out=store, max_tokens=tokens, window=window
    )


def main() -> None:
    """Record, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("book", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--prompts", type=int, nargs="+", default=[257, 1025, 4097, 16385])
    parser.add_argument("--control", action="store_true", help="random weights, too")
    parser.add_argument("--out", type=Path, default=Path("out/book"))
    args = parser.parse_args()
    text = read_text(args.book)
    model, tokenizer = flocking.load(args.model)
    tokens = min(args.tokens, context(model) or args.tokens)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    store = args.out.with_suffix(".zarr")
    recording = recorded(model, tokenizer, text, store, tokens, args.window)
    read = int(recording.tokens.sum())
    prompts = [length for length in args.prompts if length + args.window <= read]
    measured = {"model": flocking.drift(recording, prompt_lengths=prompts).mean("layer")}
    if args.control:
        other = args.out.with_name(f"{args.out.name}-control.zarr")
        random = recorded(flocking.control(model), tokenizer, text, other, tokens, args.window)
        measured["control"] = flocking.drift(random, prompt_lengths=prompts).mean("layer")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{read} tokens read; at most {peak / 2**30:.1f} GiB of memory, the model's included")
    mpl.use("agg")
    axes = flocking.plot.drift(
        measured["model"], prompt_lengths=prompts, control=measured.get("control")
    )
    with replacing(args.out.with_suffix(".png")) as partial:
        axes[0].figure.savefig(partial, dpi=150, bbox_inches="tight")
    found = {"model": args.model or "embedded", "tokens": read, "window": args.window}
    for name, values in measured.items():
        found[name] = {
            part: {
                str(length): np.round(values[part].sel(prompt_length=length).values, 4).tolist()
                for length in prompts
            }
            for part in ("captured_energy", "jaccard", "oracle")
        }
        for length in prompts:
            row = values.captured_energy.sel(prompt_length=length).squeeze()
            known = row.dropna("distance")
            print(
                f"{name}, prompt of {length}: captured energy {float(known[0]):.3f} right after "
                f"it, {float(known[-4:].mean()):.3f} at the end"
            )
    with replacing(args.out.with_suffix(".json")) as partial:
        content = json.dumps(found).replace("NaN", "null")
        partial.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
