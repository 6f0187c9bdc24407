"""Texts that a model writes itself: drawn token by token from its own distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flocking.models.capabilities import traits
from flocking.models.copies import working_copy
from flocking.models.running import undisturbed
from flocking.models.weights import device_of, embeddings_of, vocabulary_of


def opening_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The token id that opens a text (BOS), by the tokenizer or the model; None if none does."""
    sources = (tokenizer, model.generation_config, model.config.get_text_config())
    named = (getattr(source, "bos_token_id", None) for source in sources)
    size = vocabulary_of(model)
    return next((bos for bos in named if isinstance(bos, int) and 0 <= bos < size), None)


def require_writer(model: PreTrainedModel) -> None:
    """Raise a ValueError if a model cannot write texts that it would then read the same way."""
    if not (model.can_generate() and traits(model).causal):
        raise ValueError(
            f"{type(model).__name__} is not a causal language model, so that it cannot write "
            "texts itself: give texts, or load its causal class."
        )


def sampled(
    model: PreTrainedModel,
    prompt: Tensor,
    sequences: int,
    tokens: int,
    *,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: bool,
) -> list[Tensor]:
    """Texts that begin with `prompt`, int64 (token,), and go on with `tokens` drawn ones.

    Tokens are drawn from the softmax of the logits over `temperature`, by the inverse of its
    distribution function, in float64 on the CPU. Each text has its own random numbers, so that
    the global generators are left alone and texts do not depend on `batch_size`, but for rounding.
    A token that ends a text is one like any other: the model goes on after it, as it was trained
    on texts in a row, and all texts have the same length. The model's own generation config does
    not apply.
    """
    copied: Any = working_copy(model)
    copied.generation_config = GenerationConfig(pad_token_id=0)  # nothing is padded
    device = device_of(embeddings_of(model))
    found: list[Tensor] = []
    bar = tqdm(total=sequences, desc="sampling", unit="text", disable=not progress)
    with undisturbed(model, seed), bar:
        for first in range(0, sequences, batch_size):
            numbers = range(first, min(first + batch_size, sequences))
            draws = np.stack([np.random.default_rng((seed, n)).random(tokens) for n in numbers])
            ids = prompt.expand(len(numbers), -1).to(device)
            written = copied.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                logits_processor=[_drawing(torch.from_numpy(draws), len(prompt), temperature)],
            )
            found += list(written.cpu())
            bar.update(len(numbers))
    return found


def _drawing(draws: Tensor, start: int, temperature: float) -> Any:
    """A logits processor that leaves one token: the one that uniform numbers in [0, 1) stand for.

    `draws` is float64 (sequence, token); `start` is the prompt's length.
    """

    def draw(so_far: Tensor, scores: Tensor) -> Tensor:
        logits = scores.detach().cpu().double() / temperature
        below = logits.softmax(dim=-1).cumsum(dim=-1)
        # (Times the sum, which rounding may leave below 1. What has no share is never reached.)
        aim = draws[:, so_far.shape[1] - start, None] * below[:, -1:]
        chosen = torch.searchsorted(below, aim, right=True).clamp(max=below.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.to(scores.device), 0)

    return draw
