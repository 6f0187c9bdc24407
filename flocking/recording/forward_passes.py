"""Forward passes over texts that were read already, and what they give as a recording."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flocking.feedforward import FeedForward, feedforwards, observe, select_layers
from flocking.models import (
    Prompts,
    batches,
    chunks,
    forward,
    forward_of,
    hooks_on,
    hooks_on_everything,
    is_loaded,
    refuse_long,
    traits,
    undisturbed,
    usable_memory,
    warn,
    with_inputs,
)
from flocking.recording.arguments import Options
from flocking.recording.collector import Collector
from flocking.recording.continuations import Reading, generated, refuse_continuing
from flocking.recording.dataset import attributes_of, label, size_in_bytes, variables_of
from flocking.recording.windows import Layout, window_counts

_SHARE_OF_MEMORY = 0.8  # of free memory, that a recording may take


def recorded(
    model: PreTrainedModel,
    given: Reading,
    blocks: list[FeedForward],
    raw: list[FeedForward],
    options: Options,
    progress: bool | tqdm,
    earlier: list[int] | None = None,
) -> xr.Dataset:
    """The recording of texts, in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    given : Reading
    blocks, raw : list of FeedForward
        What is recorded, and those of which relative activations are kept.
    options : Options
    progress : bool or tqdm
        Whether to show progress, or a bar that counts tokens, of these texts and others.
    earlier : list of int, optional
        How often each text was read before: where tokens are drawn, others are drawn each time.
    """
    wanted = options.wanted
    with undisturbed(model, options.seed):
        fed = generated(model, given.whole, wanted, options.seed, progress is True, earlier)
        lengths = [len(ids) for ids in fed.ids]
        layout = Layout.of(given.prompts, lengths, options.window)
        collector = Collector(blocks, raw, layout, options.ranks)
        with _bar(progress, sum(lengths)) as bar:
            _read(model, collector, fed, options.batch_size, bar)
    attributes = attributes_of(
        model,
        blocks[0],
        special_tokens=fed.special,
        window=options.window,
        max_new_tokens=wanted.max_new_tokens,
        max_tokens=options.max_tokens,
        seed=options.seed,
        generation=wanted.source(bool(given.continued)),
    )
    return label(collector, fed.ids, fed.texts, fed.tokenizer).assign_attrs(attributes)


def recordable(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it can be recorded."""
    if getattr(model, "is_twin", False):
        raise ValueError(
            "model is a twin, which has the kept neurons of one prompt only: record the original, "
            "or use flocking.observe around the twin's own generate."
        )
    if model.base_model is not model and hooks_on(model, ("_forward_pre_hooks",)):
        raise ValueError(
            f"{type(model).__name__} has a pre-hook itself, and record runs only what is "
            "inside of it, without its head: register the hook on model.base_model, or below."
        )
    if model.base_model is not model and forward_of(model) and not hasattr(model, "_hf_hook"):
        raise ValueError(
            f"{type(model).__name__} has another forward than its class, as accelerate's mixed "
            "precision gives it one, and record runs only what is inside of it, without its head: "
            "give the model as it was (accelerator.unwrap_model(model, keep_fp32_wrapper=False)), "
            "or in another dtype."
        )
    if not all(map(is_loaded, model.modules())):
        raise ValueError(
            f"{type(model).__name__} has weights on the meta device, without values: load them "
            "first."
        )
    return model


def warn_of_training(model: PreTrainedModel) -> None:
    """Warn of a model in training mode, which is recorded in another."""
    if model.training:
        warn(
            "The model is in training mode: it is recorded in eval mode (without dropout) and "
            "set back afterwards.",
        )


def chosen_blocks(
    model: PreTrainedModel, options: Options
) -> tuple[list[FeedForward], list[FeedForward]]:
    """The blocks to record, and those of them of which relative activations are kept."""
    blocks = select_layers(feedforwards(model), options.layers)
    relative = options.relative
    if relative is None or (isinstance(relative, bool | np.bool_) and not relative):
        return blocks, []
    return blocks, select_layers(blocks, None if relative is True else relative, "relative")


def refuse_unfit(model: PreTrainedModel, given: Reading, options: Options) -> None:
    """Raise a ValueError for texts that are too long, or cannot be continued as is wanted."""
    refuse_long(model, given.whole.ids, options.wanted.max_new_tokens, "max_tokens")
    refuse_continuing(model, given, options.wanted.max_new_tokens)


def recording_bytes(
    blocks: list[FeedForward],
    raw: list[FeedForward],
    options: Options,
    prompts: list[int],
    totals: list[int],
) -> int:
    """Memory that the recording of texts with so many tokens takes."""
    sizes = {
        "sequence": len(totals),
        "layer": len(blocks),
        "neuron": max(block.d_ff for block in blocks),
        "token": max(totals),
        "window": 1 + sum(window_counts(prompts, totals, options.window)),
        "routed_expert": max(block.experts for block in blocks),
        "relative_layer": len(raw),
    }
    return size_in_bytes(variables_of(blocks, raw, options.ranks), sizes)


def lengths_of(given: Reading, options: Options) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and of each text when what is to be generated has been added."""
    fed = max(0, options.wanted.max_new_tokens - 1)
    return given.prompts, [length + fed for length in given.lengths]


def needed_bytes(
    blocks: list[FeedForward],
    raw: list[FeedForward],
    options: Options,
    prompts: list[int],
    totals: list[int],
) -> int:
    """Memory that is in use while such texts are recorded, besides the model's own.

    Beside the recording there are the sums of one batch, where the model computes on the CPU.
    """
    needed = recording_bytes(blocks, raw, options, prompts, totals)
    if here := [block for block in blocks if block.device.type == "cpu"]:
        batch = _longest(totals, options.batch_size)
        of_batch = [prompts[row] for row in batch], [totals[row] for row in batch]
        needed += recording_bytes(here, [], options, *of_batch)
    return needed


def _longest(totals: list[int], count: int) -> list[int]:
    return sorted(range(len(totals)), key=totals.__getitem__)[-count:]


def check_memory(
    blocks: list[FeedForward],
    raw: list[FeedForward],
    options: Options,
    prompts: list[int],
    totals: list[int],
    block: str = "",
) -> None:
    """Refuse a recording that would not fit in memory.

    Parameters
    ----------
    blocks, raw : list of FeedForward
    options : Options
    prompts, totals : list of int
        Tokens of the texts, as :func:`lengths_of` gives them.
    block : str
        If the texts are one block of more, their names. Smaller batches make smaller blocks then.
    """

    def size(batch_size: int, window: int | None) -> int:
        other = batch_size != options.batch_size
        rows = _longest(totals, batch_size if block and other else len(totals))
        of = [prompts[row] for row in rows], [totals[row] for row in rows]
        asked = options._replace(batch_size=batch_size, window=window)
        return needed_bytes(blocks, raw, asked, *of)

    now = options.batch_size, options.window
    room = int(usable_memory().available * _SHARE_OF_MEMORY)
    if size(*now) <= room:
        return
    powers = [2**power for power in range(32)]
    fewer = [(count, options.window) for count in reversed(powers) if count < options.batch_size]
    wider = [(options.batch_size, window) for window in [*powers[6:], None]]
    fitting = next((each for each in [*fewer, *wider, (1, None)] if size(*each) <= room), now)
    named = [f"batch_size={fitting[0]}"] * (fitting[0] != now[0])
    named += [f"window={fitting[1]}"] * (fitting[1] != now[1])
    remedy = f"{' and '.join(named)} would fit ({readable(size(*fitting))})"
    if not named:
        remedy = "no window would fit: record fewer texts or layers at a time"
    what = f"The recording of {block}" if block else "The recording"
    raise MemoryError(
        f"{what} would take {readable(size(*now))} of memory and {readable(room)} may be used: "
        f"{remedy}."
    )


def readable(size: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# --------------------------------------------------------------------------------------
# Batch by batch


def _bar(progress: bool | tqdm, tokens: int) -> AbstractContextManager[tqdm]:
    if isinstance(progress, tqdm):
        return nullcontext(progress)
    return tqdm(total=tokens, desc="recording", unit="token", disable=not progress)


def _read(
    model: PreTrainedModel, collector: Collector, fed: Prompts, batch_size: int, bar: tqdm
) -> None:
    """Run all sequences through the model, batch by batch, chunk by chunk."""
    layers = [block.layer for block in collector.blocks]
    lengths = list(map(len, fed.ids))
    ways = with_inputs(model, fed.inputs) if fed.inputs else None
    everywhere = hooks_on_everything()
    if everywhere or any(hooks_on(module, of_weights=False) for module in model.modules()):
        # They may look at other tokens, or count from the end: texts alone, and each in one piece.
        ways = (ways or traits(model))._replace(paddable=False, chunkable=False)
        batch_size = 1
    ones = [torch.ones_like(row) for row in fed.ids]
    groups = batches(model, lengths, batch_size, ways)
    if "relative" in collector.arrays:
        size = readable(collector.arrays["relative"].nbytes)
        bar.set_postfix_str(f"keeping relative activations as float16: {size}")
    with observe(model, collector, layers=layers, routed=True):
        for rows in groups:
            collector.begin(rows)
            ids = _padded(fed.ids, rows)
            mask = _padded(ones, rows)
            inputs = {name: _padded(values, rows) for name, values in fed.inputs.items()}
            past = None
            for tokens in chunks(model, len(ids), ids.shape[1], ways):
                collector.expect(tokens)
                keep = tokens.stop < ids.shape[1]
                here = {name: values[:, tokens] for name, values in inputs.items()}
                output = forward(model, ids[:, tokens], mask[:, : tokens.stop], past, keep, here)
                past = output.past_key_values if keep else None
                collector.check()
                bar.update(int(mask[:, tokens].sum()))
            collector.end()


def _padded(values: list[Tensor], rows: list[int]) -> Tensor:
    """These rows as one tensor, padded with zeros on the right, where no real token sees them."""
    return nn.utils.rnn.pad_sequence([values[row] for row in rows], batch_first=True)
