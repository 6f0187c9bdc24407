"""What a static selection is made from, against the public functions called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import flocking
from flocking.experiments import references


@pytest.fixture(scope="module")
def data(subject: tuple) -> xr.Dataset:
    model, tokenizer, texts = subject
    return references.loss_by_reference(
        model, tokenizer, texts[:3], tokens=145, horizon=64, sequences=3, seed=2, progress=False
    )


def test_perplexities(subject: tuple, data: xr.Dataset) -> None:
    model, tokenizer, texts = subject
    rows = [tokenizer(text)["input_ids"][:145] for text in texts[:3]]
    beginnings = [row[: 145 - 64 - 17] for row in rows]
    assert data.prompt_length.values.tolist() == [17]
    assert data.attrs["beginning"] == 64
    drawn = flocking.global_statistic(
        model, tokenizer=tokenizer, sequences=3, seed=2, batch_size=32, progress=False
    )

    def of(*numbers: int) -> xr.DataArray:
        return flocking.global_statistic(model, [beginnings[n] for n in numbers], progress=False)

    def loss(number: int, **twin: object) -> float:
        subject_ = flocking.griffin(model, **twin) if twin else model
        scored = flocking.perplexity(
            subject_,
            [rows[number][-81:]],
            prompt_length=17,
            continuation_length=64,
            progress=False,
        )
        return -float(scored.log_likelihood.mean())

    expected: dict[str, list[float]] = {name: [] for name in data.selection.values}
    for number in range(3):
        made = {
            "": of(*({0, 1, 2} - {number})),
            "-domain": of(number),
            "-sampled": drawn,
            "-one": of((number + 1) % 3),
        }
        expected["full"].append(loss(number))
        expected["GRIFFIN"].append(loss(number, density=0.5))
        expected["random"].append(loss(number, method="random", seed=2 + number))
        for method in ("static", "global-local"):
            for suffix, reference in made.items():
                if (name := f"{method}{suffix}") in expected:
                    expected[name].append(loss(number, method=method, reference=reference))
    got = data.sel(prompt_length=17, interval="estimate")
    for name, losses in expected.items():
        value = got.perplexity.sel(selection=name).item()
        assert value == pytest.approx(np.exp(np.mean(losses)), rel=1e-4), name
    for pair in data.pair.values:
        one, other = (np.array(expected[name]) for name in pair.split(" / "))
        ratio = got.over.sel(pair=pair).item()
        assert ratio == pytest.approx(np.exp((one - other).mean()), rel=1e-4), pair
    one, other = (np.array(expected[name]) for name in ("static-domain", "static"))
    np.testing.assert_allclose(got.over_by_text, np.exp(one - other), rtol=1e-4)


def test_no_scored_token_and_no_prompt_is_in_a_reference(
    subject: tuple, data: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    plain = references.record

    def spy(model: object, ids: list[list[int]], **options: object) -> xr.Dataset:
        read.extend(ids)
        return plain(model, ids, **options)

    monkeypatch.setattr(references, "record", spy)
    model, tokenizer, texts = subject
    references.loss_by_reference(
        model, tokenizer, texts[:2], tokens=401, horizon=64, sequences=1, progress=False
    )
    rows = [tokenizer(text)["input_ids"][:401] for text in texts[:2]]
    assert read == [row[: 401 - 64 - 257] for row in rows]


def test_texts_that_are_too_short(subject: tuple) -> None:
    with pytest.raises(ValueError, match="289 are needed"):
        references.loss_by_reference(*subject[:2], ["word " * 200, "other " * 200], progress=False)
