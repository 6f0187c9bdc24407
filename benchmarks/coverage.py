"""Which of transformers' model types can be recorded and pruned: built small, tried, and listed.

    .venv/bin/python benchmarks/coverage.py [--types llama ...] [--out docs/architectures.md]

Every type in transformers' mappings of causal, masked and encoder-decoder language models is built
from its own default config, shrunk by one set of rules, with random weights. Its FF blocks are
located and proved, and `flocking.check` is run on it: a batch of texts of unequal length is
recorded and held against each text alone, and causal types generate with a twin at density 1,
which must give what the full model gives, and at one half, which must give what it gives with all
other neurons masked.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd
import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flocking
from flocking.feedforward import UnsupportedModelError

MAPPINGS = {
    "causal": (tf.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (tf.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "encoder-decoder": (
        tf.AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
}
VOCABULARY = 128
SECONDS = 90  # for one type

# --------------------------------------------------------------------------------------
# Shrinking: what a whole number in a config is set to, by the name it has there

_HEAD = r"(head_dim|d_head|head_size|kv_channels|dim_head|d_kv|headdim)$"
RULES = [
    (r"vocab_size|_vocab$", VOCABULARY),
    (r"position|seq_len|^n_ctx$|context_length|max_length|seq_length", 256),
    (r"window|_len$|chunk_size|chunk_length|local_attention|block_size", 16),
    (_HEAD, 16),
    (r"(key_value_heads|kv_heads|query_groups|key_heads)$", 2),
    (r"heads?(_per_layer)?$", 4),
    (r"per_tok(en)?$|topk$|^moe_k$|^top_k$|topk_group$|n_group$|expert_group$|n_?groups$", 2),
    (r"shared_experts$|offset$|first_k_dense_replace", 1),
    (r"period$|interval$|every_n_layers$", 2),
    (r"experts?(_num)?$", 4),
    (r"shared_layers$", 0),
    (r"(?<!cross_attention_)layers$|n_layer$|num_blocks$|per_stack$", 2),
    (r"rotary_dim$", 8),
    (r"rank$", 16),
    (r"intermediate|ffn_dim|ffn_hidden|feed_forward|^dff$|dim_ff$|d_ff$|n_inner|d_inner$", 160),
    (
        r"hidden_size|d_model|n_embd|(emb|embed|embds|proj|hidden)_dim|embedding_size|width$|_dim$",
        64,
    ),
]
TOKENS = {"pad": 0, "bos": 1, "eos": 2}


def shrunk(config: tf.PreTrainedConfig, lists: bool, head: int) -> dict[str, object]:
    """Arguments for a small config of the same class; `lists` by layer are cut or left out."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depths = {
        values.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    }
    by_layer = [v for v in values.values() if isinstance(v, list | tuple) and len(v) in depths]
    # Two layers that differ in as many ways as there are.
    other = max(range(1, max([2, *map(len, by_layer)])), key=lambda n: _differing(by_layer, n))
    arguments: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, bool) or name == "qk_head_dim":  # which follows from others
            continue
        if isinstance(value, tf.PreTrainedConfig):
            arguments[name] = shrunk(value, lists, head)
        elif isinstance(value, list | tuple) and len(value) in depths and len(value) > 2:
            if lists:
                two = [value[0], value[other]]
                arguments[name] = [_small(name, v, head) if type(v) is int else v for v in two]
        elif type(value) is int and re.search(r"(token_id|_id|_index)$", name):
            if "layer" not in name and value >= 0:
                arguments[name] = next((n for key, n in TOKENS.items() if key in name), 3)
        elif type(value) is int:
            arguments[name] = _small(name, value, head)
        elif value is None and re.search(
            f"key_value_heads$|per_tok$|routed_experts$|{_HEAD}", name
        ):
            arguments[name] = _small(name, sys.maxsize, head)
    heads = values.get("num_attention_heads")
    if heads is not None and values.get("num_key_value_heads") == heads:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    return arguments


def _differing(lists: list[list], layer: int) -> int:
    return sum(len(values) > layer and values[layer] != values[0] for values in lists)


def _small(name: str, value: int, head: int) -> int:
    for pattern, new in RULES:
        if re.search(pattern, name):
            return value if value <= 0 else min(value, head if pattern == _HEAD else new)
    return value


def built(auto: type, kind: str, causal: bool) -> tf.PreTrainedModel:
    """A small model of this type that runs; of several tries, the first that does."""
    base = CONFIG_MAPPING[kind]()
    problems = []
    for lists, head in ((True, 16), (False, 16), (True, 32), (False, 32)):
        try:
            arguments = shrunk(base, lists, head)
            if causal and hasattr(base, "is_decoder"):
                arguments["is_decoder"] = True
            torch.manual_seed(0)
            model = auto.from_config(CONFIG_MAPPING[kind](**arguments)).eval()
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():  # nothing stays 0 or 1
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            ids = torch.arange(3, 11)[None]
            more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            with torch.no_grad():
                model(input_ids=ids, **more)
            return model
        except Exception as problem:  # whatever a config or a model has against it
            problems.append(problem)
    raise problems[0]


# --------------------------------------------------------------------------------------
# Trying


class Row(NamedTuple):
    """A line of the table."""

    type: str
    ff: str = ""
    activation: str = ""
    recorded: str = ""
    griffin: str = ""
    reason: str = ""


def tried(mapping: str, kind: str) -> Row:
    """What can be done with a type."""
    auto, _ = MAPPINGS[mapping]
    causal = mapping == "causal"
    try:
        model = built(auto, kind, causal)
    except Exception as problem:
        return Row(kind, recorded="not built", reason=_first_line(problem))
    row = Row(kind, activation=_activation(model))
    try:
        blocks = flocking.feedforwards(model)
    except UnsupportedModelError as problem:
        return row._replace(
            recorded="no", griffin="no" if causal else "", reason=_first_line(problem)
        )
    row = row._replace(ff=", ".join(sorted({block.kind for block in blocks})))
    checks = flocking.check(model)
    recording, experts, griffin = (
        "; ".join(f"{name}: {_first_line(row.reason)}" for name, row in part.iterrows())
        for part in (failed(checks[:3]), failed(checks[3:4]), failed(checks[4:]))
    )
    if causal and (unfit := checks.reason[checks.passed.isna()]).size:
        griffin = _first_line(unfit.iloc[0])
    row = row._replace(
        recorded="no" if recording else "yes",
        reason="; ".join(filter(None, (recording, experts, griffin))),
    )
    return row._replace(griffin="no" if griffin else "yes") if causal else row


def failed(checks: pd.DataFrame) -> pd.DataFrame:
    """The rows of checks that apply and did not pass."""
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


def _first_line(problem: Exception | str) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[0] if lines else type(problem).__name__)[:240]


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
    """Counts, in a sentence."""
    tried_types = [row for row in rows if row.recorded != "not built"]
    state = Counter(row.recorded for row in tried_types)
    text = f"{state['yes']} of {len(tried_types)} types that could be built are recorded"
    if any(row.griffin for row in tried_types):
        text += f", {sum(row.griffin == 'yes' for row in tried_types)} run GRIFFIN"
    wrong = sum("than rounding explains" in row.reason for row in rows)
    return f"{text}; {wrong} gave something wrong without an error."


def page(tables: dict[str, list[Row]]) -> str:
    """The page of the documentation."""
    text = (
        "# Architectures\n\nMade by `benchmarks/coverage.py`, which says how each is tried, with "
        f"transformers {tf.__version__} and torch {torch.__version__}: tiny models with random "
        "weights.\n"
    )
    for mapping, rows in tables.items():
        text += f"\n## {mapping.capitalize()} language models\n\n{summary(rows)}\n\n"
        text += "| type | FF | activation | recorded | GRIFFIN | reason |\n" + "| --- " * 6 + "|\n"
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
    torch.set_num_threads(1)  # for models as small as these, more of them only wait
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
                row = Row(kind, recorded="no", griffin="no", reason=str(problem))
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
