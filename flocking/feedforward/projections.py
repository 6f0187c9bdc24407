"""Projections: how a weight matrix is stored, and how to cut it.

A weight may be transposed, quantised, wrapped in an adapter, or offloaded by accelerate, which
keeps values elsewhere and brings them for the time of a forward pass. Only this file knows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from flocking.models import loaded, parameter_of, parts, separate, tensor_of, without_accelerate


def width(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a projection, or None if `module` is not one.

    A projection is an ``nn.Linear``, transformers' ``Conv1D``, or whatever has ``in_features`` and
    ``out_features`` as a Linear has: adapters around one, quantised ones.
    """
    if isinstance(module, Conv1D):  # GPT-2's, stored transposed
        inputs, outputs = tensor_of(module).shape
        return inputs, outputs
    if isinstance(module, nn.Linear) and is_plain(module):
        outputs, inputs = module.weight.shape
        return inputs, outputs
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def projections_in(root: nn.Module) -> dict[str, nn.Module]:
    """Every projection below `root` by path, without those inside of another (an adapter's)."""
    found: dict[str, nn.Module] = {}
    last = None
    for path, module in root.named_modules():
        if (last is None or not path.startswith(f"{last}.")) and width(module):
            found[path] = module
            last = path
    return found


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection is one floating-point matrix, with or without a bias."""
    weight = projection._parameters.get("weight")
    return (
        isinstance(projection, nn.Linear | Conv1D)
        and weight is not None
        and weight.ndim == 2
        and weight.is_floating_point()
        and not is_traceable_wrapper_subclass(weight)
    )


def stored_transposed(projection: nn.Module) -> bool:
    """Whether a weight has one column, not one row, for each output, as in GPT-2."""
    return isinstance(projection, Conv1D)


def cut(
    projection: nn.Module, *, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> nn.Module:
    """A copy of `projection` that keeps only the given outputs (with bias) or inputs.

    Parameters
    ----------
    projection : torch.nn.Module
        An ``nn.Linear``, also one whose weight torchao quantised row by row, or transformers'
        ``Conv1D``; left as it is.
    outputs, inputs : Tensor of int64, shape (k,), optional
        Indices to keep.

    Raises
    ------
    ValueError
        If its weight cannot be cut like this.
    """
    if not isinstance(projection, nn.Linear | Conv1D):
        raise ValueError(f"its {type(projection).__name__} cannot be cut")
    compact = without_accelerate(separate(projection))
    with loaded(projection):
        compact._parameters = parameters = dict(projection._parameters)  # a bias may stay whole
        for name, axis, index in _taken(projection, outputs, inputs):
            kept = _take(parameter_of(compact, name).detach(), axis, index)
            parameters[name] = nn.Parameter(kept, requires_grad=False)
    if isinstance(compact, Conv1D):
        compact.nx, compact.nf = parameter_of(compact, "weight").shape
    elif isinstance(compact, nn.Linear):
        compact.out_features, compact.in_features = parameter_of(compact, "weight").shape
    return compact


def copy_cut(
    projection: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    *,
    outputs: Tensor | None = None,
    inputs: Tensor | None = None,
) -> None:
    """Copy what :func:`cut` would keep of `projection` into tensors that are there already.

    A bias that is kept whole is copied, too, if `bias` is given.
    """
    room = {"weight": weight, "bias": bias}
    with loaded(projection):
        for name, axis, index in _taken(projection, outputs, inputs):
            _take(parameter_of(projection, name).detach(), axis, index, out=room[name])
        if outputs is None and bias is not None:
            bias.copy_(parameter_of(projection, "bias").detach())


def _taken(
    projection: nn.Module, outputs: Tensor | None, inputs: Tensor | None
) -> Iterator[tuple[str, int, Tensor]]:
    """Names of the parameters to cut, with the axis and the indices to keep."""
    out_axis = 1 if stored_transposed(projection) else 0
    if inputs is not None:
        yield "weight", 1 - out_axis, inputs
    if outputs is not None:
        yield "weight", out_axis, outputs
        if projection._parameters.get("bias") is not None:
            yield "bias", 0, outputs


def _take(whole: Tensor, axis: int, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Some rows or columns of a tensor; of a quantised one, of both its numbers and its scales."""
    if not is_traceable_wrapper_subclass(whole):
        index = index.to(whole.device)
        if axis == 0:
            return torch.index_select(whole, 0, index, out=out)
        if out is not None and whole.is_cuda and out.is_contiguous() and (kernel := _columns()):
            return kernel.take_columns(whole, index, out)
        # The same as index_select of columns, and faster on CPUs in half precision.
        return torch.gather(whole, 1, index.expand(len(whole), -1), out=out)
    if out is None:
        out = whole.narrow(axis, 0, len(index)).clone()
    for part, room in zip(parts(whole), parts(out), strict=True):
        if part.ndim != whole.ndim or part.shape[axis] not in (1, whole.shape[axis]):
            raise ValueError(
                f"its {type(whole).__name__} cannot be cut: several neurons share a scale, or are "
                "packed together"
            )
        if part.shape[axis] == 1 != whole.shape[axis]:  # a scale that all of them share
            room.copy_(part)
        else:
            torch.index_select(part, axis, index.to(part.device), out=room)
    return out


@functools.cache
def _columns() -> ModuleType | None:
    """The module ``columns``, if Triton is installed."""
    try:
        from flocking.feedforward import columns
    except ImportError:
        return None
    return columns


def dense(projection: nn.Module) -> Tensor:
    """A projection's weight as floating-point numbers, one row for each output."""
    with loaded(projection):
        weight = tensor_of(projection).detach()
        if is_traceable_wrapper_subclass(weight):
            quantised: Any = weight
            weight = quantised.dequantize()
        weight = weight.float()
    return weight.T if stored_transposed(projection) else weight


def fused_rows(neurons: Tensor, d_ff: int, interleaved: bool) -> Tensor:
    """Output indices of `neurons`, gate and up, in a fused matrix of ``2 * d_ff`` outputs."""
    if interleaved:
        return torch.stack((2 * neurons, 2 * neurons + 1), dim=1).flatten()
    return torch.cat((neurons, neurons + d_ff))
