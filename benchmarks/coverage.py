"""Lists which of transformers' model types can be recorded and pruned, from trials on small models.

    .venv/bin/python benchmarks/coverage.py [--types llama ...] [--out docs/architectures.md]

Every type in transformers' mappings of causal, masked and encoder-decoder language models is built
from its own default config, shrunk by one set of rules, with random weights. Its FF blocks are
located and proved, and `flocking.check` is run on it: a batch of texts of different lengths is
recorded and compared with each text alone, and causal types generate with a twin at density 1,
which must give what the full model gives, and at one half, which must give what it gives with all
other neurons masked. Where that holds, the twin is also decoded by `flocking.Decoder`, traced but
not compiled (which would take minutes), which must give the tokens that `generate` gives. A twin
that refreshes its selection (`refresh`) must generate what the full model does, at one half with a
refresh at every token, and at density 1 with one at every third. A selection of one half and
three tenths of the layers' neurons in turn, by the norms of their weights, is exported (`export`),
and the folder, read by transformers, must give the logits of the whole model with zeros in the
place of all other neurons' columns of the down-projections.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pandas as pd
import torch
import transformers as tf
import xarray as xr
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import flocking
from flocking.feedforward import UnsupportedModelError, moe
from flocking.pruning import graphs

MAPPINGS = {
    "causal": (tf.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (tf.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "encoder-decoder": (
        tf.AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
}
VOCABULARY = 128
SECONDS = 300  # for one type

# --------------------------------------------------------------------------------------
# Shrinking: what a whole number in a config is set to, by the name it has there


class Try(NamedTuple):
    """A way of shrinking: sizes, and what is done with fields that a config derives from others."""

    depth: int
    width: int
    head: int
    lists: bool  # by layer are cut, or else left out
    declared: bool = False  # start from the defaults that the class declares


# The first that works is used. The last are for classes that derive sizes which must fit one
# another, and for layers that must be there more than once.
TRIES = [
    *(Try(2, 64, head, lists) for head in (16, 32) for lists in (True, False)),
    *(Try(4, 128, 32, lists, declared=True) for lists in (True, False)),
]
_HEAD = r"(head_dim|d_head|head_size|kv_channels|dim_head|d_kv|headdim)$"
RULES = [
    (r"vocab_size|_vocab$", VOCABULARY),
    (r"position|seq_len|^n_ctx$|context_length|max_length|seq_length", 256),
    (r"window|_len$|(?<!tokenizer_)chunk_size|chunk_length|local_attention|block_size|budget$", 16),
    (r"(left|right)_context$|filters$|compress_ratio$", 4),
    (_HEAD, "head"),
    (r"indexer_kv_heads$", 1),
    (r"(key_value_heads|kv_heads|query_groups|key_heads)$", 2),
    (r"heads?(_per_layer)?$", 4),
    (r"per_tok(en)?$|topk$|^moe_k$|^top_k$|topk_group$|n_group$|expert_group$|n_?groups$", 2),
    (r"shared_experts$|offset$|first_k_dense_replace|dense_layers$|codebooks$", 1),
    (r"period$|interval$|every_n_layers$", 2),
    (r"experts?(_num)?$", 4),
    (r"shared_layers$", 0),
    (r"(?<!cross_attention_)layers$|n_layer$|num_blocks$|per_stack$", "depth"),
    (r"rotary_dim$", 8),
    (r"rank$", 16),
    (
        r"intermediate|ffn_dim|ffn_hidden|feed_forward|^dff$|dim_ff$|d_ff$|n_inner|d_(inner|ssm)$",
        160,
    ),
    (
        r"hidden_size|d_model|n_embd|(emb|embed|embds|proj|hidden)_dim|(embedding|input)_size|"
        r"width$|_dim$",
        "width",
    ),
]
TOKENS = {"pad": 0, "bos": 1, "eos": 2}
# Numbers that some classes leave open, though their models need them.
NEEDED = rf"key_value_heads$|per_tok$|(routed|shared)_experts$|^vocab_size$|^indexer_|{_HEAD}"


def shrunk(
    config: tf.PreTrainedConfig, how: Try, lacking: dict[type, dict[str, object]]
) -> dict[str, object]:
    """Arguments for a small config of this class, with the fields that classes are `lacking`."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depths = {
        values.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    }
    by_layer = [v for v in values.values() if isinstance(v, list | tuple) and len(v) in depths]
    # Two layers that differ in as many ways as there are.
    other = max(range(1, max([2, *map(len, by_layer)])), key=lambda n: _differing(by_layer, n))
    if how.declared:
        first = {field.name: field.default for field in dataclasses.fields(config)}
        values = {
            name: value if isinstance(value, tf.PreTrainedConfig | list | tuple) else first[name]
            for name, value in values.items()
            if name in first
        }
    arguments: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, bool) or name == "qk_head_dim":  # it follows from others
            continue
        if isinstance(value, tf.PreTrainedConfig):
            arguments[name] = {"model_type": value.model_type, **shrunk(value, how, lacking)}
        elif isinstance(value, list | tuple) and len(value) in depths and len(value) > 2:
            if how.lists:
                two = [value[0], value[other]]
                arguments[name] = [_small(name, v, how) if type(v) is int else v for v in two]
                arguments[name] *= how.depth // 2
                if set(arguments[name]) == {"linear_attention"}:
                    arguments[name][-1] = "full_attention"  # its cache counts the tokens
        elif isinstance(value, list | tuple) and re.search("_dim$", name):  # the width, in parts
            arguments[name] = [how.width // len(value)] * len(value)
        elif type(value) is int and re.search(r"(token_id|_id|_index)$", name):
            if "layer" not in name and value >= 0:
                arguments[name] = next((n for key, n in TOKENS.items() if key in name), 3)
        elif type(value) is int:
            arguments[name] = _small(name, value, how)
        elif getattr(config, name) in (None, {}):
            needed = _needed(name, values, how)
            arguments |= {} if needed is None else {name: needed}
    heads = values.get("num_attention_heads")
    if heads is not None and values.get("num_key_value_heads") == heads:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    for name, value in lacking.get(type(config), {}).items():
        arguments[name] = _small(name, value, how) if type(value) is int else value
    return arguments


def _differing(lists: list[list], layer: int) -> int:
    return sum(len(values) > layer and values[layer] != values[0] for values in lists)


def _needed(name: str, values: dict[str, object], how: Try) -> object:
    """The value of a field that a class leaves open and its model needs, or None."""
    if re.search(NEEDED, name):
        return _small(name, sys.maxsize, how)
    if name == "layer_types":
        return ["full_attention"] * how.depth
    if name == "attn_layer_indices":
        return [how.depth - 1]
    if name == "rope_parameters":
        rotation = {"rope_type": "default", "rope_theta": 10000.0}
        return dict.fromkeys(values.get("layer_types") or (), rotation)
    if name.startswith("default_"):  # the first of those that there are
        return next(iter(values.get(f"{name.removeprefix('default_')}s") or ()), None)
    # Most models do not need these.
    return {"pad_token_id": TOKENS["pad"], "clip_qkv": 8.0}.get(name) if how.declared else None


def _small(name: str, value: int, how: Try) -> int:
    for pattern, size in RULES:
        if re.search(pattern, name):
            new = getattr(how, size) if isinstance(size, str) else size
            return value if value <= 0 else min(value, new)
    return value


def built(auto: type, kind: str, causal: bool) -> tf.PreTrainedModel:
    """A small model of this type: the first of several tries that runs."""
    base = CONFIG_MAPPING[kind]()
    problems = []
    lacking: dict[type, dict[str, object]] = defaultdict(dict)
    for how in TRIES:
        try:
            arguments = shrunk(base, how, lacking)
            if causal and hasattr(base, "is_decoder"):
                arguments["is_decoder"] = True
            torch.manual_seed(0)
            model = _of_config(auto, CONFIG_MAPPING[kind](**arguments)).eval()
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():  # nothing stays 0 or 1
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            ids = torch.arange(3, 11)[None]
            more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            with torch.no_grad():
                model(input_ids=ids, **more)
            return model
        except Exception as problem:  # configs and models may fail in any way
            problems.append(problem)
            # Where a class has no such field, the same field of another config may do.
            if isinstance(problem, AttributeError) and isinstance(problem.obj, tf.PreTrainedConfig):
                lacking[type(problem.obj)].update(_found(base.to_dict(), problem.name))
    raise problems[0]


def _of_config(auto: type, config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    """The model of a config, or of that part of it which the model's class takes."""
    model_class = auto._model_mapping[type(config)]
    own = [part for part in vars(config).values() if type(part) is model_class.config_class]
    return model_class(own[0]) if own else auto.from_config(config)


def _found(fields: dict[str, object], name: str) -> dict[str, object]:
    """The first field of this name in nested fields, if there is one."""
    if name in fields:
        return {name: fields[name]}
    inner = (_found(value, name) for value in fields.values() if isinstance(value, dict))
    return next(filter(None, inner), {})


# --------------------------------------------------------------------------------------
# Trying


# Names of modules that show that there is an FF, although it could not be proved. Without any
# such name, as in pure state-space models, there is none.
EXPERTS = r"moe|expert"
FF = rf"{EXPERTS}|mlp|ffn|feed_?forward|\bff\b|intermediate|fc_?\d|dense|glu"


class Row(NamedTuple):
    """A line of the table."""

    type: str
    ff: str = ""
    activation: str = ""
    recorded: str = ""
    griffin: str = ""
    decoder: str = ""
    refresh: str = ""
    export: str = ""
    reason: str = ""


def tried(mapping: str, kind: str) -> Row:
    """Find out what can be done with a type."""
    auto, _ = MAPPINGS[mapping]
    causal = mapping == "causal"
    try:
        model = built(auto, kind, causal)
    except Exception as problem:
        return Row(
            kind, recorded="not built", reason=_first_paragraph(problem.__cause__ or problem)
        )
    row = Row(kind, activation=_activation(model))
    try:
        blocks = flocking.feedforwards(model)
    except UnsupportedModelError as problem:
        if not called(model, FF):
            return row._replace(recorded="no FF")
        return row._replace(
            ff="experts" if called(model, EXPERTS) else "",
            recorded="no",
            griffin="no" if causal else "",
            reason=_first_paragraph(problem),
        )
    row = row._replace(ff=", ".join(sorted({block.kind for block in blocks})))
    checks = flocking.check(model)
    recording, selection, griffin = (
        "; ".join(f"{name}: {_first_paragraph(row.reason)}" for name, row in part.iterrows())
        for part in (failed(checks[:3]), failed(checks[3:4]), failed(checks[4:]))
    )
    if causal and (unfit := checks.reason[checks.passed.isna()]).size:
        griffin = _first_paragraph(unfit.iloc[0])
    row = row._replace(
        recorded="no" if recording else "yes",
        reason="; ".join(filter(None, (recording, selection, griffin))),
    )
    if not causal:
        return row
    if griffin:
        return row._replace(griffin="no", decoder="no", refresh="no", export="no")
    decoder, *why = decoded(model)
    refresh, *why[1:] = refreshed(model)
    export, *why[2:] = exported(model)
    reason = "; ".join(filter(None, (row.reason, *why)))
    return row._replace(
        griffin="yes", decoder=decoder, refresh=refresh, export=export, reason=reason
    )


def decoded(model: tf.PreTrainedModel) -> tuple[str, str]:
    """Whether a twin gives the same tokens in fixed shapes, or else why not."""
    graphs._COMPILER = "eager"
    torch._dynamo.reset()
    twin = flocking.griffin(model, 0.5)
    twin.generation_config = tf.GenerationConfig(pad_token_id=0)
    try:
        decoder = flocking.Decoder(twin, 32, batch_size=2)
        for length in (9, 17):
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
            mask = torch.ones_like(ids)
            expected = twin.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
            if not torch.equal(decoder.generate(ids, mask, max_new_tokens=8), expected):
                return "no", "Decoder gives other tokens, more than rounding explains"
    except Exception as problem:
        return "no", f"Decoder: {_first_paragraph(problem)}"
    return "yes", ""


def refreshed(model: tf.PreTrainedModel) -> tuple[str, str]:
    """Whether a twin that reads again gives what the full model gives, or else why not."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    config = tf.GenerationConfig(pad_token_id=0)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    options |= {"attention_mask": torch.ones_like(ids), "generation_config": config}

    def logits(subject: tf.PreTrainedModel) -> torch.Tensor:
        return torch.stack(subject.generate(ids, do_sample=False, **options).logits, dim=1)

    try:
        expected = logits(model)
        for density, every in ((0.5, 1), (1.0, 3)):
            got = logits(flocking.griffin(model, density, refresh=every))
            # Behind a token that rounding decided, texts go on differently.
            same = (got.argmax(-1) == expected.argmax(-1)).all(dim=0).long().cumprod(dim=0)
            compared = slice(0, min(int(same.sum()) + 1, len(same)))
            gap = (got - expected)[:, compared].abs().max() / expected.abs().max()
            if not gap < 1e-2:
                return "no", "refresh gives other tokens, more than rounding explains"
    except Exception as problem:
        return "no", f"refresh: {_first_paragraph(problem)}"
    return "yes", ""


def exported(model: tf.PreTrainedModel) -> tuple[str, str]:
    """Whether an export gives what the model gives without the other neurons, or else why not."""
    ids = torch.arange(3, 19)[None]
    try:
        blocks = flocking.feedforwards(model)
        firsts = [next(b for b in blocks if b.down is block.down) for block in blocks]
        places = [[b.down for b in blocks if b.call == 0].index(block.down) for block in firsts]
        densities = np.array([0.5, 0.3])[np.array(places) % 2]
        kept = flocking.select(flocking.weight_magnitude(model), densities)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            flocking.export(model, kept, f"{folder}/smaller")
            again = type(model).from_pretrained(f"{folder}/smaller").eval()
            got = again(input_ids=ids, use_cache=False).logits
            expected = _masked(model, kept)(input_ids=ids, use_cache=False).logits
    except Exception as problem:
        return "no", f"export: {_first_paragraph(problem)}"
    if not (got - expected).abs().max() <= 1e-4 * expected.abs().max():
        return "no", "export gives other logits, more than rounding explains"
    return "yes", ""


def _masked(model: tf.PreTrainedModel, kept: xr.DataArray) -> tf.PreTrainedModel:
    """A copy with zeros where the down-projections would read neurons that are not kept."""
    copied = copy.deepcopy(model)
    for block in flocking.feedforwards(copied):
        if block.call:
            continue
        mask = torch.from_numpy(kept.sel(layer=block.layer).to_numpy()[: block.d_ff])
        # (Other layers may have the same parameter.)
        weight = block.weight.detach().clone()
        named = "down_proj" if block.kind == "experts" else "weight"
        setattr(block.down, named, torch.nn.Parameter(weight))
        if block.kind == "experts":
            (axis,) = (axis for name, axis, _ in moe.axes(block.down) if name == "down_proj")
            weight.mul_(mask.view(block.experts, -1).unsqueeze(3 - axis))
        else:
            weight.mul_(mask[:, None] if isinstance(block.down, Conv1D) else mask)
    return copied


def called(model: tf.PreTrainedModel, names: str) -> bool:
    """Whether the path or the class of any module matches `names`."""
    return any(
        re.search(names, f"{path} {type(module).__name__}", re.IGNORECASE)
        for path, module in model.named_modules()
    )


def failed(checks: pd.DataFrame) -> pd.DataFrame:
    """The checks that apply and did not pass."""
    return checks[~checks.passed.fillna(True).astype(bool)]


def _activation(model: tf.PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    names = (
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "activation",
        "mlp_hidden_act",
    )
    return next((str(a) for name in names if (a := getattr(config, name, None))), "")


def _first_paragraph(problem: Exception | str) -> str:
    """What an error says, whole and in one line, without the traces that torch puts below."""
    lines = str(problem).strip().partition("\n\n")[0].splitlines()
    text = "; ".join(" ".join(line.split()) for line in lines)
    return re.sub(r"([.:;,]);", r"\1", text) or type(problem).__name__


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------
# The table


def summary(rows: list[Row]) -> str:
    """The counts in a sentence."""
    state = Counter(row.recorded for row in rows)
    with_ff = [row for row in rows if row.recorded not in ("not built", "no FF")]
    dense = [row for row in with_ff if "experts" not in row.ff]
    recorded = _share(state["yes"], len(with_ff))
    text = f"{recorded} types that could be built and have an FF are recorded"
    if any(row.griffin for row in with_ff):
        run = sum(row.griffin == "yes" for row in dense)
        text += f", and {_share(run, len(dense))} dense ones run GRIFFIN"
        twins = [row for row in with_ff if row.griffin == "yes"]
        fixed = sum(row.decoder == "yes" for row in twins)
        text += (
            f"; of all that do, {_share(fixed, len(twins))} also decode in fixed shapes (Decoder), "
            f"{_share(sum(row.refresh == 'yes' for row in twins), len(twins))} refresh their "
            f"selections, and {_share(sum(row.export == 'yes' for row in twins), len(twins))} are "
            "exported"
        )
    wrong = sum("than rounding explains" in row.reason for row in rows)
    return (
        f"{text}; {wrong} gave something wrong without an error. Not counted: {state['not built']} "
        f"that could not be built, {state['no FF']} without an FF (pure state-space models)."
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / max(whole, 1):.1%})"


def page(tables: dict[str, list[Row]]) -> str:
    """The page of the documentation."""
    text = (
        "# Architectures\n\nMade by `benchmarks/coverage.py`, which describes how each type is "
        f"tried: a tiny model with random weights, transformers {tf.__version__}, torch "
        f"{torch.__version__}.\n"
    )
    for mapping, rows in tables.items():
        text += f"\n## {mapping.capitalize()} language models\n\n{summary(rows)}\n\n"
        names = ("type", "FF", "activation", "recorded", "GRIFFIN", "Decoder", "refresh", "export")
        text += f"| {' | '.join((*names, 'reason'))} |\n" + "| --- " * len(Row._fields) + "|\n"
        for row in sorted(rows):
            cells = [str(cell).replace("|", "\\|") for cell in row]
            text += f"| {' | '.join(cells)} |\n"
    return text


def main() -> None:
    """Try all types and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--mappings", nargs="*", default=list(MAPPINGS), choices=list(MAPPINGS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more threads only wait in models as small as these
    tables = {}
    for mapping in options.mappings:
        rows = []
        for kind in options.types or MAPPINGS[mapping][1]:
            if kind not in MAPPINGS[mapping][1]:
                continue
            started = time.perf_counter()
            try:
                with limited(SECONDS):
                    row = tried(mapping, kind)
            except TimeoutError as problem:
                row = Row(
                    kind,
                    recorded="no",
                    griffin="no",
                    decoder="no",
                    refresh="no",
                    export="no",
                    reason=str(problem),
                )
            rows.append(row)
            seconds = time.perf_counter() - started
            print(f"{mapping:>15} {seconds:5.1f} s  " + " | ".join(row), flush=True)
        print(f"{mapping}: {summary(rows)}", flush=True)
        tables[mapping] = rows
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
