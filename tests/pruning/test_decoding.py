"""Decoding in fixed shapes gives what generate gives, and compiles once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import build, random_ids
from torch import Tensor

import flocking
from flocking.pruning import graphs


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and guarded as ever, then run as traced: seconds where inductor takes minutes."""
    monkeypatch.setattr(graphs, "_COMPILER", "eager")


@pytest.fixture
def compilations() -> Iterator[Tensor]:
    """How many graphs were compiled in this test so far."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def prompts(sequences: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    """Random prompts, the first of them padded on the left."""
    ids = torch.tensor(random_ids(*[length] * sequences, seed=length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = ids[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: tf.PreTrainedModel, prompt: dict[str, Tensor], new: int) -> Tensor:
    return model.generate(**prompt, max_new_tokens=new, do_sample=False)


def decodes_alike(decoder: flocking.Decoder, model: tf.PreTrainedModel, sequences: int) -> None:
    for length in (10, 30, 21):  # longer than the sliding windows of some, and shorter
        prompt = prompts(sequences, length, 0 if sequences == 1 else 4)
        assert torch.equal(
            decoder.generate(**prompt, max_new_tokens=12), generated(model, prompt, 12)
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # BLOOM's
@pytest.mark.parametrize("sequences", [1, 3])
def test_gives_what_generate_gives(
    generating: tf.PreTrainedModel, sequences: int, compilations: object
) -> None:
    """The full model, and twins; over prompts of different lengths, compiled once each.

    Tracing takes most of the time, and does not depend on the number of sequences, nor on how
    many neurons its matrices have: some are traced for a few architectures only.
    """
    all_traced = generating.config.model_type in ("llama", "gpt2", "mixtral")
    if generating.config.model_type == "gpt_neo":  # its local attention counts from the cache's end
        with pytest.raises(
            ValueError, match=r"fixed shapes \(it gives something else there.*\): use generate"
        ):
            flocking.Decoder(generating, 64, batch_size=sequences)
        return
    models = {"full": generating, "shared": flocking.griffin(generating, 0.5)}
    if sequences > 1:
        models["sequence"] = flocking.griffin(generating, 0.5, scope="sequence")
    count = 0
    for name, model in models.items():
        decoder = flocking.Decoder(model, 64, batch_size=sequences)
        if all_traced or (sequences > 1 and name != "shared"):
            count += 1
        else:
            decoder._compiled._compiled = type(decoder)._step
        decodes_alike(decoder, model, sequences)
        assert compilations() == count


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_really_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin that is made after the original was compiled decodes pruned, the original in full."""
    monkeypatch.setattr(graphs, "_COMPILER", "inductor")
    model = build(name)
    decoder = flocking.Decoder(model, 64, batch_size=2)
    decodes_alike(decoder, model, 2)
    twin = flocking.griffin(model, 0.5)
    decodes_alike(flocking.Decoder(twin, 64, batch_size=2), twin, 2)
    assert not torch.equal(
        generated(twin, prompts(2, 21), 12), generated(model, prompts(2, 21), 12)
    )
    decodes_alike(decoder, model, 2)


def test_of_a_model_compiled_before(llama: tf.PreTrainedModel) -> None:
    llama.compile(backend="eager")
    generated(llama, prompts(1, 20), 4)
    twin = flocking.griffin(llama, 0.5)
    decodes_alike(flocking.Decoder(twin, 64), twin, 1)


def test_many_decoders_in_one_process(llama: tf.PreTrainedModel, compilations: object) -> None:
    """More than the recompilations that the compiler allows one function."""
    for count in range(1, 11):
        prompt = prompts(count, 12)
        decoder = flocking.Decoder(llama, 20, batch_size=count)
        assert torch.equal(
            decoder.generate(**prompt, max_new_tokens=4), generated(llama, prompt, 4)
        )
    assert compilations() == 10


def test_ends_where_generate_ends(llama: tf.PreTrainedModel) -> None:
    """Sequences that have ended are filled up; when all have, decoding ends."""
    prompt = prompts(3, 12, 4)
    decoder = flocking.Decoder(llama, 64, batch_size=3)
    free = generated(llama, prompt, 40)[:, 12:]
    ends = [[int(free[0, 5])], sorted({int(free[0, 2]), int(free[1, 20]), int(free[2, 33])}), None]
    for end in ends:  # read anew for each prompt
        for pad in (0, None):
            llama.generation_config.eos_token_id = end
            llama.generation_config.pad_token_id = pad
            due = generated(llama, prompt, 40)
            assert torch.equal(decoder.generate(**prompt, max_new_tokens=40), due)
            assert due.shape[1] == 52 or end == ends[1]


def test_tokens_alone_will_do(llama: tf.PreTrainedModel) -> None:
    ids = prompts(1, 12)["input_ids"]
    decoder = flocking.Decoder(llama, 64)
    for new in (1, 2, 30):
        due = generated(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new)
        assert torch.equal(decoder.generate(ids, max_new_tokens=new), due)
        with torch.inference_mode():
            assert torch.equal(decoder.generate(ids.clone(), max_new_tokens=new), due)


def test_weights_may_change(llama: tf.PreTrainedModel, compilations: object) -> None:
    decoder = flocking.Decoder(llama, 64)
    decodes_alike(decoder, llama, 1)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.mul_(-1)  # in place
        llama.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(  # replaced
            llama.model.layers[1].mlp.down_proj.weight.roll(1, 0)
        )
    decodes_alike(decoder, llama, 1)
    assert compilations() == 1


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_a_twin_may_do_something_else_in_between(llama: tf.PreTrainedModel, scope: str) -> None:
    """Batches of another size move the compact weights, with a selection for each sequence."""
    twin = flocking.griffin(llama, 0.5, scope=scope)
    decoder = flocking.Decoder(twin, 64, batch_size=2)
    decodes_alike(decoder, twin, 2)
    before = decoder._compiled.addresses()
    generated(twin, prompts(3, 9), 3)
    assert (decoder._compiled.addresses() == before) == (scope == "shared")
    decodes_alike(decoder, twin, 2)


@pytest.mark.parametrize("scope", ["shared", "sequence"])
def test_a_graph_replaces_steps_and_loses_none(
    llama: tf.PreTrainedModel, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's graphs, played by a stand-in: what is captured does not run, and a replay does."""
    twin = flocking.griffin(llama, 0.5, scope=scope)
    decoder = flocking.Decoder(twin, 64, batch_size=2)
    step, capturing, replays = decoder._compiled, [], []
    compiled = step._compiled

    class Graph:
        def replay(self) -> None:
            assert self.reads == step.addresses()  # or it would read what is there no more
            replays.append(self)
            compiled(decoder)

    @contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        graph.reads = step.addresses()
        capturing.append(graph)
        yield
        capturing.pop()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(step, "_compiled", lambda owner: capturing or compiled(owner))
    monkeypatch.setattr(step, "_is_cuda", True)

    decodes_alike(decoder, twin, 2)
    assert len(replays) == 3 * 11 - 3  # the first steps warm up
    assert len(set(replays)) == 1
    with flocking.observe(llama, lambda block, z: None):  # whoever is watched, where hooks run
        llama(**prompts(1, 5))
        decodes_alike(decoder, twin, 2)
    assert len(replays) == 3 * 11 - 3
    generated(twin, prompts(3, 9), 3)  # with a selection a sequence, moves the weights
    decodes_alike(decoder, twin, 2)
    assert len(set(replays)) == (1 if scope == "shared" else 2)
    twin.generation_config.eos_token_id = [1, 2, 3]  # other memory for what ends a text
    decodes_alike(decoder, twin, 2)
    assert len(set(replays)) == (2 if scope == "shared" else 3)


def test_with_the_full_weights_in_host_memory(llama: tf.PreTrainedModel) -> None:
    twin = flocking.griffin(llama, 0.5, offload="cpu")
    decodes_alike(flocking.Decoder(twin, 64), flocking.griffin(llama, 0.5), 1)


def test_leaves_the_model_alone(llama: tf.PreTrainedModel) -> None:
    llama.train()
    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    names = set(vars(llama))
    flocking.Decoder(llama, 64).generate(**prompts(1, 9))
    assert set(vars(llama)) == names
    assert all(module.training for module in llama.modules())
    assert all(torch.equal(value, weights[name]) for name, value in llama.state_dict().items())


def test_can_be_watched(llama: tf.PreTrainedModel) -> None:
    """Inside of observe what is compiled runs eagerly: no step is missed."""
    decoder = flocking.Decoder(llama, 64)
    prompt = prompts(1, 9)
    due = decoder.generate(**prompt, max_new_tokens=8)
    seen: dict[int, int] = {}

    def count(block: flocking.FeedForward, z: Tensor) -> None:
        seen[block.layer] = seen.get(block.layer, 0) + z.shape[1]

    with flocking.observe(llama, count):
        assert torch.equal(decoder.generate(**prompt, max_new_tokens=8), due)
    assert seen == {0: 9 + 7, 1: 9 + 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "at least two tokens"),
        ({"max_length": 64, "batch_size": 0}, "one sequence"),
        ({"max_length": 257}, "more than the model's context of 256"),
    ],
)
def test_refuses_sizes(llama: tf.PreTrainedModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.Decoder(llama, **options)


def test_refuses_prompts(llama: tf.PreTrainedModel) -> None:
    decoder = flocking.Decoder(llama, 32)
    prompt = prompts(1, 20)
    right = {**prompt, "attention_mask": prompt["attention_mask"].clone()}
    right["attention_mask"][0, -2:] = 0
    for wrong, new, message in (
        (prompts(2, 20), 4, r"expected input_ids of shape \(1, tokens\)"),
        ({"input_ids": prompt["input_ids"][0]}, 4, r"expected input_ids of shape \(1, tokens\)"),
        (
            {"input_ids": prompt["input_ids"][:, :0]},
            4,
            r"expected input_ids of shape \(1, tokens\)",
        ),
        (prompt, 13, "room for 32 tokens in all"),
        (prompt, 0, "at least one new token"),
        (right, 4, "zeros on the left only"),
        ({**prompt, "attention_mask": torch.ones(1, 19)}, 4, "the shape of input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate(**wrong, max_new_tokens=new)
    assert torch.equal(decoder.generate(**prompt, max_new_tokens=12), generated(llama, prompt, 12))


def test_refuses_other_kinds(llama: tf.PreTrainedModel) -> None:
    for arguments, message in (
        (("llama", 64), "model is a str: load it first, with"),
        ((llama, "64"), "max_length='64': give a whole number"),
        ((llama, True), "max_length=True: give a whole number"),
    ):
        with pytest.raises(TypeError, match=message):
            flocking.Decoder(*arguments)
    with pytest.raises(TypeError, match="batch_size=True: give a whole number"):
        flocking.Decoder(llama, 32, batch_size=True)
    decoder = flocking.Decoder(llama, np.int64(32), batch_size=np.int32(1))
    for new in (5.0, "5", None):
        with pytest.raises(TypeError, match=f"max_new_tokens={new!r}: give a whole number"):
            decoder.generate(**prompts(1, 9), max_new_tokens=new)
    for ids, kind in (("Birds", "str"), (torch.ones(1, 5), r"torch\.float32")):
        with pytest.raises(TypeError, match=f"input_ids is {kind}: give token ids as a tensor"):
            decoder.generate(ids)


def test_steps_end_where_the_room_does(llama: tf.PreTrainedModel) -> None:
    decoder = flocking.Decoder(llama, 12)
    with pytest.raises(RuntimeError, match="read a prompt first"):
        decoder.step()
    decoder.read(**prompts(1, 9))
    decoder.step()
    decoder.step()
    with pytest.raises(RuntimeError, match="no room for another token"):
        decoder.step()


@pytest.mark.parametrize("kind", ["model", "twin"])
def test_a_prompt_that_was_not_read_is_not_gone_on_with(
    llama: tf.PreTrainedModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = flocking.Decoder(llama if kind == "model" else flocking.griffin(llama, 0.5), 32)
    decoder.read(**prompts(1, 9))
    with pytest.raises(ValueError, match="ids from 3 to 999, but the model's vocabulary ends at"):
        decoder.read(torch.tensor([[3, 999]]))
    decoder.step()  # nothing was touched

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "_prefill", fail)
    with pytest.raises(KeyboardInterrupt):
        decoder.read(torch.tensor([[3, 4]]))
    with pytest.raises(RuntimeError, match="read a prompt first"):
        decoder.step()


class Printing(torch.nn.Module):
    """What a compiler cannot take into a graph."""

    def forward(self, x: Tensor) -> Tensor:
        print(end="")
        return torch.nn.functional.silu(x)


def test_refuses_models() -> None:
    config = tf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    mamba = tf.MambaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="it keeps something else than each"):
        flocking.Decoder(mamba, 64)
    config = tf.BambaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
        mamba_n_groups=1,
    )
    with pytest.raises(ValueError, match=r"Bamba.* in fixed shapes \(it keeps something else"):
        flocking.Decoder(tf.BambaForCausalLM(config).eval(), 64)
    config = tf.MoshiConfig(  # a window that its cache has, and its attention has not
        vocab_size=128,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        sliding_window=42,
        max_position_embeddings=128,
    )
    moshi = tf.MoshiForCausalLM(config).eval()
    decodes_alike(flocking.Decoder(moshi, 42), moshi, 1)  # no text gets beyond it
    with pytest.raises(ValueError, match="it gives something else there"):
        flocking.Decoder(moshi, 43)
    llama = build("llama")
    llama.model.layers[0].mlp.act_fn = Printing()
    decoder = flocking.Decoder(llama, 64)
    with pytest.raises(RuntimeError, match=r"does not compile in one piece .*: use generate"):
        decoder.generate(**prompts(1, 9))
    llama = build("llama")
    llama.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="lies on cpu, meta"):
        flocking.Decoder(llama, 64)


def test_refuses_a_second_thread(
    llama: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would write into the same text; the first goes on undisturbed."""
    decoder = flocking.Decoder(llama, 40)
    ids = torch.tensor(random_ids(9))
    expected = decoder.generate(ids, max_new_tokens=6)
    step, refused = decoder.step, []

    def other() -> None:
        try:
            decoder.generate(ids, max_new_tokens=2)
        except RuntimeError as problem:
            refused.append(str(problem))

    def meanwhile() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        step()

    monkeypatch.setattr(decoder, "step", meanwhile)
    assert torch.equal(decoder.generate(ids, max_new_tokens=6), expected)
    assert len(refused) == 5
    assert all("generating in another thread" in one for one in refused)


def test_refuses_a_model_that_was_converted_since(llama: tf.PreTrainedModel) -> None:
    decoder = flocking.Decoder(llama, 40)
    llama.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"was in float32 on cpu when .* in bfloat16 on cpu now"):
        decoder.generate(torch.tensor(random_ids(9)), max_new_tokens=2)


@pytest.mark.parametrize("refresh", [None, 2])
def test_a_step_that_was_interrupted_is_not_gone_on_with(
    llama: tf.PreTrainedModel, refresh: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have written into the cache of some layers: the next step would be wrong."""
    decoder = flocking.Decoder(flocking.griffin(llama, 0.5, refresh=refresh), 32)
    expected = decoder.generate(**prompts(1, 9), max_new_tokens=6)

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    for name in ("_compiled", *(["_refresh"] if refresh else [])):
        decoder.read(**prompts(1, 9))
        if name == "_refresh":
            decoder.step()
        with monkeypatch.context() as patched:
            patched.setattr(decoder, name, fail)
            with pytest.raises(KeyboardInterrupt):
                decoder.step()
        with pytest.raises(RuntimeError, match="or a step was interrupted: read a prompt first"):
            decoder.step()
    assert torch.equal(decoder.generate(**prompts(1, 9), max_new_tokens=6), expected)
