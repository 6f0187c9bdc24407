"""How large a store is made for texts, and making it."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from flocking.models import CHATS, context
from flocking.recording.block_reading import BlockReader, refuse_mixture
from flocking.recording.corpora import Corpus
from flocking.recording.dataset import GENERATION, fixed_coordinates, variables_of
from flocking.recording.forward_passes import recording_bytes
from flocking.recording.growing import GrowingStore, Sizes
from flocking.recording.locations import Location
from flocking.recording.windows import Layout

FEWEST, MOST = 4, 16  # batches in a block of texts
_SHARES = 16  # blocks that a corpus has, where that is possible, for processes to share
_BLOCK = 256 * 2**20  # bytes of a block in memory, unless one batch takes more
_SURVEYED = 256  # texts that are counted at a time


class Plan(NamedTuple):
    """How large a store is made, and what it is of."""

    texts: int | None
    prompts: int  # tokens of a prompt, at most
    totals: int  # tokens of a text, at most
    new: int  # tokens of a continuation, at most
    tokens: int | None  # of all texts
    special: str
    block: int  # texts in one


def plan_of(corpus: Corpus, reader: BlockReader, progress: bool) -> Plan:
    """How large the store has to be: counted where texts can be read twice, or at most."""
    if corpus.is_lasting:
        return _counted(corpus, reader, progress)
    return _at_most(corpus, reader)


def _counted(corpus: Corpus, reader: BlockReader, progress: bool) -> Plan:
    prompts, totals = array("l"), array("l")  # (lists of numbers take several times as much)
    special, problem = "", ""
    with tqdm(
        total=corpus.number, desc="reading", unit="text", disable=not progress, leave=False
    ) as bar:
        for block in corpus.blocks(_SURVEYED):
            read = reader.read(block)
            bar.update(len(block.texts))
            problem = problem or next(iter(read.problems.values()), "")
            if read.reading is None:
                continue
            refuse_mixture(special, read.reading.whole.special, block.start)
            special = read.reading.whole.special
            for known, here in zip((prompts, totals), reader.lengths(read.reading), strict=True):
                known.extend(here)
    if not totals:
        raise ValueError(f"no text can be recorded: {problem}")
    new = max(total - prompt for prompt, total in zip(prompts, totals, strict=True))
    plan = Plan(corpus.number, max(prompts), max(totals), new, sum(totals), special, 0)
    plan = plan._replace(block=_texts_in_block(plan, reader))
    if reader.on_error == "stop":
        _refuse_large(plan, reader, prompts, totals)
    return plan


def _refuse_large(plan: Plan, reader: BlockReader, prompts: array[int], totals: array[int]) -> None:
    """Raise a MemoryError if there is no memory for the largest block of texts."""

    def rows(start: int) -> slice:
        return slice(start, start + plan.block)

    def size(start: int) -> int:
        return reader.bytes_while_recording([*prompts[rows(start)]], [*totals[rows(start)]])

    largest = max(range(0, len(totals), plan.block), key=size)
    places = range(len(totals))[rows(largest)]
    reader.check_memory(0, {place: (prompts[place], totals[place]) for place in places})


def _at_most(corpus: Corpus, reader: BlockReader) -> Plan:
    """From `max_tokens` or the model's context, and the first text."""
    options = reader.options
    limits = [limit for limit in (options.max_tokens, context(reader.model)) if limit]
    if not limits:
        raise ValueError(
            f"{type(reader.model).__name__} names no longest context, and the texts can be read "
            "only once: pass max_tokens=, or give a list."
        )
    first = corpus.peek(reader.looked_at)
    read = reader.read_quietly(first)
    if read.reading is None:
        raise ValueError(next(iter(read.problems.values())))
    wanted = first.wanted
    fed = max(0, wanted.max_new_tokens - 1)
    counts = options.wanted.prompt_tokens
    special = read.reading.whole.special
    # (Of conversations, others may end in an answer.)
    goes_on = counts is not None or wanted.continuation is not None or special == CHATS
    total = min(limits) + fed if options.max_tokens == min(limits) else min(limits)
    prompt = int(counts) if isinstance(counts, int | np.integer) else (total - fed)
    new = fed if wanted.max_new_tokens else total - 1 if goes_on else 0
    plan = Plan(corpus.number, prompt, total, new, None, special, 0)
    return plan._replace(block=_texts_in_block(plan, reader))


def create(place: Location, plan: Plan, reader: BlockReader) -> None:
    """An empty store."""
    options, blocks, raw = reader.options, reader.blocks, reader.raw
    # Sequences whose prompt, continuation and sum are the longest.
    layout = Layout.of(
        [plan.prompts, 1, max(1, plan.totals - plan.new)],
        [plan.prompts, 1 + plan.new, plan.totals],
        options.window,
    )
    names = variables_of(blocks, raw, options.ranks)
    new = layout.phase.count(GENERATION)
    sizes = Sizes(plan.texts, len(layout.phase) - new, max(block.experts for block in blocks))
    GrowingStore.create(
        place,
        names,
        fixed_coordinates(blocks, raw, layout),
        sizes,
        reader.attributes(plan.special),
        {
            "arguments": reader.arguments(),
            "block": plan.block,
            "texts": plan.texts,
            "tokens": plan.tokens,
        },
        with_files=reader.files is not None,
    )


def _texts_in_block(plan: Plan, reader: BlockReader) -> int:
    """How many texts a block has: those of some batches, and of one at the least.

    Texts are sorted by length inside a block: the larger it is, the less padding they have. The
    smaller it is, the less is lost with a run that is killed.
    """
    texts, batch_size = plan.texts, reader.options.batch_size
    batches = MOST
    while batches > FEWEST and texts is not None and texts < _SHARES * batches * batch_size:
        batches //= 2
    while batches > 1 and batches * batch_size * bytes_of_text(plan, reader) > _BLOCK:
        batches //= 2
    return batches * batch_size


def bytes_of_text(plan: Plan, reader: BlockReader) -> int:
    """Memory that the recording of a text takes, at most."""
    prompts, totals = [plan.prompts, 1], [max(plan.prompts, plan.totals), 1 + plan.new]
    # (The one with the longest prompt need not have the longest continuation.)
    return recording_bytes(reader.blocks, reader.raw, reader.options, prompts, totals) // 2
