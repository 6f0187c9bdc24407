"""Running a copy of a model without side effects, and comparing outputs."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from flocking.models.attributes import noting_changes
from flocking.models.precision import full_precision
from flocking.models.weights import device_of, parts


@contextmanager
def private_randomness(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; the global generators are as before afterwards."""
    cuda = []
    if torch.cuda.is_initialized():
        cuda = sorted({place.index for place in _places(model) if place.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _places(model: nn.Module) -> Iterator[torch.device]:
    """Where a model's weights are, and where those that are offloaded are computed with."""
    yield from (parameter.device for parameter in model.parameters())
    yield from (device_of(module) for module in model.modules() if has_offloaded_params(module))


class _NoHeads(TorchFunctionMode):
    """Raise where attention is left without keys, as by a cut through what is not an FF block.

    torch 2.11 divides by their number, which ends the process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            key = kwargs["key"] if "key" in kwargs else args[1]
            if 0 in key.shape:
                raise ValueError("attention has no keys")
        return func(*args, **kwargs)


class _ReadOnly(TorchDispatchMode):
    """Refuse every operation that would write into these parameters.

    Some models (RWKV) rescale their weights in place when they are run. On a copy, which
    shares them, that would damage the model itself.
    """

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        super().__init__()
        # The storages are kept, since the address of one that is freed may be given to another.
        storages = [part.untyped_storage() for tensor in tensors for part in parts(tensor)]
        self.storages = {storage._cdata: storage for storage in storages}
        self.written: dict[Any, list[tuple[int, str]]] = {}  # by operation: the arguments it writes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.written:
            self.written[func] = [
                (place, argument.name)
                for place, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
        for place, name in self.written[func]:
            target = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(target, Tensor) and target.untyped_storage()._cdata in self.storages:
                raise RuntimeError(
                    "it changes its own weights when it is run; if only the first time, as RWKV "
                    "does, run it once in eval mode before"
                )
        return func(*args, **kwargs)


_ATTENTION = [
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
_one_trial = threading.RLock()  # the settings below belong to the whole process


@contextmanager
def _usual_settings(copied: nn.Module) -> Iterator[None]:
    """Settings of torch as they are at its start, whatever the user has set for the moment.

    Hooks on all modules are set aside, too. What a trial finds out is remembered, so that it must
    not depend on when it was run.
    """
    kinds = {parameter.device.type for parameter in copied.parameters()} - {"meta"}
    with _one_trial, ExitStack() as restored:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            restored.callback(torch.set_default_dtype, dtype)
        if torch.are_deterministic_algorithms_enabled():
            only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(False)
            restored.callback(torch.use_deterministic_algorithms, True, warn_only=only_warn)
        restored.enter_context(full_precision())
        for kind in kinds | {"cpu"}:
            restored.enter_context(torch.autocast(kind, enabled=False))
        for hooks in (_global_forward_pre_hooks, _global_forward_hooks):
            restored.callback(hooks.update, dict(hooks))
            hooks.clear()
        restored.enter_context(torch.device("cpu"))  # what is created without naming a device
        restored.enter_context(torch.inference_mode(False))
        restored.enter_context(torch.no_grad())
        restored.enter_context(sdpa_kernel(_ATTENTION))
        yield


@contextmanager
def _same_parameters(copied: nn.Module) -> Iterator[None]:
    """Give parameters back what they had, which a copy shares with the model.

    bitsandbytes' take their scales off themselves when they run for the first time, and put them
    into the module that runs: a copy, which is thrown away.
    """
    before = [
        (parameter, dict(vars(parameter)), parameter.detach())
        for parameter in copied.parameters()
        if not is_traceable_wrapper_subclass(parameter)
    ]
    try:
        yield
    finally:
        for parameter, own, data in before:
            now = vars(parameter)
            if now.keys() != own.keys() or any(now[name] is not own[name] for name in own):
                now.clear()
                now.update(own)
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


@contextmanager
def trial(copied: nn.Module) -> Iterator[None]:
    """A context for running a trial copy.

    No gradients, a fixed seed, torch's usual settings, and weights that are read only.
    """
    with (
        noting_changes(*copied.modules()),
        _same_parameters(copied),
        _usual_settings(copied),
        private_randomness(copied, 0),
        _ReadOnly(copied.parameters()),
        _NoHeads(),
    ):
        yield


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding alone explains, when a sum is reordered.

    Other differences are larger by orders of magnitude.
    """
    if not dtype.is_floating_point:  # packed weights; their activations may have any dtype
        return 5e-2
    return {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(dtype, 1e-4)


def relative_error(got: Any, expected: Any, without: Any = None) -> float:
    """Largest difference over all tensors of two outputs, relative to the largest value.

    If both outputs contain an effect, and `without` is the output without it, the difference is
    relative to that effect: behind a large residual, a wrong effect would pass for rounding.

    Returns NaN on the meta device, and infinity where a value is not finite, unless both outputs
    have the same infinity there.

    Raises
    ------
    ValueError
        If shapes differ.
    """
    error = 0.0
    without = expected if without is None else without
    leaves = (tree_leaves(output) for output in (got, expected, without))
    for a, b, c in zip(*leaves, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            continue
        if a.shape != b.shape:
            raise ValueError(f"expected an output of shape {tuple(b.shape)}, got {tuple(a.shape)}")
        if b.is_meta:
            return math.nan
        size = b.abs().nan_to_num(posinf=0).max().float().item() if b.numel() else 0.0
        difference = _largest(a, b)
        if without is not expected:  # allow what rounding does to values of this size
            difference = max(0.0, difference - 8 * torch.finfo(b.dtype).eps * size)
            size = _largest(b, c)
        error = max(error, difference / size if size else difference and math.inf)
    return error


def _largest(a: Tensor, b: Tensor) -> float:
    """Largest difference; equal infinities (of masks) differ by nothing."""
    difference = torch.where(a == b, 0, (a - b).abs()).max().float().item() if a.numel() else 0.0
    return difference if math.isfinite(difference) else math.inf
