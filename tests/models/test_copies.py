"""What a copy of a model shares with it, and what it leaves out."""

from __future__ import annotations

import helpers
import pytest
import torch
import transformers as tf
from torch import nn

from flocking.models import relative_error, trial_copy, working_copy


@pytest.mark.parametrize("copied", [trial_copy, working_copy])
def test_copies_share_weights_and_nothing_else(tiny: tf.PreTrainedModel, copied: object) -> None:
    tiny.train()
    mine = copied(tiny)
    assert not any(m is n for m, n in zip(mine.modules(), tiny.modules(), strict=True))
    assert all(p is q for p, q in zip(mine.parameters(), tiny.parameters(), strict=True))
    assert not any(m.training for m in mine.modules())
    buffers = dict(tiny.named_buffers())
    assert not any(buffer is buffers[name] for name, buffer in mine.named_buffers())
    tiny.eval()
    ids = torch.tensor(helpers.random_ids(9))
    with torch.no_grad():
        assert relative_error(mine(ids)[0], tiny(ids)[0]) == 0


def test_only_working_copies_have_the_hooks() -> None:
    model = helpers.build("llama")
    seen: list[nn.Module] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, *_: seen.append(module))
    trying, working = trial_copy(model), working_copy(model)
    ids = torch.tensor(helpers.random_ids(9))
    trying(ids)
    assert not seen
    working(ids)
    assert seen == [model.model.layers[0]]  # with the module that it was registered on
    handle.remove()  # there, and so in the copy
    working(ids)
    assert len(seen) == 1
    working.model.layers[1].register_forward_hook(lambda *_: None)
    assert not model.model.layers[1]._forward_hooks


@pytest.mark.parametrize("copied", [trial_copy, working_copy])
def test_copies_return_hidden_states_after_the_model_did(copied: object) -> None:
    model = helpers.build("llama")
    ids = torch.tensor(helpers.random_ids(9))
    model(ids, output_hidden_states=True)
    assert len(copied(model)(ids, output_hidden_states=True).hidden_states) == 3


def test_a_trial_copy_returns_outputs_by_name() -> None:
    model = helpers.build("llama", return_dict=False)
    ids = torch.tensor(helpers.random_ids(9))
    assert isinstance(model.model(ids), tuple)
    assert trial_copy(model)(ids).logits.shape == (1, 9, helpers.VOCABULARY)
    assert model.config.return_dict is False


@pytest.mark.parametrize("copied", [trial_copy, working_copy])
def test_a_copy_made_in_inference_mode_can_be_used_outside_of_it(copied: object) -> None:
    model = helpers.build("gemma2")
    with torch.inference_mode():
        mine = copied(model)
    assert not any(buffer.is_inference() for buffer in mine.buffers())
