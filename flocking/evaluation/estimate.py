"""How long an evaluation takes, and how much memory, before it starts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flocking.evaluation.blocks import Block
from flocking.evaluation.contexts import asked_of, heads
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.plan import Question
from flocking.evaluation.tasks import Articles
from flocking.evaluation.twins import ff_bytes, share_of
from flocking.evaluation.variants import Variant
from flocking.models import byte_count, device_of, embeddings_of, undisturbed

_TOKENS = 128  # in a trial pass
_STEPS = 4


@dataclass(frozen=True)
class Work:
    """What a block of items costs.

    Attributes
    ----------
    shared : int
        Tokens that are run once for all variants.
    tokens : int
        Tokens that each variant runs in pieces.
    steps : int
        New tokens that each variant writes one after the other, at most: batches, times the most
        that a text may have.
    """

    shared: int = 0
    tokens: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Speed:
    """What the full model takes, in seconds.

    Attributes
    ----------
    token : float
        A token of a long piece.
    step : float
        A new token of each text in a batch.
    """

    token: float
    step: float

    def seconds(self, work: Work, variants: int) -> float:
        """Of a block, for so many variants; pruned ones are counted as full ones."""
        read = self.token * (work.shared + variants * work.tokens)
        return read + self.step * variants * work.steps


def work_of(lm: GriffinLM, block: Block, texts: int = 1) -> Work:
    """What a block costs, counted without running it."""
    task = block.question.task
    if isinstance(task, Articles):
        length = task.prompt_length
        return Work(length * len(block.rows), sum(len(row) - length for row in block.rows))
    if block.question.generates:
        lengths = [len(lm.tok_encode(one.args[0])) for one in block.requests]
        most = max(_most_written(one.args[1], lm.max_gen_toks) for one in block.requests)
        _check_written(lm, block, lengths, most)
        alone = block.question.authors
        together = 1 if alone else texts if texts > 1 else lm.batch_size
        return Work(shared=sum(lengths), steps=-(-len(lengths) // together) * most)
    requests = [one for one in block.requests if one.args[0]]
    pairs = [(None, *lm._encode_pair(*one.args)) for one in requests]

    def named(number: int) -> str:
        return f"{block.question.name}, item {requests[number].doc_id}: "

    asked = asked_of(pairs, lm.max_length, block.question.of_likelihoods, named)
    shared = sum(asked[numbers[0]].cut for numbers in heads(asked))
    return Work(shared, sum(len(one.tokens) - 1 - one.cut for one in asked))


def _check_written(lm: GriffinLM, block: Block, lengths: Sequence[int], most: int) -> None:
    """Raise a ValueError for a prompt without tokens, or a model without room for an answer."""
    name = block.question.name
    if 0 in lengths:
        raise ValueError(
            f"{name}, item {block.items[lengths.index(0)]}: the prompt has no token that neurons "
            "could be selected from: leave the item out."
        )
    if most >= lm.max_length:
        raise ValueError(
            f"{name} asks for {most} new tokens, and the model's context has {lm.max_length}: "
            "leave the task out, or take a model with a longer context."
        )


def _most_written(options: Mapping[str, object], otherwise: int) -> int:
    """How many tokens a request may have written."""
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        if isinstance(found := options.get(name), int):
            return found
    return otherwise


def speed_of(lm: GriffinLM) -> Speed:
    """Time a pass over a few tokens, and some steps: seconds on a large model."""
    model, batch_size = lm.full, lm.batch_size
    device = device_of(embeddings_of(model))
    tokens = min(_TOKENS, lm.max_length)
    ids = torch.ones((1, tokens), dtype=torch.int64, device=device)
    with undisturbed(model, seed=0):
        token = min(_timed(model, ids, 1) for _ in range(2)) / tokens
        one = torch.ones((batch_size, 1), dtype=torch.int64, device=device)
        step = _timed(model, one, _STEPS) / _STEPS
    return Speed(token, step)


def _timed(model: PreTrainedModel, ids: torch.Tensor, times: int) -> float:
    started = time.monotonic()
    past = None
    for _ in range(times):
        outputs = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = getattr(outputs, "past_key_values", None)  # (RWKV has none)
    float(outputs.logits[0, -1, 0])  # which waits for the device
    return time.monotonic() - started


def copies_of(lm: GriffinLM, question: Question, blocks: Sequence[Block], texts: int = 1) -> int:
    """How many texts have a selection each at once: where a twin writes, those of a batch."""
    if not question.generates or question.authors or texts > 1:
        return 1
    most = max(sum(one.repeats or 1 for one in block.requests) for block in blocks)
    return min(int(lm.batch_size), most)


def memory_of(model: PreTrainedModel, groups: Iterable[tuple[Iterable[Variant], int]]) -> str:
    """What the weights of a model and of its twins take at once, in words.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    groups : iterable of (iterable of Variant, int)
        Variants whose twins are there at once, and texts of a batch with a selection each.
    """
    weights = sum(map(byte_count, model.parameters()))
    shares = (sum(share_of(one, copies) for one in group) for group, copies in groups)
    twins = max(shares, default=0) * ff_bytes(model)
    return f"{weights / 1e9:.1f} GB for the model's weights and {twins / 1e9:.1f} GB for its twins'"


def in_words(seconds: float) -> str:
    """A time, rounded."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
