"""What several test files use: tiny models of every architecture, token ids, and references."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
import xarray as xr
from matplotlib.image import AxesImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import flocking
from flocking.analysis import magnitude
from flocking.feedforward import inherit_blocks
from flocking.models import traits

VOCABULARY = 128
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_OPT = {
    **_TOKENS,
    "hidden_size": 64,
    "ffn_dim": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GPT = {**_TOKENS, "n_embd": 64, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 256}

# Every architecture that the project promises.
ARCHITECTURES = {
    "llama": lambda: tf.LlamaConfig(**_GROUPED),
    "mistral": lambda: tf.MistralConfig(**_GROUPED, sliding_window=16),
    "qwen2": lambda: tf.Qwen2Config(**_COMMON, num_key_value_heads=2),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED),
    "gemma": lambda: tf.GemmaConfig(**{**_GROUPED, "num_key_value_heads": 1}),
    "gemma2": lambda: tf.Gemma2Config(**_GROUPED, sliding_window=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GROUPED, sliding_window=16),
    "phi": lambda: tf.PhiConfig(**_COMMON),
    "phi3": lambda: tf.Phi3Config(**_COMMON, num_key_value_heads=2),
    "glm": lambda: tf.GlmConfig(**_GROUPED),
    "gpt2": lambda: tf.GPT2Config(**_GPT),
    "opt": lambda: tf.OPTConfig(**_OPT, word_embed_proj_dim=64),
    "opt-post-norm": lambda: tf.OPTConfig(
        **_OPT, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_COMMON),
    "gptj": lambda: tf.GPTJConfig(**_GPT, rotary_dim=8),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **_TOKENS,
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=256,
    ),
    "falcon": lambda: tf.FalconConfig(
        **_TOKENS,
        hidden_size=64,
        ffn_hidden_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "bloom": lambda: tf.BloomConfig(**_TOKENS, hidden_size=64, n_layer=2, n_head=4),
    "starcoder2": lambda: tf.Starcoder2Config(**_COMMON, num_key_value_heads=2),
    "olmo2": lambda: tf.Olmo2Config(**_COMMON, num_key_value_heads=2),
    "stablelm": lambda: tf.StableLmConfig(**_COMMON, num_key_value_heads=2),
    "bert": lambda: tf.BertConfig(**_COMMON),
    # Mixtures of experts: four of 40 neurons.
    "mixtral": lambda: tf.MixtralConfig(
        **{**_GROUPED, "intermediate_size": 40}, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt_oss": lambda: tf.GptOssConfig(  # transposed, gate and up row by row, biases, clamped
        **{**_GROUPED, "intermediate_size": 40},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}


def build(name: str, **changes: object) -> tf.PreTrainedModel:
    """A tiny model with random weights, large enough that neurons differ clearly."""
    config = ARCHITECTURES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    auto = tf.AutoModel if name == "bert" else tf.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases too: nothing stays 0 or 1
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.1 * noise)
    return model


def roberta() -> tf.PreTrainedModel:
    """A tiny encoder of 40 positions, the first two of which are not a token's."""
    sizes = _COMMON | {"max_position_embeddings": 40, "pad_token_id": 1}
    torch.manual_seed(0)
    return tf.RobertaModel(tf.RobertaConfig(**sizes)).eval()


@functools.cache
def _original(name: str) -> tf.PreTrainedModel:
    return build(name)


def proved(name: str) -> tf.PreTrainedModel:
    """What `build` gives, with its blocks and traits known, as they were found out once.

    For tests of what is done with blocks. Those of finding them need a model that was just built.
    """
    original = _original(name)
    copied = copy.deepcopy(original)
    inherit_blocks(original, copied)
    traits.remember(copied, traits(original))
    torch.manual_seed(0)
    return copied


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def cells(image: AxesImage, rows: int, columns: int) -> np.ndarray:
    """The cells of a picture, each once: its image repeats them, so that they keep their edges."""
    drawn = np.ma.filled(image.get_array().astype(float), np.nan)
    high, wide = drawn.shape[0] // rows, drawn.shape[1] // columns
    assert min(drawn.shape[:2]) > 1024  # more than there are pixels to draw them on
    once = drawn[::high, ::wide]
    np.testing.assert_array_equal(once.repeat(high, axis=0).repeat(wide, axis=1), drawn)
    return once


def activations(model: tf.PreTrainedModel, ids: list[int]) -> dict[int, torch.Tensor]:
    """Each layer's z over one unpadded sequence, from a bare hook of our own: the reference."""
    kept = {}

    def keep(module: torch.nn.Module, args: tuple, output: object, layer: int) -> None:
        kept[layer] = by_expert(module, *args[:2]) if hasattr(module, "has_gate") else args[0]

    hooks = [
        block.down.register_forward_hook(functools.partial(keep, layer=block.layer))
        for block in flocking.feedforwards(model)
    ]
    try:
        with torch.no_grad():
            model.base_model(torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: z.detach().reshape(len(ids), -1).clone() for layer, z in kept.items()}


def by_expert(experts: torch.nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A mixture's z, token by token and expert by expert, from its weights: (token, d_ff)."""
    up = experts.gate_up_proj if experts.is_transposed else experts.gate_up_proj.transpose(1, 2)
    z = torch.zeros(len(x), len(up), up.shape[2] // 2)
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            both = x[token] @ up[expert]
            if experts.has_bias:
                both = both + experts.gate_up_proj_bias[expert]
            z[token, expert] = experts._apply_gate(both)
    return z.flatten(1)


def letters(template: str) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of single letters, with special tokens around a text."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "[A]": 3, "[B]": 4}
    vocabulary = special | {chr(97 + n): 10 + n for n in range(26)} | {"\0": 40, ".": 41}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(special.items())
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[A]", "[B]"],
    )


def hooks_of(model: tf.PreTrainedModel) -> list[object]:
    """Every hook registered anywhere in the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [h for m in model.modules() for kind in kinds for h in getattr(m, kind).values()]


def contents(folder: Path) -> dict[Path, bytes | None]:
    """All that is in a folder: bytes of files, None of folders."""
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def count_fed(model: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of a sequence in each forward pass from now on, of all models of the same class."""
    fed: list[int] = []
    kind = type(model.base_model)
    forward = kind.forward

    def counted(self: tf.PreTrainedModel, *args: object, **kwargs: object) -> object:
        fed.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return fed


def record(model: tf.PreTrainedModel, text: object, **kwargs: object) -> xr.Dataset:
    """A recording, without a progress bar."""
    return flocking.record(model, text, progress=False, **kwargs)


def exact(name: str) -> tf.PreTrainedModel:
    """A tiny model in float64, where a chunk gives what single steps give; mixtures cannot be."""
    model = proved(name)
    return model if name in ("mixtral", "gpt_oss") else model.double()


def relative(z: torch.Tensor) -> np.ndarray:
    """Relative activations in float64, (token, neuron)."""
    z = z.double().numpy()
    return np.abs(z) / np.linalg.norm(z, axis=-1, keepdims=True)


def assert_same(got: xr.Dataset, expected: xr.Dataset, rtol: float = 1e-4) -> None:
    """Recordings are equal where both have tokens; one may have more windows or padding."""
    for name in ("energy", "mass", "norm", "l1", "tokens"):
        a, b = xr.align(got[name], expected[name], join="inner", copy=False)
        scale = float(np.nanmax(np.abs(b.values)))
        np.testing.assert_allclose(a.values, b.values, rtol=rtol, atol=rtol * 1e-2 * scale)


def made_up(values: dict[str, np.ndarray], task: str = "piqa", **columns: object) -> pd.DataFrame:
    """Items of an evaluation, of variants such as ``topk@0.5``."""
    parts = []
    for variant, own in values.items():
        method, _, density = variant.partition("@")
        parts.append(
            pd.DataFrame(
                {
                    "task": task,
                    "protocol": "context",
                    "method": method,
                    "density": float(density or 1),
                    "metric": "acc",
                    "item": range(len(own)),
                    "value": own,
                    "chance": 0.5,
                    "prompt_tokens": np.arange(len(own)) + 10,
                    "left_out": 0,
                    "scored": 4,
                    "pruned": 0 if method == "full" else 3,
                    **columns,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


# --------------------------------------------------------------------------------------
# Twins

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tokens(*lengths: int, seed: int = 0) -> Tensor:
    return torch.tensor(random_ids(*lengths, seed=seed))


def generate(model: tf.PreTrainedModel, ids: Tensor, n: int = 12, **options: object) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, **GREEDY | options)


def expected_selection(model: tf.PreTrainedModel, ids: Tensor, density: float = 0.5) -> np.ndarray:
    """What the analysis selects: bool (sequence, layer, neuron)."""
    recording = flocking.record(
        model, ids.tolist(), window=None, batch_size=len(ids), progress=False
    )
    return select_reached(model, flocking.statistic(recording), density)


def select_reached(
    model: tf.PreTrainedModel, statistic: xr.DataArray, density: float
) -> np.ndarray:
    """As the analysis does; but by their weights in experts that no token was routed to."""
    values = statistic.copy()
    for place, block in enumerate(flocking.feedforwards(model)):
        if block.kind == "experts":
            own = values.to_numpy()[:, place].reshape(len(values), block.experts, -1)
            norms = magnitude(block).numpy().reshape(block.experts, -1)
            own[:] = np.where((own == 0).all(-1, keepdims=True), norms, own)
    return flocking.select(values, density).to_numpy()


def selected_by_hand(model: tf.PreTrainedModel, ids: list[int]) -> dict[int, np.ndarray]:
    """Half of each layer's neurons, as masks, from one full pass over a text."""
    masks = {}
    for layer, z in activations(model, ids).items():
        statistic = np.sqrt(np.square(relative(z)).sum(axis=0))
        kept = np.argsort(-statistic, kind="stable")[: len(statistic) // 2]
        masks[layer] = np.isin(np.arange(len(statistic)), kept)
    return masks


def as_masks(twin: tf.PreTrainedModel, model: tf.PreTrainedModel) -> np.ndarray:
    """A twin's selection: bool (layer, neuron), or (sequence, layer, neuron)."""
    masks = []
    for block in flocking.feedforwards(model):
        kept = twin.selection[block.layer]
        shape = (*kept.shape[:-1], block.d_ff)
        masks.append(torch.zeros(shape, dtype=torch.bool).scatter_(-1, kept, True))
    return torch.stack(masks, dim=-2).numpy()
