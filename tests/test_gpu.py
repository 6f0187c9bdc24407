"""On a CUDA device: the same tokens, selections and recordings; graphs, compiled calls, memory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf
import xarray as xr
from accelerate import cpu_offload
from helpers import build, random_ids
from torch import Tensor

import flocking
from flocking.pruning import graphs
from flocking.recording import Moments, Windows

pytestmark = pytest.mark.gpu
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompts(sequences: int, length: int, padding: int = 0, device: str = "cuda") -> dict:
    ids = torch.tensor(random_ids(*[length] * sequences, seed=length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = ids[0, :padding] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generated(model: tf.PreTrainedModel, prompt: dict, new: int = 12, **options: object) -> Tensor:
    return model.generate(**prompt, max_new_tokens=new, **GREEDY, **options)


def there(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """A copy on the device."""
    return copy.deepcopy(model).to("cuda")


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_tokens_and_selections_are_the_cpus(generating: tf.PreTrainedModel, scope: str) -> None:
    here = flocking.griffin(generating, 0.5, scope=scope)
    twin = flocking.griffin(there(generating), 0.5, scope=scope)
    due = generated(here, prompts(3, 20, 6, "cpu"))
    assert torch.equal(generated(twin, prompts(3, 20, 6)).cpu(), due)
    for layer, kept in here.selection.items():
        assert torch.equal(twin.selection[layer], kept)
    assert twin.report().selection_seconds > 0
    assert twin.report().copy_seconds > 0


@pytest.mark.parametrize("ranks", [False, True])
def test_recordings_are_the_cpus(tiny: tf.PreTrainedModel, ranks: bool) -> None:
    ids = random_ids(40, 23, 31)
    options = {"window": 8, "batch_size": 3, "ranks": ranks, "progress": False}
    due = flocking.record(tiny, ids, **options)
    got = flocking.record(there(tiny), ids, **options)
    # (A rank may go to its neighbour by rounding.)
    xr.testing.assert_allclose(got, due, rtol=1e-4, atol=5e-3 if ranks else 1e-4)
    again = flocking.record(there(tiny), ids, **options)
    xr.testing.assert_equal(got.energy, again.energy)  # to the bit, run for run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sequences", "tokens", "width"), [(1, 4096, 11008), (3, 700, 1000)])
def test_sums_against_float64(dtype: torch.dtype, sequences: int, tokens: int, width: int) -> None:
    z = torch.randn(sequences, tokens, width, device="cuda").to(dtype)
    window = (torch.arange(tokens) // 600 + 1).repeat(sequences, 1)
    window[:, 0] = 0
    window[-1, :10] = -1
    z[-1, :10] = torch.nan
    moments = Moments.zeros(sequences, 9, width, device="cuda")
    norm, l1 = moments.update(z, Windows.of(window))
    exact = z.double()
    exact[-1, :10] = 0
    length = exact.norm(dim=-1)
    r = exact.abs() / length.clamp_min(1e-18)[..., None]
    member = (window[:, None] == torch.arange(9)[None, :, None]).double().cuda()
    for got, due in (
        (moments.energy, member @ r.square()),
        (moments.mass, member @ r),
        (norm, length),
        (l1, r.sum(dim=-1)),
    ):
        torch.testing.assert_close(got.double(), due, rtol=1e-5, atol=1e-6)


def test_the_kernels_are_in_use() -> None:
    """Wherever torch's CUDA build brings Triton along; else the sums above were torch's own."""
    pytest.importorskip("triton", reason="Triton is not installed")
    windows = Windows.of(torch.zeros(1, 4, dtype=torch.int64))
    assert windows.to(torch.device("cuda", 0)).pieces is not None


# --------------------------------------------------------------------------------------
# The lean loop, as a graph


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of compilers about themselves
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "compiler"), [("llama", "inductor"), ("gemma2", "inductor"), ("opt", "eager")]
)
@pytest.mark.parametrize("scope", [None, "shared", "sequence"])
def test_one_graph_for_all_prompts(
    name: str, compiler: str, scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_COMPILER", compiler)
    model = there(build(name))
    if scope is not None:
        model = flocking.griffin(model, 0.5, scope=scope)
    decoder = flocking.Decoder(model, 64, batch_size=2)
    captured = []
    for length in (10, 30, 21):
        prompt = prompts(2, length, 4)
        model.generation_config.eos_token_id = None
        assert torch.equal(decoder.generate(**prompt, max_new_tokens=12), generated(model, prompt))
        captured.append(decoder._compiled._graph)
    assert captured[0] is not None
    assert captured[0] is captured[1] is captured[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_graph_never_reads_memory_that_was_given_up() -> None:
    """A batch of another size moves the compact weights of each sequence; weights are replaced."""
    model = there(build("llama"))
    twin = flocking.griffin(model, 0.5, scope="sequence")
    twin.generation_config.eos_token_id = None
    decoder = flocking.Decoder(twin, 64, batch_size=2)
    prompt = prompts(2, 15)
    due = generated(twin, prompt)
    assert torch.equal(decoder.generate(**prompt, max_new_tokens=12), due)
    step = decoder._compiled
    before, reads = step._graph, step.addresses()
    generated(twin, prompts(3, 9))
    junk = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(8)]
    assert torch.equal(decoder.generate(**prompt, max_new_tokens=12), due)
    assert (step._graph is before) == (step.addresses() == reads)
    del junk

    full = flocking.Decoder(model, 64, batch_size=2)
    model.generation_config.eos_token_id = None
    full.generate(**prompt, max_new_tokens=12)
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(-down.weight.detach())
    due = generated(model, prompt)
    assert torch.equal(full.generate(**prompt, max_new_tokens=12), due)


# --------------------------------------------------------------------------------------
# What generate compiles by itself on a GPU


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_static_caches_and_chunks_do_not_hide_the_prompt() -> None:
    """There generate compiles the model's call, whose hooks would be skipped without a word."""
    model = there(build("llama"))
    prompt = prompts(1, 20)
    due = generated(flocking.griffin(model, 0.5), prompt)
    full = generated(model, prompt, cache_implementation="static")
    assert "_compiled_call" in vars(model)
    twin = flocking.griffin(model, 0.5)  # made after the original was compiled
    for more in ({}, {"prefill_chunk_size": 7}):
        got = generated(twin, prompt, cache_implementation="static", **more)
        assert torch.equal(got, due)
    assert not torch.equal(due, full)
    seen: set[int] = set()
    with flocking.observe(model, lambda block, z: seen.add(block.layer)):
        generated(model, prompt, cache_implementation="static", prefill_chunk_size=7)
    assert seen == {0, 1}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_selection_waits_for_the_device_once() -> None:
    """However many layers there are."""

    def waits(layers: int) -> int:
        twin = flocking.griffin(there(build("llama", num_hidden_layers=layers)), 0.5)
        generated(twin, prompts(2, 20), 2)
        state = twin._griffin
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state.choose(state.read)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    assert waits(2) == waits(6) <= 2


def test_a_graph_follows_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has the mask of the moment when it was captured."""
    monkeypatch.setattr(graphs, "_COMPILER", "eager")
    torch.manual_seed(0)
    config = tf.MistralConfig(  # with all heads: a mask for eager attention is in no eager graph
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=4,
    )
    model = there(tf.MistralForCausalLM(config).eval())
    model.generation_config.eos_token_id = None
    for subject in (model, flocking.griffin(model, 1.0)):
        decoder = flocking.Decoder(subject, 64)
        prompt = prompts(1, 20)
        for window in (4, None, 4):
            model.config.sliding_window = window
            due = generated(model, prompt, 16)
            assert torch.equal(decoder.generate(**prompt, max_new_tokens=16), due)
            assert decoder._compiled._graph is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", ["shared", "sequence"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_refreshes_are_in_no_graph(name: str, scope: str) -> None:
    """In generate, with its compiled steps too, and between the decoder's replayed ones."""
    model = build(name)
    here = flocking.griffin(model, 0.5, scope=scope, refresh=5)
    due = generated(here, prompts(2, 20, 6, "cpu"), 24)
    twin = flocking.griffin(there(model), 0.5, scope=scope, refresh=5)
    twin.generation_config.eos_token_id = None
    decoder = flocking.Decoder(twin, 64, batch_size=2)
    prompt = prompts(2, 20, 6)
    for write in (
        lambda: generated(twin, prompt, 24),
        lambda: generated(twin, prompt, 24, cache_implementation="static"),
        lambda: decoder.generate(**prompt, max_new_tokens=24),
        lambda: decoder.generate(**prompt, max_new_tokens=24),
    ):
        assert torch.equal(write().cpu(), due)
        assert twin.report().refreshes == 4
    assert decoder._compiled._graph is not None


def test_samples_of_an_offloaded_model_depend_on_the_seed_alone() -> None:
    model = cpu_offload(build("llama"), execution_device=torch.device("cuda", 0))
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 3, "progress": False}
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    first = flocking.record(model, random_ids(20), **options)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(2)
    assert (flocking.record(model, random_ids(20), **options).token_id == first.token_id).all()


# --------------------------------------------------------------------------------------
# Memory


def test_full_weights_stay_in_host_memory() -> None:
    """Of the FF weights, the device holds the kept ones, and two blocks' to read a prompt."""
    model = build("llama", num_hidden_layers=12, intermediate_size=4096, hidden_size=256)
    due = generated(flocking.griffin(model, 0.5), prompts(1, 20, device="cpu"))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    generated(there(build("llama")), prompts(1, 4))  # what CUDA's libraries take for themselves
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    twin = flocking.griffin(model, 0.5, offload="cpu")
    assert twin.device.type == "cuda"
    assert torch.equal(generated(twin, prompts(1, 20)).cpu(), due)
    peak = torch.cuda.max_memory_allocated() - before
    report = twin.report()
    block = report.ff_bytes / 12
    assert peak < size - report.ff_bytes + report.compact_bytes + 3 * block + 2e6
    assert peak < 0.9 * size
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {p.device.type for p in twin.parameters()} == {"cuda"}


def test_offload_is_for_models_in_host_memory() -> None:
    with pytest.raises(ValueError, match="is on cuda, and offload='cpu' is for a model in host"):
        flocking.griffin(there(build("llama")), offload="cpu")
