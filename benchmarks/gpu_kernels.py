"""Which kernels a decoding step and the reading of a prompt spend their time in.

    .venv/bin/python benchmarks/gpu_kernels.py ["Llama 2 7B"] [--device cuda] [--prompt 2048]

Prints, for the full model and for GRIFFIN in `flocking.Decoder`, the kernels that take longest:
microseconds in all, how often each runs, and the median of one run. What kernels take together,
beside what the clock says, tells how long the device waits for the host. On a CPU, operators take
the place of kernels, and those that call others count them again.
"""

from __future__ import annotations

import argparse
import collections
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import SHAPES, build, need, prompts, seconds, synchronize
from torch.profiler import ProfilerActivity, profile

import flocking

STEPS = 5
ROWS = 20


def kernels(run: Callable[[], Any], device: str) -> dict[str, list[float]]:
    """Microseconds of each run of each kernel that a call starts, by name."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        run()
        synchronize(device)
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profiled.events():
        if not on_gpu:
            found[event.name].append(event.cpu_time)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    return found


def table(found: dict[str, list[float]], runs: int) -> str:
    """The kernels that take longest, per run of what was profiled."""
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))
    return "\n".join(
        f"{sum(times) / runs:11.1f} us{len(times) / runs:8.1f} x{statistics.median(times):9.2f}  "
        f"{name[:120]}"
        for name, times in longest[:ROWS]
    )


def main(arguments: list[str] | None = None) -> None:
    """Profile both models, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", nargs="?", default="Llama 2 7B", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    options = parser.parse_args(arguments)
    need(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = build(options.shape, options.device, dtype, "sdpa")
    ids = prompts(model, 1, options.prompt)
    for name, subject in {"full": model, "GRIFFIN": flocking.griffin(model, 0.5)}.items():
        decoder = flocking.Decoder(subject, options.prompt + 64)
        decoder.read(ids, max_new_tokens=64)
        for _ in range(8):  # compiled, and captured as a graph
            decoder.step()

        def steps(decoder: flocking.Decoder = decoder) -> None:
            for _ in range(STEPS):
                decoder.step()

        def read(decoder: flocking.Decoder = decoder) -> None:
            decoder.read(ids, max_new_tokens=64)

        for what, run, runs in (("a step", steps, STEPS), ("the prompt", read, 1)):
            read()
            by_clock = seconds(run, options.device) / runs
            read()
            found = kernels(run, options.device)
            total = sum(map(sum, found.values())) / runs
            print(
                f"{options.shape}, {name}, {what}: {1e3 * by_clock:.2f} ms, of which kernels "
                f"{total / 1e3:.2f} ms ({sum(map(len, found.values())) / runs:.0f} of them)"
            )
            print(table(found, runs), flush=True)


if __name__ == "__main__":
    main()
