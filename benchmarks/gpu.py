"""GRIFFIN on a GPU: measured speed against what reading bytes allows. See benchmarks/README.md.

    .venv/bin/python benchmarks/gpu.py [--quick] [--device cuda] [--only decoding batches ...]
        [--shapes "Gemma 7B" ...]
        [--attention sdpa] [--density 0.5] [--prompt 2048] [--minutes 10] [--turns FILE]
        [--repetitions 7] [--out out/gpu.json]

Models have the real shapes of benchmarks/shapes.json and random weights, made on the device: how
long a step takes does not depend on their values. Contestants of one table take turns, in random
order, so that other work of the machine slows all of them equally. Printed are medians, for ratios
with quartiles; the JSON file has every repetition. A bound is what reading allows: the bytes of
weights and of keys and values that the full model reads for a token over those that the twin reads.
What there is no time for is named and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import (
    SHAPES,
    Turns,
    build,
    copy_bandwidth,
    free,
    interleaved,
    kv_bytes,
    machine,
    need,
    prompts,
    quartiles,
    ratios,
    seconds,
    weight_bytes,
)
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import flocking
from flocking.pruning import full_model
from flocking.recording import Windows

PAPERS = ("Llama 2 13B", "Gemma 7B")  # Dong, Chen and Chi give their latencies
HUGE = "Llama 3 70B, 60 of its 80 layers"


class Run:
    """A run: what it measures with, how often, for how long, and its results.

    Attributes
    ----------
    results : dict
        What goes to the JSON file, which is written after each line.
    bandwidth : list of float
        Bytes in a second that copies read and wrote.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.perf_counter()
        self.device, self.density = options.device, options.density
        self.on_gpu = torch.device(self.device).type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        few = options.quick or not self.on_gpu
        self.repetitions = options.repetitions or (3 if few else 7)
        self.steps = 63 if self.on_gpu else 6  # with a prompt of 2,048, caches of 33 times 64
        self.prompt = options.prompt or (2048 if self.on_gpu else 48)
        self.turns = Turns(options.turns)
        self.bandwidth: list[float] = []
        self.results: dict[str, Any] = {
            "machine": machine(self.device),
            # (Without folders of the machine, which are nobody's business.)
            "options": {**vars(options), "out": None, "turns": None},
            "copy_bytes_per_second": self.bandwidth,
        }

    def model(self, shape: str, device: str | None = None, **changes: int) -> PreTrainedModel:
        """A model of a shape, as the options ask for it."""
        return build(shape, device or self.device, self.dtype, self.options.attention, **changes)

    def interleaved(
        self, contestants: dict[str, Callable[[], float]], repetitions: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds by contestant and round, while no other process measures."""
        if not self.bandwidth:  # not before others may compile
            with self.turns.alone():
                self.bandwidth += copy_bandwidth(self.device)
            low, middle, high = (f(self.bandwidth) / 1e9 for f in (min, statistics.median, max))
            print(f"copies read and write {middle:,.0f} GB/s [{low:,.0f}, {high:,.0f}]")
        return interleaved(contestants, repetitions or self.repetitions, self.turns)

    def keep(self, section: str, case: str, values: dict[str, Any]) -> None:
        """Keep a result for the JSON file."""
        self.results.setdefault(section, {})[case] = values

    def save(self) -> None:
        """Write all results so far as JSON, whole or not at all."""
        path = Path(self.options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1))
        part.replace(path)


# --------------------------------------------------------------------------------------
# Contestants: each gives the seconds of one decoding step


def compiled(decoder: flocking.Decoder, ids: Tensor, steps: int) -> Callable[[], float]:
    """`flocking.Decoder`, compiled."""

    def measure() -> float:
        decoder.read(ids, max_new_tokens=steps + 1)
        return seconds(lambda: [decoder.step() for _ in range(steps)], ids.device) / steps

    return measure


@torch.no_grad()
def eager_steps(model: PreTrainedModel, past: DynamicCache, token: Tensor, steps: int) -> float:
    """Plain greedy decoding, with nothing compiled and nothing but the model."""

    @torch.no_grad()
    def loop(token: Tensor = token) -> None:
        for _ in range(steps):
            logits = model(input_ids=token, past_key_values=past, use_cache=True).logits
            token = logits[:, -1].argmax(dim=-1, keepdim=True)

    return seconds(loop, token.device) / steps


@torch.no_grad()
def eager_prefill(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, Tensor]:
    """What the prompt leaves in a cache, and the first new token."""
    past = DynamicCache()
    out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    return past, out.logits[:, -1].argmax(dim=-1, keepdim=True)


def eager(model: PreTrainedModel, ids: Tensor, steps: int) -> Callable[[], float]:
    """The plain loop of a model, or of a twin with the selection of its prompt."""
    full = full_model(model)

    def measure() -> float:
        if full is not model:
            model.generate(ids, max_new_tokens=1)
        past, token = eager_prefill(full, ids)
        return eager_steps(model, past, token, steps)

    return measure


def generate(model: PreTrainedModel, ids: Tensor, steps: int, **more: Any) -> Callable[[], float]:
    """``generate``: the time of a long run minus that of a short one."""

    def run(new: int) -> float:
        return seconds(lambda: model.generate(ids, max_new_tokens=new, **more), ids.device)

    return lambda: (run(steps + 1) - run(1)) / steps


class NewModules:
    """GRIFFIN as its authors' code does it: new ``nn.Linear`` modules for each prompt, run eagerly.

    Written anew from the paper (section 4), for models with gate, up and down projections.
    """

    def __init__(self, model: PreTrainedModel, density: float) -> None:
        self.model, self.density = model, density
        self.mlps = [layer.mlp for layer in model.model.layers]

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> tuple[DynamicCache, Tensor]:
        """Run the prompt in full, and put modules of the kept neurons into the layers."""
        scores: list[Tensor] = []

        def watching(mlp: nn.Module, x: Tensor) -> Tensor:
            z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            scores.append((z / z.norm(dim=-1, keepdim=True)).norm(dim=1).sum(dim=0))
            return mlp.down_proj(z)

        for mlp in self.mlps:
            mlp.forward = lambda x, mlp=mlp: watching(mlp, x)
        past, token = eager_prefill(self.model, ids)
        for mlp, score in zip(self.mlps, scores, strict=True):
            kept = score.topk(int(self.density * len(score))).indices
            gate, up = (
                self.linear(mlp.gate_proj.weight[kept]),
                self.linear(mlp.up_proj.weight[kept]),
            )
            down = self.linear(mlp.down_proj.weight[:, kept])
            mlp.forward = lambda x, g=gate, u=up, d=down, act=mlp.act_fn: d(act(g(x)) * u(x))
        return past, token

    @staticmethod
    def linear(weight: Tensor) -> nn.Linear:
        """A new module with that weight."""
        new = nn.Linear(*weight.shape[::-1], bias=False, device=weight.device, dtype=weight.dtype)
        new.weight.copy_(weight)
        return new

    def measure(self, ids: Tensor, steps: int) -> float:
        """Decode with the selection of one prompt, and restore the model."""
        try:
            return eager_steps(self.model, *self.prefill(ids), steps)
        finally:
            for mlp in self.mlps:
                vars(mlp).pop("forward", None)


# --------------------------------------------------------------------------------------
# Sections: each measures one case, and says what came out line by line


def decoding(run: Run, shape: str) -> Iterator[str]:
    """Batch 1: the full model and GRIFFIN, compiled and not; reading the prompt; selection."""
    model = run.model(shape)
    ids = prompts(model, 1, run.prompt)
    twin = flocking.griffin(model, run.density)
    room = run.prompt + run.steps + 1
    full, pruned = (flocking.Decoder(subject, room) for subject in (model, twin))
    authors = NewModules(model, run.density)
    found = run.interleaved(
        {
            "full, compiled": compiled(full, ids, run.steps),
            "GRIFFIN, compiled": compiled(pruned, ids, run.steps),
            "full, eager": eager(model, ids, run.steps),
            "full, generate": generate(model, ids, run.steps),
            "GRIFFIN, eager": eager(twin, ids, run.steps),
            "GRIFFIN, new modules, eager": lambda: authors.measure(ids, run.steps),
        }
    )
    reading = run.interleaved(
        {
            "full": lambda: seconds(lambda: full.read(ids), run.device),
            "GRIFFIN": lambda: seconds(lambda: pruned.read(ids), run.device),
        }
    )
    report = twin.report()
    keys = kv_bytes(model, run.prompt + run.steps / 2)
    read = {"full": weight_bytes(model) + keys, "GRIFFIN": weight_bytes(model, twin) + keys}
    limit = read["full"] / read["GRIFFIN"]
    run.keep(
        "decoding",
        shape,
        {
            "prompt": run.prompt,
            "seconds_per_token": found,
            "prefill_seconds": reading,
            "selection_seconds": report.selection_seconds,
            "copy_seconds": report.copy_seconds,
            "bytes_per_token": read,
            "bound": limit,
            "bound_by_parameters": weight_bytes(model) / weight_bytes(model, twin),
        },
    )
    gain = ratios(found, "full, compiled", "GRIFFIN, compiled")
    yield (
        f"{shape}, prompt {run.prompt}: GRIFFIN{quartiles(gain)} times as fast, both compiled; "
        f"bound {limit:.2f}, {statistics.median(gain) / limit:.2f} of it"
    )
    for name, times in found.items():
        middle = statistics.median(times)
        rate = read["GRIFFIN" if "GRIFFIN" in name else "full"] / middle
        yield (
            f"    {name:<28}{1e3 * middle:8.3f} ms a token, at "
            f"{rate / statistics.median(run.bandwidth):4.0%} of the copy bandwidth,"
            f"{quartiles(ratios(found, 'full, eager', name))} times as fast as full, eager"
        )
    token = statistics.median(found["full, compiled"])
    yield (
        f"    the prompt is read in {1e3 * statistics.median(reading['full']):.1f} ms, by GRIFFIN "
        f"in{quartiles(ratios(reading, 'GRIFFIN', 'full'))} times that; selection takes "
        f"{report.selection_seconds / token:.2f} and copying {report.copy_seconds / token:.2f} of "
        "the full model's steps"
    )


def generation(run: Run, shape: str, new: int) -> Iterator[str]:
    """Seconds to read a prompt and generate tokens after it, as in the paper's table."""
    model = run.model(shape)
    ids = prompts(model, 1, run.prompt)
    subjects = {"full": model, "GRIFFIN": flocking.griffin(model, run.density)}

    def whole(subject: PreTrainedModel) -> Callable[[], float]:
        decoder = flocking.Decoder(subject, run.prompt + new)
        return lambda: seconds(lambda: decoder.generate(ids, max_new_tokens=new), run.device)

    contestants = {name: whole(subject) for name, subject in subjects.items()}
    found = run.interleaved(contestants, 3 if new <= 128 else 1)
    run.keep("generation", f"{shape}, {run.prompt} + {new}", found)
    yield (
        f"{shape}, {run.prompt} + {new} tokens: full {statistics.median(found['full']):.2f} s, "
        f"GRIFFIN {statistics.median(found['GRIFFIN']):.2f} s,"
        f"{quartiles(ratios(found, 'full', 'GRIFFIN'))} times as fast"
    )


def batches(run: Run, shape: str, batch: int, layers: int) -> Iterator[str]:
    """Batch sizes at which the gain fades; on some of the layers, since compiling takes time."""
    model = run.model(shape, num_hidden_layers=layers)
    ids = prompts(model, batch, run.prompt)
    subjects = {"full": model}
    for scope in ("shared", "sequence") if batch > 1 else ("shared",):
        subjects[scope] = flocking.griffin(model, run.density, scope=scope)
    found = run.interleaved(
        {
            name: compiled(
                flocking.Decoder(subject, run.prompt + run.steps + 1, batch_size=batch),
                ids,
                run.steps,
            )
            for name, subject in subjects.items()
        }
    )
    keys = kv_bytes(model, run.prompt + run.steps / 2, batch)
    bounds = {
        scope: (weight_bytes(model) + keys) / (weight_bytes(model, twin) + keys)
        for scope, twin in subjects.items()
        if scope != "full"
    }
    values = {"layers": layers, "seconds_per_token": found, "bounds": bounds}
    run.keep("batches", f"{shape}, {batch}", values)
    for scope, limit in bounds.items():
        yield (
            f"{shape}, {layers} layers, batch {batch:>2}, {scope:>8}:"
            f"{quartiles(ratios(found, 'full', scope))} times as fast, bound {limit:.2f}"
        )


def reading(run: Run, shape: str, tokens: int) -> Iterator[str]:
    """A prompt by the full model and by GRIFFIN, which then selects; nothing compiled."""
    model = run.model(shape)
    ids = prompts(model, 1, tokens)
    subjects = {"full": model, "GRIFFIN": flocking.griffin(model, run.density)}
    decoders = {name: flocking.Decoder(each, tokens + 2) for name, each in subjects.items()}
    found = run.interleaved(
        {
            name: lambda decoder=decoder: seconds(lambda: decoder.read(ids), run.device)
            for name, decoder in decoders.items()
        },
        3 * run.repetitions,
    )
    run.keep("reading", f"{shape}, {tokens}", {"tokens": tokens, "seconds": found})
    yield (
        f"{shape}, prompt {tokens}: full {1e3 * statistics.median(found['full']):.1f} ms, GRIFFIN "
        f"in{quartiles(ratios(found, 'GRIFFIN', 'full'))} times that"
    )


@torch.no_grad()
def recording(run: Run, shape: str, tokens: int) -> Iterator[str]:
    """The cost of watching, compared with the forward pass without the head."""
    model = run.model(shape)
    ids = prompts(model, 1, tokens)
    blocks = flocking.feedforwards(model)
    windows = Windows.of((torch.arange(tokens) > 0).long()[None])

    def forward() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    def sums() -> None:
        zeros = {b: flocking.Moments.zeros(1, 2, b.d_ff, device=b.device) for b in blocks}
        with flocking.observe(model, lambda b, z: zeros[b].update(z, windows) and None):
            forward()

    found = run.interleaved(
        {
            "forward": lambda: seconds(forward, run.device),
            "two windows, as GRIFFIN": lambda: seconds(sums, run.device),
            "record, windows of 64": lambda: seconds(
                lambda: flocking.record(model, ids, window=64, progress=False), run.device
            ),
        }
    )
    run.keep("recording", shape, {"tokens": tokens, "seconds": found})
    for name in list(found)[1:]:
        yield (
            f"{shape}, {tokens} tokens, {name}:{quartiles(ratios(found, name, 'forward'))} times "
            f"the headless forward's {1e3 * statistics.median(found['forward']):.1f} ms"
        )


@torch.no_grad()
def matrices(run: Run, shape: str) -> Iterator[str]:
    """A token through gate and up: in two matrices or one, and with a few more kept neurons."""
    d, k = SHAPES[shape]["hidden_size"], int(SHAPES[shape]["intermediate_size"] * run.density)
    x = torch.randn(1, d, device=run.device, dtype=run.dtype)
    layers = 8 if run.on_gpu else 2  # more than a cache holds

    def products(rows: int, matrices: int) -> Callable[[Tensor], Tensor]:
        shape = (layers * matrices, rows, d)
        weights = torch.randn(shape, device=run.device, dtype=run.dtype).unbind()
        return lambda x: torch.cat([nn.functional.linear(x, w) for w in weights], dim=-1)

    options = {"coordinate_descent_tuning": True} if run.on_gpu else None
    contestants = {}
    for name, rows, number in (
        ("two matrices", k, 2),
        ("one matrix", 2 * k, 1),
        ("two matrices, k + 1", k + 1, 2),
        ("two matrices, k to a multiple of 256", -(-k // 256) * 256, 2),
    ):
        step = products(rows, number)
        contestants[f"{name}, eager"] = replayed(step, x)
        contestants[f"{name}, compiled"] = replayed(
            torch.compile(step, options=options, dynamic=False), x
        )
    found = run.interleaved(contestants)
    run.keep("matrices", shape, {"k": k, "layers": layers, "seconds": found})
    for name, times in found.items():
        over = ratios(found, "two matrices, eager", name)
        yield (
            f"{shape}, k = {k}, {name:<46}{1e6 * statistics.median(times) / layers:8.1f} us a "
            f"layer,{quartiles(over)} times as fast as the first"
        )


def replayed(step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], float]:
    """Seconds of a call, from ten in a row; as a CUDA graph on CUDA devices."""
    if x.device.type != "cuda":
        return lambda: seconds(lambda: [step(x) for _ in range(10)], x.device) / 10
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x)
    # (The step is kept, and with it the weights that the graph reads.)
    return lambda step=step: seconds(lambda: [graph.replay() for _ in range(10)], x.device) / 10


def offloading(run: Run, shape: str) -> Iterator[str]:
    """``griffin(..., offload="cpu")``: peak memory on the device, time of a prompt and of steps."""
    model = run.model(shape, device="cpu")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    twin = flocking.griffin(model, run.density, offload="cpu")
    decoder = flocking.Decoder(twin, run.prompt + run.steps + 1)
    ids = prompts(twin, 1, run.prompt)
    decode = compiled(decoder, ids, run.steps)
    found = run.interleaved(
        {"read": lambda: seconds(lambda: decoder.read(ids), run.device), "step": decode}, 3
    )
    peak = total = None
    if run.on_gpu:
        peak = torch.cuda.max_memory_allocated()
        total = torch.cuda.get_device_properties(0).total_memory
    values = {
        "model_bytes": size,
        "peak_bytes": peak,
        "device_bytes": total,
        "prefill_seconds": found["read"],
        "seconds_per_token": found["step"],
    }
    run.keep("offloading", shape, values)
    device = "which is the host" if peak is None else f"at most {peak / 1e9:.1f} GB"
    card = "" if total is None else f" of {total / 1e9:.1f}"
    yield (
        f"{shape}: the model has {size / 1e9:.3g} GB; on the device{card}, {device}; a prompt of "
        f"{run.prompt} is read in {statistics.median(found['read']):.2f} s, a step takes "
        f"{1e3 * statistics.median(found['step']):.2f} ms"
    )


SECTIONS = (decoding, reading, recording, matrices, batches, generation, offloading)


class Case(NamedTuple):
    """A case that a section measures."""

    section: Callable[..., Iterator[str]]
    shape: str
    more: dict[str, int] = {}  # noqa: RUF012


def plan(run: Run) -> list[Case]:
    """All cases, the most wanted ones first."""
    if not run.on_gpu:
        return [
            Case(decoding, "small"),
            Case(reading, "small", {"tokens": 48}),
            Case(recording, "small", {"tokens": 64}),
            Case(matrices, "small"),
            *(Case(batches, "small", {"batch": n, "layers": 2}) for n in (1, 2)),
            *(Case(generation, "small", {"new": n}) for n in (8, 24)),
            Case(offloading, "small"),
        ]
    real = [shape for shape in SHAPES if shape not in (HUGE, "small")]
    some = [
        Case(decoding, real[0]),
        *(Case(reading, real[0], {"tokens": n}) for n in (256, 2048)),
        Case(recording, real[0], {"tokens": 4096}),
    ]
    if run.options.quick:
        return [*some, Case(matrices, real[0])]
    return [
        *some,
        *(Case(decoding, shape) for shape in real[1:]),
        *(Case(matrices, shape) for shape in real),
        *(Case(batches, real[0], {"batch": n, "layers": 8}) for n in (1, 2, 4, 8, 16)),
        Case(offloading, HUGE),
        *(Case(generation, shape, {"new": n}) for n in (128, 2048) for shape in PAPERS),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, in four minutes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION")
    shapes = list(SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, metavar="SHAPE")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, help="tokens; 2,048 by default, 48 on a CPU")
    parser.add_argument("--minutes", type=float, help="begin nothing after; by default 10, quick 4")
    parser.add_argument("--repetitions", type=int, help="by default 7; quick, or on a CPU, 3")
    parser.add_argument("--turns", metavar="FILE", help="shared with runs at the same time")
    parser.add_argument("--out", default="out/gpu.json")
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (4 if options.quick else 10)
    need(options.device)
    run = Run(options)
    print(json.dumps(run.results["machine"], indent=1))
    section = None
    for case in plan(run):
        if case.section.__name__ not in options.only or case.shape not in options.shapes:
            continue
        if case.section is not section:
            section = case.section
            print(f"\n{section.__name__}: {section.__doc__}")
        what = ", ".join([case.shape, *(f"{name} {value}" for name, value in case.more.items())])
        if time.perf_counter() - run.start > 60 * options.minutes:
            print(f"{what}: left out for want of time (--minutes)", flush=True)
            run.keep("left_out", f"{section.__name__}, {what}", {"why": "time"})
            run.save()
            continue
        try:
            for line in section(run, case.shape, **case.more):
                print(line, flush=True)
        except Exception as problem:  # one case that fails is not to cost the others
            first = str(problem).strip().partition("\n")[0]
            print(f"{what}: {type(problem).__name__}: {first}", flush=True)
            values = {"why": "".join(traceback.format_exception(problem))}
            run.keep("left_out", f"{section.__name__}, {what}", values)
        run.save()
        free()
    print(f"\n{time.perf_counter() - run.start:.0f} s; every repetition is in {options.out}")


if __name__ == "__main__":
    main()
