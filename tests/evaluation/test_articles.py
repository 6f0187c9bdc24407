"""Losses of articles after prompts of several lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flocking

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from flocking.evaluation.articles import article_rows
from flocking.evaluation.domain import documents
from flocking.evaluation.tasks import find

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on


def by_hand(model: object, subject: object, ids: list[int], prompt: int) -> dict:
    """Divergence from a model, and agreement with it, of what follows a prompt."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        full = model(ids[:, :-1]).logits[0, prompt - 1 :].double().log_softmax(-1)
        theirs = full
        if subject is not model:
            read = subject.generate(
                ids[:, :prompt], max_new_tokens=1, return_dict_in_generate=True, do_sample=False
            )
            rest = subject(ids[:, prompt:-1], past_key_values=read.past_key_values).logits[0]
            theirs = torch.cat([full[:1], rest.double().log_softmax(-1)])
    divergence = (full.exp() * (full - theirs)).sum(-1)
    agrees = (full.argmax(-1) == theirs.argmax(-1)).double()
    return {"divergence": divergence.numpy(), "agreement": agrees.numpy()}


def test_articles(shallow: tuple, evaluate: Callable, tmp_path: Path) -> None:
    """Losses of the same tokens after prompts of both lengths, held against perplexity."""
    model, tokenizer = shallow
    long = " = One = \n" + " ".join(flocking.passages()[5:7]) + "\n = Two = \n short\n"
    (tmp_path / "wikitext.txt").write_text(long)
    found = evaluate(["wikitext_16", "wikitext_256"], methods=["topk"], data_dir=tmp_path)
    ids = tokenizer(long, verbose=False)["input_ids"][:1280]
    for subject, method in ((model, "full"), (flocking.griffin(model), "topk")):
        for length in (16, 256):
            rows = found[(found["method"] == method) & (found["prompt_tokens"] == length)]
            expected = flocking.perplexity(
                subject,
                [ids[1024 - length :]],
                prompt_length=length,
                continuation_length=256,
                tokenizer=tokenizer,
                progress=False,
            ).log_likelihood
            got = rows.set_index("metric")["value"]
            assert got["loss_256"] == pytest.approx(-float(expected.mean()))
            assert got["loss_64"] == pytest.approx(-float(expected[0, :64].mean()))
            assert rows["chance"].isna().all()
            for metric, values in by_hand(model, subject, ids[1024 - length :], length).items():
                assert got[f"{metric}_256"] == pytest.approx(values.mean(), rel=1e-3, abs=1e-6)
                assert got[f"{metric}_64"] == pytest.approx(values[:64].mean(), rel=1e-3, abs=1e-6)
    (tmp_path / "wikitext.txt").write_text(" = One = \n short\n")
    with pytest.raises(ValueError, match="no article has 1280 tokens"):
        evaluate(["wikitext_16"], data_dir=tmp_path)


def test_every_prompt_opens_as_the_tokenizer_has_it(shallow: tuple, tmp_path: Path) -> None:
    """Also one that is cut out of an article, and the same tokens are predicted."""
    tokenizer = shallow[1]
    (tmp_path / "wikitext.txt").write_text(" = One = \n" + " ".join(flocking.passages()[5:7]))

    class Opening:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> dict:
            ids = tokenizer(text, **options)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    found = find(["wikitext_16", "wikitext_1024"], tmp_path)
    short, long = (
        article_rows(name, articles, Opening(), None, 8192)[0] for name, articles in found.items()
    )
    assert (len(short), len(long)) == (16 + 256, 1024 + 256)
    assert short[0] == long[0] == 1
    assert short[1:] == long[-271:]
    with pytest.raises(ValueError, match="wikitext_1024 needs 1280 tokens, and the model's c"):
        article_rows("wikitext_1024", found["wikitext_1024"], Opening(), None, 512)


def test_news_are_the_articles_of_summaries(shallow: tuple, tmp_path: Path) -> None:
    """Those that have 512 tokens; a static selection of the domain is from the others."""
    tokenizer = shallow[1]
    passages = flocking.passages()
    rows = [{"article": text, "summary": "one"} for text in ["too short", *passages]]
    (tmp_path / "cnn_dailymail_3.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = find(["news"], tmp_path)
    assert list(found) == ["news_16", "news_64", "news_256"]
    for name, articles in found.items():
        (row,) = article_rows(name, articles, tokenizer, 1, 8192)
        whole = tokenizer(passages[0])["input_ids"]
        assert row == whole[256 - articles.prompt_length : 512]
    domain = documents("news_16", found["news_16"], 1, tokenizer, 8192)
    assert tokenizer(passages[0])["input_ids"] not in domain
    assert domain[0] == tokenizer(passages[-1])["input_ids"]
    with pytest.raises(ValueError, match="there is no task 'news_1024': near ones are news"):
        find(["news_1024"], tmp_path)
    (tmp_path / "cnn_dailymail_3.jsonl").write_text(json.dumps(rows[0]))
    (articles,) = find(["news_16"], tmp_path).values()
    with pytest.raises(ValueError, match="news: no article has 512 tokens: give longer ones"):
        article_rows("news_16", articles, tokenizer, None, 8192)
