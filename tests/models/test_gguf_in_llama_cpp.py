"""Loaded GGUF files have the tokens and numbers that llama.cpp has, which reads them by itself."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import ggufs
import numpy as np
import platformdirs
import pytest
import torch
from gguf import GGUFValueType as Value

import flocking

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="xllamacpp is not installed: pip install 'flocking[llama-cpp]'"
)

TEXTS = [
    *("", " ", "  ", "   a", "a  b", "a   b ", "\n", "\n\n", " \n ", "\t", "a\n\n\nb", " Hello"),
    *(
        "日本語のテキスト",
        "你好世界",
        "한국어",
        "🙂🙃👩‍👩‍👧‍👦",
        "naïve café",
        "1 22 333 4444",
        "3.14159",
    ),
    *("don't DON'T I'll 's", "x=1;y<=2&&!z", "def f(x):\n    return x\n", "\r\n a\r\n", "a\u00a0b"),
    *("ٱلسَّلَامُ", "ไทย", "<eos>", "<bos>a", "a <eos> b", "<pad>", "<|endoftext|>", "½ ² Ⅷ", "\x7f"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)


class Server:
    """A file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = 256, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_gpu_layers, params.fit_params, params.warmup, params.ui = 0, False, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def ask(self, what: str, **question: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{what}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokens(self, text: str) -> list[int]:
        found = self.ask("tokenize", content=text, add_special=True, parse_special=True)
        return list(found["tokens"])

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        letter = ggufs.tokens()[0].index("a")  # probabilities come with a token that is text
        said = self.ask(
            "completion",
            prompt=ids,
            n_predict=1,
            n_probs=ggufs.VOCABULARY,
            logit_bias=[[letter, 100.0]],
            temperature=0,
            cache_prompt=False,
        )
        top = said["completion_probabilities"][0]["top_logprobs"]
        by_token = {one["id"]: one["logprob"] for one in top}
        return np.array([by_token[token] for token in range(ggufs.VOCABULARY)])


def scaling(architecture: str, kind: str) -> dict[str, tuple[Any, ...]]:
    return {
        f"{architecture}.rope.scaling.type": (kind, Value.STRING),
        f"{architecture}.rope.scaling.factor": (4.0, Value.FLOAT32),
        f"{architecture}.rope.scaling.original_context_length": (64, Value.UINT32),
    }


@pytest.mark.parametrize(
    ("name", "changes", "metadata"),
    [
        ("llama", {"head_dim": 32}, scaling("llama", "yarn")),
        ("llama", {}, scaling("llama", "linear")),
        ("gemma2", {"head_dim": 16}, {}),  # the file says nothing of how queries are scaled
        ("gemma3", {"head_dim": 16}, scaling("gemma3", "linear")),
        ("qwen2_moe", {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32}, {}),
    ],
)
def test_numbers(
    name: str, changes: dict[str, Any], metadata: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny(name, **changes), metadata=metadata)
    model, _ = flocking.load(file)
    ids = [(7 * n * n) % (ggufs.VOCABULARY - 3) + 3 for n in range(40)]
    with torch.no_grad():
        mine = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
    # (llama.cpp looks GELU up in a table of float16.)
    assert abs(mine - Server(file).log_probabilities(ids)).max() < 0.01


@pytest.mark.parametrize(
    "rule", [None, "gpt-2", "default", "smollm", "falcon", "qwen2", "llama-bpe"]
)
def test_tokens(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ggufs._add_tokenizer

    def other(writer: Any) -> None:
        add(writer)
        del (
            writer.kv_data[0]["tokenizer.ggml.pre"],
            writer.kv_data[0]["tokenizer.ggml.add_bos_token"],
        )
        if rule is not None:
            writer.add_tokenizer_pre(rule)

    monkeypatch.setattr(ggufs, "_add_tokenizer", other)
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("llama"))
    _, tokenizer = flocking.load(file)
    server = Server(file)
    assert {text: tokenizer(text)["input_ids"] for text in TEXTS} == {
        text: server.tokens(text) for text in TEXTS
    }


@pytest.mark.parametrize("begins", [False, True])
def test_tokens_that_stand_whole(
    begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with letters and spaces that no other token of a byte-level vocabulary has."""
    whole = [
        "<\uff5cbegin▁of▁sentence\uff5c>",
        "<\uff5cend▁of▁sentence\uff5c>",
        "<\uff5cUser\uff5c>",
        "  ",
        "<think>",
        "日本",
    ]
    kinds = [3, 3, 3, 4, 4, 4]

    def other(writer: Any) -> None:
        spelled, merges = ggufs.tokens()
        count = len(spelled)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("deepseek-r1-qwen")
        there = set(spelled[: count - len(whole)])
        merges = [one for one in merges if {*one.split(), one.replace(" ", "")} <= there]
        writer.add_token_list([*spelled[: count - len(whole)], *whole])
        writer.add_token_types([3] * 3 + [1] * (count - len(whole) - 3) + kinds)
        writer.add_token_merges(merges)
        writer.add_pad_token_id(0)
        writer.add_bos_token_id(count - len(whole))
        writer.add_eos_token_id(count - len(whole) + 1)
        writer.add_add_bos_token(begins)

    monkeypatch.setattr(ggufs, "_add_tokenizer", other)
    file = ggufs.write(tmp_path / "a.gguf", ggufs.tiny("llama"))
    _, tokenizer = flocking.load(file)
    server = Server(file)
    texts = [
        *TEXTS,
        "<\uff5cUser\uff5c>a cat<think> b",
        "a  b",
        "a日本b<\uff5cend▁of▁sentence\uff5c>",
        "日本語",
    ]
    assert {text: tokenizer(text)["input_ids"] for text in texts} == {
        text: server.tokens(text) for text in texts
    }
    assert tokenizer.bos_token_id == ggufs.VOCABULARY - len(whole)
    assert len(tokenizer) == ggufs.VOCABULARY
