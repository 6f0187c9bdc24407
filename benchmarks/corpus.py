"""Recording a corpus to disk: texts a second, peak memory, bytes a token.

    .venv/bin/python benchmarks/corpus.py [--model NAME] [--texts 64] [--tokens 256] [--rounds 5]
        [--only speed memory] [--out out/corpus.json]

Speed: in one process, ``record`` in memory and ``record(out=...)`` in random order in every round,
on the same texts; printed are medians of the rounds' ratios, with quartiles. Where nnsight can be
imported, so can its way to the raw activations of the same texts, in as large batches, with nothing
measured or written. Two processes of one thread each, as torchrun starts them, beside one process
of two threads, without their start.

Memory: a tiny model, and 250, 1,000 and 2,000 texts, each in a process of its own: how much more
than before its first text it takes at most.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measuring import interleaved, quartiles, ratios
from transformers import PreTrainedModel

import flocking

NNSIGHT = "nnsight"
TINY = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4}


def texts_of(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Texts of the packaged passages, cut into pieces of different lengths."""
    ids = [i for passage in flocking.passages() for i in tokenizer(passage)["input_ids"]]
    lengths = np.random.default_rng(0).integers(tokens // 2, tokens + 1, count)
    starts = np.random.default_rng(1).integers(0, len(ids) - tokens, count)
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Streaming beside recording in memory, and two processes beside one."""
    model, tokenizer = flocking.load(args.model)
    texts = texts_of(tokenizer, args.texts, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "x.zarr"

        def streamed() -> float:
            shutil.rmtree(store, ignore_errors=True)
            start = time.perf_counter()
            flocking.record(model, texts, out=store, max_tokens=args.tokens, progress=False)
            return time.perf_counter() - start

        def in_memory() -> float:
            start = time.perf_counter()
            flocking.record(model, texts, max_tokens=args.tokens, progress=False)
            return time.perf_counter() - start

        contestants = {"in memory": in_memory, "to disk": streamed}
        if importlib.util.find_spec("nnsight"):
            contestants[NNSIGHT] = with_nnsight(model, texts)
        times = interleaved(contestants, args.rounds)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    tokens = sum(map(len, texts))
    return {
        "tokens": tokens,
        "bytes_a_token": size / tokens,
        "texts_a_second": {name: args.texts / float(np.median(t)) for name, t in times.items()},
        "to_disk": ratios(times, "in memory", "to disk"),
        "nnsight": ratios(times, "in memory", NNSIGHT) if NNSIGHT in times else None,
        "two_processes": shared(args),
    }


def with_nnsight(model: PreTrainedModel, texts: list[list[int]]) -> Callable[[], float]:
    """What enters each down-projection, kept in memory, in batches of 8 sorted by length."""
    import nnsight

    traced = nnsight.NNsight(model)
    in_order = sorted(texts, key=len)

    def cached() -> float:
        start = time.perf_counter()
        for first in range(0, len(in_order), 8):
            batch = [torch.tensor(ids) for ids in in_order[first : first + 8]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in batch], batch_first=True
            )
            kept = []
            with torch.inference_mode(), traced.trace(input_ids=ids, attention_mask=mask):
                for layer in traced.model.layers:
                    kept.append(layer.mlp.down_proj.input.save())
            assert [z.shape[:2] for z in kept] == [ids.shape] * len(model.model.layers)
        return time.perf_counter() - start

    return cached


SHARE = """
import os, sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(int(sys.argv[2]))
import corpus, flocking
model, tokenizer = flocking.load({model!r})
texts = corpus.texts_of(tokenizer, {texts}, {tokens})
flocking.record(model, texts[:2], progress=False)  # the FF blocks are proved
start = time.perf_counter()
flocking.record(model, texts, out=sys.argv[1], max_tokens={tokens}, progress=False)
if os.environ.get("RANK", "0") == "0":
    print(time.perf_counter() - start)
"""


def shared(args: argparse.Namespace) -> list[float]:
    """Speed of two processes of one thread, times that of one process of two, by round."""
    here = str(Path(__file__).parent)
    program = SHARE.format(here=here, model=args.model, texts=args.texts, tokens=args.tokens)

    def run(processes: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", program, f"{folder}/x.zarr", str(2 // processes)]
            if processes > 1:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command = [*start, "--nproc-per-node", str(processes), "--no-python", *command]
            environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
            ended = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            return float(ended.stdout.strip().splitlines()[-1])

    times = interleaved({"one": lambda: run(1), "two": lambda: run(2)}, args.rounds)
    return ratios(times, "one", "two")


def memory() -> dict[str, int]:
    """Bytes that a process takes at most, above what it had before its first text."""
    found = {}
    for count in (250, 1000, 2000):
        command = [sys.executable, __file__, "--tiny", str(count)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(count)] = int(ended.stdout.strip().splitlines()[-1])
    return found


def tiny(count: int) -> None:
    """Record so many texts by a tiny model, and print the peak of memory."""
    import resource

    import transformers

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **heads)).eval()

    def texts() -> Iterator[list[int]]:
        draw = np.random.default_rng(0)
        for _ in range(count):
            yield draw.integers(1, 200, draw.integers(64, 513)).tolist()

    with tempfile.TemporaryDirectory() as folder:
        few = list(texts())[:64]
        flocking.record(model, few, out=f"{folder}/few.zarr", max_tokens=512, progress=False)
        before = psutil.Process().memory_info().rss
        flocking.record(model, texts(), out=f"{folder}/x.zarr", max_tokens=512, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak - before)


def main() -> None:
    """Measure, print, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["speed", "memory"])
    parser.add_argument("--out", type=Path, default=Path("out/corpus.json"))
    parser.add_argument("--tiny", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        tiny(args.tiny)
        return
    wanted = args.only or ["speed", "memory"]
    found: dict[str, Any] = {}
    if "speed" in wanted:
        found["speed"] = speed(args)
        rates = found["speed"]["texts_a_second"]
        print(", ".join(f"{name}: {rate:.2f} texts a second" for name, rate in rates.items()))
        print(f"to disk, times in memory:       {quartiles(found['speed']['to_disk'])}")
        if found["speed"]["nnsight"]:
            print(f"nnsight's cache, times in memory: {quartiles(found['speed']['nnsight'])}")
        print(f"two processes, times one:       {quartiles(found['speed']['two_processes'])}")
        print(f"on disk: {found['speed']['bytes_a_token']:,.0f} bytes a token")
    if "memory" in wanted:
        found["memory"] = memory()
        for count, size in found["memory"].items():
            print(f"{count:>5} texts: {size / 2**20:,.0f} MiB above the model at most")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
