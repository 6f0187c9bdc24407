"""Finding a model's feed-forward (FF) blocks, and proving that they are FF blocks.

There is no table of architectures. A block is *located* by its structure (``candidates.py``) and
*proved* by its function (``proof.py``), on a trial copy of the model (``models/copies.py``), never
on the model itself.
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

from flocking.feedforward.block import (
    FeedForward,
    FeedForwards,
    UnsupportedModelError,
    activation_in,
)
from flocking.feedforward.candidates import Candidate, candidates_in, candidates_of, layers_of
from flocking.feedforward.moe import foreign_experts
from flocking.feedforward.projections import width
from flocking.feedforward.search import UNTIMELY, Findings, prove_all
from flocking.models import PerModel, require_model, warn, why_not_finite, working_copy

Locate = Mapping[str, Iterable[str]] | Callable[[PreTrainedModel], Mapping[str, Iterable[str]]]


class _Instructions(NamedTuple):
    """What :func:`set_feedforwards` says of a model."""

    located: tuple[tuple[str, ...], ...] = ()  # paths of each block, the down-projection's first
    allow_partial: bool = False


_instructions: weakref.WeakKeyDictionary[nn.Module, _Instructions] = weakref.WeakKeyDictionary()


def feedforwards(model: nn.Module) -> FeedForwards:
    """Every FF block of `model`, in the order of its layers.

    Each block is located by structure and proved by function on random tokens, on a
    copy of the modules that shares the weights; `model` is not touched. The proof runs
    the first time and is remembered until the model's modules change. On the
    meta device the blocks are located by their shapes alone, and ``error`` is NaN.

    Where this fails, :func:`set_feedforwards` can help.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head, compiled or not, with PEFT's adapters or without.

    Returns
    -------
    list of FeedForward
        It prints as a table; each block has all that is known of it.

    Raises
    ------
    UnsupportedModelError
        If there is no such block; if a block that other layers have, or that was given, cannot be
        proved in a layer; or if the model's experts do not follow transformers' interface. The
        message names what was looked at.
    TypeError
        If `model` is not a transformers model.

    Warns
    -----
    UserWarning
        If some layers hold no such block, or do not run on text, and are left out.

    Examples
    --------
    >>> blocks = flocking.feedforwards(model)
    >>> blocks
    2 FF blocks, proved with relative errors up to ...
    layers  module              d_ff  kind   activation
    0-1     model.layers.*.mlp    64  gated  silu
    >>> blocks[0]
    FeedForward(layer=0, path='model.layers.0.mlp', d_ff=64, error=..., experts=1, prunable=True)
    """
    return FeedForwards(_blocks_of(require_model(model)))


def set_feedforwards(
    model: nn.Module, locate: Locate | None = None, *, allow_partial: bool = False
) -> FeedForwards:
    """Decide which FF blocks of `model` all of flocking works on, from now on.

    :func:`feedforwards`, :func:`record`, :func:`observe`, :func:`griffin` and everything else
    then use the blocks that this function returns. Without arguments, it goes back to looking for
    blocks in all layers. If it raises, what held before still holds.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for :func:`feedforwards`.
    locate : dict, or function that takes the model and returns one, optional
        Where the blocks are: from the path of each block's down-projection to the path of its
        up-projection, or to those of its gate and its up-projection in either order. (For a
        mixture of experts that follows transformers' interface, from its path to an empty list.)
        These blocks are proved like those that are found by looking.
    allow_partial : bool
        Leave out blocks that cannot be proved, or that do not belong to one layer, with a
        warning. By default they are an error.

    Returns
    -------
    list of FeedForward

    Raises
    ------
    UnsupportedModelError
        If there is no block that can be proved; without `allow_partial`, if one cannot.
    ValueError
        If `locate` names modules that do not exist, or projections whose sizes do not fit.
    TypeError
        If `locate` is not such a dict or function, or `model` is not a transformers model.

    Warns
    -----
    UserWarning
        If layers without blocks are left out, or blocks because of `allow_partial`.

    Examples
    --------
    >>> down, up, gate = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up", "gate"))
    >>> blocks = flocking.set_feedforwards(model, {down: [up, gate]})
    >>> len(blocks), flocking.record(model, "Starlings", progress=False).sizes["layer"]
    (1, 1)
    >>> len(flocking.set_feedforwards(model))  # back to all that are found
    2
    """
    model = require_model(model)
    before = _instructions.get(model, _Instructions())
    now = _Instructions(() if locate is None else _paths(model, locate), bool(allow_partial))
    if now != before:
        _instructions[model] = now
        _blocks_of.forget(model)
    try:
        return FeedForwards(_blocks_of(model))
    except Exception:
        _instructions[model] = before
        raise


def copy_with_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """A working copy of `model`, on which the same blocks are known without another proof."""
    copied = working_copy(model)
    inherit_blocks(model, copied)
    return copied


def inherit_blocks(model: PreTrainedModel, copied: PreTrainedModel) -> None:
    """Let a copy of a model have the same blocks, without another proof."""
    copies = dict(zip(model.modules(), copied.modules(), strict=True))
    moved = [
        replace(
            block,
            up=copies[block.up],
            gate=None if block.gate is None else copies[block.gate],
            down=copies[block.down],
        )
        for block in feedforwards(model)
    ]
    _blocks_of.remember(copied, moved)
    inherit(model, copied)


@contextmanager
def keeping_blocks(model: PreTrainedModel) -> Iterator[list[FeedForward]]:
    """The model's blocks; they stay known if the ``with`` moves its weights to another device."""
    blocks = feedforwards(model)
    yield blocks
    _blocks_of.remember(model, blocks)


def inherit(model: PreTrainedModel, copied: PreTrainedModel) -> None:
    """Let what :func:`set_feedforwards` said of a model hold for a copy of it."""
    if model in _instructions:
        _instructions[copied] = _instructions[model]


@PerModel
def _blocks_of(model: PreTrainedModel) -> list[FeedForward]:
    name = type(model).__name__
    given = _instructions.get(model, _Instructions())
    layers = dict(layers_of(model))
    # Without layers, or for a block that is spread over several: the whole model without its head.
    whole = next(path for path, module in model.named_modules() if module is model.base_model)
    if given.located:
        candidates = _given(model, given.located, layers, whole)
    else:
        candidates = {path: list(candidates_in(layer)) for path, layer in layers.items()}
        if not layers:
            candidates = {whole: list(candidates_in(model.base_model))}
        _refuse(name, _foreign(layers), given)
    try:
        found = prove_all(model, candidates)
    except Exception as problem:  # whatever a model raises that cannot be run like this
        reason = str(problem).strip().partition("\n")[0].rstrip(".")
        raise UnsupportedModelError(
            f"{name} could not be run on a few random tokens, to prove its blocks: {reason}."
        ) from problem

    if not found.any:
        raise UnsupportedModelError(
            why_not_finite(model)
            or f"{name} has no feed-forward block that flocking can prove: it needs an "
            "up-projection (with or without a gate), an activation function and a "
            "down-projection, as Linear or Conv1D modules, around one tensor. It looked at:\n"
            f"{_describe(model, found)}"
        )
    if given.located:  # all that a user names must be there
        expected = {path: {c.down for c in each} for path, each in candidates.items()}
    else:
        expected = _expected(model, candidates, found)
    problems = _left_out(found, expected)
    if problems and not given.allow_partial and (why := why_not_finite(model)):
        raise UnsupportedModelError(why)
    _refuse(name, problems, given)
    _warn_of_gaps(name, candidates, found, problems)
    return _assemble(model, found)


def _paths(model: PreTrainedModel, locate: Locate) -> tuple[tuple[str, ...], ...]:
    """The paths in `locate`, copied, since the user's dict may change later."""
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
            raise ValueError(f"locate names {missing[0]!r}: the model has no such module.")
        if outside := [path for path in paths if whole and not path.startswith(f"{whole}.")]:
            raise ValueError(
                f"locate names {outside[0]!r}: only what is inside of {whole!r} is run."
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
                "locate: expected a down-projection (d_ff, d) and up-projections (d, d_ff), or a "
                f"fused one (d, 2 d_ff), got {sizes}."
            )
        candidates.setdefault(holder, []).extend(fitting)
    return candidates


def _foreign(layers: dict[str, nn.Module]) -> dict[str, str]:
    """Experts that cannot be watched, and why."""
    return {
        f"{path}.{experts}": "are experts that do not follow transformers' experts interface, so "
        "that they cannot be watched"
        for path, layer in layers.items()
        if (experts := foreign_experts(layer)) is not None
    }


def _expected(
    model: PreTrainedModel, candidates: dict[str, list[Candidate]], found: Findings
) -> dict[str, set[str]]:
    """Down-projections that must be proved, by layer: what one layer has, all others must have."""
    proved = {path: {b.candidate.down for b in each} for path, each in found.proved.items()}
    everywhere: set[str] = set().union(*proved.values())
    expected = {}
    for path in filter(found.calls.get, candidates):
        experts = {c.down for c in candidates[path] if not c.ups}
        there = dict(model.get_submodule(path).named_modules())
        idle = {c.down for c, reason in found.refused[path].items() if reason == UNTIMELY}
        expected[path] = experts | (everywhere & there.keys()) - (idle if proved[path] else set())
    return expected


def _left_out(found: Findings, expected: dict[str, set[str]]) -> dict[str, str]:
    """The expected blocks that were not proved, and why."""
    problems: dict[str, str] = {}
    for path, downs in expected.items():
        here = {block.candidate.down for block in found.proved.get(path, [])}
        for down in sorted(downs - here):
            reasons = [why for c, why in found.refused.get(path, {}).items() if c.down == down]
            reason = reasons[-1] if reasons else "it is not a Linear"
            problems[".".join(filter(None, (path, down)))] = f"could not be proved: {reason}"
    return problems


def _refuse(name: str, problems: dict[str, str], given: _Instructions) -> None:
    """Raise an error, or a warning if the user allows it, for what cannot be recorded."""
    if not problems:
        return
    first, reason = next(iter(problems.items()))
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    if not given.allow_partial:
        raise UnsupportedModelError(
            f"{name}: {first} {reason}{more}. To go on without what cannot be recorded, call "
            "flocking.set_feedforwards(model, allow_partial=True) first."
        )
    warn(f"{name}: left out, since {first} {reason}{more}.")


def _warn_of_gaps(
    name: str, candidates: Iterable[str], found: Findings, problems: dict[str, str]
) -> None:
    """Warn of layers that hold no block at all, which are left out."""
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
    """What was looked at and what was missing, for the error message."""
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
    """The blocks that were proved, with the modules of the model itself."""
    blocks: list[FeedForward] = []
    found = {path: proved for path, proved in findings.proved.items() if proved}
    numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in found]
    positions = [int(match[1]) if match else 0 for match in numbers]
    # A block's layer is its place in the stack of layers. If that is ambiguous, because there are
    # several stacks, or several blocks or runs of a layer, blocks are counted in their order.
    unique = len(set(positions)) == len(positions) and all(
        len(proved) == findings.calls[path] == 1 for path, proved in found.items()
    )
    for position, (prefix, proved) in zip(positions, found.items(), strict=True):
        for _, passed in itertools.product(range(findings.calls[prefix]), proved):
            candidate = passed.candidate
            inside = (*(passed.order or [candidate.down]), candidate.down)
            *gate, up, down = (model.get_submodule(f"{prefix}.{p}".lstrip(".")) for p in inside)
            scope = ".".join(filter(None, (prefix, candidate.scope)))
            blocks.append(
                FeedForward(
                    layer=position if unique else len(blocks),
                    path=scope or candidate.down,
                    d_ff=candidate.d_ff,
                    up=up,
                    gate=up if candidate.fused else (gate[0] if gate else None),
                    down=down,
                    interleaved=candidate.interleaved,
                    error=passed.error,
                    experts=candidate.experts,
                    prunable=passed.prunable,
                    token_first=passed.token_first,
                    offset=passed.offset,
                    activation=activation_in(model.get_submodule(scope)),
                )
            )
    calls = Counter(block.down for block in blocks)
    before: Counter[nn.Module] = Counter()
    for number, block in enumerate(blocks):
        blocks[number] = replace(block, call=before[block.down], calls=calls[block.down])
        before[block.down] += 1
    return blocks
