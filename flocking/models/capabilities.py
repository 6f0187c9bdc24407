"""What may be done with a model without changing what its tokens give, found out by trial."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from flocking.models.copies import shadow
from flocking.models.memo import PerModel
from flocking.models.running import forward
from flocking.models.sandbox import relative_error, tolerance, trial
from flocking.models.weights import device_of, embeddings_of

# Tokens of one forward pass, all sequences of the batch together. Longer texts are fed in
# chunks over a cache, so that peak memory grows with the cache and the result only. Below
# this many, one pass without a cache is faster and needs less memory than chunks would.
CHUNK_TOKENS = 8192


def chunks(model: PreTrainedModel, batch: int, length: int) -> list[slice]:
    """The pieces in which `length` tokens of each of `batch` sequences are fed."""
    step = max(1, CHUNK_TOKENS // batch)
    if length <= step or not traits(model).chunkable:
        step = length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def batches(model: PreTrainedModel, lengths: list[int], size: int) -> list[list[int]]:
    """Which sequences share a forward pass: of like length, so that little is padding.

    Of the same length, if the model cannot be padded without changing what it gives.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    mixed = size == 1 or len(set(lengths)) == 1 or traits(model).paddable
    groups: list[list[int]] = []
    for row in order:
        if groups and len(groups[-1]) < size and (mixed or lengths[groups[-1][0]] == lengths[row]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Traits(NamedTuple):
    """What may be done with a model without changing what its real tokens give.

    Attributes
    ----------
    causal : bool
        Later tokens do not matter to earlier ones.
    decodes : bool
        What follows a text may be fed one token at a time, over a cache, as generation does, and
        to another copy of the model than the one that read the text.
    continuable : bool
        It may be fed in one piece, over a cache.
    chunkable : bool
        A text may be fed in pieces, over a cache.
    paddable : bool
        A text may be padded on the right.
    """

    causal: bool
    decodes: bool
    continuable: bool
    chunkable: bool
    paddable: bool


@PerModel
def traits(model: PreTrainedModel) -> Traits:
    """Find out by trial, on a shadow of the model and 16 random tokens."""
    copied = shadow(model)
    vocabulary = embeddings_of(copied).weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 16), generator=generator, device="cpu")
    ones = torch.ones_like(ids)

    def run(ids: Tensor, mask: Tensor, past: Any = None, keep: bool = False) -> Any:
        return forward(copied, ids, mask, past, keep)

    def changed() -> Tensor:
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % vocabulary
        return run(other, ones)[0][:, :-1]

    def chunked() -> Tensor:
        first = run(ids[:, :8], ones[:, :8], keep=True)
        second = run(ids[:, 8:], ones, past=first.past_key_values)
        return torch.cat((first[0], second[0]), dim=1)

    def decoded() -> Tensor:
        output = run(ids[:, :12], ones[:, :12], keep=True)
        parts = [output[0]]
        for end in range(13, 17):
            past = output.past_key_values
            output = run(ids[:, end - 1 : end], ones[:, :end], past=past, keep=True)
            parts.append(output[0])
        return torch.cat(parts, dim=1)

    def generated() -> Tensor:
        """Logits by `generate`, which knows how each model goes on; its tokens are forced."""
        reader, writer = shadow(model), shadow(model)
        writer._prefill = reader._prefill
        forward = writer.forward

        @functools.wraps(forward)
        def one_token(*args: Any, **kwargs: Any) -> Any:
            if kwargs["input_ids"].shape[1] != 1:
                raise RuntimeError("it reads the text again for every new token")
            return forward(*args, **kwargs)

        writer.forward = one_token
        writer.generation_config = GenerationConfig(pad_token_id=0)

        output = writer.generate(
            ids[:, :12].to(device_of(embeddings_of(copied))),
            attention_mask=ones[:, :12],
            max_new_tokens=4,
            do_sample=False,
            use_cache=True,
            logits_processor=[forcing(ids)],
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(output.logits, dim=1)

    def padded() -> Tensor:
        pads = torch.zeros_like(ids[:, :8])
        return run(torch.cat((ids, pads), 1), torch.cat((ones, pads), 1))[0][:, :16]

    with trial(copied):
        whole = run(ids, ones)[0]

        def same(attempt: Callable[[], Tensor], due: Tensor = whole) -> bool:
            try:
                got = attempt()
                return relative_error(got, due[:, : got.shape[1]]) <= tolerance(whole.dtype)
            except Exception:  # it cannot be done at all
                return False

        def generates() -> bool:
            if not model.can_generate() or model.config.is_encoder_decoder:
                return False
            device = device_of(embeddings_of(copied))
            return same(generated, copied(ids.to(device)).logits[:, 11:])

        by_length = _depends_on_length(model.config)
        return Traits(
            causal=same(changed),
            decodes=same(decoded) or generates(),
            continuable=(continuable := same(chunked)),
            chunkable=not by_length and continuable,
            paddable=not by_length and same(padded),
        )


def forcing(sequences: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that lets `generate` write one given sequence, int64 (1, token)."""

    def force(so_far: Tensor, scores: Tensor) -> Tensor:
        due = sequences[:, so_far.shape[1]].to(scores.device)
        return torch.full_like(scores, -torch.inf).index_fill_(1, due, 0)

    return force


def refuse_forgetful(model: PreTrainedModel, *, pieces: bool = False) -> None:
    """Raise a ValueError if the model cannot go on from a cache of what it has read.

    One token at a time, or also by `pieces` of several.
    """
    if not traits(model).decodes:
        raise ValueError(
            f"{type(model).__name__} cannot go on from a cache of its prompt: what comes after "
            "would be computed without it."
        )
    if pieces and not traits(model).continuable:
        raise ValueError(
            f"{type(model).__name__} takes only one token at a time on top of a cache, and what "
            "comes after the prompt is scored in one piece: score it with another model."
        )


def _depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether a text's length, padding included, matters in a way that no short trial shows.

    Rotary embeddings may depend on it, and sparse attention starts to leave out keys beyond some
    length, where ties may then be decided in another way.
    """
    text = config.get_text_config()
    rotation = str(getattr(text, "rope_parameters", ""))
    sparse = any(getattr(text, name, None) for name in ("index_topk", "keep_window_size"))
    sparse = sparse or getattr(text, "attention_type", "") == "block_sparse"
    return "longrope" in rotation or "dynamic" in rotation or sparse
