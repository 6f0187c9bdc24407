"""Proving by function that a candidate is an FF block.

The layer, run with its projections cut down to a random half of the neurons, must give what the
whole layer gives when the tensor that would be recorded is masked to that half. Attention's
value-to-output pair and Mamba's in-and-out pair have the structure of an FF block and fail. Cut
down to the neurons that are largest, as GRIFFIN cuts them, each must still have the same value: a
mean over all neurons is hardly another over a random half of many, and quite another over these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flocking.feedforward.candidates import Candidate
from flocking.feedforward.moe import Routed, shape, take
from flocking.feedforward.moe_hooks import watching
from flocking.feedforward.projections import cut, fused_rows, projections_in
from flocking.models import (
    any_tensor_of,
    device_of,
    is_loaded,
    relative_error,
    replaced,
    tensor_of,
    tolerance,
    with_forward,
)

PROBE_SHAPE = (2, 9)  # (sequences, tokens) of the forward pass in which candidates are tried
FLIPPED = 3  # the token whose change must not reach the others


class RefusedError(Exception):
    """A candidate failed the proof; the message says why."""


class Rows(NamedTuple):
    """Where the text's tokens stand, if there are more rows than tokens."""

    offset: int
    total: int  # rows for the text of the proof


class Proved(NamedTuple):
    """A candidate that passed, its largest relative error, and its up-projections, gate first."""

    candidate: Candidate
    error: float
    order: tuple[str, ...]
    prunable: bool = True
    token_first: bool = False
    offset: int | None = None


class _Bench:
    """One candidate in a layer of the copy, to be run with changed projections."""

    def __init__(
        self, layer: nn.Module, candidate: Candidate, run: Callable[..., Any], rows: Rows | None
    ) -> None:
        self.layer, self.candidate, self.run, self.rows = layer, candidate, run, rows
        self.down = layer.get_submodule(candidate.down)
        self.ups = {path: layer.get_submodule(path) for path in candidate.ups}
        self.dtype = any_tensor_of(self.down).dtype
        self.tolerance = tolerance(self.dtype)
        self.token_first = False  # whether z is (token, sequence, neuron), as in XLNet

    def run_with(
        self,
        ups: dict[str, nn.Module],
        down: nn.Module | None = None,
        mask: Tensor | None = None,
        otherwise: bool = False,
    ) -> tuple[Any, Tensor]:
        """Output of the layer with these projections, and the z that the last one was given.

        With `otherwise`, the layer is given other values of each token.
        """
        seen: list[Tensor] = []
        final = self.down if down is None else down

        def tap(z: Tensor) -> Tensor:
            seen.append(z)
            return final(z if mask is None else z * mask)

        with replaced(self.layer, {**ups, self.candidate.down: with_forward(self.down, tap)}):
            output = self.run(otherwise)
        if len(seen) != 1:
            raise RefusedError(f"calls its down-projection {len(seen)} times in one forward")
        self.token_first = seen[0].shape[:-1] == PROBE_SHAPE[::-1]
        return output, self.sequence_first(seen[0])

    def sequence_first(self, x: Tensor) -> Tensor:
        """A view of a tensor of the layer with the sequence as first dimension."""
        return x.transpose(0, 1) if self.token_first else x

    def check(self, error: float, reason: str) -> float:
        if error > self.tolerance:
            raise RefusedError(f"{reason} (relative error {error:.1g})")
        return error

    def refuse_layout(self, z: Tensor) -> None:
        if z.shape[:-1] in (PROBE_SHAPE, (math.prod(PROBE_SHAPE),)):
            self.rows = None
        elif self.rows is None or z.shape[:-1] != (PROBE_SHAPE[0], self.rows.total):
            raise RefusedError(f"lays out its activations as {tuple(z.shape)}, not token by token")
        if z.shape[-1] != self.candidate.d_ff:
            raise RefusedError(f"has {z.shape[-1]} activations, and {self.candidate.d_ff} neurons")

    def proved(self, error: float, order: tuple[str, ...], prunable: bool = True) -> Proved:
        offset = self.rows and self.rows.offset
        return Proved(self.candidate, error, order, prunable, self.token_first, offset)


def prove(
    layer: nn.Module,
    candidate: Candidate,
    run: Callable[..., Any],
    generator: torch.Generator,
    rows: Rows | None = None,
) -> Proved:
    """Prove one candidate in a layer of the copy, which `run` calls.

    Raises
    ------
    RefusedError
        If the candidate is not an FF block whose neurons are independent of each other.
    Exception
        Whatever the layer raises when it is run with cut projections.
    """
    if not candidate.ups:
        return Proved(candidate, _prove_experts(layer, candidate, run, generator), ())
    bench = _Bench(layer, candidate, run, rows)
    z, error = _prove_independent(bench, generator)
    if z.is_meta:  # no values to go by: by convention, the gate is defined first
        return bench.proved(math.nan, candidate.ups)
    error = max(error, _prove_tokenwise(bench, z))
    # (tanh is odd, and ReLU takes a factor out: only what does both is linear.)
    return bench.proved(error, _gate_first(bench, z, factors=(-1, 2)))


def prove_recordable(
    layer: nn.Module, candidate: Candidate, run: Callable[..., Any], rows: Rows | None = None
) -> Proved:
    """A weaker proof, for blocks whose neurons depend on each other and can only be recorded.

    Where a norm lies between the activation function and the down-projection (BitNet), or only
    the highest neurons stay active (Gemma 3n), a block cannot be cut. It still is a block if each
    row of its z depends on one token only, and if z depends on the up-projections, not linearly,
    and on nothing else.
    """
    bench = _Bench(layer, candidate, run, rows)
    whole, z = bench.run_with({})
    bench.refuse_layout(z)
    if not z.is_meta and not z.isfinite().all():
        raise RefusedError("has activations that are not finite")
    error = _prove_tokenwise(bench, z)
    # (A norm takes no factor out, and makes no block of two factors of one matrix.)
    order = _gate_first(bench, z, factors=(-1,))
    # The outputs of the up-projections are kept as they were, and all else is changed.
    given: dict[str, Tensor] = {}

    def keeping(path: str, up: nn.Module) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            given[path] = up(x)
            return given[path]

        return with_forward(up, forward)

    def negated(module: nn.Module) -> nn.Module:
        def forward(*args: Any, **kwargs: Any) -> Any:  # (a router may give several)
            return tree_map_only(Tensor, Tensor.neg, module(*args, **kwargs))

        return with_forward(module, forward)

    bench.run_with({path: keeping(path, up) for path, up in bench.ups.items()})
    held = {
        path: with_forward(up, lambda x, path=path: given[path]) for path, up in bench.ups.items()
    }
    others = {
        path: negated(module)
        for path, module in projections_in(layer).items()
        if path not in (*candidate.ups, candidate.down)
    }
    for path, up in bench.ups.items():
        _, other = bench.run_with({path: negated(up)})
        if relative_error(other, z) <= bench.tolerance:
            raise RefusedError(f"its activations do not depend on {path}")
    z_held = _otherwise(bench, {**others, **held})
    error = max(error, relative_error(z_held, z))
    bench.check(error, "its activations depend on more than its up-projections")
    masked, _ = bench.run_with({}, mask=z.new_zeros(1))
    if relative_error(masked, whole) <= bench.tolerance:
        raise RefusedError("it adds nothing to the layer's output")
    return bench.proved(error, order, prunable=False)


def _otherwise(bench: _Bench, ups: dict[str, nn.Module]) -> Tensor:
    """The z of a layer that is given other values of each token, where it can be given these.

    (Gemma 4's gate of each layer's own inputs looks like a block, but for these inputs.)
    """
    try:
        return bench.run_with(ups, otherwise=True)[1]
    except RefusedError:
        raise
    except Exception:  # some layers cannot be given just anything
        return bench.run_with(ups)[1]


def _prove_independent(bench: _Bench, generator: torch.Generator) -> tuple[Tensor, float]:
    """Check that the layer, cut down to half of the neurons, computes those alone."""
    d_ff, device = bench.candidate.d_ff, device_of(bench.down)
    half = torch.randperm(d_ff, generator=generator, device="cpu")[: d_ff // 2].sort().values
    mask = torch.zeros(d_ff, dtype=bench.dtype, device="cpu").index_fill_(0, half, 1)
    half, mask = half.to(device), mask.to(device)
    output, z_half = bench.run_with(*_cut(bench, half))
    whole, z = bench.run_with({})
    masked, _ = bench.run_with({}, mask=mask)
    bench.refuse_layout(z)
    if not z.is_meta and not (z.isfinite().all() and (z * (1 - mask)).any()):
        raise RefusedError("has activations that are all zero, or not finite")
    reason = "its neurons depend on each other"
    errors = [bench.check(relative_error(z_half, z[..., half]), reason)]
    if not z.is_meta:
        largest = z.abs().float().flatten(0, -2).mean(dim=0).topk(d_ff // 2).indices.sort().values
        _, z_largest = bench.run_with(*_cut(bench, largest))
        errors.append(bench.check(relative_error(z_largest, z[..., largest]), reason))
    effect = relative_error(output, masked, whole)
    bench.check(effect, "its up-projection serves something else too")
    return z, max(*errors, relative_error(output, masked))


def _cut(bench: _Bench, neurons: Tensor) -> tuple[dict[str, nn.Module], nn.Module]:
    """The up- and down-projections with these neurons alone."""
    candidate = bench.candidate
    rows = neurons
    if candidate.fused:
        rows = fused_rows(neurons, candidate.d_ff, candidate.interleaved)
    ups = {path: cut(up, outputs=rows) for path, up in bench.ups.items()}
    return ups, cut(bench.down, inputs=neurons)


def _prove_experts(
    layer: nn.Module, candidate: Candidate, run: Callable[..., Any], generator: torch.Generator
) -> float:
    """Check that experts, each cut down to half of its neurons, compute those alone."""
    experts = layer.get_submodule(candidate.down)
    if not is_loaded(experts):
        return math.nan
    device = device_of(experts, "down_proj")
    count, d_ff = shape(experts)
    orders = [torch.randperm(d_ff, generator=generator, device="cpu") for _ in range(count)]
    half = torch.stack(orders)[:, : d_ff // 2].sort(dim=1)[0].to(device)
    mask = torch.zeros(count, d_ff, dtype=tensor_of(experts, "down_proj").dtype, device=half.device)
    mask.scatter_(1, half, 1)

    def run_with(module: nn.Module, mask: Tensor | None = None) -> tuple[Any, Routed]:
        seen: list[Routed] = []

        def tap(routed: Routed) -> Tensor | None:
            seen.append(routed)
            return None if mask is None else routed.z * mask[routed.expert]

        with replaced(layer, {candidate.down: module}), watching(module, tap):
            output = run()
        if not seen:
            raise RefusedError("does not compute its experts in a way that can be watched")
        if len(seen) > 1:
            raise RefusedError(f"calls its experts {len(seen)} times in one forward")
        return output, seen[0]

    def check(error: float, reason: str) -> float:
        if error > tolerance(mask.dtype):
            raise RefusedError(f"{reason} (relative error {error:.1g})")
        return error

    cut_output, cut_z = run_with(take(experts, half))
    whole, z = run_with(experts)
    masked, _ = run_with(experts, mask)
    if z.expert.shape[0] != math.prod(PROBE_SHAPE):
        raise RefusedError(f"lays out its activations as {z.shape}, not token by token")
    if not (z.z.isfinite().all() and torch.equal(z.expert, cut_z.expert)):
        raise RefusedError("has activations that are not finite, or routes tokens at random")
    sizes = z.z.new_zeros(count, d_ff, dtype=torch.float32)
    sizes.index_add_(0, z.expert.flatten(), z.z.abs().float().flatten(0, -2))
    largest = sizes.topk(d_ff // 2).indices.sort(dim=1)[0]
    cuts = [(half, cut_z), (largest, run_with(take(experts, largest))[1])]
    errors = [
        *(
            check(
                relative_error(each.z[..., : d_ff // 2], z.z.gather(-1, neurons[z.expert])),
                "its neurons depend on each other",
            )
            for neurons, each in cuts
        ),
        check(relative_error(whole, run()), "watched, it computes something else"),
        relative_error(cut_output, masked),
    ]
    effect = relative_error(cut_output, masked, whole)
    check(effect, "its up-projection serves something else too")
    return max(errors)


def _prove_tokenwise(bench: _Bench, z: Tensor) -> float:
    """Check that another value at one token changes no other token's z, as in attention.

    Cutting alone might let an attention without heads pass.
    """

    def flipping(up: nn.Module) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            y = up(x).clone()
            bench.sequence_first(y)[..., FLIPPED, :] *= -1
            return y

        return with_forward(up, forward)

    _, flipped = bench.run_with({path: flipping(up) for path, up in bench.ups.items()})
    others = [token for token in range(z.shape[-2]) if token != FLIPPED]
    error = relative_error(flipped[..., others, :], z[..., others, :])
    return bench.check(error, "it mixes tokens")


def _gate_first(bench: _Bench, z: Tensor, factors: tuple[int, ...]) -> tuple[str, ...]:
    """The up-projections, gate first: z is linear in up, and not in the gate.

    It is linear in what it takes these factors out of. Where z is linear in both or in neither, the
    first one defined is taken for the gate.
    """
    linear: dict[str, bool] = {}
    for path, up in bench.ups.items():
        scaled = (
            bench.run_with({path: with_forward(up, lambda x, up=up, by=by: by * up(x))})[1] / by
            for by in factors
        )
        linear[path] = all(relative_error(each, z) <= bench.tolerance for each in scaled)
    if not bench.candidate.fused and len(linear) == 1 and all(linear.values()):
        raise RefusedError("it has no activation function: two factors of one matrix")
    return tuple(sorted(bench.candidate.ups, key=linear.__getitem__))  # stable
