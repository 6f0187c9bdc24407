"""Recordings that are written block by block: what is in them, and what ends or changes a run."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import xarray as xr
from streams import (
    BLOCK,
    SMALL,
    TEXTS,
    Ended,
    assert_same_values,
    by_block,
    counted,
    ending_after,
    stream,
)

import flocking
from flocking.recording import Wanted, forward_passes, growing, streaming
from flocking.recording.arguments import Options
from flocking.recording.chunking import chunk_sizes
from flocking.recording.collector import Collector
from flocking.recording.ranks import Processes
from flocking.recording.windows import Layout


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"window": None}),
        ("llama", {"ranks": True, "relative": [1], "max_tokens": 30}),
        ("llama", {"relative": True, "layers": [1]}),
        ("llama", {"prompt_tokens": 2}),
        ("llama", {"prompt_tokens": [len(ids) // 2 for ids in TEXTS]}),
        ("llama", {"continuation": TEXTS[::-1]}),
        ("llama", {"max_new_tokens": 9}),
        ("llama", {"max_new_tokens": 9, "window": None, "do_sample": True, "seed": 3}),
        ("mixtral", {"ranks": True}),
        ("gpt2", {}),
    ],
)
def test_it_is_what_record_gives(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    got = stream(tmp_path / "x.zarr", name=name, **changes).load()
    assert_same_values(got, by_block(name, TEXTS, **changes))
    whole = flocking.record(helpers.proved(name), TEXTS, **SMALL | changes)
    assert got.attrs == whole.attrs
    helpers.assert_same(got, whole)
    assert got.sequence.values.tolist() == list(range(len(TEXTS)))


def test_texts_and_conversations(tmp_path: Path) -> None:
    tokenizer = helpers.letters("<s> $A")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"
    for number, texts in enumerate(
        [
            ["abc def", "b", "héllo"] * 4,
            [
                [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "ef" * n}]
                for n in range(1, 12)
            ],
        ]
    ):
        got = stream(tmp_path / f"{number}.zarr", texts, tokenizer=tokenizer).load()
        expected = flocking.record(helpers.proved("llama"), texts, tokenizer=tokenizer, **SMALL)
        helpers.assert_same(got, expected)
        assert got.attrs == expected.attrs
        assert got.text.values.tolist() == expected.text.values.tolist()
        assert got.token_text.values.tolist() == expected.token_text.values.tolist()


def test_one_text_is_one_sequence(tmp_path: Path) -> None:
    for number, text in enumerate([TEXTS[0], torch.tensor(TEXTS[0]), np.array(TEXTS[0])]):
        assert stream(tmp_path / f"{number}.zarr", text).sizes["sequence"] == 1
    got = stream(tmp_path / "s.zarr", "abc", tokenizer=helpers.letters("<s> $A"))
    assert got.text.values.tolist() == ["abc"]


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 30}, {"max_tokens": 70, "ranks": True}])
def test_an_iterator_gives_the_same_as_a_list(tmp_path: Path, changes: dict[str, Any]) -> None:
    got = stream(tmp_path / "x.zarr", iter(TEXTS), **changes).load()
    assert_same_values(got, by_block("llama", TEXTS, **changes))


def test_an_iterator_with_continuations(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr", iter(TEXTS), continuation=iter(TEXTS[::-1]), max_tokens=120)
    expected = by_block("llama", TEXTS, continuation=TEXTS[::-1], max_tokens=120)
    # (Prompts could have been longer: there are windows for them, which are empty.)
    got = got.isel(window=got.tokens.values.any(axis=0)).load()
    for name in ("energy", "mass", "tokens", "start", "phase", "norm", "prompt_tokens", "token_id"):
        np.testing.assert_array_equal(got[name].values, expected[name].values, err_msg=name)
    np.testing.assert_allclose(
        flocking.prompt_generation_overlap(got).values,
        flocking.prompt_generation_overlap(expected).values,
    )


def test_an_iterator_is_read_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, ahead = [], []

    def texts() -> Iterator[list[int]]:
        for number, ids in enumerate(TEXTS):
            taken.append(number)
            yield ids

    write = growing.GrowingStore.write

    def watched(self: Any, rows: slice, *args: Any) -> None:
        ahead.append(len(taken) - rows.start)
        write(self, rows, *args)

    monkeypatch.setattr(growing.GrowingStore, "write", watched)
    stream(tmp_path / "x.zarr", texts())
    assert max(ahead) <= BLOCK + 1


@pytest.mark.parametrize(
    ("texts", "known", "block"),
    [
        (200, True, 32),
        (1023, True, 32),
        (1024, True, 64),
        (2048, True, 128),
        (9000, True, 128),
        (200, False, 128),
    ],
)
def test_larger_corpora_have_larger_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int, known: bool, block: int
) -> None:
    monkeypatch.setattr(streaming, "_fill", lambda *given: None)  # nothing is recorded
    ids = [[5, 6, 7]] * texts
    given = ids if known else iter(ids)
    with pytest.warns(UserWarning, match="is not finished"):
        flocking.record(
            helpers.proved("llama"), given, out=tmp_path / "x.zarr", max_tokens=4, progress=False
        )
    asked = xr.open_zarr(tmp_path / "x.zarr", chunks=None, consolidated=False)[
        growing.RECORDED
    ].attrs
    assert asked["block"] == block


def test_plain_xarray_reads_it(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr").load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = xr.open_zarr(tmp_path / "x.zarr", chunks=None)
    for name in got.variables:
        assert plain[name].dtype.kind in (got[name].dtype.kind, "T")
        np.testing.assert_array_equal(plain[name].values, got[name].values)
    assert plain.coords.keys() - got.coords.keys() == set()
    assert (plain.recorded == 1).all()


def test_it_can_be_saved_and_loses_no_file_unnoticed(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr")
    flocking.save_recording(got, tmp_path / "y.zarr")
    xr.testing.assert_identical(flocking.open_recording(tmp_path / "y.zarr"), got)
    next((tmp_path / "x.zarr" / "mass").glob("[0-9]*")).unlink()
    with pytest.raises(ValueError, match=r"mass/\S+ is lost"):
        flocking.open_recording(tmp_path / "x.zarr")


def test_chunks_hold_one_layer_and_blocks_share_none() -> None:
    for sizes in ((1000, 4, 17, 1536), (1000, 32, 17, 14336), (1000, 32, 600, 14336)):
        chunk = chunk_sizes(("sequence", "layer", "window", "neuron"), sizes, 4, 32)
        assert chunk[1] == 1
        assert 32 % chunk[0] == 0
        assert np.prod(chunk) * 4 <= 8 * 2**20
        assert chunk[3] == sizes[3]


@pytest.mark.parametrize("address", ["memory://a/b/x.zarr", "file://{}/b/x.zarr"])
def test_object_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    address = address.format(tmp_path)
    with monkeypatch.context() as patch:
        ending_after(patch, 13)
        with pytest.raises(Ended):
            stream(address)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="is not finished: 8 of 21"):
        assert flocking.open_recording(address).sizes["sequence"] == 8
    with pytest.raises(ValueError, match="begun with another window"):
        stream(address, window=4)  # type: ignore[arg-type]
    assert_same_values(stream(address).load(), by_block("llama", TEXTS))  # type: ignore[arg-type]
    assert_same_values(flocking.open_recording(address).load(), by_block("llama", TEXTS))
    with pytest.raises(FileNotFoundError, match=r"there is no memory://nothing\.zarr"):
        flocking.open_recording("memory://nothing.zarr")


# --------------------------------------------------------------------------------------
# What goes wrong


BAD = [*TEXTS[:10], [], *TEXTS[10:14], [10**6], *TEXTS[14:]]


def test_a_text_that_fails_is_named_before_anything_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    with pytest.raises(ValueError, match=r"^text 10 has no tokens"):
        stream(tmp_path / "x.zarr", BAD)
    assert not passes
    assert not list(tmp_path.iterdir())


def test_a_text_that_fails_later_leaves_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    with pytest.raises(ValueError, match=r"^text 10 has no tokens"):
        stream(path, iter(BAD))
    with pytest.warns(UserWarning, match="not finished: 8 texts are recorded so far"):
        assert flocking.open_recording(path).sizes["sequence"] == 8


@pytest.mark.parametrize("kind", [list, iter])
def test_texts_that_fail_can_be_skipped(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "x.zarr"
    got = stream(path, kind(BAD), on_error="skip").load()
    assert got.sequence.values.tolist() == [n for n in range(23) if n not in (10, 15)]
    assert [line.split(":")[0] for line in got.attrs["skipped"]] == ["10", "15"]
    assert "text 10 has no tokens" in got.attrs["skipped"][0]
    assert "text 15 has token ids from 1000000" in got.attrs["skipped"][1]
    expected = flocking.record(helpers.proved("llama"), TEXTS, **SMALL)
    helpers.assert_same(got.assign_coords(sequence=range(21)), expected)
    again = stream(path, kind(BAD), on_error="skip").load()
    xr.testing.assert_identical(again, got)
    flocking.save_recording(got, tmp_path / "y.zarr")
    xr.testing.assert_identical(flocking.open_recording(tmp_path / "y.zarr").load(), got)


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("place", [0, 3, 20])
def test_texts_of_another_kind_can_be_skipped(tmp_path: Path, kind: Any, place: int) -> None:
    """They could be recorded alone, not beside the others: the first one decides."""
    tokenizer = helpers.letters("<s> $A")
    texts: list[Any] = ["abc" * (1 + number % 5) for number in range(21)]
    texts[place] = [5, 6, 7]
    got = stream(tmp_path / "x.zarr", kind(texts), tokenizer=tokenizer, on_error="skip").load()
    others = [number for number in range(21) if number != place]
    assert got.sequence.values.tolist() == (others if place else [0])
    assert f"text {place or 1} comes in another form" in got.attrs["skipped"][0]
    good = [texts[number] for number in (others if place else [0])]
    expected = flocking.record(helpers.proved("llama"), good, tokenizer=tokenizer, **SMALL)
    helpers.assert_same(got.assign_coords(sequence=range(len(good))), expected)


def test_activations_that_are_not_finite_can_be_skipped(tmp_path: Path) -> None:
    model = helpers.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    texts = [[1, 2, 3], [4, 7, 5], [6, 8, 8], [9, 9, 9, 9]]
    with pytest.raises(ValueError, match="not finite, first at token 0 of text 1"):
        flocking.record(model, iter(texts), out=tmp_path / "x.zarr", **SMALL)
    got = flocking.record(model, texts, out=tmp_path / "y.zarr", on_error="skip", **SMALL)
    assert got.sequence.values.tolist() == [0, 2, 3]
    assert "of text 1" in got.attrs["skipped"][0]
    assert flocking.flocking_score(got).notnull().all()


def test_where_every_text_fails(tmp_path: Path) -> None:
    for kind in (list, iter):
        with pytest.raises(ValueError, match="text 0 has no tokens"):
            stream(tmp_path / "x.zarr", kind([[], []]), on_error="skip")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ([], {}, "text is empty"),
        (iter([]), {}, "text is empty"),
        ({"input_ids": TEXTS}, {}, "text is a dict"),
        ({1, 2}, {}, "without an order"),
        (b"abc", {}, "decode it first"),
        (TEXTS, {"num_texts": 20}, "num_texts=20, and text has 21"),
        (iter(TEXTS), {"num_texts": 20}, "more texts than the 20"),
        (iter(TEXTS), {"num_texts": 22}, "text has 21 texts, and 22 were expected"),
        (TEXTS, {"num_texts": 0}, "num_texts=0"),
        (TEXTS, {"on_error": "ignore"}, "on_error='ignore': give 'stop' or 'skip'"),
        (TEXTS, {"continuation": TEXTS[:3]}, "continuation has 3 entries, and text has 21"),
        (TEXTS, {"continuation": {"input_ids": TEXTS}}, "continuation is a dict"),
        (iter(TEXTS), {"continuation": iter(TEXTS[:3])}, "continuation has 3 entries"),
        (iter(TEXTS[:3]), {"continuation": iter(TEXTS)}, "text has 3 entries"),
        (TEXTS, {"prompt_tokens": [1]}, "prompt_tokens has 1 entries"),
        (TEXTS, {"prompt_tokens": 50}, "prompt_tokens=50, and text 1 has"),
        ([*TEXTS[:9], "abc"], {}, "text 9 is 'abc'|string"),
        (iter([*TEXTS[:9], ["a", "b"]]), {}, "text 9 is a list of strings"),
    ],
)
def test_bad_input(tmp_path: Path, text: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        stream(tmp_path / "x.zarr", text, **changes)


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names end in \.zarr"):
        stream(tmp_path / "x")
    with pytest.raises(ValueError, match="num_texts=3 is for out="):
        flocking.record(helpers.proved("llama"), TEXTS, num_texts=3)
    with pytest.raises(ValueError, match="on_error='skip' is for out="):
        flocking.record(helpers.proved("llama"), TEXTS, on_error="skip")


def test_strings_and_ids_cannot_follow_each_other(tmp_path: Path) -> None:
    tokenizer = helpers.letters("<s> $A")
    with pytest.raises(ValueError, match="text 8 comes in another form than those before"):
        stream(tmp_path / "x.zarr", iter(["abc"] * 8 + TEXTS[:2]), tokenizer=tokenizer)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, usage = tmp_path / "x.zarr", shutil.disk_usage
    free = iter([2**30, 2**30, 2**30, 1000])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda p: usage(p)._replace(free=next(free, 1000)))
        with pytest.raises(OSError, match="1,000 are free on the disk: make room"):
            stream(path)
    assert_same_values(stream(path).load(), by_block("llama", TEXTS))


def test_names_of_files_stand_beside_their_texts(tmp_path: Path) -> None:
    names = [f"{number}.txt" for number in range(len(TEXTS))]
    got = streaming.stream(
        helpers.proved("llama"),
        TEXTS,
        tmp_path / "x.zarr",
        tokenizer=None,
        options=Options(Wanted(None, None, 0), window=8, batch_size=2),
        num_texts=None,
        on_error="stop",
        progress=False,
        files=names,
    )
    assert got.coords["file"].dims == ("sequence",)
    assert got.file.values.tolist() == names
    assert_same_values(got.drop_vars("file").load(), by_block("llama", TEXTS))


CHATS = [
    [{"role": "user", "content": "abc"}],
    [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defdef"}],
]


def test_a_generator_of_conversations_may_begin_with_one_without_an_answer(tmp_path: Path) -> None:
    tokenizer = helpers.letters("<s> $A")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"
    got = stream(tmp_path / "x.zarr", iter(CHATS), tokenizer=tokenizer, max_tokens=40).load()
    expected = flocking.record(helpers.proved("llama"), CHATS, tokenizer=tokenizer, **SMALL)
    there = got.isel(window=got.tokens.values.any(axis=0))
    assert there.phase.values.tolist() == expected.phase.values.tolist()
    np.testing.assert_array_equal(there.tokens.values, expected.tokens.values)
    assert got.attrs["generation"] == "as given"


def test_prompts_that_are_cut_to_the_same_are_drawn_anew(tmp_path: Path) -> None:
    texts = [[5, 6, 7, 8, number] for number in range(10, 22)]
    options = {"max_tokens": 4, "max_new_tokens": 6, "do_sample": True, "temperature": 3.0}
    got = stream(tmp_path / "x.zarr", texts, **options)
    expected = flocking.record(helpers.proved("llama"), texts, **SMALL | options)
    np.testing.assert_array_equal(got.token_id.values, expected.token_id.values)
    assert len(np.unique(got.token_id.values, axis=0)) > 8


def test_the_first_text_of_a_generator_may_be_skipped(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr", iter([[3, 10**6], *TEXTS]), on_error="skip")
    assert got.sequence.values.tolist() == list(range(1, 22))


def test_no_more_room_than_the_context(tmp_path: Path) -> None:
    got = stream(tmp_path / "x.zarr", iter(TEXTS), max_tokens=10**9, window=None)
    assert got.sizes["token"] == max(map(len, TEXTS))


def test_one_text_of_token_ids_with_its_continuation(tmp_path: Path) -> None:
    ways = ([7, 8], [[7, 8]], torch.tensor([7, 8]), iter([7, 8]))
    expected = flocking.record(helpers.proved("llama"), [5, 6], continuation=[7, 8], **SMALL)
    for number, continuation in enumerate(ways):
        got = stream(tmp_path / f"{number}.zarr", [5, 6], continuation=continuation).load()
        helpers.assert_same(got, expected)


def test_a_tokenizer_without_a_length(tmp_path: Path) -> None:
    letters = helpers.letters("<s> $A")

    class Bare:
        def __call__(self, text: Any, **options: Any) -> Any:
            return letters(text, **options)

        def decode(self, ids: list[int]) -> str:
            return letters.decode(ids)

        def convert_ids_to_tokens(self, ids: Any) -> Any:
            return letters.convert_ids_to_tokens(ids)

    got = stream(tmp_path / "x.zarr", ["abc", "de"], tokenizer=Bare()).load()
    expected = flocking.record(helpers.proved("llama"), ["abc", "de"], tokenizer=Bare(), **SMALL)
    helpers.assert_same(got, expected)


@pytest.mark.parametrize("kind", [list, iter])
def test_what_is_doubted_is_said_once(tmp_path: Path, kind: Any) -> None:
    tokenizer = helpers.letters("<s> $A </s>")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"tokenizer": tokenizer, "max_new_tokens": 2}
        stream(tmp_path / "x.zarr", kind(["ab", "cd"]), **options)
    said = [str(each.message) for each in caught if "special token" in str(each.message)]
    assert len(said) == 1, said


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_memory_that_is_foreseen_is_what_arrays_take(name: str) -> None:
    options = Options(Wanted(None, None, 0), window=8, relative=[1], ranks=True)
    model, lengths = helpers.proved(name), [len(ids) for ids in TEXTS]
    blocks, raw = forward_passes.chosen_blocks(model, options)
    layout = Layout.of(lengths, lengths, 8)
    arrays = Collector(blocks, raw, layout, ranks=True).arrays
    foreseen = forward_passes.recording_bytes(blocks, raw, options, lengths, lengths)
    assert foreseen == sum(values.nbytes for values in arrays.values())
    assert ("routed" in arrays) == (name == "mixtral")


def test_processes_that_share_texts_are_told_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator's texts cannot be counted before they are dealt out."""

    @contextmanager
    def two() -> Iterator[Processes]:
        yield Processes(0, 2)

    with monkeypatch.context() as changed:
        changed.setattr(streaming, "processes", two)
        with pytest.raises(ValueError, match=r"2 processes share the texts, .*: pass num_texts="):
            stream(tmp_path / "x.zarr", iter(TEXTS))
    assert not list(tmp_path.iterdir())
    assert stream(tmp_path / "x.zarr", iter(TEXTS)).sizes["sequence"] == len(TEXTS)
