"""Which neurons a twin keeps: those that the analysis selects, in every arrangement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import (
    as_masks,
    build,
    expected_selection,
    generate,
    random_ids,
    select_reached,
    tokens,
)
from torch import Tensor

import flocking
from flocking.analysis import kept_count


def test_selects_what_the_analysis_selects(generating: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(generating, 0.5)
    ids = tokens(40)
    generate(twin, ids, 2)
    np.testing.assert_array_equal(
        as_masks(twin, generating), expected_selection(generating, ids)[0]
    )
    for kept in twin.selection.values():
        assert (kept.diff() > 0).all()


def test_what_is_handed_out_is_the_users(llama: tf.PreTrainedModel) -> None:
    """Whatever is done to a selection, the twin says what it selected."""
    twin = flocking.griffin(llama, 0.5, refresh=4)
    generate(twin, tokens(20), 6)
    kept, history = twin.selection[0].clone(), twin.history.copy(deep=True)
    twin.selection[0].zero_()
    assert torch.equal(twin.selection[0], kept)
    assert twin.history.equals(history)


def test_each_sequence_selects_its_own(generating: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(generating, 0.25, scope="sequence")
    ids = tokens(30, 30, 30)
    batch = generate(twin, ids)
    chosen = as_masks(twin, generating)
    np.testing.assert_array_equal(chosen, expected_selection(generating, ids, 0.25))
    for row in range(3):
        assert torch.equal(generate(twin, ids[row : row + 1])[0], batch[row])


def whole_and_pruned(
    model: tf.PreTrainedModel, ids: Tensor, later: Tensor, keep: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits of `later` after `ids`, from the full model whose z is masked through the hook."""
    with torch.no_grad():
        prompt = model(ids, use_cache=True)
        with flocking.observe(model, lambda block, z: z * keep[block.layer]):
            pruned = model(later, past_key_values=prompt.past_key_values).logits
    return prompt.logits, pruned


def test_gives_what_the_masked_model_gives(generating: tf.PreTrainedModel) -> None:
    ids, later = tokens(24), tokens(8, seed=1)
    for scope in ("shared", "sequence"):
        twin = flocking.griffin(generating, 0.5, scope=scope)
        generate(twin, ids, 2)
        keep = {
            block.layer: torch.from_numpy(mask).float()
            for block, mask in zip(
                flocking.feedforwards(generating),
                as_masks(twin, generating).reshape(2, -1),
                strict=True,
            )
        }
        _, expected = whole_and_pruned(generating, ids, later, keep)
        with torch.no_grad():
            past = generating(ids, use_cache=True).past_key_values
            got = twin(later, past_key_values=past).logits
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("arrangement", ["padded", "chunked"])
def test_other_arrangements_select_the_same(
    generating: tf.PreTrainedModel,
    arrangement: str,
    dtype: str,
    tolerance: float,
) -> None:
    """Up to neurons that rounding may move over the threshold."""
    model = generating.to(getattr(torch, dtype))
    rows = random_ids(30, 18, 7) if arrangement == "padded" else random_ids(30)
    lengths = [len(row) for row in rows]
    ids = torch.tensor([[0] * (30 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (30 - n) + [1] * n for n in lengths])
    options = {"prefill_chunk_size": 8} if arrangement == "chunked" else {}
    twin = flocking.griffin(model, 0.5, scope="sequence")
    generate(twin, ids, 2, attention_mask=mask, **options)
    together = as_masks(twin, model)
    assert twin.report().prefilled_tokens == sum(lengths)
    for number, row in enumerate(rows):
        recording = flocking.record(model, [row], window=None, progress=False)
        statistic = flocking.statistic(recording)
        alone = select_reached(model, statistic, 0.5)[0]
        moved = alone != together[number]
        for block, values, here in zip(
            flocking.feedforwards(model), statistic.values[0], moved, strict=True
        ):
            by_expert = values.reshape(block.experts, -1)
            k = kept_count(0.5, by_expert.shape[1])
            threshold = np.sort(by_expert)[:, [-k]]
            distance = np.abs(by_expert - threshold) / threshold.clip(min=1e-9)
            assert (distance[here.reshape(by_expert.shape)] <= tolerance).all()


def minimal_griffin(
    model: tf.LlamaForCausalLM, ids: Tensor, new_tokens: int, density: float
) -> list[int]:
    """GRIFFIN from the formulas, for Llama: no module, function or hook of the package."""
    mlps = [layer.mlp for layer in model.model.layers]
    seen: list[Tensor] = []
    selection: list[Tensor] = []
    originals = [mlp.forward for mlp in mlps]

    def watching(mlp: torch.nn.Module, x: Tensor) -> Tensor:
        z = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        seen.append(z[0])
        return mlp.down_proj(z)

    def pruned(mlp: torch.nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
        gate = x @ mlp.gate_proj.weight[chosen].T
        up = x @ mlp.up_proj.weight[chosen].T
        return (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.weight[:, chosen].T

    try:
        for mlp in mlps:
            mlp.forward = lambda x, mlp=mlp: watching(mlp, x)
        with torch.no_grad():
            out = model(ids)
            for z in seen:
                s = (z / z.norm(dim=-1, keepdim=True)).norm(dim=0)
                selection.append(s.topk(int(density * s.numel())).indices)
            for mlp, chosen in zip(mlps, selection, strict=True):
                mlp.forward = lambda x, mlp=mlp, chosen=chosen: pruned(mlp, x, chosen)
            new = [int(out.logits[0, -1].argmax())]
            while len(new) < new_tokens:
                out = model(torch.tensor([new[-1:]]), past_key_values=out.past_key_values)
                new.append(int(out.logits[0, -1].argmax()))
    finally:
        for mlp, forward in zip(mlps, originals, strict=True):
            del mlp.forward
            assert mlp.forward == forward
    return new


@pytest.mark.parametrize("name", ["code", "reportage", "letters"])
def test_agrees_with_a_minimal_griffin_on_real_prompts(embedded: tuple, name: str) -> None:
    model, tokenizer = embedded
    passages = {passage.name: passage for passage in flocking.passages()}
    ids = torch.tensor([tokenizer(passages[name])["input_ids"][:96]])
    twin = flocking.griffin(model)
    got = generate(twin, ids, 12)[0, 96:].tolist()
    assert got == minimal_griffin(model, ids, 12, 0.5)
    assert got != generate(model, ids, 12)[0, 96:].tolist()


def test_shares_a_selection_by_the_papers_weighted_sum(pair: tuple) -> None:
    model, twin = pair
    lengths = (30, 9)
    rows = random_ids(*lengths)
    ids = torch.tensor([rows[0], [0] * 21 + rows[1]])
    generate(twin, ids, 2, attention_mask=(torch.arange(30) >= torch.tensor([[0], [21]])).long())
    sums = 0
    for row in rows:
        recording = flocking.record(model, [row], window=None, progress=False)
        sums = sums + flocking.statistic(recording).values[0] / np.sqrt(len(row))
    expected = np.argsort(-sums, axis=-1, kind="stable")[:, : sums.shape[-1] // 2]
    for got, right in zip(twin.selection.values(), expected, strict=True):
        assert len(set(got.tolist()) ^ set(right.tolist())) <= 2  # rounding, at the threshold


def test_a_prompt_of_one_token(pair: tuple) -> None:
    model, twin = pair
    ids = tokens(1)
    generate(twin, ids)
    np.testing.assert_array_equal(as_masks(twin, model), expected_selection(model, ids)[0])


def test_a_density_for_each_layer(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, [0.25, 1])
    generate(twin, tokens(20))
    assert [len(kept) for kept in twin.selection.values()] == [40, 160]


def test_in_bfloat16() -> None:
    model = build("llama").to(torch.bfloat16)
    ids = tokens(20)
    assert torch.equal(generate(flocking.griffin(model, 1.0), ids), generate(model, ids))
    twin = flocking.griffin(model, 0.5)
    generate(twin, ids)
    np.testing.assert_array_equal(as_masks(twin, model), expected_selection(model, ids)[0])
