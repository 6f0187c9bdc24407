"""What recording costs: time and peak memory against the model's own forward pass.

    .venv/bin/python benchmarks/recording.py [--model NAME] [--pairs 15] [--tokens 512 1024]

Every round times each contestant once, in random order, so that whatever else the machine
does slows all equally; printed are the medians of the rounds' ratios, with quartiles.
Memory is the peak resident size of a separate process, the median of three, with the
lowest and highest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import threading
import time

import psutil
import torch

import flocking


def text_ids(tokenizer, tokens: int) -> torch.Tensor:
    """The packaged passages one after the other, cut to a number of tokens."""
    ids = tokenizer("\n\n".join(flocking.passages()))["input_ids"]
    return torch.tensor(ids[:tokens])[None]


def full(model, ids) -> None:
    """The model's own forward pass."""
    model(ids, use_cache=False)


def headless(model, ids) -> None:
    """The same without the language-model head."""
    model.base_model(ids, use_cache=False)


def record(model, ids) -> None:
    """``flocking.record`` with windows of 64 tokens: labels, Dataset and all."""
    flocking.record(model, ids, progress=False)


def raw_hooks(model, ids) -> None:
    """Plain hooks that keep every activation, for comparison."""
    kept = {}
    hooks = [
        block.down.register_forward_pre_hook(
            lambda module, args, layer=block.layer: kept.update({layer: args[0].clone()})
        )
        for block in flocking.feedforwards(model)
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()


CONTESTANTS = {
    "full forward": full,
    "headless forward": headless,
    "record": record,
    "raw hooks, keeping z": raw_hooks,
}


@torch.no_grad()
def times(model, tokenizer, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, interleaved."""
    ids = text_ids(tokenizer, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds + 1):
        for name in random.sample(list(CONTESTANTS), len(CONTESTANTS)):
            start = time.perf_counter()
            CONTESTANTS[name](model, ids)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(name: str, source: str | None, tokens: int, result) -> None:
    """Peak resident memory above the loaded model's, in MB, sampled in this fresh process."""
    model, tokenizer = flocking.load(source)
    ids = text_ids(tokenizer, tokens)
    process, seen, done = psutil.Process(), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    with torch.no_grad():
        CONTESTANTS[name](model, ids[:, :64])
        before = process.memory_info().rss
        watcher = threading.Thread(target=sample)
        watcher.start()
        CONTESTANTS[name](model, ids)
        done.set()
        watcher.join()
    result.put((max(seen) - before) / 1e6)


def ratio(a: list[float], b: list[float]) -> str:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or hub id; the embedded model by default")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of the timing")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--memory-tokens", type=int, default=8192, help="0: leave memory out")
    arguments = parser.parse_args()

    model, tokenizer = flocking.load(arguments.model)
    flocking.feedforwards(model)  # the proof, once per model, is not part of a recording
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.pairs} rounds")
    print(f"{'':22}{'tokens':>8}  {'of the full forward':24}{'of the headless forward':24}")
    for tokens in arguments.tokens:
        seconds = times(model, tokenizer, tokens, arguments.pairs)
        for name, mine in seconds.items():
            of_full = ratio(mine, seconds["full forward"])
            of_headless = ratio(mine, seconds["headless forward"])
            print(f"{name:22}{tokens:>8}  {of_full:24}{of_headless:24}", flush=True)

    if arguments.memory_tokens:
        print(f"\npeak memory above the model's, {arguments.memory_tokens} tokens, windows of 64:")
        context = multiprocessing.get_context("spawn")
        for name in CONTESTANTS:
            peaks = []
            for _ in range(3):  # how an allocator fares differs from one process to the next
                result = context.Queue()
                arguments_of_peak = (name, arguments.model, arguments.memory_tokens, result)
                process = context.Process(target=peak, args=arguments_of_peak)
                process.start()
                peaks.append(result.get())
                process.join()
            spread = f"[{min(peaks):.0f}, {max(peaks):.0f}]"
            print(f"{name:22}{statistics.median(peaks):8.0f} MB {spread}", flush=True)


if __name__ == "__main__":
    main()
