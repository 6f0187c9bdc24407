"""Likelihoods: against a direct computation, pruned exactly where they are said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import build, random_ids

import flocking


def direct(model: tf.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Log-likelihood of every token but the first, from one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    values = logits.log_softmax(-1)[:-1]
    return values[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


def pruned_by_hand(
    model: tf.PreTrainedModel, ids: list[int], cut: int, density: float = 0.5
) -> np.ndarray:
    """The same with z masked through the hook from token `cut` on, as selected before it."""
    recording = flocking.record(model, [ids[:cut]], window=None, progress=False)
    kept = flocking.select(flocking.statistic(recording), density).values[0]

    def masked(block: flocking.FeedForward, z: torch.Tensor) -> torch.Tensor:
        keep = torch.ones_like(z)
        keep[..., cut:, :] = torch.from_numpy(kept[block.layer]).to(z.dtype)
        return z * keep

    with flocking.observe(model, masked):
        return direct(model, ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "falcon"])
@pytest.mark.parametrize("protocol", ["context", "last-token"])
def test_score(name: str, protocol: str) -> None:
    model = build(name)
    prompt, later = random_ids(20, 7)
    got = flocking.score(model, prompt, later, protocol=protocol)
    np.testing.assert_allclose(got, direct(model, prompt + later)[19:], atol=2e-5)
    assert not got.pruned.any()
    assert got.token_id.values.tolist() == later

    twin = flocking.griffin(model, 0.5)
    got = flocking.score(twin, prompt, later, protocol=protocol)
    cut = 20 if protocol == "context" else 25
    np.testing.assert_allclose(got, pruned_by_hand(model, prompt + later, cut)[19:], atol=2e-5)
    assert got.pruned.values.tolist() == [place >= cut for place in range(19, 26)]
    full = flocking.score(flocking.griffin(model, 1.0), prompt, later, protocol=protocol)
    np.testing.assert_allclose(full, direct(model, prompt + later)[19:], atol=2e-5)


def test_an_answer_of_one_token() -> None:
    """Untouched in its context; pruned by the last-token protocol."""
    model = build("llama")
    prompt, later = random_ids(20, 1)
    twin = flocking.griffin(model, 0.5)
    context = flocking.score(twin, prompt, later)
    assert not context.pruned.any()
    np.testing.assert_allclose(context, direct(model, prompt + later)[19:], atol=2e-5)
    last = flocking.score(twin, prompt, later, protocol="last-token")
    assert last.pruned.all()
    np.testing.assert_allclose(last, pruned_by_hand(model, prompt + later, 19)[19:], atol=2e-5)


def test_what_is_scored_is_what_is_generated() -> None:
    """The twin's own greedy tokens are the likeliest, one by one, when they are scored."""
    model = build("llama")
    twin = flocking.griffin(model, 0.5)
    prompt = random_ids(20)[0]
    out = twin.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 20),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[0, 20:].tolist()
    due = [
        float(logits[0].double().log_softmax(-1)[token])
        for logits, token in zip(out.logits, new, strict=True)
    ]
    np.testing.assert_allclose(flocking.score(twin, prompt, new), due, atol=1e-5)


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_perplexity(scope: str) -> None:
    model = build("llama")
    texts = random_ids(30, 40, 33)
    options = {"prompt_length": 16, "continuation_length": 10, "progress": False}
    full = flocking.perplexity(model, texts, batch_size=2, **options)
    twin = flocking.griffin(model, 0.5, scope=scope)
    alone = flocking.perplexity(twin, texts, batch_size=1, **options)
    batch = flocking.perplexity(twin, texts, batch_size=2, **options)
    for row, text in enumerate(texts):
        due = direct(model, text[:26])[15:]
        np.testing.assert_allclose(full.log_likelihood[row], due, atol=2e-5)
        np.testing.assert_allclose(full.perplexity[row], np.exp(-due.mean()), rtol=1e-4)
        due = pruned_by_hand(model, text[:26], 16)[15:]
        np.testing.assert_allclose(alone.log_likelihood[row], due, atol=2e-5)
    same = np.allclose(alone.log_likelihood, batch.log_likelihood, atol=2e-5)
    assert same == (scope == "sequence")
    assert full.sizes == {"sequence": 3, "distance": 10}


def test_text_needs_a_tokenizer(embedded: tuple) -> None:
    model, tokenizer = embedded
    likely = flocking.score(model, "The capital of France is", " Paris", tokenizer=tokenizer)
    unlikely = flocking.score(model, "The capital of France is", " cheese", tokenizer=tokenizer)
    assert float(likely.sum()) > float(unlikely.sum())
    with pytest.raises(ValueError, match="tokenizer"):
        flocking.score(build("llama"), [5, 6], " Paris")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_the_model_takes_for_every_token_is_fed(name: str) -> None:
    """As its own forward takes it; token types and positions go on as `generate` has it."""
    model = build(name)
    prompt, later = random_ids(20, 7)
    ids = torch.tensor([prompt + later])
    inputs = {"position_ids": torch.tensor([[3 * place for place in range(20)]])}
    whole = {"position_ids": torch.cat([inputs["position_ids"][0], torch.arange(58, 65)])[None]}
    if name == "gpt2":
        inputs["token_type_ids"] = torch.tensor([[5] * 10 + [9] * 10])
        whole["token_type_ids"] = torch.tensor([[5] * 10 + [9] * 17])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(ids, attention_mask=ones, **whole).logits[0].double()
    expected = logits.log_softmax(-1)[torch.arange(26), ids[0, 1:]].numpy()
    given = {"input_ids": ids[:, :20], "attention_mask": ones[:, :20], **inputs}
    for subject in (model, flocking.griffin(model, 1.0)):
        got = flocking.score(subject, given, later)
        np.testing.assert_allclose(got, expected[19:], atol=2e-5)
        both = {name: values.repeat(2, 1) for name, values in whole.items()}
        both |= {"input_ids": ids.repeat(2, 1), "attention_mask": ones.repeat(2, 1)}
        measured = flocking.perplexity(
            subject, both, prompt_length=20, continuation_length=7, progress=False
        )
        for row in measured.log_likelihood:
            np.testing.assert_allclose(row, expected[19:], atol=2e-5)
    without = flocking.score(model, prompt, later)
    assert float(np.abs(without - expected[19:]).max()) > 0.01
    with pytest.raises(ValueError, match="continuation has position_ids"):
        flocking.score(model, prompt, {"input_ids": [later], "position_ids": [list(range(7))]})


def test_leaves_the_model_as_it_was() -> None:
    model = build("llama").train()
    state = torch.random.get_rng_state()
    flocking.score(model, *random_ids(5, 5))
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(p.grad is not None for p in model.parameters())


def test_refuses() -> None:
    model = build("llama")
    prompt, later = random_ids(5, 5)
    with pytest.raises(ValueError, match="give 'context' or 'last-token'"):
        flocking.score(model, prompt, later, protocol="last")
    with pytest.raises(ValueError, match="prompt of two tokens"):
        flocking.score(model, prompt[:1], later[:1], protocol="last-token")
    with pytest.raises(ValueError, match="continuation: text is empty"):
        flocking.score(model, prompt, [])
    with pytest.raises(ValueError, match="prompt: text 0 is empty"):
        flocking.score(model, "", later)
    for wrong in (None, 5, {1: 2}):
        with pytest.raises((TypeError, ValueError), match=r"^continuation: "):
            flocking.score(model, prompt, wrong)
        with pytest.raises((TypeError, ValueError), match=r"^prompt: "):
            flocking.score(model, wrong, later)
    long = random_ids(250)[0]
    assert flocking.score(model, long, random_ids(7)[0]).sizes == {"token": 7}
    with pytest.raises(ValueError, match="257 tokens, 1 more than the model's context of 256"):
        flocking.score(model, long, random_ids(8)[0])
    with pytest.raises(ValueError, match="299 tokens, 43 more"):
        flocking.perplexity(
            model, random_ids(300), prompt_length=200, continuation_length=100, progress=False
        )
    with pytest.raises(ValueError, match="2 sequences: score one"):
        flocking.score(model, [prompt, prompt], later)
    options = {"prompt_length": 6, "continuation_length": 6}
    with pytest.raises(ValueError, match="expected 12 tokens or more, got 5 in text 1"):
        flocking.perplexity(model, random_ids(20, 5), **options)
    for wrong in (0, True, 2.5, "8"):
        with pytest.raises(ValueError, match=f"prompt_length={wrong!r}: give a whole number"):
            flocking.perplexity(model, [prompt], prompt_length=wrong, continuation_length=2)
    with pytest.raises(TypeError, match="tokenizer is a LlamaForCausalLM"):
        flocking.score(model, "abc", "def", tokenizer=model)
    with pytest.raises(TypeError, match="tokenizer is 'gpt2': give a"):
        flocking.perplexity(model, "abc", tokenizer="gpt2", **options)
