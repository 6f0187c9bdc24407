"""A stopwatch that does not make the host wait for the device."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Times on a CUDA device's own clock, without waiting for it; elsewhere on the host's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def lap(self) -> None:
        """Note the time at which the device gets here."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._events.append(torch.cuda.Event(enable_timing=True))
                self._events[-1].record()
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From lap to lap; waits until the device has passed the last of them."""
        if self._device.type != "cuda":
            times = zip(self._times, self._times[1:], strict=False)
            return [end - start for start, end in times]
        self._events[-1].synchronize()
        events = zip(self._events, self._events[1:], strict=False)
        return [start.elapsed_time(end) / 1000 for start, end in events]
