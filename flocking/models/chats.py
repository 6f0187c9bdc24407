"""Conversations, and how a tokenizer's own chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flocking.models.forms import is_lasting
from flocking.models.problems import brief
from flocking.texts import check_string

Message = Mapping[str, Any]
Chats = Sequence[Message] | Sequence[Sequence[Message]]


class Templated(NamedTuple):
    """A conversation as the model reads it.

    Attributes
    ----------
    encoding : dict
        What the tokenizer returns of it: ``input_ids``, a list of int, and what else there is.
    text : str
    prompt : int or None
        How many tokens come before the last message, if that is the assistant's.
    """

    encoding: dict[str, Any]
    text: str
    prompt: int | None


def conversations(text: Any) -> list[list[Message]] | None:
    """The conversations that were given as text, one or several; None if it is none.

    Raises
    ------
    TypeError
        If there is something else among messages or among conversations.
    ValueError
        If a message lacks its role or content.
    """
    # (To look at what may be gone through only once would take from it.)
    if isinstance(text, str | bytes | Mapping) or not is_lasting(text):
        return None
    if getattr(text, "ndim", 1) != 1 or hasattr(text, "column_names"):
        return None
    if getattr(getattr(text, "dtype", None), "kind", "O") != "O" or isinstance(text, Tensor):
        return None  # numbers
    items = list(text)
    if any(map(_is_message, items)):
        chats = [items]
    elif any(map(_is_conversation, items)):
        for number, item in enumerate(items):
            if not _is_conversation(item):
                raise TypeError(
                    f"text {number} is not a conversation, a list of messages, as others are: give "
                    "those only."
                )
        chats = [list(item) for item in items]
    else:
        return None
    for number, chat in enumerate(chats):
        for place, message in enumerate(chat):
            _check(message, f"message {place} of text {number}")
    return chats


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item


def _is_conversation(item: Any) -> bool:
    # (Columns of tables hold arrays.)
    several = isinstance(item, list | tuple) or (isinstance(item, np.ndarray) and item.ndim > 0)
    return several and any(map(_is_message, item))


def _check(message: Any, name: str) -> None:
    if not _is_message(message) or not isinstance(message["role"], str):
        raise TypeError(f"{name} is no dict with a role, such as 'user', and its content.")
    content = message.get("content")
    if isinstance(content, str):
        check_string(content, name)
    elif content is None and not message.get("tool_calls"):
        raise ValueError(f"{name} has no content: give its text, or leave the message out.")


def templated(
    chat: Sequence[Message], number: int, tokenizer: PreTrainedTokenizerBase
) -> Templated:
    """Conversation `number` through the tokenizer's template, and where its prompt ends.

    If the last message is the assistant's, everything before it is the prompt, with the words that
    open an assistant's turn; otherwise all is, with these words at the end.

    Raises
    ------
    ValueError
        If the tokenizer has no template or the template does not take the conversation, or if the
        tokens before an assistant's last message are not those of the messages before.
    """
    known = hasattr(tokenizer, "apply_chat_template")
    if not (known and getattr(tokenizer, "chat_template", True)):
        raise ValueError(
            "the tokenizer has no chat template, which says how its model reads messages: give the "
            "tokenizer of a chat model, or each conversation as one string."
        )
    answered = chat[-1]["role"] == "assistant"
    whole, text = _applied(chat, number, tokenizer, opened=not answered)
    if not answered:
        return Templated(whole, text, None)
    if len(chat) == 1:
        raise ValueError(
            f"text {number} is one message of the assistant's, without a prompt: give the messages "
            "that it answers, too."
        )
    before = _applied(chat[:-1], number, tokenizer, opened=True)[0]["input_ids"]
    if whole["input_ids"][: len(before)] != before or len(before) == len(whole["input_ids"]):
        raise ValueError(
            f"text {number}: the chat template writes the messages before the assistant's last one "
            "otherwise when that one follows, so that its prompt has no clear end: give the "
            "messages before it, and its text as continuation."
        )
    return Templated(whole, text, len(before))


def _applied(
    chat: Sequence[Message], number: int, tokenizer: PreTrainedTokenizerBase, *, opened: bool
) -> tuple[dict[str, Any], str]:
    """Tokens and text of a conversation; `opened`: with the beginning of an assistant's turn."""
    applied: Any = tokenizer.apply_chat_template
    try:
        encoding = applied(list(chat), add_generation_prompt=opened, return_dict=True)
        text = applied(list(chat), add_generation_prompt=opened, tokenize=False)
    except Exception as problem:  # a template is a program, and raises what it likes
        raise ValueError(
            f"text {number}: the tokenizer's chat template does not take this conversation "
            f"({brief(problem)})."
        ) from problem
    return dict(encoding) | {"input_ids": list(encoding["input_ids"])}, str(text)
