"""The commands that study a model: record, demo, figures, inspect, check.

What needs torch is imported inside of the commands, so that help and version are quick.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import flocking
from flocking.cli import choices
from flocking.cli.choices import one_of
from flocking.cli.front import app
from flocking.cli.options import (
    Continuations,
    Device,
    Dtype,
    Model,
    ModelArgument,
    OnError,
    PromptTokens,
    is_first,
    load,
    numbers_of,
    passage,
)
from flocking.cli.printing import complain, counted, heading, printable, say
from flocking.cli.session import as_json, notice, reporting, result
from flocking.cli.tables import Column, print_table

if TYPE_CHECKING:
    from flocking.experiments import Outcome

_TOLD = 3  # texts that were left out and are named


@app.command(
    epilog="Example: flocking record article.txt news/ more.jsonl -o out/mine.zarr --layers 0,10-12"
)
@reporting
def record(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Text files, folders of them, patterns such as 'news/**/*.txt', and files of JSON "
            "lines, with a text in each; - is standard input.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.zarr", help="Zarr store to write.")
    ],
    model: Model = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 64,
    layers: Annotated[
        str | None, typer.Option(help="Layers, such as 0,5,10-12; all by default.")
    ] = None,
    ranks: Annotated[
        bool,
        typer.Option("--ranks", help="Keep ranks, for rank_consistency; slower, larger."),
    ] = False,
    prompt_tokens: PromptTokens = None,
    continuation: Continuations = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Continue each text greedily by at most this many tokens.")
    ] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Read at most this many tokens of each text, the first ones.")
    ] = None,
    field: Annotated[
        str, typer.Option(help="Where the text is in objects of JSON lines (.jsonl).")
    ] = "text",
    on_error: OnError = "stop",
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace OUT.zarr if it exists; begins anew where a run was interrupted.",
        ),
    ] = False,
) -> None:
    """Record texts, one sequence each, into a Zarr store.

    Blocks of texts are written as they are done. If a run was interrupted, the same command goes on
    with the rest. Processes that torchrun starts share the texts.
    """
    from flocking.cli.outputs import refuse_nothing
    from flocking.cli.recording import record_into, texts_of
    from flocking.recording import Options, Wanted, check_numbers, new_store_path

    check_numbers(window, max_new_tokens, max_tokens)
    numbers = numbers_of(layers)
    refuse_nothing("output", output)
    output = new_store_path(output, "--output")
    texts, names, answers = texts_of(files, field, continuation, on_error)
    wanted = Wanted(prompt_tokens, answers, max_new_tokens)
    checked = Options(wanted, window, numbers, max_tokens, ranks=ranks).checked()
    loading = functools.partial(load, model, device, dtype)
    sizes, skipped = record_into(output, texts, names, checked, on_error, overwrite, loading)
    if is_first():
        _tell(output, sizes, skipped)


def _tell(output: Path, sizes: dict[str, int], skipped: list[str]) -> None:
    """Say what was recorded and what was not, and how to open it."""
    if skipped:
        from flocking.models import warn

        more = "; ..." if len(skipped) > _TOLD else ""
        warn(f"{counted(len(skipped), 'text')} left out: {'; '.join(skipped[:_TOLD])}{more}")
    told = ", ".join(counted(size, dim) for dim, size in sizes.items())
    document = {"output": output, "sizes": sizes, "skipped": skipped}
    result(document, lambda: say(f"wrote {output}: {told}"))
    notice(f"open it with flocking.open_recording({str(output)!r})")


@app.command(epilog="Example: flocking demo --out out")
@reporting
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.zarr and demo.png.")] = Path("out"),
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Record the packaged passages, print how they flock by layer, and draw one of them.

    Beside it, the same tokens in a network of the same shape with random weights.
    """
    from flocking.artifacts import replacing
    from flocking.cli.demo import by_layer, print_by_layer
    from flocking.cli.outputs import refuse_other_than_demos as known
    from flocking.cli.pictures import beside_control, name_of, save_picture
    from flocking.recording import write_store

    stored, picture = out / "demo.zarr", out / "demo.png"
    with replacing(picture, check=known) as drawn, replacing(stored, check=known) as partial:
        loaded, tokenizer = load(model, device, dtype)
        passages = flocking.passages()
        ids = [tokenizer(passage)["input_ids"][:512] for passage in passages]
        layers = [block.layer for block in flocking.feedforwards(loaded)]
        shown = layers[2 * len(layers) // 3]  # where most models flock clearly
        recording = flocking.record(loaded, ids, tokenizer=tokenizer, relative=[shown])
        recording = recording.assign_coords(sequence=[passage.name for passage in passages])
        rows = by_layer(recording)
        document = {"model": name_of(recording), "sequences": len(ids), "layers": rows}
        result(
            document | {"recording": stored, "picture": picture},
            lambda: print_by_layer(recording, rows),
        )

        write_store(recording, partial)
        # The same tokens in the same windows, by one that has learned nothing.
        at = [passage.name for passage in passages].index("reportage")
        random = flocking.control(loaded)
        other = flocking.record(
            random, ids[at], tokenizer=tokenizer, relative=[shown], progress=False
        ).assign_coords(sequence=["reportage"])
        figure = beside_control(recording, other, shown, "reportage", "passage 'reportage'")
        origin = {
            key: recording.attrs[key] for key in ("architecture", "dtype", "flocking_version")
        }
        save_picture(figure, drawn, {"Source": name_of(recording), **origin})
    notice(
        f"\nwrote {stored} and {picture}. Next:\n"
        f"  look at {picture}: vertical streaks are neurons that flock, in random weights, too;\n"
        f"  open the numbers: flocking.open_recording({str(stored)!r});\n"
        "  run `make notebook`, and notebooks/flocking.ipynb in it, for chance and control;\n"
        "  read README.md for ten lines of Python of your own."
    )


@app.command(epilog="Example: flocking figures --only drift --out out/figures")
@reporting
def figures(
    out: Annotated[Path, typer.Option(help="Folder for the figures and their numbers.")] = Path(
        "figures"
    ),
    model: Model = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(help="A text file; repeat it for more. The packaged passages by default."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A figure's name; repeat it for more.", autocompletion=one_of(choices.FIGURES)
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights and random selections.")] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only say which figures are out of date, and what changed in the numbers since "
            "the last commit; exit code 1 if one is. Runs no model.",
        ),
    ] = False,
    redraw: Annotated[
        bool,
        typer.Option("--redraw", help="Only draw again what is there, however old its numbers."),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run the experiments and draw their figures, with chance and random weights to compare.

    Each figure is a PNG and an SVG, a JSON file with its numbers and where they come from, and a
    page of Markdown with its caption.
    Where the numbers are there already, for the same model, texts, versions and code, they are
    only drawn again.
    """
    from flocking import experiments
    from flocking.models import identity
    from flocking.recording import check_numbers

    check_numbers(seed=seed)
    if redraw and check:
        raise ValueError("--redraw and --check: give one of the two.")
    if redraw:
        _refuse_ignored(model=model, texts=texts, seed=seed, device=device, dtype=dtype)
    passages = [passage(name) for name in texts] if texts else flocking.passages()
    if redraw:
        done = experiments.redraw(out, only=only, say=notice)
    else:
        key = f"{identity(model)} {dtype}"
        if device and not device.startswith("cpu"):
            key += f" {device.partition(':')[0]}"  # other devices round otherwise
        inputs = (key, passages)
        if check:
            told = notice if as_json() else say
            done = experiments.check(out, *inputs, only=only, seed=seed, say=told)
        else:
            read = functools.partial(load, model, device, dtype)
            done = experiments.regenerate(out, read, *inputs, only=only, seed=seed, say=notice)
    result({"figures": [each._asdict() for each in done]}, lambda: None)
    _end_unless_made(done, check)


def _end_unless_made(done: Sequence[Outcome], check: bool) -> None:
    """End with an exit code where a figure cannot be made, or a check found one out of date."""
    from flocking.experiments import unmade

    if problem := unmade(done):
        complain(problem)
        raise typer.Exit(2)
    if check and any(each.why for each in done):
        raise typer.Exit(1)


def _refuse_ignored(**options: object) -> None:
    """Refuse options that would say of which numbers figures are, where these are there."""
    if ignored := [f"--{name}" for name, value in options.items() if value]:
        raise ValueError(
            f"--redraw draws the numbers that are there: leave {' and '.join(ignored)} out."
        )


@app.command(epilog="Example: flocking inspect HuggingFaceTB/SmolLM2-135M")
@reporting
def inspect(model: ModelArgument = None, device: Device = None, dtype: Dtype = None) -> None:
    """Show a model's FF blocks, how exactly each was proved, and whether GRIFFIN can prune it."""
    from flocking.feedforward import width

    loaded, _ = load(model, device, dtype)
    blocks = flocking.feedforwards(loaded)
    rows = []
    for block in blocks:
        sizes = None if block.kind == "experts" else width(block.down)
        rows.append(
            {
                "layer": block.layer,
                "module": block.path,
                "kind": block.kind,
                "hidden": sizes[1] if sizes else block.weight.numel() // block.d_ff,
                "d_ff": block.d_ff,
                "experts": block.experts if block.kind == "experts" else None,
                "proof_error": block.error,
            }
        )
    document: dict[str, object] = {
        "model": type(loaded).__name__,
        "parameters": loaded.num_parameters(),
        "blocks": rows,
        "griffin": True,
        "why_not": None,
        "active_parameters": None,
    }
    try:
        report = flocking.griffin(loaded).report()
    except ValueError as problem:
        document |= {"griffin": False, "why_not": str(problem)}
        verdict = f"GRIFFIN: no. {problem}"
    else:
        document["active_parameters"] = report.active_parameters
        share = report.active_parameters / loaded.num_parameters()
        verdict = f"GRIFFIN: yes, at density 0.5 with {share:.0%} of the parameters"

    def shown() -> None:
        heading(f"{printable(document['model'])}, {document['parameters']:,} parameters")
        print_table(_BLOCKS, rows)
        say(f"recorded: yes; {verdict}")

    result(document, shown)


_BLOCKS = (
    Column("layer", lambda row: row["layer"]),
    Column("module", lambda row: row["module"], text=True),
    Column("kind", lambda row: row["kind"], text=True),
    Column("hidden", lambda row: row["hidden"], spare=1),
    Column("d_ff", lambda row: row["d_ff"]),
    Column("experts", lambda row: row["experts"] or ""),
    Column("proof's error", lambda row: f"{row['proof_error']:.1g}"),
)


@app.command(epilog="Example: flocking check my-model && echo fit for use")
@reporting
def check(model: ModelArgument = None, device: Device = None, dtype: Dtype = None) -> None:
    """Check that a model's recordings and twins are right; the exit code is 1 if they are not.

    The FF blocks are proved; outputs must not change while watched, nor texts in a batch; a twin
    must keep the neurons that the analysis selects, and compute what the full model does, at
    density 1 or with all other neurons masked.
    """
    import pandas as pd

    results = flocking.check(*load(model, device, dtype))
    rows = [
        {
            "check": name,
            "passed": None if pd.isna(row.passed) else bool(row.passed),
            "error": float(row.error),
            "allowed": float(row.allowed),
            "reason": row.reason,
        }
        for name, row in results.iterrows()
    ]
    failed = any(row["passed"] is False for row in rows)
    result({"passed": not failed, "checks": rows}, lambda: print_table(_CHECKS, rows))
    if failed:
        raise typer.Exit(1)


def _number(value: float) -> str:
    return "" if value != value else f"{value:.1g}"  # (NaN is not itself)


_CHECKS = (
    Column("check", lambda row: row["check"], text=True),
    Column(
        "result",
        lambda row: {True: "passed", False: "FAILED", None: "does not apply"}[row["passed"]],
        text=True,
    ),
    Column("relative error", lambda row: _number(row["error"])),
    Column("allowed", lambda row: _number(row["allowed"])),
    Column("reason", lambda row: row["reason"], text=True),
)
