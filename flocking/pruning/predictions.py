"""Two models' predictions of the same tokens, compared token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div

_TOGETHER = 128  # tokens whose distributions over the vocabulary are in memory at once


class Compared(NamedTuple):
    """A model's predictions beside the full model's, float64 (token,).

    Attributes
    ----------
    log_likelihood : ndarray
        Of the tokens that follow, in nats.
    divergence : ndarray
        ``KL(full model || model)``, the Kullback-Leibler divergence between their distributions of
        the next token, in nats.
    agrees : ndarray
        1 where both find the same next token the likeliest, and 0 elsewhere.
    """

    log_likelihood: np.ndarray
    divergence: np.ndarray
    agrees: np.ndarray


def compare_predictions(full: Tensor, other: Tensor, following: Tensor) -> Compared:
    """Compare logits of the same tokens.

    Parameters
    ----------
    full, other : Tensor, shape (token, vocabulary)
        Of the full model and of another one, on any device.
    following : Tensor of int64, shape (token,)
        The tokens that follow.
    """
    parts = []
    for start in range(0, len(following), _TOGETHER):
        rows = slice(start, start + _TOGETHER)
        ours, theirs = (x[rows].to("cpu", torch.float32).log_softmax(-1) for x in (full, other))
        likelihood = theirs.gather(1, following[rows, None].cpu())[:, 0]
        divergence = kl_div(theirs, ours, log_target=True, reduction="none").double().sum(dim=1)
        agrees = ours.argmax(dim=1) == theirs.argmax(dim=1)
        parts.append(torch.stack([likelihood.double(), divergence, agrees.double()]))
    return Compared(*torch.cat(parts, dim=1).numpy())
