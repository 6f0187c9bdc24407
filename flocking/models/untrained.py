"""A model's control: its architecture with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flocking.models.naming import control_name
from flocking.models.sandbox import private_randomness
from flocking.models.weights import device_of, embeddings_of
from flocking.models.wrapping import require_model

# Weights that are drawn with one seed differ by less than this, relative to their size, however
# they are rounded; those of two seeds by 1.4.
_SAME = 0.05


def control(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same architecture with freshly initialised weights, to see what flocks untrained.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    seed : int
        Seed of the initialisation, which is transformers' for the architecture. The global
        generators are left alone.

    Returns
    -------
    transformers.PreTrainedModel
        Of the same class, device and dtype, in eval mode. A quantised model's control is not
        quantised.

    Raises
    ------
    TypeError
        If `model` is not a transformers model.
    ValueError
        If `seed` draws weights that `model` has, as where it is itself a control of this seed.

    Examples
    --------
    >>> untrained = flocking.control(model, seed=0)
    >>> untrained.num_parameters() == model.num_parameters()
    True
    """
    model = require_model(model)
    with torch.inference_mode(False):  # so that it can be trained, whoever asks
        return _control(model, seed)


def _control(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    fresh = _drawn(model, seed)
    same = list(_same(model, fresh))
    if same:
        # Some are the same whatever the seed, such as tables of sines.
        other = dict(_drawn(model, seed + 1).named_parameters())
        drawn = dict(fresh.named_parameters())
        same = [name for name in same if not _is_close(drawn[name], other[name])]
    if same:
        raise ValueError(
            f"seed={seed} draws weights that the model has ({same[0]}), so that it would be its "
            "own control: give another seed."
        )
    fresh.name_or_path = control_name(model, seed)
    return fresh


def _drawn(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model like this one, initialised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    device = model.device
    if device.type == "meta":  # of offloaded weights: they are drawn where they are computed with
        device = device_of(embeddings_of(model))
    with private_randomness(model, seed), torch.device(device), _drawn_in_float32():
        fresh: Any = type(model)(config)
    _round_as(model, fresh)
    return fresh.eval()


@contextmanager
def _drawn_in_float32() -> Iterator[None]:
    """As training begins, whatever dtype the values are then rounded to."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _round_as(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Give each weight and buffer the dtype that the model's has.

    Not all have the model's own: rotary frequencies stay in float32 where weights are bfloat16.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    # (Numbers of one byte are quantised: their scales are elsewhere.)
    own = {
        name: value.dtype
        for name, value in named
        if value.is_floating_point() and value.dtype.itemsize > 1
    }
    for path, module in fresh.named_modules():
        for tensors, default in ((module._parameters, model.dtype), (module._buffers, None)):
            for name, value in tensors.items():
                if value is None or not value.is_floating_point():
                    continue
                dtype = own.get(f"{path}.{name}".lstrip("."), default)
                value.data = value.data.to(dtype or value.dtype)


def _same(model: PreTrainedModel, fresh: PreTrainedModel) -> Iterator[str]:
    """Weights that both models have, but for those that are all one value."""
    drawn = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        other = drawn.get(name)
        if other is None or other.shape != parameter.shape or other.numel() < 2:
            continue
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        if bool((other != other.flatten()[0]).any()) and _is_close(parameter, other):
            yield name


def _is_close(one: Tensor, other: Tensor) -> bool:
    a, b = one.detach().float(), other.detach().to(one.device).float()
    return bool((a - b).norm() <= _SAME * b.norm())
