"""A model whose FF weights stay in host memory and are copied to the device as they run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from flocking.feedforward import FeedForward, copy_with_blocks, keeping_blocks


@torch.inference_mode(False)
@torch.no_grad()
def offloaded(model: PreTrainedModel) -> PreTrainedModel:
    """A working copy of `model` on the accelerator, except for its FF weights, which stay in place.

    Each block's weights are copied over when its first projection runs, and those of the next
    block while it computes; they are freed after use, so the device holds two blocks' at a time.
    Without an accelerator, nothing moves.

    Raises
    ------
    ValueError
        If `model` is not in host memory.
    """
    places = {p.device.type for p in model.parameters()}
    if places != {"cpu"} or any(map(has_offloaded_params, model.modules())):
        raise ValueError(
            f"{type(model).__name__} is on {', '.join(sorted(places))}, and offload='cpu' is for "
            "a model in host memory: load it there, without device_map or .to(), or leave offload "
            "out."
        )
    device = torch.accelerator.current_accelerator(check_available=True)
    device = device or torch.device("cpu")
    if device.index is None and device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    placed = copy_with_blocks(model)
    with keeping_blocks(placed) as blocks:
        stream = _Stream(blocks, device)
        sent: dict[int, nn.Parameter] = {}  # tied ones once
        for module in placed.modules():
            if module in stream.places:
                add_hook_to_module(module, _Streaming(stream, module))
                continue
            for name, value in module._parameters.items():
                if value is not None and id(value) not in sent:
                    moved = value.detach().to(device)
                    sent[id(value)] = nn.Parameter(moved, requires_grad=value.requires_grad)
                module._parameters[name] = None if value is None else sent[id(value)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
    return placed


class _Stream:
    """The weights of FF blocks, in order; at most two blocks' are on the device.

    Attributes
    ----------
    places : dict of Module to int
        The blocks' projections, and the number of the block that each is part of.
    """

    def __init__(self, blocks: Iterable[FeedForward], device: torch.device) -> None:
        self.device = device
        self.places: dict[nn.Module, int] = {}
        self.values: list[dict[nn.Module, dict[str, Tensor]]] = []
        for block in blocks:
            if block.down in self.places:  # the same block's next run
                continue
            parts = dict.fromkeys(p for p in (block.up, block.gate, block.down) if p is not None)
            self.places.update(dict.fromkeys(parts, len(self.values)))
            self.values.append({p: dict(p.named_parameters(recurse=False)) for p in parts})
        self.there: dict[int, dict[nn.Module, dict[str, Tensor]]] = {}
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.come: dict[int, torch.cuda.Event] = {}

    def take(self, module: nn.Module) -> dict[str, Tensor]:
        """A projection's weights on the device, no longer kept here; starts the next block's."""
        place = self.places[module]
        if module not in self.there.get(place, {}):
            self._bring(place)
        self.there = {n: self.there[n] for n in (place, place + 1) if n in self.there}
        mine = self.there[place].pop(module)
        if self.side is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.come[place])
            for value in mine.values():
                value.record_stream(now)
        if place + 1 < len(self.values) and place + 1 not in self.there:
            self._bring(place + 1)
        return mine

    def _bring(self, place: int) -> None:
        with torch.no_grad(), torch.cuda.stream(self.side):
            self.there[place] = {
                module: {n: v.detach().to(self.device, non_blocking=True) for n, v in each.items()}
                for module, each in self.values[place].items()
            }
            if self.side is not None:
                self.come[place] = self.side.record_event()


class _Streaming(AlignDevicesHook):
    """Accelerate's hook for an offloaded module, with weights that are copied ahead of time.

    Copies of the module share this hook, and get the same weights as the module itself.
    """

    def __init__(self, stream: _Stream, module: nn.Module) -> None:
        values = {name: p.data for name, p in module.named_parameters(recurse=False)}
        super().__init__(stream.device, offload=True, weights_map=values)
        self.stream, self.module = stream, module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        for name, value in self.stream.take(self.module).items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, value in self.weights_map.items():
            away = torch.empty_like(value, device="meta")
            module._parameters[name] = nn.Parameter(away, requires_grad=False)
        return output
