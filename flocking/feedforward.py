"""Finding a model's feed-forward (FF) blocks, and proving that they are what they seem.

There is no table of architectures here. A block is *located* by its structure, an
up-projection (with a gate, separate or fused, or without) and a down-projection around
one tensor of width ``d_ff``, and *proved* by its function: the layer, run with its
projections cut down to a random half of the neurons, must give what the whole layer
gives when the tensor that we would record is masked to that half. Attention's
value-to-output pair and Mamba's in-and-out pair have the structure and fail the proof.

Everything is tried on a shadow of the model (see ``shadow.py``), never on the model itself.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from flocking.candidates import Candidate, candidates_in, layers_of
from flocking.experts import foreign_experts, is_experts
from flocking.projections import device_of, is_loaded
from flocking.proof import PROBE_SHAPE, Proved, RefusedError, prove, prove_recordable
from flocking.shadow import per_model, replaced, shadow, unwrap, with_forward
from flocking.trial import trial


class UnsupportedModelError(ValueError):
    """The model has no FF block that can be located and proved."""


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One FF block: ``down(z)`` with ``z = act(gate(x)) * up(x)`` or ``z = act(up(x))``.

    Attributes
    ----------
    layer : int
        Index of the decoder (or encoder) layer that holds the block.
    path : str
        Path of the smallest module that holds all of the block's projections.
    d_ff : int
        Number of neurons, the width of ``z``; of a mixture of experts, all of theirs together.
    up, down : torch.nn.Module
        The projections. The input of ``down`` is the tensor ``z`` that is recorded. Of a mixture
        of experts, the one module that holds all of them.
    gate : torch.nn.Module or None
        The projection inside the activation function; None in a plain block, and the
        same module as ``up`` where the two are fused into one matrix of ``2 * d_ff`` rows.
    interleaved : bool
        Whether a fused matrix alternates gate and up row by row (else it stacks them).
    error : float
        Largest relative error seen in the proof; NaN if unproved (meta device).
    experts : int
        Of a mixture, which share the neurons evenly; 1 in a dense block.
    prunable : bool
        Whether its neurons are independent of each other. Where they are not (a norm between
        the activation function and the down-projection, say), they can be recorded only.
    """

    layer: int
    path: str
    d_ff: int
    up: nn.Module = field(repr=False)
    gate: nn.Module | None = field(repr=False)
    down: nn.Module = field(repr=False)
    interleaved: bool = field(default=False, repr=False)
    error: float = math.nan
    experts: int = 1
    prunable: bool = True

    @property
    def weight(self) -> Tensor:
        """Of the down-projection(s); without values while they are offloaded."""
        return self.down.down_proj if self.kind == "experts" else self.down.weight

    @property
    def device(self) -> torch.device:
        """Where the block computes, which need not be where its weights are kept."""
        return device_of(self.down, "down_proj" if self.kind == "experts" else "weight")

    @property
    def kind(self) -> str:
        """``"plain"``, ``"gated"``, ``"fused"`` (gate and up in one matrix) or ``"experts"``."""
        if is_experts(self.down):
            return "experts"
        if self.gate is None:
            return "plain"
        return "fused" if self.gate is self.up else "gated"


# --------------------------------------------------------------------------------------
# Locating and proving all of a model's blocks


def _probe(model: PreTrainedModel) -> None:
    """One small forward pass of random tokens, without the head and without a cache."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    vocabulary = embeddings.weight.shape[0]
    ids = torch.randint(vocabulary, PROBE_SHAPE, generator=generator, device="cpu")
    ids = ids.to(device_of(embeddings))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    for module in model.modules():  # a cache would carry one trial's tokens into the next
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    if is_loaded(embeddings):
        model.base_model(**inputs, attention_mask=torch.ones_like(ids))
        return
    # Without values, some masks can be built from a padding mask and others only without.
    model.set_attn_implementation("eager")
    if any(is_experts(module) for module in model.modules()):
        model.set_experts_implementation("batched_mm")  # which looks at no values either
    try:
        model.base_model(**inputs, attention_mask=torch.ones_like(ids))
    except RuntimeError:
        model.base_model(**inputs)


def _order_of_calls(layer: nn.Module, paths: set[str], run: Callable[[], Any]) -> dict[str, int]:
    """When each of these modules is first called in one run of the layer; absent if never."""
    calls: dict[str, int] = {}

    def noting(path: str) -> nn.Module:
        module = layer.get_submodule(path)

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(path, len(calls))
            return module(*args, **kwargs)

        return with_forward(module, forward)

    with replaced(layer, {path: noting(path) for path in paths}):
        run()
    return calls


def _search(
    layer: nn.Module,
    candidates: list[Candidate],
    run: Callable[[], Any],
    broken: dict[tuple[type, Candidate], str],
) -> tuple[list[Proved], dict[Candidate, str]]:
    """The candidates of one shadow layer that pass, and why the others do not.

    `broken` remembers, over the layers, what a layer of this class cannot even be run
    with (attention's projections, mostly), so that this is tried only once.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[Proved] = []
    refused: dict[Candidate, str] = {}
    tried: list[Candidate] = []
    calls = _order_of_calls(layer, {p for c in candidates for p in (c.down, *c.ups)}, run)
    for candidate in candidates:
        if not all(calls.get(up, math.inf) < calls.get(candidate.down, -1) for up in candidate.ups):
            continue  # what runs after the down-projection, or never, is not its up-projection
        if any(candidate.down == proved.candidate.down for proved in found):
            continue
        if candidate.ups:
            tried.append(candidate)
        if reason := broken.get((type(layer), candidate)):
            refused[candidate] = reason
            continue
        try:
            found.append(prove(layer, candidate, run, generator))
        except RefusedError as problem:
            refused[candidate] = str(problem)
        except Exception as problem:  # a wrong candidate may break the layer in any way
            reason = "cut, it fails: " + str(problem).strip().partition("\n")[0]
            refused[candidate] = broken[type(layer), candidate] = reason
    # Only where nothing can be cut, and the widest: gates may look like such blocks, too.
    for candidate in sorted(tried, key=lambda c: (-c.d_ff, -len(c.ups))):
        if found:
            break
        with suppress(Exception):  # why it is no block at all was said above
            found.append(prove_recordable(layer, candidate, run))
    return found, refused


def _describe(layers: dict[str, nn.Module], refused: dict[str, dict[Candidate, str]]) -> str:
    """What was looked at, and what was missing, for the error message."""
    lines = []
    for path, layer in itertools.islice(layers.items(), 2):
        lines.append(f"  {path or 'the model'} ({type(layer).__name__}):")
        reasons = refused.get(path, {})
        lines += [f"    {candidate}: {reason}" for candidate, reason in list(reasons.items())[:12]]
        if not reasons:
            lines.append("    no up- and down-projection around one tensor of width d_ff")
    if len(layers) > 2:
        lines.append(f"  and {len(layers) - 2} more")
    return "\n".join(lines)


def feedforwards(model: nn.Module) -> list[FeedForward]:
    """Every FF block of `model`, in the order of its layers.

    Each block is located by structure and proved by function on random tokens, on a
    copy of the modules that shares the weights; `model` is not touched. The proof runs
    the first time and is remembered until the model's modules change. On the
    meta device the blocks are located by their shapes alone, and ``error`` is NaN.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without a head, compiled or not.

    Returns
    -------
    list of FeedForward

    Raises
    ------
    UnsupportedModelError
        If there is no such block, if one that other layers have cannot be proved in a
        layer, or if the model's experts do not follow transformers' interface. It names what
        was looked at.

    Warns
    -----
    UserWarning
        If some layers of the stack hold no such block, or do not run on text, and are
        left out.

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
    return list(_blocks_of(model))


def shadow_with_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """A shadow of `model` whose blocks are known without being proved again."""
    copied = shadow(model)
    twins = dict(zip(model.modules(), copied.modules(), strict=True))
    moved = [
        replace(block, up=twins[block.up], gate=twins.get(block.gate), down=twins[block.down])
        for block in feedforwards(model)
    ]
    _blocks_of.remember(copied, moved)
    return copied


@per_model
def _blocks_of(model: PreTrainedModel) -> list[FeedForward]:
    name = type(model).__name__
    layers = dict(layers_of(model))
    for path, layer in layers.items():
        if (experts := foreign_experts(layer)) is not None:
            raise UnsupportedModelError(
                f"{name} is a mixture of experts that does not follow transformers' experts "
                f"interface ({path}.{experts}), so that they cannot be watched."
            )
    candidates = {path: list(candidates_in(layer)) for path, layer in layers.items()}
    if not layers:  # no stack: look at the model as a whole
        layers, candidates = {"": model}, {"": list(candidates_in(model))}

    found: dict[str, list[Proved]] = {}
    refused: dict[str, dict[Candidate, str]] = {}
    broken: dict[tuple[type, Candidate], str] = {}
    calls: dict[str, int] = dict.fromkeys(layers, 0)
    copied = shadow(model)

    def probing(path: str, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def run_and_prove(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:  # from the same cache every time, if the model insists on one
                again = {
                    name: copy.deepcopy(value) if isinstance(value, Cache) else value
                    for name, value in kwargs.items()
                }
                return forward(*args, **again)

            calls[path] += 1
            if calls[path] == 1:
                found[path], refused[path] = _search(layer, candidates[path], run, broken)
            return forward(*args, **kwargs)

        return run_and_prove

    for path in layers:
        layer = copied.get_submodule(path)
        layer.forward = probing(path, layer)
    try:
        with trial(copied):
            _probe(copied)
    except Exception as problem:  # whatever a model raises that cannot be run like this
        reason = str(problem).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{name} could not be run on a few random tokens, to prove its blocks: {reason}."
        ) from problem

    if not any(found.values()):
        raise UnsupportedModelError(
            f"{name} has no feed-forward block that flocking can prove: it needs an up-projection "
            "(with or without a gate), an activation function and a down-projection, as Linear or "
            f"Conv1D modules, around one tensor. It looked at:\n{_describe(layers, refused)}"
        )
    _refuse_gaps(name, layers, found, refused, calls)
    return _assemble(model, {path: proved for path, proved in found.items() if proved})


def _refuse_gaps(
    name: str,
    layers: dict[str, nn.Module],
    found: dict[str, list[Proved]],
    refused: dict[str, dict[Candidate, str]],
    calls: dict[str, int],
) -> None:
    """A block that is proved in one layer and not in another must not be left out silently."""
    proved = {path: {block.candidate.down for block in blocks} for path, blocks in found.items()}
    everywhere = set().union(*proved.values())
    stacks = {path.rpartition(".")[0] for path, blocks in found.items() if blocks}
    left_out = []
    for path, layer in layers.items():
        here = proved.get(path, set())
        if calls[path] > 1 and here:
            raise UnsupportedModelError(
                f"{name} runs {path} {calls[path]} times in one forward (its layers share "
                "weights), so what is recorded there would belong to no one layer."
            )
        missing = {down for down in everywhere - here if down in dict(layer.named_modules())}
        if calls[path] and missing and not here:
            down = sorted(missing)[0]
            reasons = [why for c, why in refused.get(path, {}).items() if c.down == down]
            raise UnsupportedModelError(
                f"{name}: the feed-forward block of {path} (around {down}) could not be proved, "
                f"though that of other layers was: {reasons[-1] if reasons else 'it is no Linear'}."
            )
        if not here and path.rpartition(".")[0] in stacks:
            left_out.append(path)
    if left_out:
        warnings.warn(
            f"{name}: {len(left_out)} layers hold no feed-forward block, or do not run on text, "
            f"and are left out: {', '.join(left_out[:3])}{', ...' if left_out[3:] else ''}.",
            stacklevel=4,
        )


def _assemble(model: nn.Module, found: dict[str, list[Proved]]) -> list[FeedForward]:
    """The blocks, on the modules of the model itself."""
    blocks: list[FeedForward] = []
    numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in found]
    positions = [int(match[1]) if match else 0 for match in numbers]
    # A layer's number is its place in the stack, unless several stacks or several blocks
    # a layer would make that ambiguous: then blocks are counted in the order they stand.
    unique = len(set(positions)) == len(positions) and all(len(b) == 1 for b in found.values())
    for position, (prefix, proved) in zip(positions, found.items(), strict=True):
        for candidate, error, order, prunable in proved:
            inside = (*(order or [candidate.down]), candidate.down)
            *gate, up, down = (model.get_submodule(f"{prefix}.{p}".lstrip(".")) for p in inside)
            if any(block.down is down for block in blocks):
                raise UnsupportedModelError(
                    f"{type(model).__name__} shares {prefix}.{candidate.down} between layers, so "
                    "what is recorded there would belong to no one layer."
                )
            blocks.append(
                FeedForward(
                    layer=position if unique else len(blocks),
                    path=".".join(part for part in (prefix, candidate.scope) if part),
                    d_ff=candidate.d_ff,
                    up=up,
                    gate=up if candidate.fused else (gate[0] if gate else None),
                    down=down,
                    interleaved=candidate.interleaved,
                    error=error,
                    experts=candidate.experts,
                    prunable=prunable,
                )
            )
    return blocks
