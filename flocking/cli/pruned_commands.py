"""The commands that prune a model: generate, prune, evaluate, and the harness's own.

What needs torch is imported inside of the commands, so that help and version are quick.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import flocking
from flocking.cli.front import app
from flocking.cli.options import (
    Calibration,
    CalibrationTexts,
    DataDir,
    Densities,
    Device,
    DownType,
    Dtype,
    FixedMethod,
    KeepMultiple,
    KeepOlder,
    LimitByTask,
    Method,
    Methods,
    Model,
    OwnSamples,
    ProtocolByTask,
    Scope,
    SourceArgument,
    Tasks,
    argument,
    at_least_one,
    by_task,
    listed,
    load,
    need_harness,
    number,
    one_sentence,
    read,
)
from flocking.cli.printing import heading, say
from flocking.cli.session import as_json, notice, progress, reporting, result
from flocking.cli.tables import Column, Row, print_table

if TYPE_CHECKING:
    from flocking.pruning import Protocol


@app.command(epilog='Example: flocking generate "Birds of a feather" --compare')
@reporting
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    density: Annotated[float, typer.Option(help="Fraction of FF neurons kept.")] = 0.5,
    method: Method = "topk",
    scope: Scope = "shared",
    refresh: Annotated[
        int | None, typer.Option(help="Select anew after every so many new tokens.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 128,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the full model's text as well.")
    ] = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Continue a prompt greedily with GRIFFIN: the prompt in full, the rest with kept neurons."""
    from flocking.analysis import kept_count
    from flocking.cli.streaming import Clock
    from flocking.models import refuse_long, tokenize
    from flocking.pruning import METHODS, check_scope

    at_least_one(max_new_tokens, "--max-new-tokens")
    kept_count(density, sys.maxsize)  # in range; whether any neuron is left depends on the model
    check_scope(scope)
    at_least_one(refresh, "--refresh")
    text = read("-") if prompt == "-" else argument(prompt, "the prompt")
    if not text:
        raise ValueError("the prompt is empty: give some text to select neurons from.")
    if method not in METHODS:
        raise ValueError(f"--method {method}: choose from {', '.join(METHODS)}.")
    loaded, tokenizer = load(model, device, dtype)
    prompts = tokenize(loaded, text, tokenizer)
    refuse_long(loaded, prompts.ids, max_new_tokens, called="the prompt")
    options: dict[str, Any] = {"method": method, "scope": scope, "refresh": refresh}
    twin = flocking.griffin(loaded, density, **options)
    first = {name: each[0] for name, each in prompts.inputs.items()} | {"input_ids": prompts.ids[0]}
    inputs: dict[str, Any] = {name: row[None].to(loaded.device) for name, row in first.items()}
    inputs["attention_mask"] = inputs["input_ids"].new_ones(inputs["input_ids"].shape)
    pruned = f"GRIFFIN, density {density:g}" + (f", anew every {refresh}" if refresh else "")
    subjects: dict[str, Any] = {"full model": loaded, pruned: twin}
    rows = []
    for name, subject in list(subjects.items())[0 if compare else 1 :]:
        if compare and not as_json():
            heading(name)
        clock = Clock(tokenizer, None if as_json() else text)
        greedy = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        try:
            subject.generate(**inputs, **greedy, tokenizer=tokenizer, streamer=clock)
        except BaseException:
            clock.break_off()
            raise
        active = twin.report().active_parameters if subject is twin else loaded.num_parameters()
        rows.append({"model": name, **clock.measured(), "active_parameters": active})

    shown = functools.partial(_print_runs, rows if compare else [])
    result({"prompt": text, "continuations": rows}, shown)


def _print_runs(rows: list[dict[str, Any]]) -> None:
    if rows:
        print_table(_RUNS, rows)
        notice("Speed is that of decoding, without the prompt; one run says little about it.")


def _speed(row: Row) -> str:
    return "-" if row["tokens_a_second"] is None else f"{row['tokens_a_second']:.1f}"


_RUNS = (
    Column("", lambda row: row["model"], text=True),
    Column("new tokens", lambda row: row["new_tokens"]),
    Column("tokens a second", _speed),
    Column("active parameters", lambda row: f"{row['active_parameters']:,}"),
)


@app.command(epilog="Example: flocking prune my-model --texts news/ --density 0.5 -o my-model-half")
@reporting
def prune(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder to write, for transformers; or a .gguf file, if SOURCE is one.",
        ),
    ],
    source: SourceArgument = None,
    texts: CalibrationTexts = None,
    own_samples: OwnSamples = False,
    density: Annotated[float, typer.Option(help="Fraction of FF neurons to keep.")] = 0.5,
    method: FixedMethod = "static",
    keep_multiple: KeepMultiple = None,
    down: DownType = None,
    seed: Annotated[int, typer.Option(help="Seed of what the model writes.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model.")
    ] = False,
) -> None:
    """Write a smaller model, without the FF neurons that matter least on your texts.

    The selection is the same for every prompt, so that what is written is an ordinary model, which
    other programs run. The last fifth of the texts is held out, and says what is lost.
    """
    from flocking.cli.pruning import Request, write_pruned

    done = write_pruned(
        Request(
            source=source,
            output=output,
            texts=texts,
            own_samples=own_samples,
            density=density,
            method=method,
            multiple=keep_multiple,
            down=down,
            seed=seed,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
        )
    )
    rows = [{"name": name, "says": says} for name, says in done.rows()]
    result(asdict(done), lambda: print_table(_NAMED, rows))


_NAMED = (
    Column("", lambda row: row["name"], text=True),
    Column("", lambda row: row["says"], text=True),
)


@app.command(
    epilog="Example: flocking evaluate --tasks piqa,boolq --methods topk,static,topk@0.25 "
    "--limit 200,boolq=100 --protocol context,boolq=last-token --out out/mine"
)
@reporting
def evaluate(
    tasks: Tasks,
    methods: Methods = "topk",
    densities: Densities = "0.5",
    protocol: ProtocolByTask = "context",
    limit: LimitByTask = None,
    data_dir: DataDir = None,
    calibration: Calibration = None,
    batch_size: Annotated[int, typer.Option(help="Does not change results.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the methods that draw random numbers.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for items, tables, figures and finished cells.")
    ] = Path("out/evaluation"),
    keep_older: KeepOlder = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask the full model and its twins the items of tasks, and say what each method loses.

    Some items of a task at a time are asked of all methods, and kept in OUT/cells: after an
    interruption, or with more tasks, items or methods, the same command runs only what is not
    there. First it says how long that may take.
    """
    need_harness()
    from flocking.cli.evaluating import digests, refuse_foreign, source_of
    from flocking.evaluation import report, runner
    from flocking.evaluation.cells import Cells
    from flocking.evaluation.plan import Plan
    from flocking.models import identity
    from flocking.pruning import calibration_texts

    at_least_one(batch_size, "--batch-size")
    plan = Plan(
        listed(tasks),
        methods=listed(methods),
        densities=[number(text, "--densities", float) for text in listed(densities)],
        protocol=cast("dict[str, Protocol]", by_task(protocol, "--protocol", str)),  # Plan checks
        limit=None if limit is None else by_task(limit, "--limit", int),
        data_dir=data_dir,
        calibration=calibration,
        seed=seed,
    )
    asked = digests(plan)
    calibration_texts(calibration)
    refuse_foreign(out)
    loaded, tokenizer = load(model, device, dtype)
    known = identity(model)
    cells = Cells(out / "cells", known, keep_older)
    items = runner.evaluate(
        loaded, tokenizer, plan, batch_size=batch_size, cells=cells, say=progress
    )
    rows = report.write(items, out, source_of(loaded, tokenizer, known, plan, asked, items))
    written = [path.name for path in report.REPORT.paths(out) if path.exists()]
    document = {"out": out, "summary": rows.to_dict("records")}
    told = f"wrote {', '.join(written)} in {out}; read {out}/tables.md"
    result(document, lambda: say(told))


@app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],  # --help is the harness's
    },
)
@one_sentence
def lm_eval(context: typer.Context) -> None:
    """Run the lm-evaluation-harness with --model griffin; all other options are the harness's.

    For example: flocking lm-eval run --model griffin --model_args
    pretrained=my-model,density=0.5,protocol=context --tasks hellaswag,piqa
    """
    need_harness()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
