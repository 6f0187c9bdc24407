"""What all experiments share: lengths, excerpts, how cut texts begin, and early refusals."""

from __future__ import annotations

import copy

import helpers
import numpy as np
import pytest
import torch
import xarray as xr
from tokenizers.processors import TemplateProcessing

import flocking
from flocking.analysis import overlap_of
from flocking.experiments import distances, losses, twins
from flocking.experiments.common import begun, same_excerpts, same_length
from flocking.experiments.reproduce import EXPERIMENTS


def small(subject: tuple) -> object:
    """A model with a context of 256."""
    return helpers.build("llama", vocab_size=len(subject[1]))


def test_lengths_are_a_first_token_and_whole_windows(subject: tuple) -> None:
    with pytest.warns(UserWarning, match="497 tokens instead of 500: they are a first token and"):
        ids, _ = same_length(*subject, 500, 16)
    assert {len(row) for row in ids} == {497}
    with pytest.warns(UserWarning, match=r"241 tokens instead of 513: .* context is 256\."):
        same_length(small(subject), *subject[1:], 513, 16)
    with pytest.raises(ValueError, match="context is 256, 200 of it for what is generated; 257"):
        same_length(small(subject), *subject[1:], 257, 64, room=200)


def test_excerpts_are_as_long_as_was_asked_for(subject: tuple) -> None:
    texts = [row for row, _ in [(subject[1](text)["input_ids"], 0) for text in subject[2]]]
    excerpts, names, count = same_excerpts(*subject, 129, 16, most=3, least=33)
    assert (count, len(names)) == (3, 4)
    assert excerpts == [row[at : at + 129] for row in texts for at in (0, 128, 256)]
    with pytest.warns(UserWarning, match="3 excerpts of 97 tokens of each text instead of 3 of 10"):
        excerpts, _, _ = same_excerpts(*subject, 100, 16, most=3, least=33)
    assert excerpts[1] == texts[0][96:193]
    # Where the context has no room for two, there is one, no longer than was asked for.
    with pytest.warns(UserWarning, match="1 excerpt of 129 tokens of each .* context is 256"):
        excerpts, _, count = same_excerpts(small(subject), *subject[1:], 129, 16, most=3, least=33)
    assert (count, excerpts) == (1, [row[:129] for row in texts])
    with pytest.warns(UserWarning, match="1 excerpt of 241 tokens"):
        same_excerpts(small(subject), *subject[1:], 513, 16, most=3, least=33)
    with pytest.raises(ValueError, match="tokens=16: give 33 or more for an excerpt"):
        same_excerpts(*subject, 16, 16, most=3, least=33)


def test_a_cut_text_has_as_many_tokens() -> None:
    row = [1, 2, *range(10, 20)]
    assert begun(row, 0, [1, 2]) == row
    assert begun(row, 4, [1, 2]) == [1, 2, *range(14, 20)]
    assert begun(row, 4, []) == row[4:]


@pytest.fixture(scope="module")
def opening(subject: tuple) -> object:
    """The tokenizer with a special token before each text, as Llama's and Gemma's have one."""
    tokenizer = copy.deepcopy(subject[1])
    token = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss_by_prompt", {"tokens": 241, "horizon": 112}),
        ("loss_by_density", {"tokens": 65}),
        ("loss_by_method", {"tokens": 65}),
        ("loss_by_batch", {"tokens": 65}),
        ("loss_by_distance", {"tokens": 241, "horizon": 128}),
        ("loss_by_lengths", {"tokens": 241, "horizon": 64}),
        ("loss_by_reference", {"tokens": 241, "horizon": 64, "sequences": 1}),
        ("loss_by_allocation", {"tokens": 65}),
    ],
)
def test_every_prompt_opens_as_the_tokenizer_has_it(
    name: str,
    options: dict[str, int],
    subject: tuple,
    opening: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that is cut out of a text; the scored tokens are the text's."""
    read: list[tuple[list[list[int]], int]] = []
    for module, function in (
        (twins, "side_by_side"),
        (losses, "side_by_side"),
        (distances, "logits_side_by_side"),
    ):
        whole = getattr(module, function)

        def noted(models: object, ids: torch.Tensor, prompt: int, whole: object = whole) -> object:
            read.append((ids.tolist(), prompt))
            return whole(models, ids, prompt)

        monkeypatch.setattr(module, function, noted)
    model, _, texts = subject
    EXPERIMENTS[name](model, opening, texts[:2], progress=False, **options)
    whole = [" ".join(map(str, opening(text)["input_ids"])) for text in texts[:2]]
    assert read
    for rows, prompt in read:
        for row in rows:
            assert row[0] == opening.bos_token_id
            assert opening.bos_token_id not in row[1:]
            assert any(" ".join(map(str, row[1:])) in text for text in whole)
            assert len(row) > prompt


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("loss_by_")])
def test_models_that_cannot_be_pruned_are_refused_before_texts_are_read(
    name: str, subject: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object, **kwargs: object) -> None:
        raise AssertionError("texts were read")

    module = EXPERIMENTS[name].__wrapped__.__globals__
    monkeypatch.setitem(module, "record", slow)
    model = helpers.build("bert", vocab_size=len(subject[1]))
    with pytest.raises(ValueError, match="Bert"):
        EXPERIMENTS[name](model, *subject[1:], progress=False)


def test_numbers_that_cannot_be_are_refused_before_anything_is_read(subject: tuple) -> None:
    for name, options in (
        ("scores", {"seed": -1}),
        ("scores", {"seed": 0.5}),
        ("scores", {"tokens": 0}),
        ("loss_by_reference", {"horizon": 0}),
        ("loss_by_reference", {"sequences": 0}),
        ("atlas", {"piece": 0}),
        ("generation", {"new_tokens": True}),
    ):
        ((what, value),) = options.items()
        with pytest.raises(ValueError, match=rf"^{what}={value}: give a whole number from [01] up"):
            EXPERIMENTS[name](*subject, progress=False, **options)
    with pytest.raises(ValueError, match="horizon=8: give 16 tokens or more"):
        EXPERIMENTS["loss_by_reference"](*subject, horizon=8, progress=False)


def test_an_allocation_of_mixtures_is_refused_at_once(subject: tuple) -> None:
    model = helpers.build("mixtral", vocab_size=len(subject[1]))
    with pytest.raises(ValueError, match="layer 0 is a mixture of experts"):
        EXPERIMENTS["loss_by_allocation"](model, *subject[1:], progress=False)


def test_overlaps_of_mixtures_are_within_each_expert(subject: tuple) -> None:
    """As GRIFFIN selects, in the atlas as in what it calls."""
    tokenizer, texts = subject[1:]
    model = helpers.build("mixtral", vocab_size=len(tokenizer))
    data = EXPERIMENTS["atlas"](model, tokenizer, texts, tokens=129, piece=32, progress=False)
    ids = [tokenizer(text)["input_ids"][:129] for text in texts]
    recording = flocking.record(model, ids, window=32, progress=False)
    energy = flocking.statistic(recording, start=1, by="window")
    pairs = [
        # (In experts that had a token in both pieces.)
        overlap_of(
            *(energy.isel(sequence=s, window=w, drop=True) for s, w in ((0, n), (1, m))), 0.5
        )
        for n in range(energy.sizes["window"])
        for m in range(energy.sizes["window"])
    ]
    expected = np.mean([pair.values for pair in pairs])
    found = data.overlap.sel(weights="trained").isel(kind=0, other=1)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_intervals_of_pairs_are_of_draws_of_both(subject: tuple) -> None:
    data = EXPERIMENTS["atlas"](*subject, tokens=129, piece=32, progress=False)
    pairs = data.overlap.where(data.overlap.kind != data.overlap.other)
    expected = flocking.bootstrap(pairs.rename(kind="sequence"))
    xr.testing.assert_allclose(
        data.between.drop_attrs(), expected.reset_coords(drop=True).drop_attrs()
    )
    narrow = flocking.bootstrap(pairs.mean("other").rename(kind="sequence"))
    for weights in ("trained", "control"):
        here, means = (each.sel(weights=weights) for each in (data.between, narrow))
        width, other = (
            float(each.sel(interval="high") - each.sel(interval="low")) for each in (here, means)
        )
        assert width > other
    assert np.isfinite(data.between).all()
