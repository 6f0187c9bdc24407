"""What GRIFFIN saves: decoding speed of the twin against the full model, and what it costs.

    .venv/bin/python benchmarks/decoding.py [--model NAME] [--pairs 15] [--batch 1 2 4 8]
        [--dtype float32 bfloat16] [--density 0.5] [--prompt 256] [--new-tokens 24]

Every round lets each contestant decode once, in random order, so that whatever else the machine
does falls on all alike; printed are the medians of the rounds' ratios, with quartiles. The bound is
what reading allows: the parameters that the full model reads for a step over those that the twin
reads, which with one selection a sequence has compact weights to read for each (input embeddings
are looked up, not read, unless they are the output matrix as well). Where arithmetic is slower than
reading, as for small batches on some processors, a twin can exceed it. Memory is what a process of
its own has gained by loading and generating. Selection and copy are the shared twin's, in steps of
the full model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time

import psutil
import torch
from transformers.generation.streamers import BaseStreamer

import flocking


class Clock(BaseStreamer):
    """When each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def step_seconds(model, ids, new_tokens: int) -> float:
    """Median time of a decoding step, from ``generate`` itself; without the prompt's pass."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
    )
    gaps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    return statistics.median(gaps)


def quartiles(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:5.2f} [{low:.2f}, {high:.2f}]"


def bound(model, twin) -> float:
    """Parameters read for one step, full over pruned, after the twin has generated."""
    report = twin.report()
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    looked_up = 0 if head is not None and head.weight is embedding else embedding.numel()
    full = report.parameters - looked_up
    return full / (full - (report.ff_bytes - report.compact_bytes) / embedding.itemsize)


def speed(name: str | None, dtype: str, options: argparse.Namespace) -> None:
    """Print the speed-ups, and what selection costs."""
    model, tokenizer = flocking.load(name, dtype=dtype)
    shared, own = (
        flocking.griffin(model, options.density, scope=s) for s in ("shared", "sequence")
    )
    rows = [tokenizer(p)["input_ids"][: options.prompt] for p in flocking.passages()]
    for batch in options.batch:
        ids = torch.tensor([rows[n % len(rows)] for n in range(batch)])
        contestants = {"full": model, "shared": shared}
        if batch > 1:
            contestants["by sequence"] = own
        for contestant in contestants.values():  # warm up
            step_seconds(contestant, ids, 4)
        rounds: list[dict[str, float]] = []
        costs = []
        for _ in range(options.pairs):
            order = random.sample(list(contestants), len(contestants))
            times = {n: step_seconds(contestants[n], ids, options.new_tokens) for n in order}
            rounds.append(times)
            report = shared.report()
            costs.append((report.selection_seconds + report.copy_seconds) / times["full"])
        for contestant in list(contestants)[1:]:
            limit = bound(model, contestants[contestant])
            ratios = [times["full"] / times[contestant] for times in rounds]
            share = statistics.median(ratios) / limit
            print(
                f"{dtype:>9}  batch {batch}  {contestant:>11}: {quartiles(ratios)} times the full "
                f"model's speed (reading allows {limit:.2f}; {share:.2f} of it)"
            )
        print(f"{dtype:>9}  batch {batch}  selection and copy: {quartiles(costs)} full steps")


def resident(name: str | None, dtype: str, density: float, scope: str, batch: int, queue) -> None:
    """What this fresh process holds after generating, in MiB, to the queue."""
    process = psutil.Process()
    before = process.memory_info().rss
    model, tokenizer = flocking.load(name, dtype=dtype)
    rows = [tokenizer(p)["input_ids"][:64] for p in flocking.passages()[:batch]]
    subject = model if density == 0 else flocking.griffin(model, density, scope=scope)
    step_seconds(subject, torch.tensor(rows), 4)
    queue.put((process.memory_info().rss - before) / 2**20)


def memory(name: str | None, dtype: str, density: float) -> None:
    """Print the resident sizes."""
    context = multiprocessing.get_context("spawn")
    cases = {
        "full": (0.0, "shared", 4),
        "twin, shared": (density, "shared", 4),
        "twin, by sequence (4)": (density, "sequence", 4),
    }
    for label, case in cases.items():
        sizes = []
        for _ in range(3):
            queue = context.Queue()
            process = context.Process(target=resident, args=(name, dtype, *case, queue))
            process.start()
            sizes.append(queue.get())
            process.join()
        low, middle, high = sorted(sizes)
        print(f"{dtype:>9}  memory {label:>22}: {middle:5.0f} MiB [{low:.0f}, {high:.0f}]")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in options.dtype:
        speed(options.model, dtype, options)
        memory(options.model, dtype, options.density)


if __name__ == "__main__":
    main()
