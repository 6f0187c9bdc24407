"""Variants of a model: their names, their twins, and that they share what they are asked."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import helpers
import pandas as pd
import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

import flocking

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from flocking.evaluation import estimate, runner, twins
from flocking.evaluation.blocks import blocks_of
from flocking.evaluation.cells import Cells
from flocking.evaluation.harness import GriffinLM
from flocking.evaluation.plan import Plan
from flocking.evaluation.sharing import Shared
from flocking.evaluation.twins import share_of
from flocking.evaluation.variants import FULL, Twinned, Variant, variants_of
from flocking.pruning.prompt import Reader

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"


@pytest.fixture(scope="module")
def small(shallow: tuple) -> tuple:
    """A tiny model with a real tokenizer."""
    tokenizer = shallow[1]
    return helpers.build(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=2048
    ), tokenizer


def test_names() -> None:
    found = variants_of(["topk", "refreshed-16@0.25", "shared-4", "static-domain"], [0.5])
    assert list(map(str, found)) == [
        *("full", "topk@0.5", "refreshed-16@0.25", "shared-4@0.5", "static-domain@0.5")
    ]
    assert [variant.twinned for variant in found[1:]] == [
        Twinned("topk", 0.5),
        Twinned("topk", 0.25, refresh=16),
        Twinned("topk", 0.5, texts=4),
        Twinned("static", 0.5, of_domain=True),
    ]
    for wrong in ("refreshed", "refreshed-0", "shared-", "shared-x", "refreshed--4", "topk-4"):
        with pytest.raises(ValueError, match=f"there is no method '{wrong}': choose from full, "):
            variants_of([wrong], [0.5])


def test_what_is_computed_for_one_is_kept_for_the_others() -> None:
    models = [object(), object()]
    ran: list[list[object]] = []

    def compute(asked: list) -> list[int]:
        ran.append(asked)
        return [10 * len(ran) + number for number in range(len(asked))]

    shared = Shared(models)
    assert [shared.of(models[0], "a", compute) for _ in range(2)] == [10, 20]
    assert [shared.of(models[1], "a", compute) for _ in range(2)] == [11, 21]
    assert shared.of(models[1], "b", compute) == 31
    assert ran == [models] * 3
    stranger = object()
    assert shared.of(stranger, "a", compute) == 40
    assert ran[-1] == [stranger]


def test_prompts_are_read_once(small: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all variants, whichever task it is, but for the last token where the model writes."""
    model, tokenizer = small
    read: list[int] = []
    plain = Reader.read

    def counted(
        self: Reader, run: object, sequences: int, mask: object, tokens: int, *more
    ) -> object:
        read.append(tokens)
        return plain(self, run, sequences, mask, tokens, *more)

    monkeypatch.setattr(Reader, "read", counted)
    methods = ["topk", "magnitude", "topk@0.25", "random"]
    for task in ("piqa", "xsum"):
        plan = Plan([task], methods=methods, limit=1, data_dir=TASKS)
        read.clear()
        runner.evaluate(model, tokenizer, plan, say=lambda line: None)
        again = [tokens for tokens in read if tokens > 1]
        assert len(again) == 1, task
        assert len(read) == 1 + (len(methods) if task == "xsum" else 0)


OTHERS = {
    "refreshed-4": {"refresh": 4, "batch_size": 1},
    "shared-2": {"scope": "shared", "batch_size": 2},
    "topk": {"batch_size": 1},
}


@pytest.mark.parametrize("referred", OTHERS)
def test_refreshed_and_shared_selections(small: tuple, referred: str, tmp_path: Path) -> None:
    """What they write is what their twins write, alone or in batches of so many prompts.

    The references are what one of these twins writes: it alone scores 1.
    """
    model, tokenizer = small
    lm = GriffinLM(model, tokenizer=tokenizer, method="full")
    (question,) = Plan(["xsum"], methods=[], data_dir=TASKS).questions()
    (block,) = blocks_of(lm, question, 2)
    written = {
        method: GriffinLM(model, tokenizer=tokenizer, density=0.5, **options).generate_until(
            list(block.requests), disable_tqdm=True
        )
        for method, options in OTHERS.items()
    }
    rows = [json.loads(line) for line in (TASKS / "xsum.jsonl").read_text().splitlines()]
    changed = [row | {"reference": text} for row, text in zip(rows, written[referred], strict=True)]
    (tmp_path / "xsum.jsonl").write_text("\n".join(map(json.dumps, changed)))
    plan = Plan(["xsum"], methods=[*OTHERS], data_dir=tmp_path)
    found = runner.evaluate(model, tokenizer, plan, batch_size=1, say=lambda line: None)
    (block,) = blocks_of(lm, plan.questions()[0], 2)
    for method, texts in written.items():
        for item, text in enumerate(texts):
            expected = block.question.task.process_results(block.documents[item], [text])
            own = found[(found["method"] == method) & (found["item"] == item)]
            assert dict(zip(own["metric"], own["value"], strict=True)) == expected
            assert (own["value"] == 1).all() == (method == referred)


def test_shared_selections_are_for_texts_that_are_written(small: tuple) -> None:
    plan = Plan(["piqa"], methods=["shared-2"], limit=1, data_dir=TASKS)
    with pytest.raises(ValueError, match=r"shared-2 is for .* none of these does \(piqa\): leave"):
        plan.questions()
    plan = Plan(["piqa", "gsm8k"], methods=["shared-2"], limit=1, data_dir=TASKS)
    with pytest.warns(UserWarning, match=r"shared-2@0\.5 is .* it is not asked of piqa"):
        found = runner.evaluate(*small, plan, say=str)
    asked = found.groupby("task")["method"].agg(set).to_dict()
    assert asked == {"piqa": {"full"}, "gsm8k": {"full", "shared-2"}}


def test_twins_are_made_once_and_dropped(small: tuple) -> None:
    model, tokenizer = small
    lm = GriffinLM(model, tokenizer=tokenizer, method="full")
    made = twins.Twins(lm)
    static, topk = Variant("static", 0.5), Variant("topk", 0.5)
    one, other = ["The sun rose."], ["To boil an egg, bring water to a boil."]
    assert made.of(FULL, one) is lm.full
    assert made.unread([(static, one), (static, other), (topk, one)]) == sum(
        len(tokenizer(text)["input_ids"]) for text in one + other
    )
    first = made.of(static, one)
    assert made.of(static, one) is first
    assert made.of(static, other) is not first
    assert made.of(topk, one) is made.of(topk, other)  # texts make no difference to it
    assert made.unread([(static, one)]) == 0
    made.keep([(static, one)])
    assert made.of(static, one) is first
    made.keep([(topk, one)])
    assert made.of(static, one) is not first
    assert made.unread([(static, one), (static, other)]) == 0  # later tasks need the statistics


def test_groups_that_fit_in_memory(small: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small[0]
    monkeypatch.setattr(twins, "mapped_bytes", lambda model: 0)
    assert twins.ff_bytes(model) == flocking.griffin(model).report().ff_bytes
    variants = variants_of(["topk", "random", "magnitude@0.25", "sampled@0.25"], [0.5])
    monkeypatch.setattr(twins, "_free", lambda device: 10**12)
    assert twins.in_memory(model, variants) == [variants]
    room = 0.8 * twins.ff_bytes(model) / twins._SHARE_OF_MEMORY
    monkeypatch.setattr(twins, "_free", lambda device: room)
    assert twins.in_memory(model, variants) == [variants[:2], variants[2:4], variants[4:]]
    monkeypatch.setattr(twins, "mapped_bytes", lambda model: 10**12)
    assert twins.in_memory(model, variants[1:3]) == [[variants[1]], [variants[2]]]


def test_a_batch_of_texts_has_neurons_of_each(
    small: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is foreseen is what twins then hold: a selection for each text that is written."""
    model, tokenizer = small
    lm = GriffinLM(model, tokenizer=tokenizer, density=0.5, batch_size=2)
    plan = Plan(["piqa", "gsm8k"], methods=["topk"], data_dir=TASKS, limit=2)
    for question, copies in zip(plan.questions(), (1, 2), strict=True):
        (block,) = blocks_of(lm, question, 2)
        assert estimate.copies_of(lm, question, [block]) == copies
        answered = lm.generate_until if question.generates else lm.loglikelihood
        answered(list(block.requests), disable_tqdm=True)
        held = copies * 0.5 * twins.ff_bytes(model)
        assert lm.model.report().compact_bytes == pytest.approx(held, rel=0.01)
        with monkeypatch.context() as changed:  # to a size that is seen in GB
            changed.setattr(estimate, "ff_bytes", lambda model: 8e9)
            foreseen = estimate.memory_of(model, [([FULL, Variant("topk", 0.5)], copies)])
        assert f"and {copies * 4}.0 GB for its twins'" in foreseen
    assert estimate.copies_of(lm, question, [block], texts=4) == 1
    variants = variants_of(["topk", "random"], [0.5])
    monkeypatch.setattr(twins, "mapped_bytes", lambda model: 0)
    monkeypatch.setattr(twins, "_free", lambda device: 1.2 * twins.ff_bytes(model) / 0.6)
    assert len(twins.in_memory(model, variants)) == 1
    assert len(twins.in_memory(model, variants, copies=2)) == 2


def test_a_twin_that_is_larger_than_memory_is_refused(
    small: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the number of texts at once that would fit, before anything is computed."""
    whole = twins.ff_bytes(small[0])
    plan = Plan(["gsm8k"], methods=["topk"], data_dir=TASKS, limit=2)
    monkeypatch.setattr(runner, "speed_of", None)
    monkeypatch.setattr(twins, "mapped_bytes", lambda model: 0)
    monkeypatch.setattr(twins, "_free", lambda device: 0.9 * whole)
    why = r"topk@0\.5 takes .* GB for the kept weights of 2 texts at once, and .* --batch-size 1 "
    with pytest.raises(MemoryError, match=why):  # there are no more than two, whatever the size
        runner.evaluate(*small, plan, batch_size=8, say=str)
    monkeypatch.setattr(twins, "_free", lambda device: whole // 4)
    why = r"topk@0\.5 takes .* GB for the kept weights, and .* are free: free some, or take half"
    with pytest.raises(MemoryError, match=why):
        runner.evaluate(*small, plan, batch_size=1, say=str)


def test_what_is_not_a_number_is_told_of_before_it_is_kept(
    small: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the harness, the likeliest of answers that are no numbers is the first."""
    model = copy.deepcopy(small[0])
    model.lm_head.weight.data.fill_(float("nan"))
    plan = Plan(["piqa"], methods=[], data_dir=TASKS, limit=2)
    cells = Cells(tmp_path / "cells", "one")
    with pytest.raises(
        ValueError, match=r"piqa: acc is infinite or not a number .* under full, as"
    ):
        runner.evaluate(model, small[1], plan, cells=cells, say=str)
    assert not list(tmp_path.rglob("*.json.gz"))
    # What the others have answered is kept.
    plan = Plan(["piqa"], methods=["topk"], data_dir=TASKS, limit=2)
    answered = runner.ask

    def ask(*args: Any) -> list:
        rows = answered(*args)
        return [rows[0], [{**row, "value": float("nan")} for row in rows[1]]]

    monkeypatch.setattr(runner, "ask", ask)
    with pytest.raises(ValueError, match=r"or not a number for .* under topk@0.5, as"):
        runner.evaluate(*small, plan, cells=cells, say=str)
    (file,) = tmp_path.rglob("*.json.gz")
    found = json.loads(gzip.decompress(file.read_bytes()))["cells"]
    assert [cell["variant"] for cell in found] == ["full"]


def test_models_that_cannot_go_on_from_a_cache_are_refused_before(small: tuple) -> None:
    config = RwkvConfig(
        vocab_size=len(small[1]),
        hidden_size=16,
        num_hidden_layers=2,
        context_length=2048,
        rescale_every=0,
    )
    torch.manual_seed(0)
    model = RwkvForCausalLM(config).eval()
    plan = Plan(["piqa"], methods=[], data_dir=TASKS, limit=2)
    with pytest.raises(ValueError, match="RwkvForCausalLM takes only one token at a time"):
        runner.evaluate(model, small[1], plan, say=str)


@pytest.mark.parametrize("method", ["magnitude", "static"])
def test_neurons_that_all_texts_have_are_held_once(small: tuple, method: str) -> None:
    """One copy for a batch, and the answers of a twin with a copy for each text."""
    model, tokenizer = small
    lm = GriffinLM(model, tokenizer=tokenizer, method=method, density=0.5, batch_size=2)
    assert lm.scope == "sequence"
    (question,) = Plan(["gsm8k"], methods=[method], data_dir=TASKS, limit=2).questions()
    (block,) = blocks_of(lm, question, 2)
    apart = lm.generate_until(list(block.requests), disable_tqdm=True)
    variant = Variant(method, 0.5)
    twin = twins.Twins(lm).of(variant, lm.calibration)
    lm.answer_with(twin)
    assert lm.generate_until(list(block.requests), disable_tqdm=True) == apart
    held = 0.5 * twins.ff_bytes(model)
    assert twin.report().compact_bytes == pytest.approx(held, rel=0.01)
    assert estimate.copies_of(lm, question, [block]) == 2
    assert share_of(variant, 2) == 0.5


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([(["full"], 4)], "0.0"),
        ([(["full", "topk"], 1)], "4.0"),
        ([(["full", "topk"], 3)], "12.0"),
        ([(["full", "magnitude", "static"], 3)], "8.0"),  # of which all texts have one selection
        ([(["topk@0.25", "magnitude@0.1"], 2)], "4.8"),
        ([(["topk"], 1), (["topk", "random@0.25"], 2), (["full"], 8)], "12.0"),  # not all at once
        ([], "0.0"),
    ],
)
def test_memory_in_words(
    small: tuple, groups: list, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "ff_bytes", lambda model: 8e9)
    monkeypatch.setattr(estimate, "byte_count", lambda weight: 2e8)
    weights = len([*small[0].parameters()]) * 0.2
    given = [
        ([one for one in variants_of(names, [0.5]) if one != FULL or "full" in names], copies)
        for names, copies in groups
    ]
    expected = f"{weights:.1f} GB for the model's weights and {told} GB for its twins'"
    assert estimate.memory_of(small[0], given) == expected


def test_work_is_counted(small: tuple) -> None:
    """Held against what the answers say that they took."""
    model, tokenizer = small
    lm = GriffinLM(model, tokenizer=tokenizer, method="full", batch_size=2)
    plan = Plan(["piqa", "xsum"], methods=[], data_dir=TASKS)
    piqa, xsum = plan.questions()
    (block,) = blocks_of(lm, piqa, 40)
    work = estimate.work_of(lm, block)
    lm.loglikelihood(list(block.requests), disable_tqdm=True)
    taken = pd.DataFrame(lm.answered)
    assert work.shared == taken.groupby("item")["prompt"].first().sum()
    assert work.tokens == (taken["scored"] - 1).sum()
    assert work.steps == 0
    (block,) = blocks_of(lm, xsum, 8)
    lengths = [len(tokenizer(one.args[0])["input_ids"]) for one in block.requests]
    assert estimate.work_of(lm, block) == estimate.Work(sum(lengths), 0, 64)
    assert estimate.work_of(lm, block, texts=1).steps == 64
    speed = estimate.Speed(token=2.0, step=3.0)
    assert speed.seconds(estimate.Work(5, 7, 11), variants=2) == 2 * (5 + 14) + 3 * 22
    assert estimate.speed_of(lm).token > 0


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(3.2, "3 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (9e3, "2.5 h")],
)
def test_times_in_words(seconds: float, told: str) -> None:
    assert estimate.in_words(seconds) == told
