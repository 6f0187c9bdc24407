"""``record(out=...)``: recordings of any number of texts, written to disk block by block."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import xarray as xr
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from flocking.models import require_model, require_tokenizer
from flocking.recording.arguments import Options
from flocking.recording.block_reading import BlockReader, Read, refuse_mixture
from flocking.recording.corpora import Block, Corpus
from flocking.recording.dataset import NOT_TOLD
from flocking.recording.forward_passes import (
    chosen_blocks,
    readable,
    recordable,
    warn_of_training,
)
from flocking.recording.growing import LAYOUT, GrowingStore
from flocking.recording.grown import is_growing, refuse_appended
from flocking.recording.locations import Folder, Location, Url, is_url
from flocking.recording.planning import bytes_of_text, create, plan_of
from flocking.recording.ranks import Processes, processes
from flocking.recording.stores import new_store_path, open_recording


def stream(
    model: nn.Module,
    text: Any,
    out: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    options: Options,
    num_texts: int | None,
    on_error: str,
    progress: bool,
    files: Sequence[str] | None = None,
) -> xr.Dataset:
    """Record texts into a store, or go on with it; see :func:`flocking.record`.

    `files` are the names of the files that texts are from, for coordinate ``file``.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r}: give 'stop' or 'skip'.")
    place: Location = Url(str(out)) if is_url(out) else Folder(new_store_path(out, "out"))
    model = recordable(require_model(model))
    corpus = Corpus(text, options.wanted, num_texts)
    reader = BlockReader(model, require_tokenizer(tokenizer), options, on_error, files)
    first = corpus.peek(reader.looked_at)
    reader = reader.after(
        reader.read_quietly(first)
    )  # what is wrong with all is wrong with the first
    chosen_blocks(model, options)
    warn_of_training(model)
    with processes() as among:
        _require_number(corpus, among)
        among.refuse_unlike("out", str(place))
        among.refuse_unlike("texts", (corpus.number, first.digests[:1].tolist()))
        with place.claimed() if among.rank == 0 else nullcontext():
            among.of_first(lambda: _prepare(place, corpus, reader, progress))
            store = GrowingStore(place)
            _refuse_other(store, reader.arguments())  # in each process
            _refuse_other_number(store, corpus)
            if not store.is_finished:
                _fill(store, corpus, reader, among, progress)
    return open_recording(str(place))


def refuse_without_out(num_texts: object, on_error: object) -> None:
    """Raise a ValueError for arguments that say nothing without a store to write to."""
    for name, value, default in (("num_texts", num_texts, None), ("on_error", on_error, "stop")):
        if value != default:
            raise ValueError(f"{name}={value!r} is for out=, a store to write to: give one.")


def _require_number(corpus: Corpus, among: Processes) -> None:
    if among.number > 1 and corpus.number is None:
        raise ValueError(
            f"{among.number} processes share the texts, and it is not known how many there are: "
            "pass num_texts=, or give a list."
        )


def _prepare(place: Location, corpus: Corpus, reader: BlockReader, progress: bool) -> None:
    """Make the store, or see that the one that is there is of the same texts and arguments."""
    if place.is_there():
        if not is_growing(place):
            raise ValueError(
                f"{place} exists and was not written by record(out=...): choose another name."
            )
        refuse_appended(place)
        store = GrowingStore(place)
        _refuse_other(store, reader.arguments())
        # (Of what can be read only once, the user has said a number, perhaps a wrong one.)
        if corpus.is_lasting or store.is_finished:
            _refuse_other_number(store, corpus)
        if not store.is_finished:
            store.forget_losses()
        if corpus.is_lasting or store.is_finished:
            _refuse_changed(store, corpus)
        elif corpus.number is not None:
            _check_all_there(store, corpus.number)
        if corpus.number is not None and not store.is_finished:
            store.expect(corpus.number)
        if progress and store.is_finished:
            tqdm.write(f"{place} is finished: nothing is left to record", file=sys.stderr)
        return
    plan = plan_of(corpus, reader, progress)
    place.make(lambda where: create(where, plan, reader))
    if progress:
        one, texts = bytes_of_text(plan, reader), plan.texts
        what = f"{texts:,} text{'s' * (texts > 1)} of" if texts else "each text of"
        tqdm.write(
            f"{place}: at most {readable(one * (texts or 1))}, before compression, for {what} up "
            f"to {plan.totals:,} tokens",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------------
# What goes on, and what does not


def _refuse_other(store: GrowingStore, arguments: dict[str, Any]) -> None:
    """Raise a ValueError if a store was begun with other arguments."""
    if store.asked["layout"] != LAYOUT:
        raise ValueError(
            f"{store.place} has layout {store.asked['layout']!r}, and this version of flocking "
            f"goes on with layout {LAYOUT}: record into another store."
        )
    before = store.asked["arguments"]
    now = json.loads(json.dumps(arguments))
    left_out = NOT_TOLD - before.keys()
    if store.is_finished and {*now["hook"]} <= {*before.get("hook", [])}:
        left_out |= {"hook"}  # one that was there may have removed itself
    if store.is_finished:
        left_out |= {"chat"}  # no text is written any more
    for name in (each for each in {**now, **before} if each not in left_out):
        if before.get(name) != now.get(name):
            said, current = _shown(before.get(name)), _shown(now.get(name))
            if name == "chat":
                raise ValueError(
                    "the chat template writes the same conversation otherwise than when "
                    f"{store.place} was begun ({said}; now {current}), as one with today's date "
                    "does: record into another store, or give token ids of all conversations as of "
                    "one day."
                )
            raise ValueError(
                f"{store.place} was begun with another {name} ({said}; now {current}): give the "
                "same, or record into another store."
            )


def _refuse_other_number(store: GrowingStore, corpus: Corpus) -> None:
    """Raise a ValueError if a store was begun with another number of texts."""
    texts = store.asked["texts"]
    if None not in (texts, corpus.number) and texts != corpus.number:
        raise ValueError(
            f"{store.place} was begun with {texts} texts, and there are {corpus.number} now: give "
            "the same, or record into another store."
        )


def _shown(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else f"{said[:40]}..."


def _refuse_changed(store: GrowingStore, corpus: Corpus) -> None:
    """Raise a ValueError if a text that is recorded is another one now."""
    last = 0
    for block in corpus.blocks(store.asked["block"]):
        _check_same(store, block)
        last = block.rows.stop
    _check_all_there(store, last)


def _check_same(store: GrowingStore, block: Block) -> None:
    state = store.state(block.rows)
    changed = (state > 0) & (store.digests(block.rows) != block.digests)
    if changed.any():
        number = block.start + int(np.argmax(changed))
        raise ValueError(
            f"text {number} is another one than when {store.place} was begun: give the same texts "
            "in the same order, or record into another store."
        )


def _check_all_there(store: GrowingStore, texts: int) -> None:
    known = store.sequences if store.asked["texts"] is None else store.asked["texts"]
    if texts < store.sequences and store.state(slice(texts, store.sequences)).any():
        raise ValueError(
            f"text has {texts} texts, and more are recorded in {store.place}: give the same texts, "
            "or record into another store."
        )
    if store.asked["finished"] and texts > known:
        raise ValueError(
            f"text has {texts} texts, and {store.place} was finished with {known}: give the same "
            "texts, or record into another store and put both together with flocking.concat."
        )


# --------------------------------------------------------------------------------------
# Filling it


def _fill(
    store: GrowingStore, corpus: Corpus, reader: BlockReader, among: Processes, progress: bool
) -> None:
    """Record what is missing, and finish the store when all processes are done."""
    failure, texts = None, 0
    digest = hashlib.sha256()
    try:
        for block in _recorded_blocks(store, corpus, reader, among, progress):
            texts = block.rows.stop
            digest.update(block.digests.tobytes())
        _check_all_there(store, texts)
    except Exception as problem:
        failure = problem
    among.settle(failure)
    among.refuse_unlike("texts", digest.hexdigest())
    generation = reader.options.wanted.source(True)
    among.of_first(lambda: store.finish(texts, generation))


def _recorded_blocks(
    store: GrowingStore, corpus: Corpus, reader: BlockReader, among: Processes, progress: bool
) -> Iterator[Block]:
    """All blocks, after this process's share of those that are missing is recorded."""
    size = store.asked["block"]
    missing = _missing(store, among)
    mine = None if missing is None else set(missing[among.rank :: among.number])
    drawn = bool(reader.options.wanted.arguments)
    seen: Counter[bytes] = Counter()
    with _bar(store, among, progress) as bar:
        for block in corpus.blocks(size):
            number = block.start // size
            if missing is None:
                done = bool((store.state(block.rows) > 0).all())
            else:
                done = number not in missing
            if done:
                _check_same(store, block)
            here = not done and (mine is None or number in mine)
            if here or drawn:
                read = _read_again(store, block, reader)
                read = read.counted(seen) if drawn else read
            if here:
                _record_block(store, block, read, reader, bar)
            yield block


def _read_again(store: GrowingStore, block: Block, reader: BlockReader) -> Read:
    # (Where tokens were counted, all texts were read before, and what there is was said.)
    counted = store.asked["tokens"] is not None
    return reader.read_quietly(block) if counted else reader.read(block)


def _record_block(
    store: GrowingStore, block: Block, read: Read, reader: BlockReader, bar: tqdm
) -> None:
    read = reader.fitting(block, read)
    if read.reading is not None:
        special = store.attributes["special_tokens"]
        refuse_mixture(special, read.reading.whole.special, block.start)
        store.place.refuse_full(reader.bytes_of(read.reading))
    recording, problems = reader.record(block, read, bar)
    files = None if reader.files is None else reader.files[block.rows]
    store.write(block.rows, recording, block.digests, problems, files)
    bar.set_postfix(texts=block.rows.stop, refresh=False)


def _missing(store: GrowingStore, among: Processes) -> list[int] | None:
    """Numbers of the blocks that several processes share; None where there is one process.

    They are of the time before any of them has written: what a process reads is held against the
    others' texts at the end, not against what they wrote a moment before. So what is said of
    unlike texts does not depend on which process is ahead.
    """
    if among.number == 1:
        return None
    size = store.asked["block"]
    starts = range(0, store.asked["texts"], size)

    def missing() -> list[int]:
        rows = (slice(start, min(start + size, starts.stop)) for start in starts)
        return [each.start // size for each in rows if not (store.state(each) > 0).all()]

    found: list[int] = among.of_first(missing)
    return found


def _bar(store: GrowingStore, among: Processes, progress: bool) -> tqdm:
    total = store.asked["tokens"]
    done = 0
    if total is not None:
        done = store.tokens_recorded()
        total = done + (total - done) // among.number
    return tqdm(
        total=total,
        initial=done,
        desc="recording" if among.number == 1 else f"recording (1 of {among.number} processes)",
        unit="token",
        disable=not progress or among.rank > 0,
    )
