"""What is refused: arguments, models, and what a twin cannot do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import ARCHITECTURES, VOCABULARY, as_masks, build, expected_selection, generate, tokens
from torch import Tensor

import flocking
from flocking.pruning import build as building


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density=0\.0: give the fraction"),
        ({"density": 1.5}, r"density=1\.5"),
        ({"density": 0.001}, "keeps none of 160"),
        ({"density": [0.5]}, "density: expected one number, or one for each of 2 layers, got 1"),
        ({"method": "best"}, "choose from topk, .*, static, global-local"),
        ({"method": "static"}, "needs reference"),
        ({"method": "global-local"}, "needs reference"),
        ({"scope": "batch"}, "give 'shared' or 'sequence'"),
        ({"seed": 2**64}, r"seed=.*: give a number below 2 \*\* 63"),
        ({"weight": 0.2}, "weight=0.2 is for method='global-local': name it"),
        ({"weight": "0.5"}, "weight='0.5' is for method='global-local'"),
        ({"weight": 0.2, "method": "magnitude"}, "weight=0.2 is for method='global-local'"),
        ({"reference": 1}, "reference is for .* method is 'topk': name one of them"),
        ({"reference": 1, "method": max}, "reference is for .* method is a function"),
    ],
    ids=str,
)
def test_refuses_what_makes_no_twin(llama: tf.PreTrainedModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.griffin(llama, **options)


@pytest.mark.parametrize("density", ["0.5", None, [], "half", True, [True, 0.5]])
def test_density_is_a_number(llama: tf.PreTrainedModel, density: object) -> None:
    with pytest.raises(TypeError, match="give a number, or one for each of 2"):
        flocking.griffin(llama, density)


class Packed(torch.nn.Linear):
    """A Linear whose weight is bytes of another shape, as bitsandbytes has them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max() / 127)
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight = torch.nn.Parameter(packed.reshape(-1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return x @ (weight * self.scale).T


def test_refuses_models_that_cannot_be_pruned() -> None:
    with pytest.raises(ValueError, match="not a decoder-only model that generates"):
        flocking.griffin(build("bert"))
    with torch.device("meta"):
        meta = tf.AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]())
    with pytest.raises(ValueError, match="on the meta device"):
        flocking.griffin(meta)
    quantised = build("llama")
    for layer in quantised.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    with pytest.raises(ValueError, match=r"quantised \(Packed\)"):
        flocking.griffin(quantised)
    assert flocking.record(quantised, [5, 6, 7], progress=False).sizes["layer"] == 2


def test_refuses_what_a_twin_cannot_do(pair: tuple) -> None:
    model, twin = pair
    ids = tokens(20)
    with pytest.raises(ValueError, match=r"computes in eval mode, .*: train the original"):
        twin.train()
    assert not twin.eval().training
    with pytest.raises(RuntimeError, match="this twin has no selection yet"):
        twin(ids)
    with pytest.raises(RuntimeError, match="this twin has no selection yet"):
        _ = twin.selection
    with pytest.raises(ValueError, match="use_cache=False, given or in the twin's"):
        generate(twin, ids, use_cache=False)
    with pytest.raises(ValueError, match="assistant_model=twin"):
        generate(twin, ids, assistant_model=model)
    with pytest.raises(ValueError, match="assistant_model=twin"):
        generate(twin, ids, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="twin already"):
        flocking.griffin(twin)
    with pytest.raises(ValueError, match="batch continuously"):
        twin.generate_batch([[1, 2]])
    for save in (twin.save_pretrained, twin.push_to_hub):
        with pytest.raises(
            ValueError, match=r"flocking\.export\(original, twin\.selection, folder\)"
        ):
            save("nowhere")
    for convert in (
        lambda: twin.half(),
        lambda: twin.to(torch.bfloat16),
        lambda: twin.to("meta"),
        lambda: twin.double(),
        lambda: twin.bfloat16(),
        lambda: twin.resize_token_embeddings(VOCABULARY + 8),
        lambda: twin.load_state_dict(model.state_dict(), strict=False),
        lambda: twin.requires_grad_(False),
    ):
        with pytest.raises(ValueError, match="shares its parameters"):
            convert()
    assert twin.to("cpu") is twin.to(torch.float32) is twin
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    generate(twin, ids)
    with pytest.raises(ValueError, match="record the original"):
        flocking.record(twin, ids.tolist())
    assert isinstance(twin, type(model))
    assert type(twin).__name__ == type(model).__name__


def test_refuses_models_that_cannot_go_on_from_a_cache() -> None:
    """Decoding would read the whole prompt pruned, or begin without its state."""
    small = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt = tf.OpenAIGPTLMHeadModel(
        tf.OpenAIGPTConfig(**small, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    )
    recurrent = tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **small,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            lru_width=64,
            attention_window_size=16,
            block_types=["recurrent", "recurrent", "attention"],
        )
    )
    for model in (gpt, recurrent):
        for attempt in (flocking.griffin, lambda model: flocking.score(model, [5, 6], [7, 8])):
            with pytest.raises(ValueError, match="cannot go on from a cache of its prompt"):
                attempt(model)


def test_refuses_other_numbers_of_sequences_than_it_has_selections_for() -> None:
    for name in ("llama", "opt"):
        twin = flocking.griffin(build(name), 0.5, scope="sequence")
        generate(twin, tokens(20, 20))
        for batch in (1, 4):
            with pytest.raises(
                RuntimeError, match=f"selections for 2 sequences, and was given {batch}"
            ):
                twin(tokens(*[6] * batch))
        with pytest.raises(RuntimeError, match="selections for 2 sequences"):
            twin(input_ids=tokens(6))
        generate(twin, tokens(20))
        assert twin(tokens(6, 6)).logits.shape[:2] == (2, 6)


def test_refuses_loops_that_would_not_prefill(pair: tuple) -> None:
    _, twin = pair
    generate(twin, tokens(20))
    with pytest.raises(ValueError, match="custom_generate would not run the prompt in full"):
        generate(twin, tokens(20), custom_generate=lambda model, *args, **kwargs: None)
    for asked in ({"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}):
        with pytest.raises(ValueError, match="code from a hub, which would not run the prompt"):
            generate(twin, tokens(20), do_sample=False, **asked)
        with pytest.raises(ValueError, match="code from a hub, which would not run the prompt"):
            generate(twin, tokens(20), trust_remote_code=True, do_sample=False, **asked)
    with pytest.raises(ValueError, match="guidance_scale would run the negative prompt pruned"):
        generate(twin, tokens(20), guidance_scale=1.5, negative_prompt_ids=tokens(5))
    twin.config.use_cache = False
    twin.generation_config.use_cache = False
    with pytest.raises(ValueError, match="or in the twin's generation config"):
        generate(twin, tokens(20))


def test_a_model_whose_config_wants_no_cache_has_twins_that_use_one() -> None:
    """As MPT's; the model's own config stays as it is."""
    config = tf.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=VOCABULARY)
    model = tf.MptForCausalLM(config).eval()
    assert model.generation_config.use_cache is False
    ids = tokens(20)
    expected = generate(model, ids, use_cache=True)
    for twin in (flocking.griffin(model, 1.0), flocking.griffin(model, 0.5, refresh=1)):
        assert generate(twin, ids).equal(expected)
    assert model.generation_config.use_cache is False


def test_an_interrupted_prompt_leaves_no_half_made_selection(pair: tuple) -> None:
    """None at all, whatever interrupts it; the next prompt is chosen from itself alone."""
    model, twin = pair
    ids = tokens(20)

    class Interrupted(BaseException):
        pass

    def interrupt(*args: object) -> Tensor:
        raise Interrupted

    state = twin._griffin
    method, fill = state.selector.method, state.compacts[1].fill
    for attempt in ("prompt", "method", "copy"):
        generate(twin, ids)
        if attempt == "method":
            state.selector.method = interrupt
        elif attempt == "copy":
            state.compacts[1].fill = interrupt
        row = torch.full((1, 5), VOCABULARY + 7) if attempt == "prompt" else tokens(9)
        with pytest.raises((IndexError, Interrupted)):
            generate(twin, row)
        with pytest.raises(RuntimeError, match="this twin has no selection yet"):
            _ = twin.selection
        for run in (twin, twin.model):
            with pytest.raises(RuntimeError, match="this twin has no selection yet"):
                run(ids)
        assert twin.report().prefilled_tokens == 0
        state.selector.method, state.compacts[1].fill = method, fill
    generate(twin, ids)
    np.testing.assert_array_equal(as_masks(twin, model), expected_selection(model, ids)[0])


def test_refuses_to_be_pickled_or_copied(pair: tuple) -> None:
    _, twin = pair
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied: give the original"):
            attempt(twin)


def test_what_needs_no_model_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: object) -> None:
        raise AssertionError("the model was tried")

    monkeypatch.setattr("flocking.pruning.build.prunable", slow)
    llama = build("llama")
    for options, why in (
        ({"method": "topK"}, "method='topK': choose from topk"),
        ({"method": "static"}, "needs reference"),
        ({"scope": "batch"}, "scope='batch'"),
        ({"seed": "1"}, "seed='1'"),
        ({"refresh": 0}, "refresh=0"),
        ({"offload": "disk"}, "offload='disk'"),
    ):
        with pytest.raises((ValueError, TypeError), match=why):
            flocking.griffin(llama, **options)


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (lambda states: states[:, 1:], 8),
        (lambda states: torch.cat((states, states[:, -1:]), dim=1), 10),
    ],
    ids=["dropped", "repeated"],
)
def test_refuses_a_model_that_computes_other_tokens_than_it_was_given(
    llama: tf.PreTrainedModel, change: Callable[[Tensor], Tensor], computed: int
) -> None:
    """Their activations would not be those of the prompt's tokens."""
    llama.model.embed_tokens.register_forward_hook(lambda module, args, output: change(output))
    twin = flocking.griffin(llama)
    (head,) = tokens(9).tolist()
    why = f"was given 9 tokens a sequence and computed {computed}: it added, dropped or repeated"
    with pytest.raises(RuntimeError, match=why):
        flocking.score(twin, head, [5, 6])
    with pytest.raises(RuntimeError, match="this twin has no selection yet"):
        _ = twin.selection


def test_refuses_to_refresh_over_a_cache_that_cannot_go_back(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "rewinds", lambda model: False)
    flocking.griffin(llama)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM cannot read tokens again .*: leave refresh out"
    ):
        flocking.griffin(llama, refresh=4)
