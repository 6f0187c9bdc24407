"""Losses of articles after prompts of several lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import flocking

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from flocking.evaluation.items import article_losses
from flocking.evaluation.tasks import find

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on


def test_articles(embedded: tuple, evaluate: Callable, tmp_path: Path) -> None:
    """Losses of the same tokens after prompts of both lengths, held against perplexity."""
    model, tokenizer = embedded
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
    (tmp_path / "wikitext.txt").write_text(" = One = \n short\n")
    with pytest.raises(ValueError, match="no article has 1280 tokens"):
        evaluate(["wikitext_16"], data_dir=tmp_path)


def test_every_prompt_opens_as_the_tokenizer_has_it(
    embedded: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is cut out of an article, and the same tokens are predicted."""
    model, tokenizer = embedded
    (tmp_path / "wikitext.txt").write_text(" = One = \n" + " ".join(flocking.passages()[5:7]))

    class Opening:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> dict:
            ids = tokenizer(text, **options)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    rows = []
    monkeypatch.setattr(
        "flocking.evaluation.items.perplexity",
        lambda model, ids, **options: rows.append(ids[0]) or 1 / 0,
    )
    lm = SimpleNamespace(tokenizer=Opening(), model=model, max_length=8192)
    for articles in find(["wikitext_16", "wikitext_1024"], tmp_path).values():
        with pytest.raises(ZeroDivisionError):
            article_losses(lm, articles, None)
    short, long = rows
    assert (len(short), len(long)) == (16 + 256, 1024 + 256)
    assert short[0] == long[0] == 1
    assert short[1:] == long[-271:]
    lm.max_length = 512
    with pytest.raises(ValueError, match="wikitext_1024 needs 1280 tokens, and the model's c"):
        article_losses(lm, articles, None)
