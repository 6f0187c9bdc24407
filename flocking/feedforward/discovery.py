"""Finding a model's feed-forward (FF) blocks, and proving that they are what they seem.

There is no table of architectures here. A block is *located* by its structure, an
up-projection (with a gate, separate or fused, or without) and a down-projection around
one tensor of width ``d_ff``, and *proved* by its function: the layer, run with its
projections cut down to a random half of the neurons, must give what the whole layer
gives when the tensor that we would record is masked to that half. Attention's
value-to-output pair and Mamba's in-and-out pair have the structure and fail the proof.

Everything is tried on a shadow of the model (see ``models/copies.py``), never on the model itself.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from flocking.feedforward.block import FeedForward, UnsupportedModelError
from flocking.feedforward.candidates import Candidate, candidates_in, candidates_of, layers_of
from flocking.feedforward.moe import foreign_experts
from flocking.feedforward.projections import width
from flocking.feedforward.search import UNTIMELY, Findings, prove_all
from flocking.models import PerModel, shadow, unwrap, warn

Locate = Mapping[str, Iterable[str]] | Callable[[PreTrainedModel], Mapping[str, Iterable[str]]]


class _Wish(NamedTuple):
    """What a user said of a model; `located` are paths, the down-projection's first."""

    located: tuple[tuple[str, ...], ...] = ()
    allow_partial: bool = False


_wishes: weakref.WeakKeyDictionary[nn.Module, _Wish] = weakref.WeakKeyDictionary()


def feedforwards(
    model: nn.Module, *, locate: Locate | None = None, allow_partial: bool | None = None
) -> list[FeedForward]:
    """Every FF block of `model`, in the order of its layers.

    Each block is located by structure and proved by function on random tokens, on a
    copy of the modules that shares the weights; `model` is not touched. The proof runs
    the first time and is remembered until the model's modules change. On the
    meta device the blocks are located by their shapes alone, and ``error`` is NaN.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head, compiled or not, with PEFT's adapters or without.
    locate : dict, or function that makes one of the model, optional
        Where the blocks are, if looking for them does not find them: from the path of each
        block's down-projection to those of its up-projection, or of its gate and its up-projection
        in either order. (Of a mixture of experts that follows transformers' interface, from its
        path to none.) They go through the same proof. An empty dict: look for them again.
    allow_partial : bool, optional
        Go on without blocks that cannot be proved, or that belong to no one layer; by default they
        are an error.

        What `locate` and `allow_partial` say holds for this model from then on, in
        :func:`record`, :func:`observe` and :func:`griffin` too.

    Returns
    -------
    list of FeedForward

    Raises
    ------
    UnsupportedModelError
        If there is no such block, if one that other layers have, or that was given, cannot be
        proved in a layer, or if the model's experts do not follow transformers' interface. It
        names what was looked at.
    ValueError
        If `locate` names modules that are not there, or no projections of fitting sizes.
    TypeError
        If `locate` is nothing of the kind.

    Warns
    -----
    UserWarning
        If some layers of the stack hold no such block, or do not run on text, and are
        left out, or if blocks are left out by `allow_partial`.

    Examples
    --------
    >>> model, tokenizer = flocking.load()
    >>> flocking.feedforwards(model)[0]
    FeedForward(layer=0, path='model.layers.0.mlp', d_ff=1536, error=...)
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: flocking needs one "
            "(PreTrainedModel), since it has to know how to run it."
        )
    before = _wishes.get(model, _Wish())
    wish = _Wish(
        before.located if locate is None else _paths(model, locate),
        before.allow_partial if allow_partial is None else bool(allow_partial),
    )
    if wish == before:
        return list(_blocks_of(model))
    _wishes[model] = wish
    _blocks_of.forget(model)
    try:
        return list(_blocks_of(model))
    except Exception:
        _wishes[model] = before
        raise


def shadow_with_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """A shadow of `model` whose blocks are known without being proved again."""
    copied = shadow(model)
    twins = dict(zip(model.modules(), copied.modules(), strict=True))
    moved = [
        replace(block, up=twins[block.up], gate=twins.get(block.gate), down=twins[block.down])
        for block in feedforwards(model)
    ]
    _blocks_of.remember(copied, moved)
    inherit(model, copied)
    return copied


@contextmanager
def keeping_blocks(model: PreTrainedModel) -> Iterator[list[FeedForward]]:
    """Its blocks, which stay known when its weights are in other places at the end."""
    blocks = feedforwards(model)
    yield blocks
    _blocks_of.remember(model, blocks)


def inherit(model: PreTrainedModel, copied: PreTrainedModel) -> None:
    """What was said of a model holds for a copy of it."""
    if model in _wishes:
        _wishes[copied] = _wishes[model]


@PerModel
def _blocks_of(model: PreTrainedModel) -> list[FeedForward]:
    name = type(model).__name__
    wish = _wishes.get(model, _Wish())
    layers = dict(layers_of(model))
    # Where there is no stack, or a block is spread over it, that is the whole model without head.
    whole = next(path for path, module in model.named_modules() if module is model.base_model)
    problems: dict[str, str] = {}
    if wish.located:
        candidates = _given(model, wish.located, layers, whole)
    else:
        candidates = {path: list(candidates_in(layer)) for path, layer in layers.items()}
        if not layers:
            candidates = {whole: list(candidates_in(model.base_model))}
        for path, layer in layers.items():
            if (experts := foreign_experts(layer)) is not None:
                problems[f"{path}.{experts}"] = (
                    "are experts that do not follow transformers' experts interface, so that they "
                    "cannot be watched"
                )
        _refuse(name, problems, wish)
    try:
        found = prove_all(model, candidates)
    except Exception as problem:  # whatever a model raises that cannot be run like this
        reason = str(problem).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{name} could not be run on a few random tokens, to prove its blocks: {reason}."
        ) from problem

    if not found.any:
        raise UnsupportedModelError(
            f"{name} has no feed-forward block that flocking can prove: it needs an up-projection "
            "(with or without a gate), an activation function and a down-projection, as Linear or "
            f"Conv1D modules, around one tensor. It looked at:\n{_describe(model, found)}"
        )
    if wish.located:  # what a user names must all be there
        due = {path: {c.down for c in each} for path, each in candidates.items()}
    else:
        due = _due(model, candidates, found)
    problems = _left_out(found, due)
    _refuse(name, problems, wish)
    _warn_of_gaps(name, candidates, found, problems)
    return _assemble(model, found)


def _paths(model: PreTrainedModel, locate: Locate) -> tuple[tuple[str, ...], ...]:
    """What a user names, at once, whatever becomes of the user's dict."""
    given = locate(model) if callable(locate) else locate
    if not isinstance(given, Mapping):
        raise TypeError(
            "locate: give a dict from the path of each block's down-projection to those of its "
            "up-projections, or a function of the model that returns one."
        )
    located = []
    for down, ups in given.items():
        paths = (ups,) if isinstance(ups, str) or not isinstance(ups, Iterable) else tuple(ups)
        if not all(isinstance(path, str) for path in (down, *paths)):
            raise TypeError(f"locate: {ups!r} for {down!r}: give a path, or a list of paths.")
        located.append((down, *paths))
    return tuple(located)


def _given(
    model: PreTrainedModel,
    located: tuple[tuple[str, ...], ...],
    layers: dict[str, nn.Module],
    whole: str,
) -> dict[str, list[Candidate]]:
    """The candidates that a user names, by the layer that holds them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates: dict[str, list[Candidate]] = {}
    for paths in located:
        if missing := [path for path in paths if path not in modules]:
            raise ValueError(f"locate names {missing[0]!r}, and the model has no such module.")
        if outside := [path for path in paths if whole and not path.startswith(f"{whole}.")]:
            raise ValueError(
                f"locate names {outside[0]!r}, outside of {whole!r}, which is all that is run."
            )
        holder = next(
            (layer for layer in layers if all(path.startswith(f"{layer}.") for path in paths)),
            whole,
        )
        inside = tuple(path.removeprefix(f"{holder}.") for path in paths)
        fitting = list(candidates_of(inside, [modules[path] for path in paths]))
        if not fitting:
            sizes = ", ".join(f"{path} {width(modules[path])}" for path in paths)
            raise ValueError(
                f"locate: these are no down-projection (d_ff, d) with up-projections (d, d_ff), or "
                f"one of (d, 2 d_ff): {sizes}."
            )
        candidates.setdefault(holder, []).extend(fitting)
    return candidates


def _due(
    model: PreTrainedModel, candidates: dict[str, list[Candidate]], found: Findings
) -> dict[str, set[str]]:
    """Down-projections that must be proved, by layer: what one layer has, all others must have."""
    proved = {path: {b.candidate.down for b in each} for path, each in found.proved.items()}
    everywhere = set().union(*proved.values())
    due = {}
    for path in filter(found.calls.get, candidates):
        experts = {c.down for c in candidates[path] if not c.ups}
        there = dict(model.get_submodule(path).named_modules())
        idle = {c.down for c, reason in found.refused[path].items() if reason == UNTIMELY}
        due[path] = experts | (everywhere & there.keys()) - (idle if proved[path] else set())
    return due


def _left_out(found: Findings, due: dict[str, set[str]]) -> dict[str, str]:
    """Blocks that must not go missing without a word, and why they are."""
    problems: dict[str, str] = {}
    for path, downs in due.items():
        here = {block.candidate.down for block in found.proved.get(path, [])}
        for down in sorted(downs - here):
            reasons = [why for c, why in found.refused.get(path, {}).items() if c.down == down]
            reason = reasons[-1] if reasons else "it is no Linear"
            problems[".".join(filter(None, (path, down)))] = f"could not be proved: {reason}"
    return problems


def _refuse(name: str, problems: dict[str, str], wish: _Wish) -> None:
    """An error, or a warning if the user allows it, for what cannot be recorded."""
    if not problems:
        return
    first, reason = next(iter(problems.items()))
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    if not wish.allow_partial:
        raise UnsupportedModelError(
            f"{name}: {first} {reason}{more}. To go on without what cannot be recorded, in record "
            "and griffin too, call flocking.feedforwards(model, allow_partial=True)."
        )
    warn(f"{name}: left out, since {first} {reason}{more}.")


def _warn_of_gaps(
    name: str, candidates: Iterable[str], found: Findings, problems: dict[str, str]
) -> None:
    """Layers that hold no block at all are left out, but not without a word."""
    stacks = {path.rpartition(".")[0] for path, blocks in found.proved.items() if blocks}
    left_out = [
        path
        for path in candidates
        if not found.proved.get(path) and path.rpartition(".")[0] in stacks
        if not any(f"{place}.".startswith(f"{path}.") for place in problems)
    ]
    if left_out:
        warn(
            f"{name}: {len(left_out)} layers hold no feed-forward block, or do not run on text, "
            f"and are left out: {', '.join(left_out[:3])}{', ...' if left_out[3:] else ''}.",
        )


def _describe(model: nn.Module, found: Findings) -> str:
    """What was looked at, and what was missing, for the error message."""
    lines = []
    for path in itertools.islice(found.calls, 2):
        layer = model.get_submodule(path)
        lines.append(f"  {path or 'the model'} ({type(layer).__name__}):")
        reasons = found.refused.get(path, {})
        lines += [f"    {candidate}: {reason}" for candidate, reason in list(reasons.items())[-12:]]
        if not reasons:
            lines.append("    no up- and down-projection around one tensor of width d_ff")
    if len(found.calls) > 2:
        lines.append(f"  and {len(found.calls) - 2} more")
    return "\n".join(lines)


def _assemble(model: nn.Module, findings: Findings) -> list[FeedForward]:
    """The blocks, on the modules of the model itself."""
    blocks: list[FeedForward] = []
    found = {path: proved for path, proved in findings.proved.items() if proved}
    numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in found]
    positions = [int(match[1]) if match else 0 for match in numbers]
    # A layer's number is its place in the stack, unless several stacks, or several blocks or runs
    # of a layer would make that ambiguous: then they are counted in the order they stand.
    unique = len(set(positions)) == len(positions) and all(
        len(proved) == findings.calls[path] == 1 for path, proved in found.items()
    )
    for position, (prefix, proved) in zip(positions, found.items(), strict=True):
        for _, block in itertools.product(range(findings.calls[prefix]), proved):
            candidate = block.candidate
            inside = (*(block.order or [candidate.down]), candidate.down)
            *gate, up, down = (model.get_submodule(f"{prefix}.{p}".lstrip(".")) for p in inside)
            blocks.append(
                FeedForward(
                    layer=position if unique else len(blocks),
                    path=".".join(filter(None, (prefix, candidate.scope))) or candidate.down,
                    d_ff=candidate.d_ff,
                    up=up,
                    gate=up if candidate.fused else (gate[0] if gate else None),
                    down=down,
                    interleaved=candidate.interleaved,
                    error=block.error,
                    experts=candidate.experts,
                    prunable=block.prunable,
                    token_first=block.token_first,
                    offset=block.offset,
                )
            )
    calls = Counter(block.down for block in blocks)
    before: Counter[nn.Module] = Counter()
    for number, block in enumerate(blocks):
        blocks[number] = replace(block, call=before[block.down], calls=calls[block.down])
        before[block.down] += 1
    return blocks
