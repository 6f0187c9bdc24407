"""Pruned GGUF files in llama.cpp: how fast they are, how large, and what they lose.

    PYTHONPATH=.venv/llama-cpp .venv/bin/python benchmarks/llama_cpp.py [FILE.gguf ...]
        [--texts PATH ...] [--other PATH ...] [--density 0.5 0.75] [--rounds 9] [--prompt 256]
        [--new-tokens 48] [--threads 2] [--out out/llama_cpp] [--only lost speed]

Each file (by default that of the embedded model) is pruned by the static statistic of --texts, and
the whole and the pruned files run in llama.cpp, in random order in every round; printed are medians
of the rounds' ratios to the whole file, with quartiles. Beside them stand files whose FF and
attention weights are quantised more coarsely instead, by llama.cpp's own quantiser and from the
same file: what a user who wants a smaller file would take otherwise. (Rows that are no multiple
of a type's block of 256 take Q4_0, as larger types would be no saving.) The control keeps neurons
at random. The last fifth of the texts is held out; what is lost is measured over that and over
--other, texts of another kind, in float32 with the weights as they are in the files. (By default
the texts are the packaged passages but for code, which is the other kind.) Bits per byte can be
compared between models with other tokenizers, perplexities cannot.

Files are kept in OUT/ (remove them to have them made anew), and numbers in OUT.json as they come:
the next run with the same file and texts takes them, and says so if code has changed. The picture
is OUT.png. Losses take long, speeds a quiet machine: --only does one part.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from measuring import interleaved, quartiles, ratios
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import flocking
from flocking.artifacts import code_digest, file_digest, refuse_unwritable, replacing
from flocking.drawing import logarithmic
from flocking.drawing.style import STYLE
from flocking.models import embedded_file, read_gguf
from flocking.pruning import (
    Lost,
    calibration_texts,
    measure_lost,
    rounded_densities,
    split_texts,
)

SMALL = "Q5_0"  # of down-projections, where Q8_0 is larger than what it replaces
COARSER = ("Q4_0", "Q3_K", "Q2_K")
RESULT = "flocking.pruning.lost", "flocking.pruning.fixed", "flocking.pruning.gguf_files"


# --------------------------------------------------------------------------------------
# Files


def requantised(source: Path, target: Path, kind: str) -> None:
    """Write a GGUF file again with coarser FF and attention weights, by ggml's own quantiser."""
    wanted = GGMLQuantizationType[kind]

    def coarser(name: str, data: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, Any]:
        if not name.startswith("blk.") or rows.ndim != 2:
            return data, None
        fits = rows.shape[1] % 256 == 0 or kind == "Q4_0"
        chosen = wanted if fits else GGMLQuantizationType.Q4_0
        return quantised_by_ggml(rows, chosen), chosen

    rewritten(source, target, coarser)


def quantised_by_ggml(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of float32 as bytes of a type."""
    import xllamacpp
    from gguf import GGML_QUANT_SIZES

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    quantise = library.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    quantise.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    block, size = GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.empty((rows.shape[0], rows.shape[1] // block * size), np.uint8)
    quantise(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    return out


def rewritten(source: Path, target: Path, change: Callable[..., tuple[np.ndarray, Any]]) -> None:
    """Copy a GGUF file with other tensors."""
    from gguf import GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        rows = dequantize(tensor.data, tensor.tensor_type)
        data, kind = change(tensor.name, tensor.data, rows)
        writer.add_tensor(tensor.name, data, raw_dtype=kind or tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --------------------------------------------------------------------------------------
# llama.cpp


@contextmanager
def served(path: Path, threads: int, tokens: int) -> Iterator[Any]:
    """llama.cpp with a file loaded."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = tokens, 1, 0
    for each in (parameters.cpuparams, parameters.cpuparams_batch):
        each.n_threads, each.poll = threads, 0  # threads that wait do not spin
    parameters.warmup, parameters.verbosity, parameters.port = False, -1, 0
    yield xllamacpp.Server(parameters)


def timed(server: Any, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds a token: of the prompt, and of decoding."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    if "timings" not in answer:
        raise RuntimeError(f"llama.cpp: {answer}")
    timings = answer["timings"]
    return timings["prompt_per_token_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3


def speeds(files: dict[str, Path], prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of speed to the whole file's, by round, of the prompt and of decoding."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        room = args.prompt + args.new_tokens + 8
        servers = {
            name: stack.enter_context(served(path, args.threads, room))
            for name, path in files.items()
        }
        both: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}

        def run(name: str) -> float:
            both[name].append(timed(servers[name], prompt, args.new_tokens))
            return both[name][-1][1]

        contestants = {name: (lambda name=name: run(name)) for name in servers}
        interleaved(contestants, args.rounds)
    parts = {}
    for number, part in enumerate(("prompt", "decode")):
        times = {name: [pair[number] for pair in each[1:]] for name, each in both.items()}
        parts[part] = {name: ratios(times, "whole", name) for name in times}
        parts[f"{part}_tokens_a_second"] = {
            name: 1 / float(np.median(each)) for name, each in times.items()
        }
    return parts


# --------------------------------------------------------------------------------------
# What is lost


def described(lost: Lost, texts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> dict:
    """What is lost, and bits per byte of the texts."""
    size = sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in texts)
    nats = math.log(lost.pruned_perplexity) * lost.tokens
    return {**vars(lost), "ratio": lost.ratio, "bits_per_byte": nats / math.log(2) / size}


def random_selection(model: PreTrainedModel, density: float) -> Any:
    """Neurons drawn at random: the control."""
    values = flocking.weight_magnitude(model)
    drawn = values.copy(data=np.random.default_rng(0).random(values.shape))
    if "d_ff" in values.coords:
        drawn = drawn.where(values.neuron < values.d_ff)
    return flocking.select(drawn, density)


# --------------------------------------------------------------------------------------
# One model


def selections(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, tuple[Any, str]]:
    """Selections to write, by the file's name, and the type of its down-projections."""
    calibration = split_texts(model, texts_of(args)[0], tokenizer).calibration
    statistic = flocking.global_statistic(model, calibration, tokenizer=tokenizer)
    found = {}
    for density in args.density:
        rounded = rounded_densities(flocking.feedforwards(model), density, multiple=32)
        selection = flocking.select(statistic, rounded)
        found[f"pruned {density:g}"] = selection, "Q8_0"
        if density == args.density[0]:  # with coarser down-projections, too
            found[f"pruned {density:g} {SMALL}"] = selection, SMALL
    found[f"random {args.density[0]:g}"] = random_selection(model, args.density[0]), "Q8_0"
    return found


def written(source: Path, args: argparse.Namespace) -> dict[str, Path]:
    """All files of a model, made if they are not there: the control, too."""
    folder = args.out / source.stem
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for density in args.density for name in (f"pruned {density:g}",)]
    names += [f"pruned {args.density[0]:g} {SMALL}", f"random {args.density[0]:g}", *COARSER]
    files = {name: folder / f"{name.replace(' ', '-')}.gguf" for name in names}
    missing = [name for name in names if not files[name].exists()]
    for kind in COARSER:
        if kind in missing:
            with replacing(files[kind]) as partial:
                requantised(source, partial, kind)
    if {*missing} - {*COARSER}:
        model, tokenizer = flocking.load(source)
        for name, (selection, down) in selections(model, tokenizer, args).items():
            if name in missing:
                flocking.export_gguf(source, selection, files[name], down=down)
    return {"whole": source, **files}


def losses(
    source: Path, args: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]
) -> None:
    """What each file loses, on held-out texts of both kinds; kept file by file."""
    model, tokenizer = flocking.load(source)
    texts, others = texts_of(args)
    kinds = {
        "same kind": split_texts(model, texts, tokenizer).held_out,
        "another kind": split_texts(model, others, tokenizer).held_out,
    }
    for name, path in written(source, args).items():
        if name in found:
            continue
        other = model if name == "whole" else read_gguf(path)
        found[name] = {
            kind: described(measure_lost(model, other, ids, progress=False), ids, tokenizer)
            for kind, ids in kinds.items()
        }
        print(f"{name:16} {found[name]['same kind']['ratio']:.3g} times the perplexity", flush=True)
        keep()
        del other


def timings(
    source: Path, args: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]
) -> None:
    """How fast the files are, the control left out; and their sizes."""
    if found:
        return
    files = {name: path for name, path in written(source, args).items() if "random" not in name}
    tokenizer = flocking.load(source)[1]
    prompt = tokenizer("\n".join(texts_of(args)[0]))["input_ids"][: args.prompt]
    sizes = {name: path.stat().st_size for name, path in files.items()}
    found |= {"bytes": sizes, **speeds(files, prompt, args)}
    keep()


def texts_of(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Texts of the kind that models are pruned for, and of another."""
    passages = flocking.passages()
    if args.texts:
        texts = [text for path in args.texts for text in calibration_texts(path)]
    else:
        texts = [passage for passage in passages if passage.name != "code"]
    if args.other:
        return texts, [text for path in args.other for text in calibration_texts(path)]
    return texts, [passage for passage in passages if passage.name == "code"]


def key_of(source: Path, args: argparse.Namespace) -> str:
    """What the numbers of one file are of; code changes more often than they do."""
    options = {
        name: value
        for name, value in vars(args).items()
        if name in ("density", "prompt", "new_tokens")
    }
    texts = [str(text) for each in texts_of(args) for text in each]
    content = json.dumps(
        [
            file_digest(source),
            {**options, "texts": texts},
        ],
        default=str,
        sort_keys=True,
    )
    return hashlib.sha256(content.encode()).hexdigest()


def is_complete(found: dict[str, Any]) -> bool:
    """Whether each file that was timed has been judged."""
    return bool(found.get("speed")) and {*found["speed"]["bytes"]} <= {*found.get("lost", {})}


# --------------------------------------------------------------------------------------
# Showing


def printed(name: str, found: dict[str, Any]) -> None:
    """The table of one file."""
    whole = found["speed"]["bytes"]["whole"]
    print(f"\n{name}, {whole / 1e6:.0f} MB")
    print(f"{'':16}  {'bytes':>5}  {'decode':>18}  {'prompt':>18}  {'loss':>20}  {'other':>6}")
    for one, size in found["speed"]["bytes"].items():
        same, other = (found["lost"][one][kind] for kind in ("same kind", "another kind"))
        loss = f"{same['ratio']:.2f} [{same['ratio_low']:.2f}, {same['ratio_high']:.2f}]"
        decode, prompt = (quartiles(found["speed"][part][one]) for part in ("decode", "prompt"))
        print(
            f"{one:16}  {size / whole:5.2f}  {decode:>18}  {prompt:>18}  {loss:>20}  "
            f"{other['ratio']:6.2f}"
        )
    for one in found["lost"].keys() - found["speed"]["bytes"].keys():
        print(f"{one:16}  loss {found['lost'][one]['same kind']['ratio']:.3g} (control)")


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss against speed and size, a row for each model."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(results),
            2,
            figsize=(6.4, 0.5 + 2.4 * len(results)),
            squeeze=False,
            sharey="row",
            layout="constrained",
        )
        for row, (name, found) in zip(axes, results.items(), strict=True):
            whole = found["speed"]["bytes"]["whole"]
            for one, size in found["speed"]["bytes"].items():
                is_pruned = one.startswith("pruned")
                colour = "C0" if is_pruned else "0.15" if one == "whole" else "C1"
                style = {"color": colour, "marker": "o" if is_pruned else "s", "ls": "none"}
                lost = found["lost"][one]["same kind"]
                speed = float(np.median(found["speed"]["decode"][one]))
                spread = [[lost["ratio"] - lost["ratio_low"]], [lost["ratio_high"] - lost["ratio"]]]
                for ax, x in ((row[0], speed), (row[1], size / whole)):
                    ax.errorbar(x, lost["ratio"], yerr=spread, ms=3, lw=0.8, **style)
                    if one.endswith(SMALL):  # below, since its neighbour's is above
                        y, style_of = lost["ratio_low"], {"xytext": (0, -10), "ha": "center"}
                    elif is_pruned:
                        y, style_of = lost["ratio_high"], {"xytext": (0, 3), "ha": "center"}
                    elif one == "whole":  # below, since others are near
                        y, style_of = lost["ratio"], {"xytext": (0, -9), "ha": "center"}
                    else:
                        y, style_of = lost["ratio"], {"xytext": (4, -2), "ha": "left"}
                    ax.annotate(one, (x, y), textcoords="offset points", **style_of)
            row[0].set(ylabel="perplexity, times whole file")
            row[0].set_title(name, loc="left")
            logarithmic(row[0], row[0].yaxis, [1, 2, 5, 10])
            for ax, label in zip(row, ("decoding speed", "bytes"), strict=True):
                ax.set_xlabel(f"{label}, times whole file")
                ax.margins(x=0.2, y=0.15)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def main() -> None:
    """Measure every file, keep the numbers, draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--texts", nargs="+")
    parser.add_argument("--other", nargs="+")
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/llama_cpp"))
    parser.add_argument("--only", nargs="+", choices=["lost", "speed"], default=["lost", "speed"])
    args = parser.parse_args()
    random.seed(0)
    numbers = args.out.with_suffix(".json")
    refuse_unwritable(numbers)
    kept = json.loads(numbers.read_text()) if numbers.exists() else {}
    sources = args.files or [embedded_file()]

    def keep() -> None:
        with replacing(numbers) as partial:
            partial.write_text(json.dumps(kept, indent=1) + "\n")

    code = hashlib.sha256("".join(map(code_digest, RESULT)).encode()).hexdigest()
    for part, measure in (("lost", losses), ("speed", timings)):
        for source in sources if part in args.only else []:
            key = key_of(source, args)
            mine = kept.setdefault(source.stem, {"key": key})
            if mine["key"] != key:
                parser.error(
                    f"{numbers} has numbers of {source.stem} with other texts or options: name "
                    "another --out."
                )
            print(f"{source.stem}: {part}", flush=True)
            if mine.setdefault(f"{part}_code", code) != code:
                print(f"(begun with older code: remove '{part}' from {numbers} to measure it anew)")
            measure(source, args, mine.setdefault(part, {}), keep)
    results = {source.stem: kept[source.stem] for source in sources}
    results = {name: each for name, each in results.items() if is_complete(each)}
    for name, found in results.items():
        printed(name, found)
    if results:
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
