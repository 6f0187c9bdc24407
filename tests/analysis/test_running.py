"""Running means over texts: against the mean of a stored recording, in any split of the texts."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import datasets
import helpers
import numpy as np
import pytest
import transformers as tf
import xarray as xr

import flocking
from flocking.analysis import texts_in_turn

IDS = helpers.random_ids(*np.random.default_rng(3).integers(5, 60, 11).tolist())
NAMES = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
model_of = functools.cache(helpers.proved)


@functools.cache
def recorded(name: str, window: int | None = None) -> xr.Dataset:
    return helpers.record(model_of(name), IDS, window=window)


def static_by_hand(model: tf.PreTrainedModel, texts: list[list[int]]) -> np.ndarray:
    """The root of the mean over texts of energy per token, from bare hooks, in float64."""
    each = []
    for ids in texts:
        found = helpers.activations(model, ids)
        each.append([(helpers.relative(z) ** 2).mean(axis=0) for _, z in sorted(found.items())])
    return np.sqrt(np.mean(each, axis=0))


def statistic(name: str, texts: object, **options: object) -> xr.DataArray:
    return flocking.global_statistic(model_of(name), texts, progress=False, **options)


# --------------------------------------------------------------------------------------
# The static statistic


@NAMES
def test_global_statistic_is_that_of_each_text_alone(name: str) -> None:
    expected = static_by_hand(model_of(name), IDS)
    np.testing.assert_allclose(statistic(name, IDS), expected, rtol=2e-5, atol=1e-7)


@NAMES
def test_global_statistic_is_the_mean_of_one_recording(name: str) -> None:
    """In every digit, as it was when all texts were recorded before they were averaged."""
    energy = flocking.statistic(recorded(name))
    expected = np.sqrt((energy**2 / energy.tokens).mean("sequence"))
    got = statistic(name, IDS)
    xr.testing.assert_identical(got.drop_attrs(), expected.drop_attrs().rename("statistic"))


def test_global_statistic_of_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = statistic("llama", IDS)
    xr.testing.assert_identical(statistic("llama", iter(IDS)), expected)
    taken = []

    def several() -> Iterator[list[int]]:
        for number, ids in enumerate(IDS):
            taken.append(number)
            yield ids

    monkeypatch.setattr(texts_in_turn, "BLOCK", 4)
    in_blocks = statistic("llama", several())
    np.testing.assert_allclose(in_blocks, expected, rtol=1e-6)  # other batches, other rounding
    assert in_blocks.attrs["made_from"] == expected.attrs["made_from"]
    assert taken == list(range(len(IDS)))
    xr.testing.assert_identical(statistic("llama", iter(IDS[0])), statistic("llama", IDS[0]))


def test_global_statistic_holds_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no text may wait for its turn; then the sum's order is that of the batches."""
    sizes = []
    original = texts_in_turn.record

    def counting(model: tf.PreTrainedModel, text: object, **options: object) -> xr.Dataset:
        recording = original(model, text, **options)
        sizes.append(recording.sizes["sequence"])
        return recording

    monkeypatch.setattr(texts_in_turn, "record", counting)
    expected = statistic("llama", IDS, batch_size=2)
    assert max(sizes) == 2
    assert sum(sizes) == len(IDS)
    monkeypatch.setattr("flocking.pruning.calibration._ROOM", 0)
    got = statistic("llama", IDS, batch_size=2)
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    assert got.attrs["made_from"] == expected.attrs["made_from"]


def parts_of(name: str, *cuts: int) -> list[flocking.RunningStatistic]:
    made = []
    for begin, end in zip((0, *cuts), (*cuts, len(IDS)), strict=True):
        running = flocking.RunningStatistic()
        running.update(recorded(name).isel(sequence=slice(begin, end)))
        made.append(running)
    return made


@NAMES
def test_running_statistics_add_up(name: str) -> None:
    expected = statistic(name, IDS)
    for cuts in [(), (1,), (3, 7), tuple(range(1, 11))]:
        both = sum(parts_of(name, *cuts))
        assert both.texts == len(IDS)
        got = both.result()
        np.testing.assert_allclose(got, expected, rtol=1e-13)
        assert {*got.coords} == {*expected.coords}
    one = flocking.RunningStatistic()
    for number in range(len(IDS)):
        one.update(recorded(name, 8).isel(sequence=number))
    np.testing.assert_allclose(one.result(), expected, rtol=2e-6)  # sums of windows in float32
    assert "11 texts of" in got.attrs["made_from"]


def test_state_goes_to_another_process(tmp_path) -> None:
    first, second = parts_of("llama", 4)
    first.state().to_zarr(tmp_path / "state.zarr", zarr_format=2)
    opened = xr.open_zarr(tmp_path / "state.zarr", chunks=None)
    again = flocking.RunningStatistic.from_state(opened)
    xr.testing.assert_identical((again + second).result(), (first + second).result())
    assert repr(again) == "<RunningStatistic of 4 texts>"
    with pytest.raises(TypeError, match="expected the Dataset that state"):
        flocking.RunningStatistic.from_state(None)


def test_what_cannot_be_added_is_refused_and_changes_nothing() -> None:
    running = parts_of("llama")[0]
    before = running.result()
    for other, message in [
        (recorded("gpt2"), "texts before are of architecture 'LlamaForCausalLM', and these of"),
        (recorded("llama").isel(layer=[0]), "of other layers or neurons"),
        (recorded("llama").assign_attrs(dtype="float16"), "are of dtype 'float32', and these of"),
        (recorded("llama").assign_attrs(adapter="birds"), "are of adapter 'none', and these of"),
    ]:
        with pytest.raises(ValueError, match=message):
            running.update(other)
    with pytest.raises(TypeError, match="expected a recording"):
        running.update(flocking.statistic(recorded("llama")))
    with pytest.raises(TypeError, match="unsupported operand"):
        running + flocking.RunningScores()
    with pytest.raises(TypeError, match="unsupported operand"):
        running + 1
    xr.testing.assert_identical(running.result(), before)
    with pytest.raises(ValueError, match="there is no text yet: update with a recording"):
        flocking.RunningStatistic().result()
    empty = flocking.RunningStatistic() + flocking.RunningStatistic()
    assert empty.texts == 0
    xr.testing.assert_identical((empty + running).result(), before)


# --------------------------------------------------------------------------------------
# Scores


@NAMES
def test_running_scores_are_those_of_all_texts(name: str) -> None:
    recording = recorded(name)
    parts = []
    for rows in (slice(0, 1), slice(1, 6), slice(6, 11)):
        running = flocking.RunningScores(flocking.flocking_score, flocking.effective_neurons)
        running.update(recording.isel(sequence=rows))
        parts.append(running)
    alone = flocking.RunningScores()
    for number in range(11):
        alone.update(recording.isel(sequence=number))
    for running in (sum(parts), alone):
        result = running.result()
        for measure in (flocking.flocking_score, flocking.effective_neurons):
            values = measure(recording).values
            found = result[measure.__name__]
            assert found.dims == ("summary", "layer")
            assert found.attrs == measure(recording).attrs
            mean, error, texts = found.values
            np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
            expected = values.std(axis=0, ddof=1) / np.sqrt(11)
            np.testing.assert_allclose(error, expected, rtol=1e-10)
            assert texts.tolist() == [11, 11]
        assert result.layer.values.tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:1 of")
def test_texts_without_a_score_are_left_out() -> None:
    running = flocking.RunningScores(flocking.flocking_score)
    model = model_of("llama")
    for ids in ([5, 6], IDS[0], IDS[1], [7]):
        running.update(helpers.record(model, [ids]))
    result = running.result().flocking_score
    both = flocking.flocking_score(helpers.record(model, IDS[:2]))
    np.testing.assert_allclose(result.sel(summary="mean"), both.mean("sequence"), rtol=1e-5)
    assert result.sel(summary="texts").values.tolist() == [2, 2]
    assert running.texts == 4
    one = flocking.RunningScores(flocking.flocking_score)
    one.update(helpers.record(model, [IDS[0]]))
    assert bool(one.result().flocking_score.sel(summary="standard_error").isnull().all())


def test_measures_with_other_dimensions_and_several_kinds() -> None:
    def by_density(recording: xr.Dataset) -> xr.DataArray:
        return flocking.drift(recording, prompt_lengths=[1]).captured_energy

    recording = helpers.record(model_of("llama"), IDS, window=4)
    running = flocking.RunningScores(by_density, flocking.consistency)
    running.update(recording.isel(sequence=[0, 1, 2]))
    assert running.result().captured_energy.dims == (
        "summary",
        "layer",
        "prompt_length",
        "distance",
    )
    twice = running + running
    twice.update(recording)  # which goes on with the same measures
    assert (running.texts, twice.texts) == (3, 3 + 3 + len(IDS))
    again = flocking.RunningScores.from_state(twice.state(), by_density, flocking.consistency)
    again.update(recording)
    assert {*again.result()} == {"captured_energy", "consistency"}
    with pytest.raises(ValueError, match="other sums"):
        running + _updated(flocking.RunningScores(flocking.consistency))
    with pytest.raises(TypeError, match="is not a function of a recording"):
        flocking.RunningScores("flocking_score")
    with pytest.raises(ValueError, match="gives no values by sequence"):
        _updated(flocking.RunningScores(lambda r: flocking.consistency(r).mean("sequence")))


def _updated(running: flocking.RunningScores) -> flocking.RunningScores:
    running.update(recorded("llama"))
    return running


def test_mean_scores_of_texts_in_turn() -> None:
    model = model_of("llama")
    expected = _updated(flocking.RunningScores()).result()
    for texts in (IDS, iter(IDS), (list(ids) for ids in IDS)):
        got = flocking.mean_scores(model, texts, progress=False)
        xr.testing.assert_allclose(got, expected, rtol=1e-12)
    cut = flocking.mean_scores(model, IDS, flocking.consistency, max_tokens=9, progress=False)
    recording = helpers.record(model, IDS, window=None, max_tokens=9)
    np.testing.assert_allclose(
        cut.consistency.sel(summary="mean"),
        flocking.consistency(recording).mean("sequence"),
        rtol=1e-12,
    )


def test_texts_are_encoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no more is held of many texts than how long they are, whole documents or not."""
    model, tokenizer = model_of("llama"), helpers.letters("<s> $A")
    texts = ["abc" * (1 + n % 7) for n in range(12)]
    recording = helpers.record(model, texts, tokenizer=tokenizer, window=None, max_tokens=9)
    expected = _updated_with(recording)
    encoded: list[int] = []
    inner = texts_in_turn.tokenize

    def tokenize(model: tf.PreTrainedModel, text: list[str], *args: object) -> object:
        encoded.append(len(text))
        return inner(model, text, *args)

    monkeypatch.setattr(texts_in_turn, "tokenize", tokenize)
    monkeypatch.setattr(texts_in_turn, "SURVEYED", 5)
    options = {"tokenizer": tokenizer, "progress": False, "max_tokens": 9, "batch_size": 3}
    for given in (texts, np.array(texts), datasets.Dataset.from_dict({"a": texts})["a"]):
        encoded.clear()
        got = flocking.mean_scores(model, given, **options)
        assert encoded == [5, 5, 2, 3, 3, 3, 3]
        xr.testing.assert_allclose(got, expected, rtol=1e-5)
        assert got.attrs["special_tokens"] == recording.attrs["special_tokens"] == "<s>"
    with pytest.raises(ValueError, match=r"^text 7 is empty"):
        flocking.mean_scores(model, [*texts[:7], ""], **options)
    with pytest.raises(ValueError, match="text 5 comes in another form than those before it"):
        flocking.mean_scores(model, [*texts[:5], *IDS], **options)


def _updated_with(recording: xr.Dataset) -> xr.Dataset:
    running = flocking.RunningScores()
    running.update(recording)
    return running.result()


# --------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize("texts", [[], iter([]), (x for x in ())])
def test_no_text_is_refused(texts: object) -> None:
    for function in (flocking.global_statistic, flocking.mean_scores):
        with pytest.raises(ValueError, match="empty: give at least one text"):
            function(model_of("llama"), texts, progress=False)


def test_the_text_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [*IDS[:6], [3, 10**6], *IDS[6:]]
    with pytest.raises(ValueError, match=r"^text 6 has token ids from 3 to 1000000"):
        statistic("llama", bad)
    monkeypatch.setattr(texts_in_turn, "BLOCK", 4)
    with pytest.raises(ValueError, match=r"^text 6 has token ids from 3 to 1000000"):
        statistic("llama", iter(bad))

    def broken() -> Iterator[list[int]]:
        yield from IDS[:6]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away") as caught:
        statistic("llama", broken())
    assert caught.value.__notes__ == ["while text 6 was taken from the iterable"]
    original = texts_in_turn.record

    def failing(model: tf.PreTrainedModel, text: dict, **options: object) -> xr.Dataset:
        if any(ids.tolist() == IDS[5] for ids in text["input_ids"]):
            raise RuntimeError("out of memory")
        return original(model, text, **options)

    monkeypatch.setattr(texts_in_turn, "record", failing)
    with pytest.raises(RuntimeError, match="out of memory") as failed:
        statistic("llama", IDS, batch_size=1)
    assert failed.value.__notes__ == ["while text 5 was read"]
    with pytest.raises(TypeError, match="text is of type int"):
        statistic("llama", 5)


def test_two_measures_of_one_name_are_refused_and_nothing_is_added() -> None:
    different = functools.partial(flocking.consistency, different_tokens=True)
    recording = flocking.record(
        helpers.build("llama"), helpers.random_ids(20, 30), relative=True, progress=False
    )
    running = flocking.RunningScores(flocking.consistency, different)
    with pytest.raises(ValueError, match="two measures give values named 'consistency': rename"):
        running.update(recording)
    assert running.texts == 0
    both = flocking.RunningScores(
        flocking.consistency, lambda recording: different(recording).rename("another")
    )
    both.update(recording)
    assert list(both.result()) == ["consistency", "another"]


def test_a_state_of_another_kind_is_refused() -> None:
    recording = flocking.record(helpers.build("llama"), helpers.random_ids(20), progress=False)
    kinds = flocking.RunningStatistic(), flocking.RunningScores()
    for running in kinds:
        running.update(recording)
    for one, other in (kinds, kinds[::-1]):
        name = type(one).__name__
        with pytest.raises(ValueError, match=f"state is not that of a {name}: it has "):
            type(one).from_state(other.state())
        xr.testing.assert_identical(type(one).from_state(one.state()).result(), one.result())


def test_measures_that_compare_texts_are_refused() -> None:
    model, ids = helpers.build("llama"), helpers.random_ids(20, 30)
    recording = flocking.record(model, ids, window=8, progress=False)
    running = flocking.RunningScores(flocking.between_consistency)
    with pytest.raises(ValueError, match="between_consistency compares the texts of one recording"):
        running.update(recording)
    lengths = flocking.RunningScores(lambda each: flocking.drift(each).jaccard)
    ids = helpers.random_ids(33, 41)
    for row in ids:
        part = flocking.record(helpers.build("llama"), row, window=8, progress=False)
        if row is ids[0]:
            lengths.update(part)
    with pytest.raises(ValueError, match="before have 4 values along prompt_length, and these 5"):
        lengths.update(part)


def test_mean_scores_records_what_a_measure_needs() -> None:
    model = helpers.build("llama")
    options = {"layers": [1], "window": 8, "progress": False}
    got = flocking.mean_scores(model, IDS, flocking.rank_consistency, ranks=True, **options)
    recording = flocking.record(model, IDS, ranks=True, **options)
    expected = flocking.rank_consistency(recording).mean("sequence")
    np.testing.assert_allclose(got.rank_consistency.sel(summary="mean"), expected)
