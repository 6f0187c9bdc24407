"""Dynamic rotary embeddings, whose frequencies follow the longest text that they were given.

transformers keeps them until a longer text comes, or one within the length that the model was
trained with. So a text between the two gets other frequencies after a longer one than alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flocking.models.attributes import updates_itself

_ORIGINAL = "original_inv_freq"


def forget_lengths(model: nn.Module) -> None:
    """Take rotary embeddings back to where they are before any text, for the next one."""
    for module in filter(updates_itself, model.modules()):
        for name in [*module._buffers, *vars(module)]:
            if name.endswith(_ORIGINAL):
                _forget(module, name.removesuffix(_ORIGINAL))


def _forget(module: Any, prefix: str) -> None:
    """Of one kind of layers, if they have their own frequencies: `prefix` is theirs."""
    longest = getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached)
    if longest == module.original_max_seq_len:
        return
    current = getattr(module, f"{prefix}inv_freq")
    fresh = getattr(module, f"{prefix}{_ORIGINAL}").to(current.device).clone()
    module._buffers[f"{prefix}inv_freq"] = fresh
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextmanager
def lengths_as_before(model: nn.Module) -> Iterator[None]:
    """Begin with fresh rotary embeddings, and give the model its own back at the end."""
    before = [_State(module) for module in filter(updates_itself, model.modules())]
    try:
        forget_lengths(model)
        yield
    finally:
        for state in before:
            state.restore()


class _State:
    """What a module's buffers and attributes were."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._buffers = dict(module._buffers)
        # (Some are written to in place. What is offloaded has no values here.)
        there = {n: b for n, b in self._buffers.items() if b is not None and not b.is_meta}
        self._values = {name: buffer.clone() for name, buffer in there.items()}

    @torch.no_grad()
    def restore(self) -> None:
        attributes, buffers = vars(self._module), self._module._buffers
        buffers.clear()
        buffers.update(self._buffers)
        for name, value in self._values.items():
            if not torch.equal(buffers[name], value):  # type: ignore[arg-type]
                buffers[name].copy_(value)  # type: ignore[union-attr]
        for name in attributes.keys() - self._attributes.keys():
            del attributes[name]
        attributes.update(self._attributes)
