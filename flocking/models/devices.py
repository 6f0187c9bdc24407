"""Where a user wants a model to be, checked before anything slow is done for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Places of a device map that name no device.
_WORDS = ("auto", "balanced", "balanced_low_0", "sequential", "disk", "cpu")


def check_places(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse devices that are not there or hold no values, and dtypes that there are not.

    Parameters
    ----------
    name : str
        Of the model, as the user gave it.
    kwargs : dict
        Of ``from_pretrained``.

    Raises
    ------
    ValueError
        If there is no such device or dtype.
    """
    for argument in ("device_map", "device"):  # (the latter is the harness's)
        given = kwargs.get(argument)
        for place in given.values() if isinstance(given, Mapping) else [given]:
            if str(place).partition(":")[0] == "meta":
                raise ValueError(
                    f"{argument} names the device meta, which holds no values: give cpu or cuda."
                )
            # (The harness's default, cuda:0, becomes another device where there is none.)
            asked = argument == "device_map" or place == "cuda"
            if asked and (why := _why_not_there(place)):
                raise ValueError(f"{name} cannot be loaded: {argument} names {why}.")
    for argument in ("dtype", "torch_dtype"):
        given = kwargs.get(argument)
        if isinstance(given, str) and given != "auto":
            short = given.removeprefix("torch.")
            if not isinstance(getattr(torch, short, None), torch.dtype):
                raise ValueError(f"{argument}={given!r}: give float32, bfloat16 or float16.")


def _why_not_there(place: object) -> str:
    """Why a model cannot be at a place, and what to give instead; empty if it can."""
    if place is None or place in _WORDS or not isinstance(place, str | int | torch.device):
        return ""
    try:
        device = torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    except RuntimeError:  # it is no name of one
        return f"{place!r}, which is no device: give 'cpu', 'cuda' or 'auto'"
    backend = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "device_count"):
        return ""
    count = int(backend.device_count())  # type: ignore[union-attr]
    if (device.index or 0) < count:
        return ""
    there = f"devices 0 to {count - 1}" if count else "no such device"
    kind = device.type
    instead = f"{kind}:0" if count else "cpu"
    return f"{device}, and torch finds {there} of the kind {kind}: give {instead!r} or 'auto'"
