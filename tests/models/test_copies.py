"""A shadow shares a model's weights and nothing else."""

from __future__ import annotations

import helpers
import torch
import transformers as tf

from flocking.models import relative_error, shadow


def test_shadow_shares_weights_and_nothing_else(tiny: tf.PreTrainedModel) -> None:
    tiny.train()
    tiny.get_input_embeddings().register_forward_hook(lambda *args: None)
    copied = shadow(tiny)
    assert not any(m is n for m, n in zip(copied.modules(), tiny.modules(), strict=True))
    assert all(p is q for p, q in zip(copied.parameters(), tiny.parameters(), strict=True))
    assert not any(m._forward_hooks or m.training for m in copied.modules())
    tiny.eval()
    ids = torch.tensor(helpers.random_ids(9))
    with torch.no_grad():
        assert relative_error(copied(ids)[0], tiny(ids)[0]) == 0
