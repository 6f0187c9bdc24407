"""The twin: every architecture, every way to generate, and nothing changed by watching."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
from helpers import ARCHITECTURES, VOCABULARY, build, random_ids
from packaging.version import parse
from torch import Tensor

import flocking
from flocking.analysis import expert_count, magnitude
from flocking.pruning import METHODS, full_model

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
    """As the analysis does; but neurons of experts that were not reached by their weights."""
    values = statistic.copy()
    for place, block in enumerate(flocking.feedforwards(model)):
        if block.kind == "experts":
            own = values.values[:, place].reshape(len(values), block.experts, -1)
            norms = magnitude(block).numpy().reshape(block.experts, -1)
            own[:] = np.where((own == 0).all(-1, keepdims=True), norms, own)
    return flocking.select(values, density).values


def as_masks(twin: tf.PreTrainedModel, model: tf.PreTrainedModel) -> np.ndarray:
    masks = []
    for block in flocking.feedforwards(model):
        experts = twin.selection[block.layer]
        shape = (*experts.shape[:-1], block.d_ff)
        masks.append(torch.zeros(shape, dtype=torch.bool).scatter_(-1, experts, True))
    return torch.stack(masks, dim=-2).numpy()


def whole_and_pruned(
    model: tf.PreTrainedModel, ids: Tensor, later: Tensor, keep: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits of `later` after `ids`, from the full model whose z is masked through the hook."""
    with torch.no_grad():
        prompt = model(ids, use_cache=True)
        with flocking.observe(model, lambda block, z: z * keep[block.layer]):
            pruned = model(later, past_key_values=prompt.past_key_values).logits
    return prompt.logits, pruned


# --------------------------------------------------------------------------------------
# Analysis and inference line up, for every architecture


def test_selects_what_the_analysis_selects(generating: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(generating, 0.5)
    ids = tokens(40)
    generate(twin, ids, 2)
    np.testing.assert_array_equal(
        as_masks(twin, generating), expected_selection(generating, ids)[0]
    )
    for experts in twin.selection.values():
        assert (experts.diff() > 0).all()


def test_each_sequence_selects_its_own(generating: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(generating, 0.25, scope="sequence")
    ids = tokens(30, 30, 30)
    batch = generate(twin, ids)
    chosen = as_masks(twin, generating)
    np.testing.assert_array_equal(chosen, expected_selection(generating, ids, 0.25))
    for row in range(3):
        assert torch.equal(generate(twin, ids[row : row + 1])[0], batch[row])


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


def test_keeping_all_neurons_changes_nothing(generating: tf.PreTrainedModel) -> None:
    ids = tokens(20, 20)
    for scope in ("shared", "sequence"):
        twin = flocking.griffin(generating, 1.0, scope=scope)
        assert torch.equal(generate(twin, ids), generate(generating, ids))
        options = {"return_dict_in_generate": True, "output_logits": True}
        got, expected = (generate(m, ids, **options).logits for m in (twin, generating))
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_leaves_the_model_as_it_was(generating: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    before = {name: value.clone() for name, value in generating.state_dict().items()}
    own_hook = generating.register_forward_hook(lambda *_: None)
    modules = {name: id(module) for name, module in generating.named_modules()}
    config = copy.deepcopy(generating.generation_config.to_dict())
    output = generate(generating, ids)
    hooks = [len(module._forward_pre_hooks) for module in generating.modules()]
    for density in (0.5, 0.1):
        generate(flocking.griffin(generating, density), ids)
    assert modules == {name: id(module) for name, module in generating.named_modules()}
    assert hooks == [len(module._forward_pre_hooks) for module in generating.modules()]
    assert generating.generation_config.to_dict() == config
    assert own_hook.id in generating._forward_hooks
    for name, value in generating.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(generate(generating, ids), output)


def test_drafts_for_the_full_model(generating: tf.PreTrainedModel) -> None:
    """Speculative decoding gives the full model's greedy tokens; experts stay the prompt's."""
    twin = flocking.griffin(generating, 0.5)
    ids = tokens(24)
    other = copy.deepcopy(generating)  # whose drafts are not taken
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape))
    try:
        generate(generating, ids, 16, assistant_model=other)
    except RuntimeError as problem:
        # Sliding windows, in transformers 5.17; whatever assists, so that no twin is to blame.
        if parse(tf.__version__) >= parse("5.23"):
            raise
        pytest.skip(f"transformers itself cannot draft for this model: {problem}")
    got = generate(generating, ids, 16, assistant_model=twin)
    assert torch.equal(got, generate(generating, ids, 16))
    np.testing.assert_array_equal(
        as_masks(twin, generating), expected_selection(generating, ids)[0]
    )
    report = twin.report()
    assert report.prefilled_tokens == 24
    assert 0 <= report.accepted_tokens <= report.drafted_tokens


def test_counts_the_drafts_that_are_taken(llama: tf.PreTrainedModel) -> None:
    """All of them at density 1; against every call of the full model at one half."""
    ids = tokens(24)
    everything = flocking.griffin(llama, 1.0)
    generate(llama, ids, 24, assistant_model=everything)
    report = everything.report()
    assert report.accepted_tokens == report.drafted_tokens > 0

    twin = flocking.griffin(llama, 0.3)
    checked: list[int] = []
    handle = llama.register_forward_hook(lambda m, a, out: checked.append(out.logits.shape[1]))
    result = generate(llama, ids, 24, assistant_model=twin)
    handle.remove()
    report = twin.report()
    # A check runs over a draft and one token more, and gives what it takes and one token more.
    drafts = [length - 1 for length in checked if length > 1]
    assert report.drafted_tokens == sum(drafts[:-1])
    of_last = result.shape[1] - 24 - len(checked) - report.accepted_tokens
    assert 0 <= of_last <= drafts[-1]
    assert 0 < report.accepted_tokens < report.drafted_tokens
    generate(llama, tokens(24, seed=4), 2, assistant_model=twin)
    assert twin.report().drafted_tokens < report.drafted_tokens


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("arrangement", ["padded", "chunked"])
def test_other_arrangements_select_alike(
    generating: tf.PreTrainedModel, arrangement: str, dtype: str, tolerance: float
) -> None:
    """Up to neurons that rounding may move over the threshold."""
    model = copy.deepcopy(generating).to(getattr(torch, dtype))
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
            k = expert_count(0.5, by_expert.shape[1])
            threshold = np.sort(by_expert)[:, [-k]]
            distance = np.abs(by_expert - threshold) / threshold.clip(min=1e-9)
            assert (distance[here.reshape(by_expert.shape)] <= tolerance).all()


# --------------------------------------------------------------------------------------
# Everything that generate does


def minimal_griffin(
    model: tf.LlamaForCausalLM, ids: Tensor, new_tokens: int, density: float
) -> list[int]:
    """GRIFFIN from the formulas, for Llama: no module, function or hook of the package."""
    mlps = [layer.mlp for layer in model.model.layers]
    kept: list[Tensor] = []
    experts: list[Tensor] = []
    originals = [mlp.forward for mlp in mlps]

    def watching(mlp: torch.nn.Module, x: Tensor) -> Tensor:
        z = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        kept.append(z[0])
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
            for z in kept:
                s = (z / z.norm(dim=-1, keepdim=True)).norm(dim=0)
                experts.append(s.topk(int(density * s.numel())).indices)
            for mlp, chosen in zip(mlps, experts, strict=True):
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
    got = generate(twin, ids, 24)[0, 96:].tolist()
    assert got == minimal_griffin(model, ids, 24, 0.5)
    assert got != generate(model, ids, 24)[0, 96:].tolist()


@pytest.fixture
def pair(llama: tf.PreTrainedModel) -> tuple:
    return llama, flocking.griffin(llama, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 5, "eos_token_id": list(range(64))},
    ],
    ids=str,
)
def test_generates_in_every_way(pair: tuple, options: dict) -> None:
    """At density 1 as the model does; at one half, with the prompt's experts."""
    model, twin = pair
    ids = tokens(20, 20)
    everything = flocking.griffin(model, 1.0)
    results = []
    for each in (model, everything, twin, twin):
        torch.manual_seed(3)
        results.append(generate(each, ids, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[3])
    assert not torch.equal(results[0], results[2])
    plain = flocking.griffin(model, 0.5)
    generate(plain, ids)
    np.testing.assert_array_equal(as_masks(twin, model), as_masks(plain, model))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_beams_with_experts_by_sequence(name: str) -> None:
    model = build(name)
    twin = flocking.griffin(model, 0.5, scope="sequence")
    ids = tokens(20, 20)
    together = generate(twin, ids, num_beams=3)
    for row in range(2):
        assert torch.equal(generate(twin, ids[row : row + 1], num_beams=3)[0], together[row])


@pytest.mark.parametrize("method", ["sampled", "half-sampled", "random"])
def test_a_sequence_draws_in_a_batch_what_it_draws_alone(
    llama: tf.PreTrainedModel, method: str
) -> None:
    """And so do its beams, which go on from one another."""
    twin = flocking.griffin(llama, 0.5, method=method, scope="sequence")
    ids = tokens(20, 20, 20)
    together = generate(twin, ids, num_beams=3, num_return_sequences=2)
    assert twin.report().prefilled_tokens == 60
    chosen = as_masks(twin, llama)
    for row in range(3):
        alone = generate(twin, ids[row : row + 1], num_beams=3, num_return_sequences=2)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])
        assert twin.report().prefilled_tokens == 20
        mask = as_masks(twin, llama)
        for beam in range(3):
            np.testing.assert_array_equal(chosen[3 * row + beam], mask[beam])
            np.testing.assert_array_equal(mask[beam], mask[0])


def test_shares_experts_by_the_papers_weighted_sum(pair: tuple) -> None:
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
    for got, due in zip(twin.selection.values(), expected, strict=True):
        assert len(set(got.tolist()) ^ set(due.tolist())) <= 2  # rounding, at the threshold


def test_streams_and_stops(pair: tuple) -> None:
    _, twin = pair
    seen: list[int] = []

    class Streamer(tf.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    class Stop(tf.StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 25, dtype=torch.bool)

    result = generate(
        twin, tokens(20), streamer=Streamer(), stopping_criteria=tf.StoppingCriteriaList([Stop()])
    )
    assert result.shape[1] == 25
    assert seen == [*result[0].tolist(), -1]


def test_a_prompt_of_one_token(pair: tuple) -> None:
    model, twin = pair
    ids = tokens(1)
    generate(twin, ids)
    np.testing.assert_array_equal(as_masks(twin, model), expected_selection(model, ids)[0])


def test_a_second_turn_adds_to_the_statistic(pair: tuple) -> None:
    model, twin = pair
    first = generate(twin, tokens(20), return_dict_in_generate=True)
    new = tokens(9, seed=1)
    ids = torch.cat((first.sequences, new), dim=1)
    kept = first.past_key_values.get_seq_length()
    second = generate(twin, ids, past_key_values=first.past_key_values)
    assert twin.report().prefilled_tokens == 20 + (ids.shape[1] - kept)
    # By hand: energies of the first prompt, and of the new tokens over the cache of the first.
    energy = dict.fromkeys(twin.selection, 0.0)

    def add(block: flocking.FeedForward, z: Tensor) -> None:
        energy[block.layer] = energy[block.layer] + (
            z[0].double() / z[0].double().norm(dim=-1, keepdim=True)
        ).square().sum(0)

    again = flocking.griffin(model, 0.5)
    turn = generate(again, tokens(20), return_dict_in_generate=True)
    with torch.no_grad(), flocking.observe(model, add):
        model(tokens(20))
        model(ids[:, kept:], past_key_values=turn.past_key_values)
    for layer, experts in twin.selection.items():
        assert experts.tolist() == energy[layer].topk(80).indices.sort().values.tolist()
    # Other prompts in between do not matter, nor does where inference mode begins and ends.
    with torch.inference_mode():
        turn = generate(again, tokens(20), return_dict_in_generate=True)
    generate(again, tokens(11, seed=2))
    flocking.score(again, *random_ids(7, 3))
    generate(again, ids, past_key_values=turn.past_key_values)
    assert again.report().prefilled_tokens == 20 + (ids.shape[1] - kept)
    for layer, experts in twin.selection.items():
        assert torch.equal(again.selection[layer], experts)
    # On a cache that is not its own, the new tokens alone count.
    with torch.no_grad():
        other = model(ids[:, :kept], use_cache=True).past_key_values
    generate(twin, ids, past_key_values=other)
    assert twin.report().prefilled_tokens == ids.shape[1] - kept
    assert second.shape[1] > ids.shape[1]


def test_a_second_turn_on_a_changed_cache_chooses_afresh(pair: tuple) -> None:
    _, twin = pair
    for change, batch in (
        (lambda cache: cache.crop(10 - cache.get_seq_length()), 1),
        (lambda cache: cache.batch_repeat_interleave(2), 2),
    ):
        cache = generate(twin, tokens(40), return_dict_in_generate=True).past_key_values
        change(cache)
        kept = cache.get_seq_length()
        ids = torch.cat((tokens(*[kept] * batch), tokens(*[12] * batch, seed=5)), dim=1)
        generate(twin, ids, 2, past_key_values=cache)
        assert twin.report().prefilled_tokens == 12 * batch
    cache = generate(twin, tokens(40), return_dict_in_generate=True).past_key_values
    cache.crop(
        45 - cache.get_seq_length()
    )  # some of the generation is undone, nothing of the prompt
    ids = torch.cat((tokens(45), tokens(12, seed=5)), dim=1)
    generate(twin, ids, 2, past_key_values=cache)
    assert twin.report().prefilled_tokens == 40 + 12


def test_in_a_pipeline_with_a_chat_template(embedded: tuple) -> None:
    model, tokenizer = embedded
    twin = flocking.griffin(model, 1.0)
    chat = [{"role": "user", "content": "Name three birds."}]
    texts = []
    for each in (model, twin):
        pipe = tf.pipeline("text-generation", model=each, tokenizer=tokenizer)
        answer = pipe(chat, max_new_tokens=12, do_sample=False)
        texts.append(answer[0]["generated_text"][-1]["content"])
    assert texts[0] == texts[1]
    assert texts[0]


def test_can_be_watched_as_it_decodes(pair: tuple) -> None:
    """The hook sees what the experts compute: the full model's z, at the experts' places."""
    model, twin = pair
    ids = tokens(20)
    out = generate(twin, ids, 2)
    seen: dict[int, Tensor] = {}
    due: dict[int, Tensor] = {}
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        with flocking.observe(twin, lambda block, z: seen.update({block.layer: z.clone()})):
            twin(out[:, 20:21], past_key_values=copy.deepcopy(past))
        with flocking.observe(model, lambda block, z: due.update({block.layer: z.clone()})):
            model(out[:, 20:21], past_key_values=past)
    torch.testing.assert_close(seen[0], due[0][..., twin.selection[0]])


def test_several_twins_at_once(llama: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    densities = (0.2, 0.5, 0.9)
    alone = [generate(flocking.griffin(llama, density), ids) for density in densities]
    twins = [flocking.griffin(llama, density) for density in densities]
    for twin in twins:  # in turn, so that one's experts would show in another
        generate(twin, tokens(20, seed=5))
    assert all(
        torch.equal(generate(twin, ids), due) for twin, due in zip(twins, alone, strict=True)
    )
    counts = [len(twin.selection[0]) for twin in twins]
    assert counts == [32, 80, 144]


def test_a_density_for_each_layer(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, [0.25, 1])
    generate(twin, tokens(20))
    assert [len(experts) for experts in twin.selection.values()] == [40, 160]


def test_of_a_compiled_model(llama: tf.PreTrainedModel) -> None:
    ids = tokens(20)
    expected = generate(flocking.griffin(llama, 0.5), ids)
    llama.compile(backend="eager")
    llama.model.layers[0].mlp.forward = torch.compile(
        llama.model.layers[0].mlp.forward, backend="eager"
    )
    generate(llama, ids)
    assert torch.equal(generate(flocking.griffin(llama, 0.5), ids), expected)


def test_of_a_model_that_generate_has_compiled(llama: tf.PreTrainedModel) -> None:
    """For a static cache generate compiles the model's call, on a GPU by itself, and keeps it."""
    ids = tokens(20)
    config = tf.generation.CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    expected = generate(flocking.griffin(llama, 0.5), ids)
    full = generate(llama, ids, **options)
    assert "_compiled_call" in vars(llama)
    twin = flocking.griffin(llama, 0.5)
    for more in ({}, {"prefill_chunk_size": 7}):
        assert torch.equal(generate(twin, ids, **options, **more), expected)
    assert not torch.equal(expected, full)
    assert torch.equal(generate(llama, ids, **options), full)


def test_two_twins_in_two_threads(llama: tf.PreTrainedModel) -> None:
    """One's prompt does not count for the other's experts."""
    twins = [flocking.griffin(llama, density) for density in (0.5, 0.3)]
    prompts = [tokens(100, seed=seed) for seed in (1, 2)]
    alone = [generate(*pair) for pair in zip(twins, prompts, strict=True)]
    # The second is given its prompt in the middle of the first's.
    inner: list[Tensor] = []
    layer = full_model(twins[0]).model.layers[1]
    forward = layer.forward

    def interrupted(*args: object, **kwargs: object) -> Tensor:
        if not inner:
            inner.append(generate(twins[1], prompts[1]))
        return forward(*args, **kwargs)

    layer.forward = interrupted
    assert torch.equal(generate(twins[0], prompts[0]), alone[0])
    assert torch.equal(inner[0], alone[1])
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for got, due in zip(pool.map(generate, twins, prompts), alone, strict=True):
                assert torch.equal(got, due)


def test_hooks_act_where_they_were_put(llama: tf.PreTrainedModel) -> None:
    """Those on a twin not on its original, nor the other way round, nor on another twin."""
    ids = tokens(20)
    twin, other = flocking.griffin(llama, 0.5), flocking.griffin(llama, 1.0)
    full, pruned = generate(llama, ids), generate(twin, ids)
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output * 0)
        for layer in twin.model.layers
    ]
    assert not torch.equal(generate(twin, ids), pruned)
    assert torch.equal(generate(llama, ids), full)
    assert torch.equal(generate(other, ids), full)
    for handle in handles:
        handle.remove()
    llama.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, output: output * 0)
    assert not torch.equal(generate(llama, ids), full)
    assert torch.equal(generate(other, ids), full)
    seen = []
    with flocking.observe(twin, lambda block, z: seen.append(z.shape[-1])):
        llama(ids)
        generate(twin, ids, 3)
    assert set(seen) == {80}


@pytest.mark.parametrize("change", ["assigned", "head", "buffer", "config"])
def test_a_new_twin_is_of_the_model_as_it_is_now(change: str) -> None:
    model, ids = build("gemma2"), tokens(20)
    generate(flocking.griffin(model, 1.0), ids)
    with torch.no_grad():
        if change == "assigned":
            state = {name: value * 1.5 for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        elif change == "head":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
        elif change == "buffer":
            model.model.rotary_emb.inv_freq.mul_(0.3)
        else:
            model.config.final_logit_softcapping = 0.5
    options = {"return_dict_in_generate": True, "output_logits": True}
    got, due = (generate(m, ids, 4, **options) for m in (flocking.griffin(model, 1.0), model))
    for a, b in zip(got.logits, due.logits, strict=True):
        torch.testing.assert_close(a, b)


def test_of_a_model_converted_since(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, 0.5)
    llama.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"original is in torch\.bfloat16 by now"):
        generate(twin, tokens(20))


def test_of_a_model_in_training(llama: tf.PreTrainedModel) -> None:
    expected = generate(flocking.griffin(llama, 0.5), tokens(20))
    llama.train()
    assert torch.equal(generate(flocking.griffin(llama, 0.5), tokens(20)), expected)
    assert llama.training


def test_outlives_its_original() -> None:
    model = build("llama")
    twin = flocking.griffin(model, 0.5)
    expected = generate(twin, tokens(20))
    del model
    assert torch.equal(generate(twin, tokens(20)), expected)


def test_in_bfloat16() -> None:
    model = build("llama").to(torch.bfloat16)
    ids = tokens(20)
    assert torch.equal(generate(flocking.griffin(model, 1.0), ids), generate(model, ids))
    twin = flocking.griffin(model, 0.5)
    generate(twin, ids)
    np.testing.assert_array_equal(as_masks(twin, model), expected_selection(model, ids)[0])


def test_reports(generating: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(generating, 0.5)
    blocks = flocking.feedforwards(generating)
    assert twin.report().prefilled_tokens == 0
    generate(twin, tokens(20))
    report = twin.report()
    assert report.parameters == generating.num_parameters()
    assert report.active_parameters == sum(p.numel() for p in twin.parameters())
    shared = {id(p) for p in generating.parameters()}
    ours = sum(p.numel() * 4 for p in twin.parameters() if id(p) not in shared)
    biases = sum(
        p.numel() * 4
        for b in blocks
        for n, p in b.down.named_parameters()
        if n.endswith("bias") and not n.startswith("gate")
    )
    assert report.compact_bytes == ours + biases
    ff = {m for block in blocks for m in (block.up, block.gate, block.down) if m is not None}
    assert report.ff_bytes == sum(p.numel() * 4 for m in ff for p in m.parameters())
    assert report.parameters > report.active_parameters
    assert report.copy_seconds > 0 < report.selection_seconds
    assert "active parameters" in report._repr_html_()


def test_holds_experts_once_for_each_sequence(llama: tf.PreTrainedModel) -> None:
    shared, own = (flocking.griffin(llama, 0.5, scope=scope) for scope in ("shared", "sequence"))
    for sequences in (3, 1):
        ids = tokens(*[20] * sequences)
        for twin in (shared, own):
            generate(twin, ids, 2)
        once = 2 * 3 * 80 * 64 * 4  # layers, projections, experts, hidden size, bytes
        assert shared.report().compact_bytes == once
        assert own.report().compact_bytes == sequences * once


# --------------------------------------------------------------------------------------
# Methods


def scores_of(method: str, statistic: Tensor, k: int = 40, seed: int = 0) -> Tensor:
    block = flocking.feedforwards(build("llama"))[0]
    return METHODS[method](statistic, k, block, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_reproducible(llama: tf.PreTrainedModel, method: str) -> None:
    ids = tokens(20)
    chosen = []
    for seed in (0, 0, 1):
        twin = flocking.griffin(llama, 0.5, method=method, seed=seed)
        generate(twin, ids)
        chosen.append(as_masks(twin, llama))
    assert (chosen[0].sum(-1) == 80).all()
    np.testing.assert_array_equal(chosen[0], chosen[1])
    drawn = method in ("sampled", "half-sampled", "random")
    assert (chosen[0] != chosen[2]).any() == drawn
    if method != "topk":
        assert (chosen[0] != expected_selection(llama, ids)[0]).any()


def test_samples_in_proportion_to_the_statistic() -> None:
    """Drawing two of four: frequencies against the closed form, within five standard errors."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    due = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    n = 20_000
    scores = METHODS["sampled"](
        torch.tensor(p * 7).expand(n, 4), 2, None, torch.Generator().manual_seed(0)
    )
    got = np.bincount(scores.topk(2).indices.flatten().numpy(), minlength=4) / n
    assert (np.abs(got - due) < 5 * np.sqrt(np.array(due) * (1 - np.array(due)) / n)).all()


def test_half_sampling_keeps_the_highest() -> None:
    statistic = torch.rand(160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = scores_of("half-sampled", statistic, seed=1).topk(40).indices.tolist()
    assert set(statistic.topk(20).indices.tolist()) < set(kept)
    assert set(kept) != set(statistic.topk(40).indices.tolist())


def test_magnitude_is_the_weights(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, 0.5, method="magnitude")
    generate(twin, tokens(20))
    due = flocking.select(flocking.weight_magnitude(llama), 0.5).values
    np.testing.assert_array_equal(as_masks(twin, llama), due)


def test_global_statistic_and_what_is_chosen_by_it(llama: tf.PreTrainedModel) -> None:
    texts = random_ids(30, 50, 12)
    reference = flocking.global_statistic(llama, texts, progress=False)
    energy = 0
    for row in texts:
        recording = flocking.record(llama, [row], window=None, progress=False)
        energy = energy + flocking.statistic(recording).values[0] ** 2 / len(row) / 3
    np.testing.assert_allclose(reference, np.sqrt(energy), rtol=1e-5)
    assert reference.dims == ("layer", "neuron")

    def chosen(method: str, **options: object) -> np.ndarray:
        twin = flocking.griffin(llama, 0.5, method=method, reference=reference, **options)
        generate(twin, tokens(20))
        return as_masks(twin, llama)

    static, prompt = chosen("static"), chosen("topk")
    np.testing.assert_array_equal(static, flocking.select(reference, 0.5).values)
    np.testing.assert_array_equal(chosen("global-local", weight=1), static)
    np.testing.assert_array_equal(chosen("global-local", weight=0), prompt)
    both = chosen("global-local")
    assert (both != static).any()
    assert (both != prompt).any()
    # By hand: mean of ranks, for the first layer.
    s = flocking.statistic(
        flocking.record(llama, tokens(20).tolist(), window=None, progress=False)
    ).values[0, 0]
    ranks = s.argsort().argsort() + reference.values[0].argsort().argsort()
    kept = ranks[both[0]]
    assert kept.min() >= np.sort(ranks)[-80]


def test_the_oracle_is_static_in_hindsight(llama: tf.PreTrainedModel) -> None:
    prompt, later = random_ids(20, 15)
    recording = flocking.record(llama, [prompt + later], window=19, progress=False)
    reference = flocking.statistic(recording, start=20).isel(sequence=0)
    twin = flocking.griffin(llama, 0.5, method="static", reference=reference)
    flocking.score(twin, prompt, later)
    np.testing.assert_array_equal(as_masks(twin, llama), flocking.select(reference, 0.5).values)


def test_a_users_own_method(llama: tf.PreTrainedModel) -> None:

    def lowest(statistic: Tensor, k: int, block: object, generator: object) -> Tensor:
        return -statistic

    twin = flocking.griffin(llama, 0.5, method=lowest)
    generate(twin, tokens(20))
    np.testing.assert_array_equal(as_masks(twin, llama), ~expected_selection(llama, tokens(20))[0])
    twin = flocking.griffin(llama, 0.5, method=lambda s, k, b, g: torch.arange(160) > 60)
    generate(twin, tokens(20))
    assert twin.selection[0].tolist() == [*range(61, 141)]
    for wrong, message in (
        (lambda s, k, b, g: s[:3], r"one score for each of 160 neurons, method returned \(3,\)"),
        (lambda s, k, b, g: None, "expected one score .* method returned NoneType"),
        (lambda s, k, b, g: s * float("nan"), "returned NaN in layer 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(flocking.griffin(llama, method=wrong), tokens(20))


# --------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density=0\.0: give the fraction"),
        ({"density": 1.5}, r"density=1\.5"),
        ({"density": 0.001}, "keeps none of 160"),
        ({"density": [0.5]}, "expected one density, or one for each of 2 layers, got 1"),
        ({"method": "best"}, "choose from topk, sampled, half-sampled, random, magnitude, static"),
        ({"method": "static"}, "needs reference"),
        ({"method": "global-local"}, "needs reference"),
        ({"scope": "batch"}, "give 'shared' or 'sequence'"),
    ],
    ids=str,
)
def test_refuses_what_makes_no_twin(llama: tf.PreTrainedModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.griffin(llama, **options)


@pytest.mark.parametrize("density", ["0.5", None, [], "half"])
def test_density_is_a_number(llama: tf.PreTrainedModel, density: object) -> None:
    with pytest.raises(TypeError, match="give a number, or one for each of 2"):
        flocking.griffin(llama, density)


def test_refuses_a_reference_of_another_model(llama: tf.PreTrainedModel) -> None:
    reference = flocking.global_statistic(llama, random_ids(20), progress=False)
    with pytest.raises(
        ValueError,
        match="expected reference of 2 layers of 160 neurons, got one of 1 layers of 160",
    ):
        flocking.griffin(llama, method="static", reference=reference.isel(layer=[1]))
    for width in (9, 500):  # also a wider model's, whose first neurons are others
        other = reference.reindex(neuron=range(width), fill_value=1.0)
        with pytest.raises(ValueError, match=f"got one of 2 layers of {width} neurons"):
            flocking.griffin(llama, method="static", reference=other)
    with pytest.raises(ValueError, match="not finite"):
        flocking.griffin(llama, method="static", reference=reference.where(reference.layer > 0))
    with pytest.raises(TypeError, match="reference is a ndarray"):
        flocking.griffin(llama, method="static", reference=reference.values)
    with pytest.raises(ValueError, match=r"expected reference \(layer, neuron\)"):
        flocking.griffin(llama, method="static", reference=reference.isel(layer=0))
    with pytest.raises(ValueError, match="weight=2"):
        flocking.griffin(llama, method="global-local", reference=reference, weight=2)


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
    with pytest.raises(RuntimeError, match="this twin has no selection yet"):
        twin(ids)
    with pytest.raises(RuntimeError, match="this twin has no selection yet"):
        _ = twin.selection
    with pytest.raises(ValueError, match="use_cache=False, given or in the model"):
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
        with pytest.raises(ValueError, match="save the original"):
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


def test_refuses_other_sequences_than_the_experts_are_for() -> None:
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
    with pytest.raises(ValueError, match="guidance_scale would run the negative prompt pruned"):
        generate(twin, tokens(20), guidance_scale=1.5, negative_prompt_ids=tokens(5))
    twin.config.use_cache = False
    twin.generation_config.use_cache = False
    with pytest.raises(ValueError, match="or in the model's config"):
        generate(twin, tokens(20))


def test_an_interrupted_prompt_leaves_no_half_chosen_experts(pair: tuple) -> None:
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


def test_a_second_turn_of_new_tokens_alone(llama: tf.PreTrainedModel) -> None:
    """Beside a cache, `generate` takes the whole conversation, or what is new of it."""
    twin = flocking.griffin(llama)
    ids, later = tokens(12), tokens(6)
    results = []
    for alone in (False, True):
        first = twin.generate(ids, max_new_tokens=1, return_dict_in_generate=True, pad_token_id=0)
        cache = first.past_key_values
        fed = later if alone else torch.cat((ids, later), dim=1)
        mask = torch.ones(1, 18, dtype=torch.int64)
        output = twin.generate(
            fed,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        results.append((output[0, -4:].tolist(), twin.report().prefilled_tokens))
    assert results[0] == results[1]
    assert results[0][1] == 18


def test_reports_tied_parameters_once() -> None:
    """Whichever of their names comes first."""
    config = tf.CamembertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
    )
    model = tf.CamembertForCausalLM(config).eval()
    assert flocking.griffin(model).report().parameters == model.num_parameters()
