"""The protocol of GRIFFIN's authors, held against their program written anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import helpers
import pandas as pd
import pytest
import torch
import transformers as tf
from tokenizers.processors import TemplateProcessing

import flocking

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("rouge", reason="rouge is not installed")

from flocking.evaluation import blocks, runner
from flocking.evaluation.cells import Cells
from flocking.evaluation.plan import Plan
from flocking.evaluation.summary import summarise
from flocking.evaluation.tasks import find

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

TASKS = Path(__file__).parents[1] / "tasks"


@pytest.fixture(scope="module")
def opening(shallow: tuple) -> tf.PreTrainedTokenizerBase:
    """A tokenizer that opens every text with a token, as that of Llama 2 does."""
    tokenizer = tf.AutoTokenizer.from_pretrained(shallow[1].name_or_path)
    token = tokenizer.eos_token
    tokenizer.bos_token = token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.eos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def model(opening: tf.PreTrainedTokenizerBase) -> tf.PreTrainedModel:
    """One that ends what it writes after the first prompt: with what was its 61st token there."""
    built = helpers.build("llama", vocab_size=len(opening), max_position_embeddings=512)
    built.generation_config.eos_token_id = opening.eos_token_id
    ids = opening(prompts()[0], add_special_tokens=False, return_tensors="pt").input_ids
    text = helpers.generate(built, ids, 61)[0, ids.shape[1] :].tolist()
    assert text.index(text[60]) >= 20
    (end,) = opening("###", add_special_tokens=False).input_ids
    weight = built.lm_head.weight.data
    weight[[end, text[60]]] = weight[[text[60], end]]
    return built


def theirs(
    subject: tf.PreTrainedModel,
    tokenizer: tf.PreTrainedTokenizerBase,
    requests: list[dict],
    greedy: bool,
    special: bool = False,
) -> dict[int, tuple[int, str]]:
    """The loop of their program, but for the seed, which is set each time.

    Of each item that is not skipped, the prompt's length and the summary.
    """
    found = {}
    for number, request in enumerate(requests):
        ids = tokenizer(
            request["article"], add_special_tokens=special, return_tensors="pt"
        ).input_ids
        if len(ids[0]) > 512 - 128:
            continue
        with torch.random.fork_rng():
            torch.manual_seed(42)
            output = subject.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_length=128 + len(ids[0]),
                temperature=0.3,
                top_k=0,
                top_p=1,
                do_sample=not greedy,
                num_return_sequences=1,
                pad_token_id=0,
            )
        text = tokenizer.decode(output.squeeze(0)[len(ids[0]) :])
        found[number] = len(ids[0]), text[: text.find("###")]
    return found


def prompts() -> list[str]:
    return [
        f"###\nArticle: {passage[:size]}\n\nSummarize the above article in 1 sentence.\n"
        for passage, size in zip(flocking.passages()[:4], (300, 4000, 500, 400), strict=True)
    ]


def written(folder: Path, summaries: dict[int, str] | None = None) -> list[dict]:
    """Items in a file; each has a part of its article as its summary, unless another is given."""
    requests = [
        {"article": prompt, "summary_gt": (summaries or {}).get(number, prompt[50:250])}
        for number, prompt in enumerate(prompts())
    ]
    (folder / "xsum_1shot.jsonl").write_text("\n".join(map(json.dumps, requests)))
    return requests


@pytest.mark.parametrize("protocol", ["authors", "authors-greedy"])
def test_summaries_are_those_of_their_program(
    model: tf.PreTrainedModel, opening: tf.PreTrainedTokenizerBase, tmp_path: Path, protocol: str
) -> None:
    """Full and pruned, sampled and greedy, also where a run goes on; long items are skipped.

    The references are what the full model writes by their program, so that it scores 1.
    """
    from rouge import Rouge

    greedy = protocol == "authors-greedy"
    own = theirs(model, opening, written(tmp_path), greedy)
    requests = written(tmp_path, {number: text for number, (_, text) in own.items()})
    if greedy:  # one summary was cut at its end
        assert len(opening(own[0][1])["input_ids"]) < 70 < len(opening(own[2][1])["input_ids"])
    lines: list[str] = []
    plan = Plan(["xsum"], methods=["topk"], protocol=protocol, data_dir=tmp_path)
    assert plan.questions()[0].limit == 1000
    options = {"batch_size": 8, "cells": Cells(tmp_path / "cells", "one")}
    found = runner.evaluate(model, opening, plan, say=lines.append, **options)
    assert lines[0] == "xsum: 1 of 4 items are too long, and are skipped."
    for subject, method in ((model, "full"), (flocking.griffin(model), "topk")):
        expected = theirs(subject, opening, requests, greedy)
        assert set(expected) == {0, 2, 3}
        rows = found[found["method"] == method]
        assert set(rows["item"]) == set(expected)
        for row in rows.itertuples():
            length, text = expected[row.item]
            scores = Rouge().get_scores(text, requests[row.item]["summary_gt"])[0]
            name = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}[row.metric]
            assert row.value == scores[name]["f"]
            assert (row.value > 0.999) == (method == "full")
            assert row.prompt_tokens == length
    pd.testing.assert_frame_equal(runner.evaluate(model, opening, plan, **options), found)


def test_a_block_may_have_no_item_that_fits(
    model: tf.PreTrainedModel,
    opening: tf.PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_ITEMS_WRITTEN", 1)
    written(tmp_path)
    plan = Plan(["xsum"], methods=[], protocol="authors-greedy", data_dir=tmp_path)
    options = {"cells": Cells(tmp_path / "cells", "one"), "say": lambda line: None}
    found = runner.evaluate(model, opening, plan, **options)
    assert set(found["item"]) == {0, 2, 3}
    pd.testing.assert_frame_equal(runner.evaluate(model, opening, plan, **options), found)


def test_gemmas_prompts_are_opened(opening: tf.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    gemma = helpers.build("gemma3", vocab_size=len(opening), max_position_embeddings=512)
    requests = written(tmp_path)[:1]
    plan = Plan(["xsum"], methods=[], protocol="authors-greedy", limit=1, data_dir=tmp_path)
    found = runner.evaluate(gemma, opening, plan)
    expected = theirs(gemma, opening, requests, greedy=True, special=True)
    assert set(found["prompt_tokens"]) == {expected[0][0]}


def test_classification_is_by_the_last_token_without_an_opening(
    model: tf.PreTrainedModel, opening: tf.PreTrainedTokenizerBase
) -> None:
    """Their forward keeps neurons by all tokens fed but the last, for which it masks the others."""
    plan = Plan(["piqa"], methods=["topk"], protocol="authors", data_dir=TASKS)
    found = runner.evaluate(model, opening, plan)
    twin = flocking.griffin(model)
    for row, line in enumerate((TASKS / "piqa.jsonl").read_text().splitlines()):
        item = json.loads(line)
        context = f"Question: {item['context']}\nAnswer:"
        sums = []
        for choice in item["choices"]:
            ids = opening(context + f" {choice}", add_special_tokens=False)["input_ids"]
            head = len(opening(context, add_special_tokens=False)["input_ids"])
            scores = flocking.score(twin, ids[:head], ids[head:], protocol="last-token")
            sums.append(float(scores.sum()))
        own = found[(found["item"] == row) & (found["method"] == "topk")].set_index("metric")
        assert own.loc["acc", "value"] == (sums.index(max(sums)) == item["label"])
        assert own.loc["acc", "pruned"] == 2


def test_both_protocols_share_the_cells_of_choices_and_keep_their_names(
    model: tf.PreTrainedModel, opening: tf.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cells, lines = Cells(tmp_path / "cells", "one"), []
    more = {"data_dir": TASKS}
    first = Plan(["piqa"], methods=["topk"], protocol="authors", **more)
    runner.evaluate(model, opening, first, cells=cells)
    second = Plan(["piqa"], methods=["topk", "topk@0.75"], protocol="authors-greedy", **more)
    found = runner.evaluate(model, opening, second, cells=cells, say=lines.append)
    assert lines[0] == "2 of 3 cells are there already."
    assert found["protocol"].unique().tolist() == ["authors-greedy"]
    assert {*summarise(found)["variant"]} == {"full", "topk@0.5", "topk@0.75"}


def test_cnn_dailymail_is_shown_an_example(tmp_path: Path) -> None:
    rows = [{"article": f"Birds number {n}.", "summary": f"Birds {n}."} for n in range(3)]
    (tmp_path / "cnn_dailymail.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (task,) = find(["cnn_dailymail"], tmp_path, authors=True).values()
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=1)
    (prompt, options) = task.instances[0].args
    ask = "\n\nSummarize the above article in 3 sentences.\n"
    assert prompt in {
        f"###\nArticle: Birds number {n}.{ask}Birds {n}.\n\n###\nArticle: Birds number 0.{ask}"
        for n in (1, 2)
    }
    assert options["max_gen_toks"] == 128
    rows[2] = {"article": "Birds number 2.", "summary_gt": "Birds 2."}  # as the authors have it
    (tmp_path / "cnn_dailymail.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"cnn_dailymail.jsonl: item 2 has another form than the"):
        find(["cnn_dailymail"], tmp_path, authors=True)


@pytest.mark.parametrize(
    ("tasks", "options", "match"),
    [
        (["wikitext_16"], {}, "the authors' protocol does not say how wikitext_16 is asked: it is"),
        (["gsm8k"], {}, "does not say how gsm8k is asked: it is for xsum, cnn_dailymail, and for"),
        (["piqa"], {"protocol": {"": "authors", "piqa": "context"}}, "give no other beside it"),
        (["piqa"], {"protocol": {"piqa": "authors"}}, "is for all tasks: give no other beside it"),
        (["xsum"], {"methods": ["topk", "shared-4"]}, "one prompt at a time: leave out shared-4"),
        (["piqa"], {"protocol": "author"}, "choose from context, last-token, authors, authors-gr"),
    ],
)
def test_refuses(tasks: list[str], options: dict, match: str, tmp_path: Path) -> None:
    (tmp_path / "wikitext.txt").write_text(" = One = \n short\n")
    example = {"question": "How many birds?", "answer": "#### 3"}
    (tmp_path / "gsm8k.jsonl").write_text("\n".join([json.dumps(example)] * 8))
    with pytest.raises(ValueError, match=match):
        Plan(tasks, data_dir=tmp_path, **{"protocol": "authors", **options}).questions()


def test_refuses_a_model_without_room(opening: tf.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    short = helpers.build("llama", vocab_size=len(opening), max_position_embeddings=160)
    written(tmp_path)
    plan = Plan(["xsum"], methods=[], protocol="authors", data_dir=tmp_path)
    match = r"xsum: the model's context of 160 tokens has no room for a prompt, the shortest of wh"
    with pytest.raises(ValueError, match=match):
        runner.evaluate(short, opening, plan)


def test_an_item_without_a_prompt_is_named(
    model: tf.PreTrainedModel, opening: tf.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = {"article": "", "summary_gt": "Birds sing."}
    (tmp_path / "xsum.jsonl").write_text(json.dumps(row))
    plan = Plan(["xsum"], methods=[], protocol="authors", data_dir=tmp_path)
    with pytest.raises(ValueError, match="xsum, item 0: the prompt has no token"):
        runner.evaluate(model, opening, plan)


def test_texts_without_words_have_no_score() -> None:
    from flocking.evaluation.authors import _scores

    for text in ("", ".", "..."):
        assert _scores(text, "birds sing") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_names_the_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, cleared: Callable[[], None]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(ValueError, match="by the package rouge: pip install rouge"):
        Plan(["piqa"], protocol="authors", data_dir=TASKS).questions()


@pytest.fixture
def cleared() -> object:
    from flocking.evaluation.protocols import rouge_scorer

    rouge_scorer.cache_clear()
    yield
    rouge_scorer.cache_clear()
