"""The model card of an export: what the smaller model was made from, how, and what it loses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from flocking.models import identity, listed
from flocking.pruning.classes import is_automatic, why_not_importable
from flocking.pruning.exported import Exported
from flocking.pruning.lost import Lost
from flocking.pruning.sources import LICENCES, Source
from flocking.pruning.widths import Sized

_LICENCE = ("license", "license_name", "license_link")
_README = "README.md"


def card_of(
    model: PreTrainedModel,
    source: Source,
    config: PreTrainedConfig,
    done: Exported,
    parts: Sequence[Sized],
    made_from: str,
    has_tokenizer: bool,
) -> str:
    """The text of a model card, with its YAML header.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        What the smaller model was made from.
    source : Source
        Where that is from.
    config : transformers.PreTrainedConfig
        Of the smaller model.
    done : Exported
    parts : list of Sized
        The blocks of `model`.
    made_from : str
        How the selection was made; empty if that is not known.
    has_tokenizer : bool
        Whether a tokenizer is in the folder.
    """
    how = made_from or (
        "not known. The selection was given as a list of neurons, without a word about the "
        "statistic or the texts behind it."
    )
    called = _source(source, type(model).__name__)
    lines = [
        f"# {done.path.name}",
        "",
        f"{called} with {done.parameters / done.parameters_before:.1%} of its parameters: "
        "in its feed-forward (FF) blocks, only some of the neurons were kept. "
        f"{_weights(source)}",
        "",
        "## How it was made",
        "",
        f"- From: {called}{_identity(source)}",
        f"- Neurons kept by: {how}",
        *_widths(done, parts),
        *(f"- In the config: {text}" for text in _changed(model.config, config)),
        "",
        "| | this model | made from |",
        "| --- | --- | --- |",
        f"| parameters | {done.parameters:,} | {done.parameters_before:,} |",
        f"| bytes of weights | {done.bytes:,} | {done.bytes_before:,} |",
        "",
        "## What it loses",
        "",
        *_lost(done.lost),
        "",
        "## How to load it",
        "",
        *_loading(model, done, has_tokenizer),
        "",
        "## Versions",
        "",
        f"Written by flocking {version('flocking')} "
        f"(`flocking.export`) with transformers {transformers.__version__} and torch "
        f"{torch.__version__}. flocking is not needed to use it.",
        "",
    ]
    header = _header(source).to_yaml()
    return f"---\n{header}\n---\n\n" + "\n".join(lines)


# --------------------------------------------------------------------------------------
# Where it is from


def _source(source: Source, kind: str) -> str:
    if not source.name:
        return f"A {kind} that was in memory and has no name"
    if source.commit:
        return f"[{source.name}](https://huggingface.co/{source.name}) ({kind})"
    return f"{source.name} ({kind})"


def _identity(source: Source) -> str:
    """What tells the source from every other model, as far as it has files."""
    if source.commit:
        return f", commit {source.commit}"
    if source.changed == [] and source.folder is not None:
        try:
            return f", its files' SHA-256 {identity(source.folder)}"
        except (OSError, ValueError):  # they are not there any more, or are something else
            return ""
    return ""


def _weights(source: Source) -> str:
    """What became of the other weights, as far as that can be told."""
    if source.changed == []:
        return "Nothing was trained or changed beside that."
    if source.changed:
        count = len(source.changed)
        return (
            f"**Its weights were changed after loading**, before that: {count:,} of its tensors "
            f"are others than in the files of that name ({listed(source.changed)})."
        )
    if not source.name:
        return "Its other weights are as they were in memory."
    return (
        "Its other weights are as they were in memory; they could not be compared with the files "
        "of that name."
    )


def _header(source: Source) -> huggingface_hub.ModelCardData:
    said: dict[str, Any] = _said_by(source.folder and source.folder / _README)
    if link := _licence(str(said.pop("license_link", "")), source):
        said["license_link"] = link
    if source.commit:
        said["base_model"] = source.name
    return huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flocking", "pruned"],
        **said,
    )


def _licence(link: str, source: Source) -> str:
    """Where the licence is that a README links to; empty if it is in no place that is known."""
    folder = source.folder
    is_copied = folder is not None and link in LICENCES and (folder / link).is_file()
    if "://" in link or is_copied:
        return link
    if link and source.commit:
        return f"https://huggingface.co/{source.name}/blob/{source.commit}/{link}"
    return ""


def _said_by(readme: Path | None) -> dict[str, Any]:
    """The licence that a README names, and the model that it was made from."""
    try:
        assert readme is not None
        said = huggingface_hub.ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # there is none, or whatever is wrong with its header
        return {}
    return {key: said[key] for key in (*_LICENCE, "base_model", "language") if said.get(key)}


# --------------------------------------------------------------------------------------
# What it is


def _widths(done: Exported, parts: Sequence[Sized]) -> Iterator[str]:
    rows = [
        (part.block.layer, done.kept[part.block.layer], part.block.d_ff, part.block.experts)
        for part in parts
    ]
    if len({row[1:] for row in rows}) == 1:
        yield f"- Width: {_kept(*rows[0][1:])} in each of {len(rows)} layers"
    else:
        each = "; ".join(f"layer {layer}: {_kept(*rest)}" for layer, *rest in rows)
        yield f"- Width by layer: {each}"
    if done.zeros:
        share = done.zeros / sum(done.stored.values())
        yield (
            f"- Filled up: {done.zeros:,} neurons in the files have zero weights ({share:.1%} of "
            "all): the config has one width for layers of several, and experts need a multiple of "
            "8. They add nothing to any output."
        )


def _kept(kept: int, d_ff: int, experts: int) -> str:
    text = f"{kept:,} of {d_ff:,} neurons ({kept / d_ff:.1%})"
    if experts > 1:
        text += f", {kept // experts:,} of {d_ff // experts:,} in each of {experts} experts"
    return text


def _changed(before: PreTrainedConfig, after: PreTrainedConfig) -> Iterator[str]:
    """Fields of the config that differ."""

    def compared(name: str, a: Any, b: Any) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in b:
                yield from compared(f"{name}.{key}".lstrip("."), a.get(key), b[key])
        elif a != b:
            yield f"`{name}` {b} (was {a})"

    ours = ("dtype", "architectures", "transformers_version")
    both = [
        {k: v for k, v in each.to_dict().items() if k not in ours and not k.startswith("_")}
        for each in (before, after)
    ]
    return compared("", *both)


def _lost(lost: Lost | None) -> list[str]:
    if lost is None:
        return [
            "Not measured. `flocking.export(model, selection, folder, held_out=texts)` measures it "
            "on texts that the selection was not made from, and `flocking.perplexity` that of any "
            "model on any texts. Expect more loss on texts of another kind than those that the "
            "neurons were selected with.",
        ]
    times = lost.pruned_perplexity / lost.perplexity
    interval = "" if math.isnan(lost.ratio_low) else (
        f", 95% interval {lost.ratio_low:.3g} to {lost.ratio_high:.3g}"
    )  # fmt: skip
    return [
        f"On {lost.texts} held-out texts of {lost.tokens:,} tokens:",
        "",
        "| | this model | made from |",
        "| --- | --- | --- |",
        f"| perplexity | {lost.pruned_perplexity:.4g} ({times:.3g} times{interval}) | "
        f"{lost.perplexity:.4g} |",
        f"| tokens with the same likeliest next token | {lost.agreement:.1%} | |",
        f"| divergence (Kullback-Leibler, nats a token) | {lost.divergence:.3g} | |",
        "",
        "Texts of another kind may lose more.",
    ]


def _loading(model: PreTrainedModel, done: Exported, has_tokenizer: bool) -> list[str]:
    kind, folder = type(model), done.path.name
    known = is_automatic(kind, type(model.config))
    cls = "AutoModelForCausalLM" if known else kind.__name__
    hidden = "" if known else why_not_importable(kind)
    module = kind.__module__ if not kind.__module__.startswith("transformers.") else "transformers"
    tokenizer = ["AutoTokenizer"] if has_tokenizer else []
    if known or module == "transformers":
        imports = [f"from transformers import {', '.join([cls, *tokenizer])}"]
    else:
        imports = [f"# {cls}: see above" if hidden else f"from {module} import {cls}"]
        imports += [f"from transformers import {each}" for each in tokenizer]
    # Code that came with the model goes with it, and transformers asks before it runs it.
    trust = (
        ", trust_remote_code=True" if kind.__module__.startswith("transformers_modules.") else ""
    )
    lines = [f'model = {cls}.from_pretrained("{folder}", dtype="auto"{trust})']
    if has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})')
    else:
        lines.append("# Its tokenizer is that of the model that it was made from.")
    return [*_warnings(cls, done, hidden), "```python", *imports, "", *lines, "```"]


def _warnings(cls: str, done: Exported, hidden: str) -> Iterator[str]:
    """What goes wrong, or not at all, when the folder is loaded."""
    if done.only:
        yield (
            f"**Only `{cls}` reads it right.** `AutoModelForCausalLM` goes by the config alone, "
            "and makes a model of another class of it, which computes something else."
        )
    if hidden:
        yield f"`{cls}` cannot be imported, since {hidden}: get its code from who made this."
    if done.only or hidden:
        yield ""
