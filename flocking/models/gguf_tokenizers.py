"""Tokenizers of GGUF files: what transformers makes of them otherwise than llama.cpp is corrected.

llama.cpp's code (src/llama-vocab.cpp) says what the metadata mean: by which rules a text is split
before pairs are merged (``tokenizer.ggml.pre``), whether a first token and a first space are added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flocking.models.checkpoints import read_tokenizer
from flocking.models.gguf import Contents
from flocking.models.notices import warn

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGITS = (r"\p{N}", _GPT2)
_QWEN2 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# How llama.cpp splits texts where transformers does as GPT-2 did, whatever the file says: one rule
# after the other, each within the pieces of those before.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "stablelm2": _QWEN2,
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), _DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b"), _DIGITS),
}
# Those who are split as GPT-2 did, or by rules of transformers' own.
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
# Whole words of the vocabulary are taken before pairs are merged.
_WHOLE_WORDS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "tekken",
)
_CONTROL, _USERS = 3, 4  # types of tokens (llama.cpp's LLAMA_TOKEN_TYPE_...)
# Texts begin with the first token where the file does not say whether they do.
_BEGINNING = (*_WHOLE_WORDS, "chameleon")
# Texts on which rules of splitting differ.
_PROBES = (
    *("", " ", "  a", "a  b ", "\n\n \n", "\t\tx", "Birds of a feather", "1 22 333 4444 55555"),
    *("don't WE'LL", "f(x)={y:1};//\n", "\r\n\r\n", "日本語、テキスト。", "été naïf", "🙂🙃", "½²"),
)


def correct(folder: Path, contents: Contents, *, splits: bool = True) -> None:
    """Correct the files of a tokenizer that was read from a GGUF file and saved.

    Parameters
    ----------
    folder : Path
    contents : Contents
        Of the GGUF file.
    splits : bool
        Also how texts are split before pairs are merged.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    before = json.loads(file.read_bytes())
    after = {**before, **_changes(before, contents, splits)}
    if after != before:
        file.write_text(json.dumps(after, ensure_ascii=False), encoding="utf-8")
        # Classes of some models would build the parts that were corrected anew.
        told = {**json.loads(settings.read_bytes()), "tokenizer_class": "TokenizersBackend"}
        settings.write_text(json.dumps(told, indent=2, ensure_ascii=False), encoding="utf-8")
    _check(folder, contents)


def _check(folder: Path, contents: Contents) -> None:
    """Warn if transformers reads the saved tokenizer with a class that has other rules."""
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = read_tokenizer(str(folder))
    for text in _PROBES:
        if loaded(text)["input_ids"] != wanted.encode(text).ids:
            warn(
                f"{contents.file} has a tokenizer that transformers' {type(loaded).__name__} does "
                f"not read as it is: {text!r} has other tokens than in llama.cpp, and so may other "
                "texts."
            )
            return
    if contents.metadata["tokenizer.ggml.model"] != "gpt2":  # only there they are put in anew
        return
    # (Of tokens that are there twice, the last one counts.)
    whole = {token: number for number, (token, _) in _whole_tokens(contents.metadata).items()}
    for token, number in whole.items():
        if loaded.convert_tokens_to_ids(token) != number:
            warn(
                f"{contents.file} has a token {token!r} that transformers' "
                f"{type(loaded).__name__} takes for another one or for none: texts in which it is "
                "have other tokens than in llama.cpp."
            )
            return


def _changes(content: dict[str, Any], contents: Contents, splits: bool) -> dict[str, Any]:
    metadata = contents.metadata
    size = len(metadata["tokenizer.ggml.tokens"])
    # Special tokens that a class has by default are no part of this model.
    added = [token for token in content["added_tokens"] if token["id"] < size]
    found: dict[str, Any] = {"added_tokens": added}
    kind, rule = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        content = {**content, "model": _with_whole(content["model"], metadata)}
        found["model"] = content["model"]
        found["added_tokens"] = _whole(added, metadata)
    if kind == "llama" and not metadata["general.architecture"].startswith("gemma"):
        found |= _with_spaces(metadata.get("tokenizer.ggml.add_space_prefix", True))
    if kind == "gpt2" and splits:
        found |= _split(content, rule, contents)
    if kind in ("llama", "gpt2"):
        ends = _ends(metadata, kind == "llama" or rule in _BEGINNING)
        if ends != _added(content["post_processor"]):
            found["post_processor"] = _template(metadata["tokenizer.ggml.tokens"], *ends)
    return found


def _whole_tokens(metadata: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """By id, tokens that stand whole in a text as the file spells them; and if they are special."""
    kinds = metadata.get("tokenizer.ggml.token_type") or ()
    return {
        number: (token, kind == _CONTROL)
        for number, (token, kind) in enumerate(
            zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False)
        )
        if kind in (_CONTROL, _USERS)
    }


def _with_whole(model: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """A byte-level vocabulary in which these are spelled as in the file, and not by their bytes.

    (transformers writes them byte by byte where they have letters or spaces that no other token
    has, and then adds tokens of the right spelling, behind the end of the model's embedding.)
    """
    by_bytes = {number: token for token, number in model["vocab"].items()}
    # (Two may have had one spelling, and then only one of them is there.)
    spelled = {**dict(enumerate(metadata["tokenizer.ggml.tokens"])), **by_bytes}
    whole = _whole_tokens(metadata)
    others = {token for number, token in spelled.items() if number not in whole}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = {token for pair in pairs for token in (*pair, "".join(pair))}
    for number, (token, _) in whole.items():
        if spelled[number] in others or spelled[number] not in merged:
            spelled[number] = token
    return {**model, "vocab": {spelled[number]: number for number in sorted(spelled)}}


def _whole(added: list[dict[str, Any]], metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that are looked for in a text first, by id."""
    found = {token["id"]: token for token in added}
    for number, (token, is_special) in _whole_tokens(metadata).items():
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        found[number] = {"id": number, "content": token, **plain, "special": is_special}
    return [found[number] for number in sorted(found)]


def _with_spaces(first: bool) -> dict[str, Any]:
    """Parts of a tokenizer of SentencePiece that puts a space before a text, or does not."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] if first else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _split(content: dict[str, Any], rule: object, contents: Contents) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rule in _WHOLE_WORDS:
        found["model"] = {**content["model"], "ignore_merges": True}
    if rule in _SPLITS:
        pieces: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
            for one in _SPLITS[rule]
        ]
        spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        pieces.append({**spelled, "use_regex": False})
        found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pieces}
    elif rule not in _AS_GPT2 and content["pre_tokenizer"]["type"] == "ByteLevel":
        warn(
            f"{contents.file} has a tokenizer that splits texts by the rule {rule!r} "
            "(tokenizer.ggml.pre), which is not known here: some texts may have other tokens than "
            "in llama.cpp."
        )
    return found


def _ends(metadata: dict[str, Any], begins: bool) -> tuple[list[int], list[int]]:
    """The tokens that are put before and after a text; `begins` where the file does not say so."""

    def token(flag: str, default: bool, name: str) -> list[int]:
        found = metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.{flag}", default)
        return [found] if wanted and found is not None else []

    return token("add_bos_token", begins, "bos"), token("add_eos_token", False, "eos")


def _added(processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The tokens that a processor puts before and after a text."""
    if processor is None or processor["type"] == "ByteLevel":
        return [], []
    if processor["type"] == "Sequence":
        parts = [_added(one) for one in processor["processors"]]
        return [i for part in parts for i in part[0]], [i for part in parts for i in part[1]]
    ids = processor["special_tokens"]
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(ids[piece["SpecialToken"]["id"]]["ids"])
    return sides


def _template(tokens: list[str], first: list[int], last: list[int]) -> dict[str, Any] | None:
    if not first and not last:
        return None

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": tokens[i], "type_id": kind}} for i in first]
        after = [{"SpecialToken": {"id": tokens[i], "type_id": kind}} for i in last]
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    special = {
        tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in first + last
    }
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }
