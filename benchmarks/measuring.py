"""What benchmarks have in common: models of real shapes, bytes, clocks, and taking turns."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

import flocking

SHAPES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "shapes.json").read_text())


def build(
    shape: str, device: str, dtype: torch.dtype, attention: str, **changes: int
) -> PreTrainedModel:
    """A model of a real shape, with random weights that repeat, so that it is made quickly."""
    config = AutoConfig.for_model(**{**SHAPES[shape], **changes})
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        ).eval()
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    tile = torch.randn(2**22 + 3, generator=generator, device=device).to(dtype) * 0.02
    for parameter in model.parameters():
        if parameter.ndim > 1:
            for part in parameter.data.view(-1).split(len(tile)):
                part.copy_(tile[: len(part)])
    model.generation_config.eos_token_id = None  # all generate as many tokens as they are asked for
    model.generation_config.pad_token_id = 0
    return model


def prompts(model: PreTrainedModel, sequences: int, tokens: int) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(sequences)
    shape = (sequences, tokens)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator).to(model.device)


def kv_bytes(model: PreTrainedModel, tokens: float, sequences: int = 1) -> float:
    """Bytes of the keys and values of this many tokens."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * size
    return 2 * config.num_hidden_layers * width * model.dtype.itemsize * tokens * sequences


def weight_bytes(model: PreTrainedModel, twin: PreTrainedModel | None = None) -> int:
    """Bytes of weights that decoding a token reads: all but input embeddings that are not the head.

    With `twin`, those that the twin reads. It must have generated: with one selection a sequence,
    it holds and reads compact weights for each.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if head is None or head.weight is not embedding:
        size -= embedding.numel() * embedding.element_size()
    if twin is not None:
        report = twin.report()
        size -= report.ff_bytes - report.compact_bytes
    return size


def need(device: str) -> None:
    """End with a sentence if a device is not there, before anything slow starts."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: --device cpu tries the script on a small shape.")


def synchronize(device: str | torch.device) -> None:
    """Wait for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str | torch.device) -> float:
    """Seconds until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


class Turns:
    """A lock: processes that name one file build and compile together, and measure one at a time.

    Compiling takes most of a run and leaves most cores idle, so several processes share it. A
    measurement begins when none of them compiles, and none of them compiles while it lasts.

    Parameters
    ----------
    path : str, optional
        The file, which is made if it is not there. Without one this process is alone.
    """

    def __init__(self, path: str | None = None) -> None:
        self._file = None if path is None else open(path, "a")  # noqa: SIM115
        self._lock("LOCK_SH")

    def _lock(self, name: str) -> None:
        if self._file is not None:
            import fcntl  # not on Windows

            fcntl.flock(self._file, getattr(fcntl, name))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Measure inside of this context, while no other process does."""
        self._lock("LOCK_EX")
        try:
            yield
        finally:
            self._lock("LOCK_SH")


def interleaved(
    contestants: dict[str, Callable[[], float]], repetitions: int, turns: Turns | None = None
) -> dict[str, list[float]]:
    """Measure each contestant in each round, in random order; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in contestants}

    def take_turns() -> None:
        for name in random.sample(list(contestants), len(contestants)):
            found[name].append(contestants[name]())

    take_turns()
    found = {name: [] for name in contestants}
    with contextlib.nullcontext() if turns is None else turns.alone():
        for _ in range(repetitions):
            take_turns()
    return found


def ratios(found: dict[str, list[float]], name: str, other: str) -> list[float]:
    """Ratios of one contestant's times to another's, by round."""
    return [a / b for a, b in zip(found[name], found[other], strict=True)]


def quartiles(values: list[float]) -> str:
    """Median and quartiles; for fewer than four values, median, lowest and highest."""
    if len(values) < 4:
        return f"{statistics.median(values):5.2f} [{min(values):.2f}, {max(values):.2f}]"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:5.2f} [{low:.2f}, {high:.2f}]"


def copy_bandwidth(device: str) -> list[float]:
    """Bytes read and written in a second by copies too large for any cache."""
    size = 2**31 if torch.device(device).type == "cuda" else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return [2 * size / seconds(lambda: target.copy_(source), device) for _ in range(9)]


def machine(device: str) -> dict[str, Any]:
    """Device, driver, clocks and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "flocking": flocking.__version__,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["memory"] = torch.cuda.get_device_properties(0).total_memory
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        try:
            found["nvidia-smi"] = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError) as problem:
            found["nvidia-smi"] = str(problem)
    return found


def free() -> None:
    """Give unused memory back to the device."""
    torch._dynamo.reset()
    for _ in range(2):  # what the first finds may hold something else
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
