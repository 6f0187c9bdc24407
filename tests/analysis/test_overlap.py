"""Statistics, selections and what they capture, against raw activations and by hand."""

from __future__ import annotations

import itertools

import helpers
import numpy as np
import pytest
import torch
import xarray as xr

import flocking
from flocking.feedforward import row_norms, width


def relative(model, ids: list[int]) -> dict[int, np.ndarray]:
    """Each layer's r over one sequence, (token, neuron), from bare hooks."""
    found = {}
    for layer, z in helpers.activations(model, ids).items():
        z = z.double().abs().numpy()
        found[layer] = z / np.linalg.norm(z, axis=1, keepdims=True)
    return found


def best(s: np.ndarray, k: int) -> set[int]:
    """The k largest, ties to the lowest index, by sorting."""
    return set(sorted(range(len(s)), key=lambda j: (-s[j], j))[:k])


def jaccard_of(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def norm(r: np.ndarray) -> np.ndarray:
    return np.sqrt((r**2).sum(0))


@pytest.fixture(scope="module")
def recorded() -> tuple:
    """A model, its texts (of different lengths) and a recording with windows of 8."""
    model = helpers.build("llama")
    ids = helpers.random_ids(49, 41, 33)
    return model, ids, flocking.record(model, ids, window=8, progress=False)


@pytest.fixture(scope="module")
def generated() -> tuple:
    """The same with generations; `ids` are the tokens that were fed, prompts are 17 of them."""
    model = helpers.build("llama")
    prompts = helpers.random_ids(17, 17, seed=3)
    recording = flocking.record(model, prompts, window=8, max_new_tokens=25, progress=False)
    fed = [row[row >= 0].tolist() for row in recording.token_id.values]
    return model, fed, recording


# --------------------------------------------------------------------------------------
# Statistics


def test_statistic_is_the_norm_over_tokens(tiny) -> None:
    """On every architecture, over a padded batch."""
    texts = helpers.random_ids(30, 11)
    got = flocking.statistic(flocking.record(tiny, texts, progress=False))
    for number, text in enumerate(texts):
        for layer, r in relative(tiny, text).items():
            here = got.sel(sequence=number, layer=layer)
            np.testing.assert_allclose(here.values[: r.shape[1]], norm(r), rtol=1e-4, atol=1e-6)
            assert here.tokens.item() == len(text)
    assert got.dims == ("sequence", "layer", "neuron")
    assert got.dtype == np.float64


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (1, 25), (9, 33), (0, 1)])
def test_statistic_of_a_range(recorded: tuple, start: int, stop: int) -> None:
    model, ids, recording = recorded
    got = flocking.statistic(recording, start=start, stop=stop)
    for number, text in enumerate(ids):
        for layer, r in relative(model, text).items():
            here = got.sel(sequence=number, layer=layer)
            np.testing.assert_allclose(here, norm(r[start:stop]), rtol=1e-5)


@pytest.mark.parametrize("by", ["length", "window"])
def test_statistic_as_a_series(recorded: tuple, by: str) -> None:
    model, ids, recording = recorded
    got = flocking.statistic(recording, by=by, start=1)
    assert got.stop.values.tolist() == [9, 17, 25, 33, 41, 49]
    assert got.start.values.tolist() == ([1] * 6 if by == "length" else [1, 9, 17, 25, 33, 41])
    r = relative(model, ids[1])[0]  # 41 tokens: the last window is beyond its end
    here = got.sel(sequence=1, layer=0)
    for at, (start, stop) in enumerate(zip(got.start.values, got.stop.values, strict=True)):
        if stop <= 41:
            expected = norm(r[start:stop])
            np.testing.assert_allclose(here.isel(window=at), expected, rtol=1e-5)
            assert got.tokens.sel(sequence=1).values[at] == stop - start
        else:
            assert here.isel(window=at).isnull().all()


def test_statistic_of_phases(generated: tuple) -> None:
    model, fed, recording = generated
    for number, row in enumerate(fed):
        for layer, r in relative(model, row).items():
            where = {"sequence": number, "layer": layer}
            for phase, part in (("prompt", r[:17]), ("generation", r[17:])):
                got = flocking.statistic(recording, phase=phase).sel(where)
                np.testing.assert_allclose(got, norm(part), rtol=1e-4)
            got = flocking.statistic(recording, phase="generation", start=8, stop=24).sel(where)
            np.testing.assert_allclose(got, norm(r[25:41]), rtol=1e-4)
            whole = flocking.statistic(recording).sel(where)
            np.testing.assert_allclose(whole, norm(r), rtol=1e-4)


def test_a_range_without_tokens_is_nan_and_says_so(recorded: tuple) -> None:
    with pytest.warns(UserWarning, match="no token in this range"):
        got = flocking.statistic(recorded[2], start=41)
    assert got.isnull().any(("layer", "neuron")).values.tolist() == [False, True, True]
    chosen = flocking.select(got)
    assert chosen.any(("layer", "neuron")).values.tolist() == [True, False, False]
    assert np.isnan(flocking.jaccard(chosen, chosen)).values[1:].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3}, "start=3 is not an edge of a window: the nearest are at 0 and 1"),
        ({"stop": 40}, "stop=40 is not an edge of a window: the nearest are at 33 and 41"),
        ({"start": 17, "stop": 9}, "leave no token"),
        ({"phase": "generation"}, r"no phase 'generation': make it with record\(\.\.\., max_new"),
        ({"phase": "first"}, "phase='first': give 'prompt', 'generation' or nothing"),
        ({"by": "token"}, "by='token'"),
    ],
)
def test_statistic_refuses(recorded: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flocking.statistic(recorded[2], **options)


def test_prompts_of_one_token_have_a_generation_too() -> None:
    recording = helpers.record(helpers.proved("llama"), [[5]], window=8, max_new_tokens=20)
    with pytest.raises(ValueError, match="in a recording with a generation: give a phase"):
        flocking.statistic(recording, start=0, stop=8)
    got = flocking.statistic(recording, by="length", phase="generation")
    assert got.stop.values.tolist() == [8, 16, 19]


def test_positions_in_a_generation_need_the_phase(generated: tuple) -> None:
    with pytest.raises(ValueError, match="start=1 in a recording with a generation: give a phase"):
        flocking.statistic(generated[2], start=1)


def test_statistic_of_others(recorded: tuple) -> None:
    model, ids, recording = recorded
    got = flocking.statistic_of_others(flocking.statistic(recording))
    energy = [(relative(model, text)[1] ** 2).mean(0) for text in ids]
    for number in range(3):
        others = [energy[other] for other in range(3) if other != number]
        expected = np.sqrt(np.mean(others, axis=0))
        np.testing.assert_allclose(got.sel(sequence=number, layer=1), expected, rtol=1e-5)
    assert got.dims == ("sequence", "layer", "neuron")
    with pytest.raises(ValueError, match="expected two sequences or more, got 1"):
        flocking.statistic_of_others(flocking.statistic(recording.isel(sequence=[0])))


def test_weight_magnitude(tiny) -> None:
    """Against row norms of matrices that the identity was pushed through."""
    got = flocking.weight_magnitude(tiny)
    for block in flocking.feedforwards(tiny):
        rows = {}
        if block.kind == "experts":  # test_moe says what these are
            rows["up"] = row_norms(block.down).flatten().numpy()
        for name in ("up", "gate"):
            projection = getattr(block, name)
            if projection is not None and block.kind != "experts":
                with torch.no_grad():
                    zero = torch.zeros(1, width(projection)[0])
                    eye = torch.eye(width(projection)[0])
                    rows[name] = (projection(eye) - projection(zero)).norm(dim=0).numpy()
        if block.kind == "fused":
            both = rows["up"].reshape((-1, 2) if block.interleaved else (2, -1))
            expected = both.prod(1 if block.interleaved else 0)
        else:
            expected = rows["up"] * rows.get("gate", 1)
        here = got.sel(layer=block.layer).values[: block.d_ff]
        np.testing.assert_allclose(here, expected, rtol=1e-4)


# --------------------------------------------------------------------------------------
# Selections


def of(values: list, **coordinates: object) -> xr.DataArray:
    values = np.array(values)
    dims = ("sequence", "layer", "neuron")[-values.ndim :]
    return xr.DataArray(values, coordinates, dims)


def test_select_by_hand() -> None:
    s = of([[3.0, 1, 2, 0], [1, 1, 1, 1], [0, 5, 5, 5]])
    chosen = flocking.select(s, 0.5)
    assert chosen.values.tolist() == [
        [True, False, True, False],
        [True, True, False, False],  # ties go to the lowest index
        [False, True, True, False],
    ]
    assert chosen.dtype == bool
    assert chosen.density.item() == 0.5
    several = flocking.select(s, densities=[0.25, 1])
    assert several.dims == ("density", "layer", "neuron")
    assert several.sum("neuron").values.tolist() == [[1, 1, 1], [4, 4, 4]]
    np.testing.assert_array_equal(several.sel(density=0.25), flocking.select(s, 0.25))


def test_one_density_for_each_layer(recorded: tuple) -> None:
    """In every function that takes a density, as each layer alone with its density."""
    _, _, recording = recorded
    s = flocking.statistic(recording)
    kept = flocking.select(s, [0.25, 0.5])
    assert kept.sum("neuron").values.tolist() == [[40, 80]] * 3
    assert kept.density.to_series().to_dict() == {0: 0.25, 1: 0.5}
    drift = flocking.drift(recording, [0.25, 0.5])
    overlap = flocking.between_sequence_overlap(recording, iter([0.25, 0.5]))
    for layer, density in enumerate((0.25, 0.5)):
        one = recording.sel(layer=[layer])
        alone = flocking.select(s.sel(layer=[layer]), density)
        np.testing.assert_array_equal(kept.sel(layer=[layer]), alone)
        for together, alone in (
            (drift, flocking.drift(one, density)),
            (overlap, flocking.between_sequence_overlap(one, density)),
        ):
            for name, values in alone.items():
                np.testing.assert_array_equal(together[name].sel(layer=[layer]), values)
            assert together.density.sel(layer=layer).item() == density
    with pytest.raises(ValueError, match="expected one number, or one for each of 2 layers, got 3"):
        flocking.select(s, [0.25, 0.5, 0.75])
    with pytest.raises(TypeError, match="density='half': give a number, or one for each of 2"):
        flocking.select(s, "half")


@pytest.mark.parametrize("densities", [0.5, [], "0.5", ["half"]])
def test_densities_that_are_not_a_list_of_numbers_are_refused(
    generated: tuple, densities: object
) -> None:
    with pytest.raises(TypeError, match="give a list of numbers"):
        flocking.select(flocking.statistic(generated[2]), densities=densities)
    with pytest.raises(TypeError, match="give a list of numbers"):
        flocking.prompt_generation_overlap(generated[2], densities=densities)


def test_densities_are_compared_each_for_all_layers(generated: tuple) -> None:
    _, _, recording = generated
    prompt = flocking.statistic(recording, phase="prompt")
    several = flocking.select(prompt, densities=iter([0.25, 0.5]))
    overlap = flocking.prompt_generation_overlap(recording, densities=iter([0.25, 0.5]))
    for density in (0.25, 0.5):
        one = flocking.select(prompt, density)
        np.testing.assert_array_equal(several.sel(density=density), one)
        one = flocking.prompt_generation_overlap(recording, density)
        np.testing.assert_array_equal(overlap.sel(density=density), one)
    mixed = flocking.prompt_generation_overlap(recording, [0.25, 0.5])
    assert mixed.dims == ("sequence", "layer")
    np.testing.assert_array_equal(mixed.sel(layer=0), overlap.sel(density=0.25, layer=0))
    np.testing.assert_array_equal(mixed.sel(layer=1), overlap.sel(density=0.5, layer=1))


def test_select_against_sorting() -> None:
    random = np.random.default_rng(0)
    s = of(random.integers(0, 9, (4, 5, 33)).astype(float))  # full of ties
    for density in (0.1, 0.5, 0.7, 1.0):
        chosen = flocking.select(s, density)
        k = int(density * 33 + 1e-9)
        for row, mask in zip(s.values.reshape(-1, 33), chosen.values.reshape(-1, 33), strict=True):
            assert set(np.flatnonzero(mask)) == best(row, k)


def test_narrow_layers_keep_some_of_their_own_neurons() -> None:
    s = of([[0.0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]], d_ff=("layer", [2, 6]))
    assert flocking.select(s, 0.5).values.tolist() == [
        [True] + [False] * 5,
        [False] * 3 + [True] * 3,
    ]


@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan"), 0.01])
def test_densities_out_of_range_are_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density="):
        flocking.select(of([1.0, 2, 3]), density)
    with pytest.raises(ValueError, match="density="):
        flocking.select(of([1.0, 2, 3]), densities=[0.5, density])


def test_density_that_floating_point_would_round_down() -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert flocking.select(of(np.arange(100.0)), 0.29).sum() == 29


def test_jaccard_known_answers() -> None:
    a = of([[True, True, False, False]])
    assert flocking.jaccard(a, a).item() == 1
    assert flocking.jaccard(a, ~a).item() == 0
    assert flocking.jaccard(a, of([[False, True, True, False]])).item() == pytest.approx(1 / 3)
    assert np.isnan(flocking.jaccard(a, a & False).item())
    with pytest.raises(ValueError, match="b is not a selection"):
        flocking.jaccard(a, a.astype(float))
    with pytest.raises(ValueError, match=r"align|index"):
        flocking.jaccard(a.assign_coords(layer=[0]), a.assign_coords(layer=[1]))


def test_chance_jaccard_against_simulation() -> None:
    random = np.random.default_rng(0)
    for density in (0.25, 0.5):
        draws = [
            [set(random.permutation(200)[: int(200 * density)]) for _ in range(2)]
            for _ in range(400)
        ]
        simulated = np.mean([jaccard_of(a, b) for a, b in draws])
        assert flocking.chance_jaccard(density) == pytest.approx(simulated, abs=0.01)
    assert flocking.chance_jaccard([0.5, 1]) == [pytest.approx(1 / 3), 1]
    with pytest.raises(ValueError, match="density=0"):
        flocking.chance_jaccard(0)


def test_chance_jaccard_of_what_has_densities() -> None:
    statistic = of(np.arange(64.0)).expand_dims(layer=2)
    for density in (0.5, [0.5, 1.0]):
        known = flocking.select(statistic, density).density
        wanted = [pytest.approx(1 / 3), 1.0] if known.ndim else pytest.approx(1 / 3)
        for given in (known, known.values, torch.tensor(known.values)):
            assert flocking.chance_jaccard(given) == wanted
    assert flocking.chance_jaccard({0: 0.5, 1: 1.0}) == [pytest.approx(1 / 3), 1.0]
    for wrong in ("0.5", None, True, [None], ["0.5"]):
        with pytest.raises(TypeError, match=r"density=.*: give a number in \(0, 1\]"):
            flocking.chance_jaccard(wrong)


def test_the_oracle_keeps_as_many_of_each_expert() -> None:
    """As `select` does, and as many of each as the selection keeps; layers may be of two kinds."""
    random = np.random.default_rng(0)
    later = xr.DataArray(
        random.exponential(size=(3, 2, 24)),
        {"d_ff": ("layer", [24, 20]), "experts": ("layer", [4, 1])},
        ("sequence", "layer", "neuron"),
    )
    later[:, 1, 20:] = 0
    own = flocking.select(later, 0.5)
    np.testing.assert_allclose(flocking.captured_energy(own, later, of="oracle"), 1)
    uneven = own & (xr.DataArray(np.arange(24), dims="neuron") % 5 > 0)
    got = flocking.captured_energy(uneven, later, of="oracle")
    for sequence in range(3):
        for layer, parts in ((0, np.split(np.arange(24), 4)), (1, [np.arange(20)])):
            energy, mask = (each.values[sequence, layer] for each in (later**2, uneven))
            most = sum(np.sort(energy[part])[::-1][: mask[part].sum()].sum() for part in parts)
            wanted = energy[mask].sum() / most
            assert got[sequence, layer].item() == pytest.approx(wanted, rel=1e-12)


def test_captured_energy(recorded: tuple) -> None:
    model, ids, recording = recorded
    chosen = flocking.select(flocking.statistic(recording, stop=17), 0.25)
    later = flocking.statistic(recording, start=17, stop=33)
    got = flocking.captured_energy(chosen, later)
    ratio = flocking.captured_energy(chosen, later, of="oracle")
    for number, text in enumerate(ids):
        for layer, r in relative(model, text).items():
            energy = (r[17:33] ** 2).sum(0)
            kept = sum(energy[j] for j in best(norm(r[:17]), 40))
            most = sum(energy[j] for j in best(energy, 40))
            where = {"sequence": number, "layer": layer}
            assert got.sel(where).item() == pytest.approx(kept / energy.sum(), rel=1e-5)
            assert ratio.sel(where).item() == pytest.approx(kept / most, rel=1e-5)
    oracle = flocking.select(later, 0.25)
    np.testing.assert_allclose(flocking.captured_energy(oracle, later, of="oracle"), 1)


def test_random_selections_capture_the_density() -> None:
    random = np.random.default_rng(0)
    later = of(random.exponential(size=64))
    chosen = xr.concat([flocking.select(of(random.random(64)), 0.25) for _ in range(2000)], "draw")
    assert flocking.captured_energy(chosen, later).mean().item() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="of='some'"):
        flocking.captured_energy(chosen, later, of="some")
    with pytest.raises(ValueError, match="not a selection"):
        flocking.captured_energy(later, later)


# --------------------------------------------------------------------------------------
# Questions


def test_prompt_generation_overlap(generated: tuple) -> None:
    model, fed, recording = generated
    got = flocking.prompt_generation_overlap(recording, densities=[0.25, 0.5])
    for number, row in enumerate(fed):
        for layer, r in relative(model, row).items():
            for density, k in ((0.25, 40), (0.5, 80)):
                expected = jaccard_of(best(norm(r[:17]), k), best(norm(r[17:]), k))
                here = got.sel(sequence=number, layer=layer, density=density)
                assert here.item() == pytest.approx(expected, abs=0.03)  # a near-tie may flip
    assert got.dims == ("density", "sequence", "layer")


def test_between_sequence_overlap(recorded: tuple) -> None:
    """33 tokens are common: windows 1 to 17 against 17 to 33."""
    model, ids, recording = recorded
    got = flocking.between_sequence_overlap(recording, 0.5)
    rs = [relative(model, text) for text in ids]
    for a, b in itertools.product(range(3), repeat=2):
        for layer in (0, 1):
            first, second = best(norm(rs[a][layer][1:17]), 80), best(norm(rs[b][layer][17:33]), 80)
            expected = pytest.approx(jaccard_of(first, second))
            if a == b:
                assert got.within.sel(sequence=a, layer=layer).item() == expected
                assert np.isnan(got.between.sel(sequence=a, other=b, layer=layer).item())
            else:
                assert got.between.sel(sequence=a, other=b, layer=layer).item() == expected
    coarse = flocking.record(model, ids, window=64, progress=False)
    with pytest.raises(ValueError, match="fewer than a window"):
        flocking.between_sequence_overlap(coarse)
    equal = flocking.record(model, helpers.random_ids(20, 20), window=64, progress=False)
    with pytest.raises(ValueError, match="expected two full windows or more, got 1"):
        flocking.between_sequence_overlap(equal)


def test_halves_of_a_text_have_equally_many_tokens(recorded: tuple) -> None:
    """Windows of 16, 16 and 1 token: the last one is left out, not made half of a text."""
    model = recorded[0]
    ids = helpers.random_ids(34, 34)
    long, cut = (
        flocking.record(model, ids, window=16, max_tokens=n, progress=False) for n in (34, 33)
    )
    got, expected = map(flocking.between_sequence_overlap, (long, cut))
    np.testing.assert_allclose(got.within, expected.within)
    with pytest.raises(ValueError, match="expected two full windows or more, got 1"):
        flocking.between_sequence_overlap(
            flocking.record(model, helpers.random_ids(18, 18), window=16, progress=False)
        )


def test_drift(recorded: tuple) -> None:
    model, ids, recording = recorded
    got = flocking.drift(recording, 0.5, prompt_lengths=[1, 17, 25])
    assert got.distance.values.tolist() == [0, 8, 16, 24, 32, 40]
    for number, text in enumerate(ids):
        for layer, r in relative(model, text).items():
            for length, distance in itertools.product((1, 17, 25), got.distance.values.tolist()):
                here = got.sel(
                    sequence=number, layer=layer, prompt_length=length, distance=distance
                )
                later = r[length + distance : length + distance + 8]
                if len(later) < 8:
                    assert here.to_array().isnull().all()
                    continue
                energy = (later**2).sum(0)
                chosen, own = best(norm(r[:length]), 80), best(norm(later), 80)
                assert here.jaccard.item() == pytest.approx(jaccard_of(chosen, own), abs=1e-6)
                kept, most = (sum(energy[j] for j in s) / energy.sum() for s in (chosen, own))
                assert here.captured_energy.item() == pytest.approx(kept, rel=1e-5)
                assert here.oracle.item() == pytest.approx(most, rel=1e-5)
    assert flocking.drift(recording).prompt_length.values.tolist() == [1, 9, 17, 25, 33, 41]


def test_drift_refuses(recorded: tuple) -> None:
    with pytest.raises(ValueError, match="prompt_lengths=18 is not an edge"):
        flocking.drift(recorded[2], prompt_lengths=[18])
    with pytest.raises(ValueError, match="each must leave a prompt and a window"):
        flocking.drift(recorded[2], prompt_lengths=[49])
    short = flocking.record(recorded[0], helpers.random_ids(8), window=8, progress=False)
    with pytest.raises(ValueError, match="record with a smaller window"):
        flocking.drift(short)
    with pytest.raises(TypeError, match="expected a recording"):
        flocking.drift(recorded[2].energy)
