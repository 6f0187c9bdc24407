"""Reading and recording a block of texts, and what a recording depends on besides its texts."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.feedforward import FeedForward
from flocking.models import AS_GIVEN, CHATS, fingerprints, tokenize_chats, warn
from flocking.recording.arguments import Options
from flocking.recording.continuations import Reading, given_texts
from flocking.recording.corpora import Block
from flocking.recording.dataset import attributes_of
from flocking.recording.forward_passes import (
    check_memory,
    chosen_blocks,
    lengths_of,
    needed_bytes,
    recorded,
    recording_bytes,
    refuse_unfit,
)

_CHAT = [{"role": "user", "content": "The starlings turned as one."}]
_PROBES = ("The starlings turned as one.", "def f(x):\n    return x ** 2\n", "Größe, 鳥, 🐦", "")


class Read(NamedTuple):
    """Texts of a block that can be recorded.

    Attributes
    ----------
    reading : Reading or None
        None if there is no such text.
    places : list of int
        Their places in the block.
    problems : dict of str
        Why others cannot be, by their places.
    earlier : dict of int
        By place, how often the same prompt came before; empty where it makes no difference.
    """

    reading: Reading | None
    places: list[int]
    problems: dict[int, str]
    earlier: Mapping[int, int] = MappingProxyType({})

    def counted(self, seen: Counter[bytes]) -> Read:
        """With `earlier`, by the prompts that were seen before, to which these are added."""
        earlier = {}
        for place, ids in zip(
            self.places, self.reading.whole.ids if self.reading else [], strict=True
        ):
            key = hashlib.sha256(ids.numpy().tobytes()).digest()
            earlier[place] = seen[key]
            seen[key] += 1
        return self._replace(earlier=earlier)


class BlockReader(NamedTuple):
    """What reads and records blocks of texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    options: Options
    on_error: str
    files: Sequence[str] | None = None  # that the texts are from
    form: str = ""  # special tokens of the texts before, if there are any: all have the same

    def after(self, first: Read) -> BlockReader:
        """The same reader, which expects texts like the first ones, read by their tokenizer."""
        if first.reading is None:
            return self
        whole, tokenizer = first.reading.whole, self.tokenizer
        # (Token ids need none; one that lies beside the model only shows them.)
        if whole.special != AS_GIVEN or self.options.wanted.continuation is not None:
            tokenizer = whole.tokenizer
        return self._replace(form=whole.special, tokenizer=tokenizer)

    @property
    def looked_at(self) -> int:
        """How many texts are looked at, to see of which kind they are: one has to be readable."""
        return 1 if self.on_error == "stop" else 32

    @property
    def blocks(self) -> list[FeedForward]:
        """What is recorded; proved once a model."""
        return chosen_blocks(self.model, self.options)[0]

    @property
    def raw(self) -> list[FeedForward]:
        """Blocks of which relative activations are kept."""
        return chosen_blocks(self.model, self.options)[1]

    def read(self, block: Block) -> Read:
        """Tokens of a block's texts.

        Raises
        ------
        TypeError, ValueError
            For a text that cannot be read or recorded, by its number, if it is to stop at one.
        """
        places = list(range(len(block.texts)))
        try:
            with self._named(block.start, places):
                return Read(self._given(block), places, {})
        except (TypeError, ValueError):
            if self.on_error == "stop":
                raise
        problems, reader = {}, self
        for place in places:
            try:
                with self._named(block.start, [place]):
                    alone = reader._given(block.only([place]))
            except (TypeError, ValueError) as problem:
                problems[place] = str(problem)
            else:
                reader = reader._replace(form=alone.whole.special)
        good = [place for place in places if place not in problems]
        if not good:
            return Read(None, good, problems)
        with self._named(block.start, good):
            return Read(self._given(block.only(good)), good, problems)

    def read_quietly(self, block: Block) -> Read:
        """As :meth:`read`, of texts that are read once more, where their warnings are shown."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return self.read(block)

    def _named(self, start: int, places: list[int]) -> AbstractContextManager[None]:
        """Let errors and warnings name a block's texts as they are among all."""
        return renamed([self._name(start + place) for place in places])

    def _name(self, number: int) -> str:
        return f"text {number}" + (f" ({self.files[number]})" if self.files is not None else "")

    def _given(self, block: Block) -> Reading:
        given = given_texts(
            self.model, block.texts, self.tokenizer, block.wanted, self.options.max_tokens
        )
        refuse_mixture(self.form, given.whole.special)
        refuse_unfit(self.model, given, self.options)
        return given

    def record(
        self, block: Block, read: Read, bar: tqdm
    ) -> tuple[xr.Dataset | None, dict[int, str]]:
        """The recording of a block's texts, and why others are left out, by their places."""
        if read.reading is None:
            return None, read.problems
        try:
            with self._named(block.start, read.places):
                data = self._recorded(block.only(read.places), read.reading, bar, read.earlier)
            return data, read.problems
        except ValueError:
            if self.on_error == "stop":
                raise
        problems = dict(read.problems)
        for place in read.places:
            alone = block.only([place])
            try:
                with self._named(block.start, [place]):
                    self._recorded(alone, self._given(alone), bar, {})
            except ValueError as problem:
                problems[place] = str(problem)
        good = [place for place in read.places if place not in problems]
        if not good:
            return None, problems
        rest = block.only(good)
        earlier = {place: times for place, times in read.earlier.items() if place in good}
        return self._recorded(rest, self._given(rest), bar, earlier), problems

    def fitting(self, block: Block, read: Read) -> Read:
        """The texts of a block that there is memory for, the others left out, the largest first.

        Raises
        ------
        MemoryError
            If there is none for all of them, and no text is to be left out.
        """
        if read.reading is None:
            return read
        sizes = dict(zip(read.places, zip(*self.lengths(read.reading), strict=True), strict=True))
        problems = dict(read.problems)
        while sizes:
            try:
                self.check_memory(block.start, sizes)
                break
            except MemoryError as problem:
                if self.on_error == "stop":
                    raise
                largest = max(sizes, key=lambda place: sizes[place][1])
                why = "" if len(sizes) == 1 else "the largest of its block: "
                problems[largest] = f"{self._name(block.start + largest)}: {why}{problem}"
                del sizes[largest]
        if len(sizes) == len(read.places):
            return read
        if not sizes:
            return Read(None, [], problems)
        earlier = {place: times for place, times in read.earlier.items() if place in sizes}
        rest = self.read_quietly(block.only([*sizes]))
        return Read(rest.reading, [*sizes], problems, earlier)

    def check_memory(self, start: int, sizes: Mapping[int, tuple[int, int]]) -> None:
        """Refuse texts that do not fit in memory together.

        `sizes` are the tokens of each one's prompt and of all of it, by its place after `start`.
        """
        first, last = min(sizes) + start, max(sizes) + start
        named = self._name(first) if first == last else f"texts {first} to {last}"
        prompts, totals = ([size[n] for size in sizes.values()] for n in (0, 1))
        check_memory(self.blocks, self.raw, self.options, prompts, totals, named)

    def lengths(self, reading: Reading) -> tuple[list[int], list[int]]:
        """Tokens of each prompt, and of each text with its continuation."""
        return lengths_of(reading, self.options)

    def bytes_while_recording(self, prompts: list[int], totals: list[int]) -> int:
        """Memory in use while texts with so many tokens are recorded."""
        return needed_bytes(self.blocks, self.raw, self.options, prompts, totals)

    def bytes_of(self, reading: Reading) -> int:
        """Memory that the recording of texts takes."""
        return recording_bytes(self.blocks, self.raw, self.options, *self.lengths(reading))

    def _recorded(
        self, block: Block, reading: Reading, bar: tqdm, earlier: Mapping[int, int]
    ) -> xr.Dataset:
        options = self.options._replace(wanted=block.wanted)
        times = list(earlier.values()) or None
        return recorded(self.model, reading, self.blocks, self.raw, options, bar, times)

    def arguments(self) -> dict[str, Any]:
        """All that a recording depends on besides its texts, by name."""
        options = self.options
        wanted = options.wanted
        counts = wanted.prompt_tokens
        attributes = self.attributes(special_tokens="")
        del attributes["model_path"]  # files may be moved meanwhile
        return {
            **attributes,
            "weights": fingerprints.weights(self.model),
            "structure": fingerprints.modules(self.model),
            "hook": fingerprints.hooks(self.model),
            "config": _config(self.model),
            "tokenizer": _vocabulary(self.tokenizer),
            "chat": self._chat(),
            "layers": [block.layer for block in self.blocks],
            "relative": [block.layer for block in self.raw],
            "ranks": bool(options.ranks),
            "batch_size": int(options.batch_size),
            "prompt_tokens": int(counts) if isinstance(counts, int | np.integer) else None,
        }

    def _chat(self) -> str:
        """A conversation as the template writes it now; empty where texts are none.

        A template may write today's date.
        """
        if self.form != CHATS:
            return ""
        try:
            return tokenize_chats(self.model, [_CHAT], self.tokenizer)[0].texts[0]
        except ValueError:  # some templates want other roles
            return ""

    def attributes(self, special_tokens: str) -> dict[str, Any]:
        """Attributes of the recording."""
        options = self.options
        return attributes_of(
            self.model,
            self.blocks[0],
            special_tokens=special_tokens,
            window=options.window,
            max_new_tokens=options.wanted.max_new_tokens,
            max_tokens=options.max_tokens,
            seed=options.seed,
            generation=options.wanted.source(True),  # (if no text has one, the end says so)
        )


@contextmanager
def renamed(names: list[str]) -> Iterator[None]:
    """Let errors and warnings have these names of texts in the place of their numbers."""

    def name(found: re.Match[str]) -> str:
        number = int(found[1])
        return names[number] if number < len(names) else found[0]

    def renamed(message: str) -> str:
        return re.sub(r"\btext (\d+)\b", name, message)

    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        except (TypeError, ValueError) as problem:
            kind = TypeError if isinstance(problem, TypeError) else ValueError
            raise kind(renamed(str(problem))) from problem
    for each in caught:
        if each.category is UserWarning:
            warn(renamed(str(each.message)))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _config(model: PreTrainedModel) -> str:
    """What the model's config says of how it computes."""
    said = {
        name: value
        for name, value in model.config.to_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """What a tokenizer makes of some text, so that another one is noticed."""
    if tokenizer is None:
        return ""
    ids = [tokenizer(text)["input_ids"] for text in _PROBES]
    template = str(getattr(tokenizer, "chat_template", None))
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return hashlib.sha256(json.dumps([ids, size, template]).encode()).hexdigest()


def refuse_mixture(before: str, now: str, number: int = 0) -> None:
    """Raise a ValueError if texts from a number on come in another form than those before."""
    if before and now != before:
        raise ValueError(
            f"text {number} comes in another form than those before it (special tokens: {now}; "
            f"before: {before}): give all in one form."
        )
