"""Token ids without padding, of text in any of the forms that ``record`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocking.models.capabilities import traits
from flocking.models.chats import Message, templated
from flocking.models.checkpoints import folder_of, read_tokenizer, said_of
from flocking.models.forms import Text, given, require_tokenizer, whole_numbers
from flocking.models.inputs import check_values, fed, rows_of, starting_again
from flocking.models.memo import PerModel
from flocking.models.notices import warn
from flocking.models.weights import vocabulary_of
from flocking.texts import check_string, doubt

# Where special tokens come from, if it is not the tokenizer that adds them.
AS_GIVEN, CHATS = "as given", "chat template"


class Prompts(NamedTuple):
    """Tokenized texts.

    Attributes
    ----------
    ids : list of Tensor of int64, shape (token,)
        Token ids of each text, on the CPU.
    inputs : dict of list of Tensor of int64, shape (token, ...)
        What else the model is fed for each of these tokens, such as ``token_type_ids``, by name.
    texts : list of str
        The texts; decoded where ids were given (empty without a tokenizer).
    tokenizer : transformers.PreTrainedTokenizerBase or None
    special : str
        The special tokens that the tokenizer added to each text; or ``AS_GIVEN``, of token ids, or
        ``CHATS``, of conversations.
    """

    ids: list[Tensor]
    inputs: dict[str, list[Tensor]]
    texts: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    special: str

    def cut(self, tokens: int | None) -> Prompts:
        """At most this many tokens of each text, the first ones; the texts stay whole."""
        inputs = {name: [row[:tokens] for row in rows] for name, rows in self.inputs.items()}
        return self._replace(ids=[row[:tokens] for row in self.ids], inputs=inputs)


def tokenize(
    model: PreTrainedModel,
    text: Text,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    special: bool = True,
) -> Prompts:
    """Token ids of `text` in any of its forms, without padding.

    With `special` false, strings are read without the special tokens that the tokenizer adds.

    Raises
    ------
    TypeError
        If `text` has none of the known forms, or `tokenizer` is none.
    ValueError
        If a text is empty, its ids do not fit the model, it comes with inputs that cannot be fed,
        or no tokenizer can be found.
    """
    tokenizer = require_tokenizer(tokenizer)
    texts, rows, bare, encoding = given(text)
    if texts is None:
        has_mask = encoding.get("attention_mask") is not None
        ids, inputs = _read(model, rows, bare, encoding, given=True)
        tokenizer = tokenizer or tokenizer_beside(model)
        if not has_mask:
            _warn_of_padding(model, ids, tokenizer)
        texts = [str(tokenizer.decode(each)) if tokenizer else "" for each in ids]
        return Prompts(ids, inputs, texts, tokenizer, AS_GIVEN)
    _check_strings(texts)
    tokenizer = tokenizer or _tokenizer_of(model)
    ids, inputs = _read(model, *_encoded(texts, tokenizer, special), given=False)
    return Prompts(ids, inputs, texts, tokenizer, _special(tokenizer) if special else "none")


def tokenize_chats(
    model: PreTrainedModel,
    chats: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Prompts, list[int]]:
    """Conversations as the tokenizer's chat template writes them, and the tokens of each prompt.

    The prompt is what comes before the last message, if that is the assistant's; otherwise it is
    everything, the words that open an assistant's turn included.

    Raises
    ------
    TypeError, ValueError
        As :func:`tokenize`; and if the template does not take a conversation.
    """
    tokenizer = require_tokenizer(tokenizer) or _tokenizer_of(model)
    read = [templated(chat, number, tokenizer) for number, chat in enumerate(chats)]
    rows, encoding = _columns([each.encoding for each in read])
    ids, inputs = _read(model, rows, False, encoding, given=False)
    prompts = Prompts(ids, inputs, [each.text for each in read], tokenizer, CHATS)
    return prompts, [each.prompt or len(row) for each, row in zip(read, ids, strict=True)]


def _read(
    model: PreTrainedModel, rows: list[Any], bare: bool, encoding: dict[str, Any], *, given: bool
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Token ids of each text without padding, and what else the model is fed for them."""
    masks = encoding.pop("attention_mask", None)
    rows = [whole_numbers(row, number) for number, row in enumerate(rows)]
    inputs = {
        name: rows_of(name, value, rows, bare)
        for name, value in fed(model, encoding, given=given).items()
    }
    real = _real(rows, masks, bare)
    ids = [row[place] for row, place in zip(rows, real, strict=True)]
    for name, values in inputs.items():
        inputs[name] = [value[place] for value, place in zip(values, real, strict=True)]
    _check_ids(ids, vocabulary_of(model))
    check_values(model, inputs)
    if masks is None:
        _refuse_packed(model, inputs.get("position_ids", []))
    return ids, inputs


def _check_strings(texts: list[str]) -> None:
    for number, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {number} is empty: give a text of at least one token.")
        check_string(text, f"text {number}")
    for number, text in enumerate(texts):
        if problem := doubt(text):
            warn(f"text {number} {problem}.")


def _encoded(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, special: bool
) -> tuple[list[Any], bool, dict[str, list[Any]]]:
    """Token ids of strings, that they are several, and what else the tokenizer returns by name."""
    # What is too long is refused or cut later: the tokenizer's warning about it would be wrong.
    options: dict[str, Any] = (
        {"verbose": False} if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
    )
    if not special:
        options["add_special_tokens"] = False
    ids, rest = _columns([tokenizer(text, **options) for text in texts])
    if special:
        _warn_of_doubled(texts, ids, tokenizer)
    return ids, False, rest


def _columns(encodings: list[Mapping[str, Any]]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Token ids of each text, and by name what else the tokenizer returned of all of them."""
    ids = [encoding["input_ids"] for encoding in encodings]
    names = set.intersection(*(set(encoding) for encoding in encodings)) - {"input_ids"}
    return ids, {name: [encoding[name] for encoding in encodings] for name in sorted(names)}


def _warn_of_doubled(texts: list[str], ids: list[Any], tokenizer: Any) -> None:
    """Warn of special tokens that texts have already, as from a template, and then get again."""
    added = list(tokenizer("")["input_ids"])
    doubled: dict[int, int] = {}  # by text: a token that it has twice
    for number, (text, row) in enumerate(zip(texts, ids, strict=True)):
        if sum(token in added for token in row) > len(added) > 0:
            plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            twice = _twice(list(row), plain)
            if twice is not None:
                doubled[number] = twice
    if doubled:
        number, token = next(iter(doubled.items()))
        others = f" (and {len(doubled) - 1} others)" if len(doubled) > 1 else ""
        name = tokenizer.convert_ids_to_tokens(token)
        warn(
            f"text {number}{others} has the special token {name}, as from a chat template, and the "
            "tokenizer adds it once more: to read the text as it is, give "
            "tokenizer(text, add_special_tokens=False) instead of the text."
        )


def _twice(ids: list[int], plain: list[int]) -> int | None:
    """A token that was put before or after `plain` to make `ids`, although it is there already."""
    for before in range(len(ids) - len(plain) + 1 if plain else 0):
        after = before + len(plain)
        if ids[before:after] == plain:
            ends = [(plain[0], ids[:before]), (plain[-1], ids[after:])]
            return next((token for token, put in ends if token in put), None)
    return None


def _real(ids: list[Tensor], masks: Any, bare: bool) -> list[slice]:
    """Where each text's tokens are, between padding."""
    if masks is None:
        return [slice(0, len(row)) for row in ids]
    rows = rows_of("attention_mask", masks, ids, bare)
    places = []
    for number, mask in enumerate(rows):
        if mask.ndim != 1 or not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                f"text {number} has an attention_mask of more than 0 and 1 for each token: only "
                "masks that mark padding can be used."
            )
        real = mask.nonzero()[:, 0]
        if len(real) == 0:
            raise ValueError(f"text {number} has no tokens but padding: give one or more.")
        first, last = int(real[0]), int(real[-1])
        if len(real) != last - first + 1:
            raise ValueError(
                f"text {number} has gaps in its attention_mask: only padding before and after "
                "a text can be dropped."
            )
        places.append(slice(first, last + 1))
    return places


def _warn_of_padding(model: PreTrainedModel, ids: list[Tensor], tokenizer: Any) -> None:
    """Warn of rows without a mask that begin or end as if they were padded."""
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    if padding is None:
        return
    ends = [_run_at_an_end(row, int(padding)) for row in ids]
    by_length: dict[int, list[int]] = {}
    for row, count in zip(ids, ends, strict=True):
        by_length.setdefault(len(row), []).append(count)
    # One such token can be a text's own, and several if all texts of that length have as many.
    own = {n for n, counts in by_length.items() if len(counts) > 1 and len({*counts}) == 1}
    found = [n for n, row in enumerate(ids) if ends[n] > 1 and len(row) not in own]
    if found:
        number, others = found[0], f" (and {len(found) - 1} others)" if found[1:] else ""
        warn(
            f"text {number}{others} begins or ends with {ends[number]} padding tokens "
            f"({int(padding)}), which are read as if they were text: give what the tokenizer "
            "returned whole, with its attention_mask, in place of its input_ids."
        )


def _run_at_an_end(row: Tensor, padding: int) -> int:
    """How many padding tokens a row begins or ends with, whichever is more."""
    other = (row != padding).nonzero()[:, 0]
    return max(int(other[0]), len(row) - 1 - int(other[-1])) if len(other) else len(row)


def _check_ids(ids: list[Tensor], vocabulary: int) -> None:
    for number, row in enumerate(ids):
        if len(row) == 0:
            raise ValueError(f"text {number} has no tokens but padding: give one or more.")
        if not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
            raise ValueError(
                f"text {number} has token ids from {int(row.min())} to {int(row.max())}, but "
                f"the model's vocabulary ends at {vocabulary - 1}: use the model's own tokenizer."
            )


def _refuse_packed(model: PreTrainedModel, positions: list[Tensor]) -> None:
    """Refuse positions that transformers takes for those of several texts in one row.

    It does so where there is no mask, in causal models.
    """
    for number, row in enumerate(positions):
        place = starting_again(row)
        if place is not None and traits(model).causal:
            raise ValueError(
                f"text {number} has position_ids that do not go on at token {place}, and no "
                "attention_mask: transformers takes this for several texts in one row. Give them "
                "one by one, or an attention_mask."
            )


def tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's folder or hub repository, if there is one."""
    if not getattr(model, "name_or_path", None):
        return None
    try:
        return _tokenizer_of(model)
    except ValueError:
        return None


def special_tokens_around(
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    if tokenizer is None:
        return [], []
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _special(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that `tokenizer` adds to a text."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])) or "none"


@PerModel
def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder or hub repository, read once."""
    if not model.name_or_path:
        raise ValueError(
            "No tokenizer was found with the model (it has no name): pass tokenizer=, or give "
            "token ids."
        )
    try:
        revision = getattr(model.config, "_commit_hash", None) or "main"
        place = str(folder_of(model) or model.name_or_path)
        return read_tokenizer(place, revision=revision, **said_of(model))
    except (OSError, ValueError, TypeError) as problem:
        raise ValueError(
            "No tokenizer was found with the model: pass tokenizer=, or give token ids. "
            f"({problem})"
        ) from problem
