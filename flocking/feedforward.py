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

import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from flocking.shadow import cut, fused_rows, replaced, shadow, unwrap, width, with_forward

# Largest relative error that the proof lets pass. What is compared differs only by the
# order of a sum, so anything but rounding is orders of magnitude above these.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE_ELSE = 1e-4

_PROBE_SHAPE = (2, 8)  # sequences x tokens of the one forward pass that the proof runs


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
        Number of neurons, the width of ``z``.
    up, down : torch.nn.Module
        The projections. The input of ``down`` is the tensor ``z`` that is recorded.
    gate : torch.nn.Module or None
        The projection inside the activation function; None in a plain block, and the
        same module as ``up`` where the two are fused into one matrix of ``2 * d_ff`` rows.
    interleaved : bool
        Whether a fused matrix alternates gate and up row by row (else it stacks them).
    error : float
        Largest relative error seen in the proof; NaN if unproved (meta device).
    """

    layer: int
    path: str
    d_ff: int
    up: nn.Module = field(repr=False)
    gate: nn.Module | None = field(repr=False)
    down: nn.Module = field(repr=False)
    interleaved: bool = field(default=False, repr=False)
    error: float = math.nan

    @property
    def kind(self) -> str:
        """``"plain"``, ``"gated"`` or ``"fused"`` (gate and up in one matrix)."""
        if self.gate is None:
            return "plain"
        return "fused" if self.gate is self.up else "gated"


# --------------------------------------------------------------------------------------
# Locating by structure


class _Candidate(NamedTuple):
    """Paths, inside one layer, of what may be an FF block."""

    down: str
    ups: tuple[str, ...]  # one, or two of which one is the gate
    d_ff: int
    fused: bool = False
    interleaved: bool = False

    @property
    def scope(self) -> str:
        parts = [path.split(".")[:-1] for path in (self.down, *self.ups)]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
        return ".".join(names[0] for names in shared)

    def __str__(self) -> str:
        layout = (" (interleaved)" if self.interleaved else " (fused)") if self.fused else ""
        return f"{' + '.join(self.ups)}{layout} -> {self.down}"


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The elements of the outermost module lists: a model's stack(s) of layers."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _layers(child, path)


def _candidates(layer: nn.Module) -> Iterator[_Candidate]:
    """Every set of projections in `layer` with the structure of an FF block.

    For each possible down-projection (d_ff -> d), the up-projections (d -> d_ff, or
    d -> 2 d_ff if fused) are sought in the smallest module around it that has any.
    """
    widths = {path: w for path, module in layer.named_modules() if (w := width(module))}
    for down, (d_ff, d) in widths.items():
        if d_ff < 2:
            continue
        scope = down
        single: list[str] = []
        fused: list[str] = []
        while scope and not (single or fused):
            scope = scope.rpartition(".")[0]
            near = [p for p in widths if p != down and (not scope or p.startswith(scope + "."))]
            single = [path for path in near if widths[path] == (d, d_ff)]
            fused = [path for path in near if widths[path] == (d, 2 * d_ff)]
        yield from (_Candidate(down, (up,), d_ff) for up in single)
        yield from (_Candidate(down, pair, d_ff) for pair in itertools.combinations(single, 2))
        for up, interleaved in itertools.product(fused, (False, True)):
            yield _Candidate(down, (up,), d_ff, fused=True, interleaved=interleaved)


def _experts(layer: nn.Module) -> str | None:
    """Path of a mixture of experts in `layer`, recognised by its parameters' shape."""
    for path, module in layer.named_modules():
        three_dimensional = any(
            parameter.ndim == 3 and min(parameter.shape) > 1
            for parameter in module.parameters(recurse=False)
        )
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        if path.rpartition(".")[2] == "experts" or (three_dimensional and not convolution):
            return path
    return None


# --------------------------------------------------------------------------------------
# Proving by function


class _RefusedError(Exception):
    """A candidate failed the proof; the message says why."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding alone explains, when a sum is reordered."""
    return _TOLERANCE.get(dtype, _TOLERANCE_ELSE)


def relative_error(got: Any, expected: Any) -> float:
    """Largest difference over all tensors of two outputs, relative to the largest value.

    NaN on the meta device. Raises ValueError where shapes differ.
    """
    error = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            continue
        if a.shape != b.shape:
            raise ValueError(f"it gives shape {tuple(a.shape)} where {tuple(b.shape)} is due")
        if b.is_meta:
            return math.nan
        scale = b.abs().max().float().item()
        difference = (a - b).abs().max().float().item()
        error = max(error, difference / scale if scale else difference)
    return error


def _check(got: Any, expected: Any, dtype: torch.dtype, reason: str) -> float:
    error = relative_error(got, expected)
    if error > tolerance(dtype):
        raise _RefusedError(f"{reason} (relative error {error:.1g})")
    return error


def _prove(
    layer: nn.Module, candidate: _Candidate, run: Callable[[], Any], generator: torch.Generator
) -> tuple[float, tuple[str, ...]]:
    """The proof for one candidate of a shadow's layer, which `run` calls.

    Returns the largest relative error and the up-projections with the gate first.
    Raises _RefusedError, or whatever the layer raises when it is run with cut projections.
    """
    down = layer.get_submodule(candidate.down)
    ups = {path: layer.get_submodule(path) for path in candidate.ups}
    device, dtype = down.weight.device, down.weight.dtype

    def run_with(changes: dict[str, nn.Module], then: Callable[[Tensor], Tensor], into: nn.Module):
        """Output of the layer with `changes`, and the z that reached the down-projection."""
        seen: list[Tensor] = []

        def tap(z: Tensor) -> Tensor:
            seen.append(z)
            return into(then(z))

        with replaced(layer, {**changes, candidate.down: with_forward(down, tap)}):
            output = run()
        if len(seen) != 1:
            raise _RefusedError(f"calls its down-projection {len(seen)} times in one forward")
        return output, seen[0]

    def unchanged(z: Tensor) -> Tensor:
        return z

    # 1. Cut down to a random half of the neurons, the layer computes those and no others.
    half = torch.randperm(candidate.d_ff, generator=generator)[: candidate.d_ff // 2].sort().values
    mask = torch.zeros(candidate.d_ff, dtype=dtype).index_fill_(0, half, 1).to(device)
    half = half.to(device)
    rows = fused_rows(half, candidate.d_ff, candidate.interleaved) if candidate.fused else half
    cut_ups = {path: cut(up, outputs=rows) for path, up in ups.items()}
    output, z_half = run_with(cut_ups, unchanged, cut(down, inputs=half))
    masked, z = run_with({}, lambda z: z * mask, down)
    if not z.is_meta and not (z.abs().max().isfinite() and (z * (1 - mask)).any()):
        raise _RefusedError("has activations that are all zero, or not finite")
    errors = [
        _check(z_half, z[..., half], dtype, "its neurons depend on each other"),
        _check(output, masked, dtype, "its up-projection serves something else too"),
    ]

    # 2. Position-wise: another value at the first token changes no later token's z.
    # (Attention's values would. Cutting alone might let a headless attention pass.)
    def flip_first(up: nn.Module) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            y = up(x).clone()
            y[..., 0, :] *= -1
            return y

        return with_forward(up, forward)

    _, z_flipped = run_with({p: flip_first(up) for p, up in ups.items()}, unchanged, down)
    errors.append(_check(z_flipped[..., 1:, :], z[..., 1:, :], dtype, "it mixes tokens"))

    # 3. z is linear in up and not in the gate: that tells them apart. Where both or
    # neither is linear (or on the meta device), the first one defined is called the gate.
    order = candidate.ups
    if len(order) == 2 and not z.is_meta:
        linear = {}
        for path, up in ups.items():
            negated = {path: with_forward(up, lambda x, up=up: -up(x))}
            _, z_negated = run_with(negated, unchanged, down)
            linear[path] = relative_error(z_negated, -z) <= tolerance(dtype)
        order = tuple(sorted(order, key=linear.get))  # stable: not linear, the gate, first
    return max(errors), order


def _probe(model: nn.Module) -> None:
    """One small forward pass of random tokens, without the head and without a cache."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: flocking needs one "
            "(PreTrainedModel), since it has to know how to run it."
        )
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], _PROBE_SHAPE, generator=generator).to(weight.device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    for module in model.modules():  # a cache would carry one trial's tokens into the next
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    if not weight.is_meta:
        model.base_model(**inputs, attention_mask=torch.ones_like(ids))
        return
    # Without values, some masks can be built from a padding mask and others only without.
    model.set_attn_implementation("eager")
    try:
        model.base_model(**inputs, attention_mask=torch.ones_like(ids))
    except RuntimeError:
        model.base_model(**inputs)


_Found = tuple[_Candidate, float, tuple[str, ...]]


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
    candidates: list[_Candidate],
    run: Callable[[], Any],
    broken: dict[tuple[type, _Candidate], str],
) -> tuple[list[_Found], dict[_Candidate, str]]:
    """The candidates of one shadow layer that pass, and why the others do not.

    `broken` remembers, over the layers, what a layer of this class cannot even be run
    with (attention's projections, mostly), so that this is tried only once.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[_Found] = []
    refused: dict[_Candidate, str] = {}
    calls = _order_of_calls(layer, {p for c in candidates for p in (c.down, *c.ups)}, run)
    for candidate in candidates:
        if not all(calls.get(up, math.inf) < calls.get(candidate.down, -1) for up in candidate.ups):
            continue  # what runs after the down-projection, or never, is not its up-projection
        if any(candidate.down == proved.down for proved, _, _ in found):
            continue
        if reason := broken.get((type(layer), candidate)):
            refused[candidate] = reason
            continue
        try:
            found.append((candidate, *_prove(layer, candidate, run, generator)))
        except _RefusedError as problem:
            refused[candidate] = str(problem)
        except Exception as problem:  # a wrong candidate may break the layer in any way
            reason = "cut, it fails: " + str(problem).strip().partition("\n")[0]
            refused[candidate] = broken[type(layer), candidate] = reason
    return found, refused


def _describe(layers: dict[str, nn.Module], refused: dict[str, dict[_Candidate, str]]) -> str:
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


# What was proved, by model: (paths and modules, to see whether they still stand; blocks).
_proved: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, nn.Module], list[FeedForward]]]
_proved = weakref.WeakKeyDictionary()


@torch.no_grad()
def feedforwards(model: nn.Module) -> list[FeedForward]:
    """Every FF block of `model`, in the order of its layers.

    Each block is located by structure and proved by function on random tokens, on a
    copy of the modules that shares the weights; `model` is not touched. The proof runs
    the first time and is remembered for as long as the projections stay in place. On the
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
        layer, or if the model is a mixture of experts. It names what was looked at.

    Examples
    --------
    >>> model, tokenizer = flocking.load()
    >>> flocking.feedforwards(model)[0]
    FeedForward(layer=0, path='model.layers.0.mlp', d_ff=1536, error=...)
    """
    model = unwrap(model)
    if model in _proved:
        modules, blocks = _proved[model]
        named = dict(model.named_modules())
        if all(named.get(path) is module for path, module in modules.items()):
            return list(blocks)

    layers = dict(_layers(model))
    candidates = {path: list(_candidates(layer)) for path, layer in layers.items()}
    for path, layer in layers.items():
        if (experts := _experts(layer)) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} is a mixture of experts ({path}.{experts}), which "
                "flocking cannot record yet: choose a dense model."
            )
    if not any(candidates.values()):  # no stack, or nothing in it: look at the model as a whole
        layers = layers or {"": model}
        candidates = {path: list(_candidates(layer)) for path, layer in layers.items()}

    found: dict[str, list[_Found]] = {}
    refused: dict[str, dict[_Candidate, str]] = {}
    broken: dict[tuple[type, _Candidate], str] = {}
    calls: dict[str, int] = dict.fromkeys(layers, 0)
    copied = shadow(model)

    def probing(path: str, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def run_and_prove(*args: Any, **kwargs: Any) -> Any:
            calls[path] += 1
            if calls[path] == 1:
                run = lambda: forward(*args, **kwargs)  # noqa: E731
                found[path], refused[path] = _search(layer, candidates[path], run, broken)
            return forward(*args, **kwargs)

        return run_and_prove

    for path in [path for path in layers if candidates[path]]:
        layer = copied.get_submodule(path)
        layer.forward = probing(path, layer)
    if any(candidates.values()):
        _probe(copied)

    if not any(found.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feed-forward block that flocking can prove: it needs "
            "an up-projection (with or without a gate) and a down-projection, as Linear or Conv1D "
            f"modules, around one tensor. It looked at:\n{_describe(layers, refused)}"
        )
    _refuse_gaps(model, found, refused, calls)
    blocks, modules = _assemble(model, found)
    if not any(math.isnan(block.error) for block in blocks):
        _proved[model] = (modules, blocks)
    return list(blocks)


def _refuse_gaps(
    model: nn.Module,
    found: dict[str, list[_Found]],
    refused: dict[str, dict[_Candidate, str]],
    calls: dict[str, int],
) -> None:
    """A block that is proved in one layer and not in another must not be left out silently."""
    downs = {candidate.down for blocks in found.values() for candidate, _, _ in blocks}
    for path, reasons in refused.items():
        here = {candidate.down for candidate, _, _ in found[path]}
        for candidate, reason in reasons.items():
            if candidate.down in downs - here:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: the feed-forward block {path}.{candidate} could not "
                    f"be proved, though the same block of other layers was: {reason}."
                )
    for path, blocks in found.items():
        if blocks and calls[path] > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs {path} {calls[path]} times in one forward (its "
                "layers share weights), so what is recorded there would belong to no one layer."
            )


def _assemble(
    model: nn.Module, found: dict[str, list[_Found]]
) -> tuple[list[FeedForward], dict[str, nn.Module]]:
    """The blocks, on the modules of the model itself, and those modules by path."""
    blocks: list[FeedForward] = []
    modules: dict[str, nn.Module] = {}
    numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in found]
    positions = [int(match[1]) if match else 0 for match in numbers]
    # A layer's number is its place in the stack, unless several stacks or several blocks
    # a layer would make that ambiguous: then blocks are counted in the order they stand.
    unique = len(set(positions)) == len(positions) and all(len(b) <= 1 for b in found.values())
    for position, (prefix, proved) in zip(positions, found.items(), strict=True):
        for candidate, error, order in proved:
            paths = [f"{prefix}.{p}" if prefix else p for p in (*order, candidate.down)]
            modules.update({path: model.get_submodule(path) for path in paths})
            *gate, up, down = (modules[path] for path in paths)
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
                )
            )
    return blocks, modules
