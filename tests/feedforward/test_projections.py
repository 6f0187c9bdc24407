"""Projections are cut to some of their inputs or outputs."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from flocking.feedforward import cut, fused_rows


def test_cut_keeps_rows_columns_and_bias() -> None:
    keep = torch.tensor([0, 3])
    for projection in (nn.Linear(5, 7), tf.pytorch_utils.Conv1D(7, 5)):
        x = torch.randn(2, 3, 5)
        torch.testing.assert_close(cut(projection, outputs=keep)(x), projection(x)[..., keep])
        masked = torch.zeros_like(x)
        masked[..., keep] = x[..., keep]
        torch.testing.assert_close(cut(projection, inputs=keep)(x[..., keep]), projection(masked))
        assert projection(x).shape == (2, 3, 7)


def test_fused_rows() -> None:
    neurons = torch.tensor([1, 2])
    assert fused_rows(neurons, 4, interleaved=False).tolist() == [1, 2, 5, 6]
    assert fused_rows(neurons, 4, interleaved=True).tolist() == [2, 3, 4, 5]
