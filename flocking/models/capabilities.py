"""In which ways a model can be run without changing its results, found out by trial."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from flocking.models.copies import trial_copy
from flocking.models.locks import exclusive
from flocking.models.memo import PerModel
from flocking.models.running import forward
from flocking.models.sandbox import relative_error, tolerance, trial
from flocking.models.weights import device_of, embeddings_of, vocabulary_of, why_not_finite

# Tokens of one forward pass, all sequences of the batch together. Longer texts are fed in
# chunks over a cache, so that peak memory grows with the cache and the result only. Below
# this many tokens, one pass without a cache is faster and needs less memory than chunks would.
CHUNK_TOKENS = 8192


def chunks(
    model: PreTrainedModel, batch: int, length: int, ways: Traits | None = None
) -> list[slice]:
    """The slices in which `length` tokens of each of `batch` sequences are fed.

    `ways` are the model's :func:`traits`, or those :func:`with_inputs`.
    """
    step = max(1, CHUNK_TOKENS // batch)
    if length <= step or not (ways or traits(model)).chunkable:
        step = length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def batches(
    model: PreTrainedModel, lengths: list[int], size: int, ways: Traits | None = None
) -> list[list[int]]:
    """Rows of sequences that share a forward pass, of similar length to keep padding small.

    Of the same length, if padding changes the model's results. `ways` are as in :func:`chunks`.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    mixed = size == 1 or len(set(lengths)) == 1 or (ways or traits(model)).paddable
    groups: list[list[int]] = []
    for row in order:
        if groups and len(groups[-1]) < size and (mixed or lengths[groups[-1][0]] == lengths[row]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Traits(NamedTuple):
    """Ways to run a model that do not change the results of a text's tokens.

    Attributes
    ----------
    causal : bool
        Later tokens do not matter to earlier ones.
    decodes : bool
        What follows a text may be fed one token at a time over a cache, as generation does, also
        to another copy of the model than the one that read the text.
    continuable : bool
        What follows a text may be fed in one piece over a cache.
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


# What no trial on a few tokens can show: a text's length, padding included, matters if one of
# these attributes of the configuration has such a value.
DEPENDS_ON_LENGTH: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rope_parameters": (
        lambda value: "longrope" in str(value) or "dynamic" in str(value),
        "rotary embeddings change with the length",
    ),
    "index_topk": (bool, "sparse attention drops keys of long texts; padding may change which"),
    "keep_window_size": (bool, "as index_topk, in Doge"),
    "attention_type": (
        lambda value: value == "block_sparse",
        "BigBird attends to blocks, of which long texts leave some out",
    ),
}


@PerModel
def traits(model: PreTrainedModel) -> Traits:
    """Find out by trial, on a trial copy of the model and 16 random tokens."""
    attempts = _Attempts(model)
    with trial(attempts.copied):
        whole = attempts.whole()

        def generates() -> bool:
            if not model.can_generate() or model.config.is_encoder_decoder:
                return False
            return _same(attempts.generated, attempts.logits())

        by_length = _depends_on_length(model.config)
        return Traits(
            causal=_same(attempts.changed, whole),
            decodes=_same(attempts.decoded, whole) or generates(),
            continuable=(continuable := _same(attempts.chunked, whole)),
            chunkable=not by_length and continuable,
            paddable=not by_length and _same(attempts.padded, whole),
        )


def with_inputs(model: PreTrainedModel, inputs: Mapping[str, Sequence[Tensor]]) -> Traits:
    """The model's :func:`traits` where it is also fed inputs such as these, of several texts.

    Token types, for example, decide in some models which tokens see each other. The trials are
    made with values from `inputs`, int64 (token, ...): all tokens have the same, or random ones.

    Raises
    ------
    ValueError
        If the model cannot be run with these inputs.
    """
    found = traits(model)
    for drawn in _drawn(inputs):
        with exclusive(model):
            attempts = _Attempts(model, drawn)
        with trial(attempts.copied):
            try:
                whole = attempts.whole()
            except Exception as problem:  # a model may fail in any way
                raise ValueError(
                    f"{type(model).__name__} cannot be run with {' and '.join(inputs)} "
                    f"({type(problem).__name__}: {str(problem).partition(chr(10))[0]}): leave that "
                    "out, or give other values."
                ) from problem
            found = found._replace(
                causal=found.causal and _same(attempts.changed, whole),
                chunkable=found.chunkable and _same(attempts.chunked, whole),
                paddable=found.paddable and _same(attempts.padded, whole),
            )
    return found


_SAME_VALUES = 3  # trials in which all tokens have the same types


def _drawn(inputs: Mapping[str, Sequence[Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Values for the 16 tokens of a trial, int64 (1, 16, ...) by name."""
    kinds = {name: torch.cat(list(rows)).unique(dim=0) for name, rows in inputs.items()}
    count = max((len(k) for name, k in kinds.items() if name != "position_ids"), default=0)
    generator = torch.Generator().manual_seed(0)
    for number in range(min(count, _SAME_VALUES)):
        yield {name: k[[number % len(k)] * 16][None] for name, k in kinds.items()}
    if max(map(len, kinds.values()), default=0) > 1:
        yield {
            name: k[torch.randint(len(k), (16,), generator=generator, device="cpu")][None]
            for name, k in kinds.items()
        }


def _same(attempt: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether an attempt succeeds, and gives what is expected of its tokens."""
    try:
        got = attempt()
        return relative_error(got, expected[:, : got.shape[1]]) <= tolerance(expected.dtype)
    except Exception:  # it cannot be done at all
        return False


class _Attempts:
    """Ways to run a trial copy of a model on one text of 16 random tokens.

    Where a model may be used in one of these ways, its hidden states (1, token, hidden) are those
    of :meth:`whole`; :meth:`generated` gives :meth:`logits`. All but these two are also fed
    `inputs`, int64 (1, 16, ...), by name.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.inputs = inputs or {}
        self.copied = trial_copy(model)
        self.vocabulary = vocabulary_of(self.copied)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(self.vocabulary, (1, 16), generator=generator, device="cpu")
        self.ones = torch.ones_like(self.ids)

    def _run(self, ids: Tensor, mask: Tensor, past: Any = None, keep: bool = False) -> Any:
        start, stop = mask.shape[1] - ids.shape[1], mask.shape[1]
        inputs = {}
        for name, values in self.inputs.items():
            padding = values.new_zeros(1, max(0, stop - values.shape[1]), *values.shape[2:])
            inputs[name] = torch.cat((values, padding), 1)[:, start:stop]
        return forward(self.copied, ids, mask, past, keep, inputs)

    def whole(self) -> Tensor:
        """The text in one pass, as it is."""
        return self._run(self.ids, self.ones)[0]

    def changed(self) -> Tensor:
        """All tokens but the last, which is another one."""
        other = self.ids.clone()
        other[:, -1] = (other[:, -1] + 1) % self.vocabulary
        return self._run(other, self.ones)[0][:, :-1]

    def chunked(self) -> Tensor:
        """In two pieces, over a cache."""
        first = self._run(self.ids[:, :8], self.ones[:, :8], keep=True)
        second = self._run(self.ids[:, 8:], self.ones, past=first.past_key_values)
        return torch.cat((first[0], second[0]), dim=1)

    def decoded(self) -> Tensor:
        """The last four tokens one at a time, over a cache."""
        output = self._run(self.ids[:, :12], self.ones[:, :12], keep=True)
        states = [output[0]]
        for end in range(13, 17):
            token, mask = self.ids[:, end - 1 : end], self.ones[:, :end]
            output = self._run(token, mask, past=output.past_key_values, keep=True)
            states.append(output[0])
        return torch.cat(states, dim=1)

    def padded(self) -> Tensor:
        """With eight padding tokens behind."""
        pads = torch.zeros_like(self.ids[:, :8])
        ids, mask = torch.cat((self.ids, pads), 1), torch.cat((self.ones, pads), 1)
        return self._run(ids, mask)[0][:, :16]

    def logits(self) -> Tensor:
        """Logits of the tokens that :meth:`generated` writes, in one pass."""
        ids = self.ids.to(device_of(embeddings_of(self.copied)))
        return self.copied(ids).logits[:, 11:]

    def generated(self) -> Tensor:
        """Logits by `generate`, which knows how each model goes on; its tokens are forced.

        One copy of the model reads the text, another writes.
        """
        reader: Any = trial_copy(self.model)
        writer: Any = trial_copy(self.model)
        writer._prefill = reader._prefill
        plain = writer.forward

        @functools.wraps(plain)
        def one_token(*args: Any, **kwargs: Any) -> Any:
            if kwargs["input_ids"].shape[1] != 1:
                raise RuntimeError("it reads the text again for every new token")
            return plain(*args, **kwargs)

        writer.forward = one_token
        writer.generation_config = GenerationConfig(pad_token_id=0)
        output = writer.generate(
            self.ids[:, :12].to(device_of(embeddings_of(self.copied))),
            attention_mask=self.ones[:, :12],
            max_new_tokens=4,
            do_sample=False,
            use_cache=True,
            logits_processor=[forcing(self.ids)],
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(output.logits, dim=1)


def _depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether a text's length matters in one of the ways of :data:`DEPENDS_ON_LENGTH`."""
    text = config.get_text_config()
    return any(
        matters(getattr(text, name, None)) for name, (matters, _) in DEPENDS_ON_LENGTH.items()
    )


def forcing(sequences: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that makes `generate` write one given sequence, int64 (1, token)."""

    def force(so_far: Tensor, scores: Tensor) -> Tensor:
        token = sequences[:, so_far.shape[1]].to(scores.device)
        return torch.full_like(scores, -torch.inf).index_fill_(1, token, 0)

    return force


def refuse_forgetful(model: PreTrainedModel, *, pieces: bool = False) -> None:
    """Raise a ValueError if the model cannot go on from a cache, one token at a time.

    With `pieces`, also if it cannot go on with several tokens at once.
    """
    if not traits(model).decodes:
        raise ValueError(
            why_not_finite(model)
            or f"{type(model).__name__} cannot go on from a cache of its prompt: what comes after "
            "would be computed without it."
        )
    if pieces and not traits(model).continuable:
        raise ValueError(
            f"{type(model).__name__} takes only one token at a time on top of a cache, and what "
            "comes after the prompt is scored in one piece: score it with another model."
        )
