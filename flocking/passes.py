"""Forward passes: without the head, in chunks, continued, and leaving no trace."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flocking.feedforward import relative_error, tolerance
from flocking.hooks import observe
from flocking.shadow import shadow

# Tokens of one forward pass, all sequences of the batch together. Longer texts are fed in
# chunks over a cache, so that peak memory grows with the cache and the result only. Below
# this many, one pass without a cache is faster and needs less memory than chunks would.
CHUNK_TOKENS = 8192


@contextmanager
def undisturbed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode, no gradients, and random numbers of our own; all restored at the end."""
    training = [module for module in model.modules() if module.training]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield
    finally:
        for module in training:
            module.training = True


def continued(
    model: PreTrainedModel, prompts: list[Tensor], max_new_tokens: int, progress: bool
) -> list[Tensor]:
    """Each prompt with its greedy continuation, less the last token (which is never fed).

    One at a time: padded on the left as `generate` would have it, some models give
    other tokens than alone.
    """
    device = model.get_input_embeddings().weight.device
    pad = model.generation_config.pad_token_id
    if pad is None:  # nothing is padded, but generate wants one
        eos = model.generation_config.eos_token_id
        pad = (eos[0] if isinstance(eos, list) else eos) or 0
    sequences = []
    for prompt in tqdm(prompts, "generating", unit="text", disable=not progress):
        ids = prompt[None].to(device)
        sequence = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )[0]
        sequences.append(sequence[:-1].cpu())
    return sequences


def chunks(model: PreTrainedModel, batch: int, length: int) -> list[slice]:
    """The pieces in which `length` tokens of each of `batch` sequences are fed."""
    step = max(1, CHUNK_TOKENS // batch)
    if length <= step or not _chunkable(model):
        step = length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, past: Any, keep: bool) -> Any:
    """One pass without the head; the cache to go on from, if it is to be kept."""
    base = model.base_model
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if past is not None:
        inputs["past_key_values"] = past
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = keep or past is not None
    output = base(**inputs)
    return output.past_key_values if keep else None


_chunked_exactly: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _chunkable(model: PreTrainedModel) -> bool:
    """Whether `model` over a cache, in two pieces, gives what it gives in one; by trial.

    Bidirectional models do not, nor do models whose cache is not one to go on from.
    """
    if model not in _chunked_exactly:
        copied = shadow(model)
        vocabulary = copied.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
        seen: list[Tensor] = []
        try:
            with observe(copied, lambda block, z: seen.append(z)) as blocks:
                past = forward(copied, ids[:, :8], torch.ones(1, 8, dtype=int), None, True)
                forward(copied, ids[:, 8:], torch.ones(1, 16, dtype=int), past, False)
                forward(copied, ids, torch.ones(1, 16, dtype=int), None, False)
            first, second, whole = (seen[k * len(blocks) :][: len(blocks)] for k in range(3))
            _chunked_exactly[model] = all(
                relative_error(torch.cat((a, b), dim=-2), c) <= tolerance(c.dtype)
                for a, b, c in zip(first, second, whole, strict=True)
            )
        except (TypeError, AttributeError, ValueError, RuntimeError):
            _chunked_exactly[model] = False
    return _chunked_exactly[model]
