"""What GRIFFIN saves: decoding speed of the twin against the full model, and what it costs.

    .venv/bin/python benchmarks/decoding.py [--model NAME] [--pairs 15] [--batch 1 2 4 8]
        [--compiled 1] [--dtype float32] [--density 0.5] [--prompt 256]
        [--new-tokens 24] [--refresh 16 64 256] [--long 256] [--only speed refreshed memory]

Every round lets each contestant decode once, in random order, so that whatever else the machine
does slows all equally; printed are the medians of the rounds' ratios, with quartiles. The bound is
what reading allows: the weights that the full model reads for a step over those that the twin
reads, which with one selection a sequence has compact weights to read for each (input embeddings
are looked up, not read, unless they are the output matrix as well). Where arithmetic is slower than
reading, as for small batches on some processors, a twin can exceed it. Batches named after
--compiled are also decoded by flocking.Decoder. Memory is what a separate process has gained by
loading and generating. Selection and copy are the shared twin's, in steps of the full model.

The second table is of selections that are made anew (``refresh``), batch 1, and of the twin as the
full model's draft: mean time of --long new tokens, refreshes included, the prompt's pass and the
first token not; in ``generate``, and in flocking.Decoder without the draft. There are a third as
many rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

import psutil
import torch
from measuring import interleaved, quartiles, ratios, seconds, weight_bytes
from transformers.generation.streamers import BaseStreamer

import flocking


class Clock(BaseStreamer):
    """The times at which tokens came."""

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


def compiled_seconds(decoder: flocking.Decoder, ids, new_tokens: int) -> float:
    """Median time of a step of a :class:`flocking.Decoder`; without the prompt's pass."""
    decoder.read(ids, max_new_tokens=new_tokens)
    return statistics.median(seconds(decoder.step, "cpu") for _ in range(new_tokens - 1))


def speed(name: str | None, dtype: str, options: argparse.Namespace) -> None:
    """Print the speed-ups, and what selection costs."""
    model, tokenizer = flocking.load(name, dtype=dtype)
    shared, own = (
        flocking.griffin(model, options.density, scope=s) for s in ("shared", "sequence")
    )
    rows = [tokenizer(p)["input_ids"][: options.prompt] for p in flocking.passages()]
    room = options.prompt + options.new_tokens
    for batch in options.batch:
        ids = torch.tensor([rows[n % len(rows)] for n in range(batch)])
        costs = []

        def of_shared(ids=ids, costs=costs) -> float:
            time_ = step_seconds(shared, ids, options.new_tokens)
            report = shared.report()
            costs.append(report.selection_seconds + report.copy_seconds)
            return time_

        subjects = {"full": model, "shared": shared}
        contestants = {
            "full": lambda ids=ids: step_seconds(model, ids, options.new_tokens),
            "shared": of_shared,
        }
        if batch > 1:
            subjects["by sequence"] = own
            contestants["by sequence"] = lambda ids=ids: step_seconds(own, ids, options.new_tokens)
        if batch in options.compiled:
            for kind, subject in list(subjects.items()):
                decoder = flocking.Decoder(subject, room, batch_size=batch)
                subjects[f"{kind}, compiled"] = subject
                contestants[f"{kind}, compiled"] = lambda d=decoder, ids=ids: compiled_seconds(
                    d, ids, options.new_tokens
                )
        found = interleaved(contestants, options.pairs)
        full = weight_bytes(model)
        for kind in list(contestants)[1:]:
            twin = None if subjects[kind] is model else subjects[kind]
            limit = full / weight_bytes(model, twin)
            print(
                f"{dtype:>9}  batch {batch}  {kind:>21}: {quartiles(ratios(found, 'full', kind))} "
                f"times the speed of the full model's generate (reading allows {limit:.2f})"
            )
            if kind.endswith(", compiled") and twin is not None:
                gain = ratios(found, "full, compiled", kind)
                print(f"{'':>43}: {quartiles(gain)} times the full model's, compiled")
        steps = [cost / time_ for cost, time_ in zip(costs[1:], found["full"], strict=True)]
        print(f"{dtype:>9}  batch {batch}  selection and copy: {quartiles(steps)} full steps")


def long_seconds(model, ids, new_tokens: int, **options) -> float:
    """Mean time of a new token in ``generate``, after the first, whatever a step is."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens + 1,
        min_new_tokens=new_tokens + 1,
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
        **options,
    )
    return (clock.times[-1] - clock.times[1]) / new_tokens


def compiled_long_seconds(decoder: flocking.Decoder, ids, new_tokens: int) -> float:
    """Mean time of a step of a :class:`flocking.Decoder`, refreshes included."""
    decoder.read(ids, max_new_tokens=new_tokens + 1)
    start = time.perf_counter()
    for _ in range(new_tokens):
        decoder.step()
    return (time.perf_counter() - start) / new_tokens


def refreshed(name: str | None, dtype: str, options: argparse.Namespace) -> None:
    """Print the speed-ups of long generations, with and without refreshes, and as a draft."""
    model, tokenizer = flocking.load(name, dtype=dtype)
    ids = tokenizer(flocking.passages()[0], return_tensors="pt")["input_ids"][:, : options.prompt]
    every = {"once": None, **{f"anew every {n}": n for n in options.refresh}}
    twins = {kind: flocking.griffin(model, options.density, refresh=n) for kind, n in every.items()}
    draft = flocking.griffin(model, options.density)
    contestants = {"full": lambda: long_seconds(model, ids, options.long)}
    for kind, twin in twins.items():
        contestants[kind] = lambda twin=twin: long_seconds(twin, ids, options.long)
    contestants["drafted"] = lambda: long_seconds(model, ids, options.long, assistant_model=draft)
    if 1 in options.compiled:
        for kind, subject in {"full": model, **twins}.items():
            decoder = flocking.Decoder(subject, options.prompt + options.long + 1)
            contestants[f"{kind}, compiled"] = lambda decoder=decoder: compiled_long_seconds(
                decoder, ids, options.long
            )
    found = interleaved(contestants, max(3, options.pairs // 3))  # each takes many tokens
    for kind in list(contestants)[1:]:
        gain = quartiles(ratios(found, "full", kind))
        print(f"{dtype:>9}  {kind:>24}: {gain} times the speed of the full model's generate")
        base = "once, compiled" if kind.endswith(", compiled") else "once"
        if kind.startswith("anew"):
            print(f"{'':>35}: {quartiles(ratios(found, base, kind))} times that of {base}")
        if kind.startswith(("once", "anew")) and kind.endswith(", compiled"):
            gain = quartiles(ratios(found, "full, compiled", kind))
            print(f"{'':>35}: {gain} times the full model's, compiled")
    for kind, twin in twins.items():
        report = twin.report()
        print(
            f"{dtype:>9}  {kind:>24}: {report.refreshes} refreshes, effective density "
            f"{report.effective_density:.3f}, {report.bytes_per_token / 1e6:.0f} MB a token"
        )
    report = draft.report()
    share = report.accepted_tokens / max(1, report.drafted_tokens)
    print(f"{dtype:>9}  {'drafted':>24}: {share:.2f} of {report.drafted_tokens} proposals taken")


def resident(name: str | None, dtype: str, density: float, scope: str, batch: int, queue) -> None:
    """Put what this fresh process holds after generating, in MiB, into the queue."""
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
    parser.add_argument("--compiled", type=int, nargs="*", default=[1], help="batch sizes")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--refresh", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--long", type=int, default=256)
    tables = ["speed", "refreshed", "memory"]
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in options.dtype:
        if "speed" in options.only:
            speed(options.model, dtype, options)
        if "refreshed" in options.only:
            refreshed(options.model, dtype, options)
        if "memory" in options.only:
            memory(options.model, dtype, options.density)


if __name__ == "__main__":
    main()
