"""The harness's plug-in, on tasks of this file's own, read from local JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ggufs
import helpers
import pytest

import flocking

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from flocking.evaluation.harness import GriffinLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to fail on

CHOICES = [
    ("The starlings rose from the reeds and", [" turned as one.", " ate the moon."], 0),
    ("To boil an egg, first", [" paint the kettle.", " bring water to a boil."], 1),
    ("She opened the umbrella because it", [" was raining hard.", " had eaten."], 0),
]


def asked(kind: str, *arguments: Any, task: str = "mine") -> list[Instance]:
    return [Instance(kind, {}, args, n, metadata=(task, n, 1)) for n, args in enumerate(arguments)]


PAIRS = [(context, choice) for context, choices, _ in CHOICES for choice in choices]


@pytest.fixture(scope="module")
def plain(shallow: tuple) -> HFLM:
    model, tokenizer = shallow
    return HFLM(pretrained=model, tokenizer=tokenizer)


def griffin_lm(subject: tuple, **options: Any) -> GriffinLM:
    model, tokenizer = subject
    return GriffinLM(pretrained=model, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("protocol", ["context", "last-token"])
def test_at_density_1_likelihoods_are_the_harnesss_own(
    shallow: tuple, plain: HFLM, protocol: str
) -> None:
    lm = griffin_lm(shallow, density=1.0, protocol=protocol)
    expected = plain.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    got = lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for (one, greedy), (other, other_greedy) in zip(got, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy


@pytest.mark.parametrize("protocol", ["context", "last-token"])
def test_likelihoods_are_those_of_score(shallow: tuple, protocol: str) -> None:
    """Whatever they are asked with: alone, together, in another order."""
    model, _ = shallow
    lm = griffin_lm(shallow, protocol=protocol)
    together = lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    backwards = lm.loglikelihood(asked("loglikelihood", *PAIRS[::-1]), disable_tqdm=True)
    assert backwards[::-1] == together
    twin = flocking.griffin(model)
    for pair, (got, _) in zip(PAIRS, together, strict=True):
        assert lm.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True) == [
            together[PAIRS.index(pair)]
        ]
        context, later = lm._encode_pair(*pair)
        expected = flocking.score(twin, context, later, protocol=protocol)
        assert got == pytest.approx(float(expected.sum()), abs=1e-3)


def test_says_what_share_was_pruned(shallow: tuple) -> None:
    lm = griffin_lm(shallow)
    lengths = [len(lm._encode_pair(*pair)[1]) for pair in PAIRS]
    lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    lm.loglikelihood(asked("loglikelihood", ("Is it? Answer:", " yes"), task="boolq"), True)
    share = lm.get_model_info()["pruned_share"]
    assert share == {"mine": pytest.approx(1 - len(PAIRS) / sum(lengths)), "boolq": 0}
    last = griffin_lm(shallow, protocol="last-token")
    last.loglikelihood(asked("loglikelihood", ("Is it? Answer:", " yes"), task="boolq"), True)
    assert last.get_model_info()["pruned_share"] == {"boolq": 1}


def test_refreshes_as_score_and_generate_do(embedded: tuple) -> None:
    """Whatever else is asked with the same context; and it says what was pruned."""
    model, tokenizer = embedded
    twin, lm = flocking.griffin(model, refresh=2), griffin_lm(embedded, refresh=2, batch_size=3)
    context = PAIRS[0][0]
    pairs = [(context, " one two three four five"), (context, " six seven"), *PAIRS]
    together = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    pruned = total = 0
    for pair, (got, _) in zip(pairs, together, strict=True):
        expected = flocking.score(twin, *lm._encode_pair(*pair))
        assert got == pytest.approx(float(expected.sum()), abs=1e-3)
        pruned, total = pruned + int(expected.pruned.sum()), total + len(expected)
    info = lm.get_model_info()
    assert info["pruned_share"] == {"mine": pytest.approx(pruned / total)}
    assert info["griffin"]["refresh"] == 2
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    (written,) = lm.generate_until(asked("generate_until", (context, options)), disable_tqdm=True)
    ids = tokenizer(context, return_tensors="pt")
    new = twin.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert written == tokenizer.decode(new, skip_special_tokens=True).partition("\n")[0]


def test_a_context_that_is_too_long_loses_its_beginning(shallow: tuple, plain: HFLM) -> None:
    model, tokenizer = shallow
    lm = GriffinLM(pretrained=model, tokenizer=tokenizer, density=1.0, max_length=32)
    short = HFLM(pretrained=model, tokenizer=tokenizer, max_length=32)
    pair = ("word " * 60, " and more of the same")
    (got,) = lm.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)
    (expected,) = short.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)
    assert got[0] == pytest.approx(expected[0], abs=1e-3)


def test_an_empty_context_is_the_prefix_token(shallow: tuple, plain: HFLM) -> None:
    lm = griffin_lm(shallow, density=1.0)
    pair = ("", "The sun rose")
    (got,) = lm.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)
    (expected,) = plain.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)
    assert got[0] == pytest.approx(expected[0], abs=1e-3)


def test_generation_is_the_twins_in_any_batch(embedded: tuple) -> None:
    model, tokenizer = embedded
    prompts = [context for context, _, _ in CHOICES]
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = asked("generate_until", *((prompt, dict(options)) for prompt in prompts))
    twin = flocking.griffin(model)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        new = twin.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).partition("\n")[0])
    for batch_size in (1, 3):
        lm = griffin_lm(embedded, batch_size=batch_size)
        assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_an_empty_prompt_is_named(shallow: tuple) -> None:
    requests = asked("generate_until", ("", {"until": ["\n"], "max_gen_toks": 8}))
    with pytest.raises(ValueError, match="mine, item 0: the prompt has no token that neurons"):
        griffin_lm(shallow).generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"protocol": "last"}, "protocol='last'"),
        ({"method": "best"}, "method='best'"),
        ({"density": 0}, "density=0"),
        ({"refresh": 0}, "refresh=0: give a whole number from 1 up"),
        ({"batch_size": "auto"}, "give a number"),
    ],
)
def test_refuses(shallow: tuple, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        griffin_lm(shallow, **options)


def test_refuses_rolling_likelihoods(shallow: tuple) -> None:
    with pytest.raises(ValueError, match=r"flocking\.perplexity"):
        griffin_lm(shallow).loglikelihood_rolling(asked("loglikelihood_rolling", ("text",)))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks as the harness defines them: choices, and generation."""
    data = tmp_path / "items.jsonl"
    rows = [
        {"context": context, "choices": [c.strip() for c in choices], "label": label}
        for context, choices, label in CHOICES
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    )
    (tmp_path / "own_choices.yaml").write_text(
        f"task: own_choices\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: choices\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "own_text.yaml").write_text(
        f"task: own_text\n{common}output_type: generate_until\n"
        'doc_to_text: "{{context}}"\ndoc_to_target: "{{choices[label]}}"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 6\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return tmp_path


def test_the_harness_runs_it_from_the_command_line(
    tasks: Path, shallow: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from typer.testing import CliRunner

    from flocking.cli import app

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    arguments = [
        "lm-eval",
        "run",
        "--model",
        "griffin",
        "--model_args",
        "pretrained=default,density=0.5,protocol=context",
        "--tasks",
        "own_choices,own_text",
        "--include_path",
        str(tasks),
        "--batch_size",
        "2",
        "--output_path",
        str(tasks / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (written,) = (tasks / "out").rglob("results*.json")
    results = json.loads(written.read_text())
    assert 0 <= results["results"]["own_choices"]["acc,none"] <= 1
    assert "own_text" in results["results"]
    assert results["config"]["griffin"]["density"] == 0.5
    assert 0 < results["config"]["pruned_share"]["own_choices"] < 1


def cached(lm: GriffinLM, file: Path) -> Any:
    """As ``--use_cache`` wraps it."""
    from lm_eval.api.model import CachingLM

    return CachingLM(lm, str(file))


SETTINGS: list[dict[str, Any]] = [
    {"density": 1.0},
    {"density": 0.1},
    {"density": 0.1, "protocol": "last-token"},
    {"density": 0.1, "method": "random", "seed": 0},
    {"density": 0.1, "method": "random", "seed": 1},
    {"density": 0.1, "method": "static", "calibration": ["The sun rose over the reeds."]},
    {"density": 0.1, "method": "static", "calibration": ["To boil an egg, bring water to a boil."]},
    {"method": "full"},
]


@pytest.fixture(scope="module")
def small(shallow: tuple) -> tuple:
    """A tiny model with a real tokenizer."""
    return helpers.build("llama", vocab_size=len(shallow[1])), shallow[1]


def test_the_harnesss_cache_keeps_settings_apart(small: tuple, tmp_path: Path) -> None:
    requests = asked("loglikelihood", *PAIRS[:2])
    alone = [griffin_lm(small, **each).loglikelihood(requests, True) for each in SETTINGS]
    assert len(set(map(str, alone[:-1]))) == len(SETTINGS) - 1  # they do differ
    for computed in (True, False):
        for each, expected in zip(SETTINGS, alone, strict=True):
            lm = griffin_lm(small, **each)
            assert cached(lm, tmp_path / "cache").loglikelihood(requests) == expected
            assert bool(lm.answered) == computed


def test_the_cache_follows_a_change_of_settings(small: tuple, tmp_path: Path) -> None:
    requests = asked("loglikelihood", *PAIRS[:2])
    lm = griffin_lm(small, density=1.0)
    both = cached(lm, tmp_path / "cache")
    first = both.loglikelihood(requests)
    lm.prune("topk", 0.1)
    second = both.loglikelihood(requests)
    lm.protocol = "last-token"
    third = both.loglikelihood(requests)
    assert len({str(each) for each in (first, second, third)}) == 3
    lm.protocol = "context"
    assert both.loglikelihood(requests) == second
    lm.prune("topk", 1.0)
    assert both.loglikelihood(requests) == first
    assert len(lm.answered) == 3 * len(requests)


def test_the_cache_keeps_models_apart(shallow: tuple, tmp_path: Path) -> None:
    tokenizer = shallow[1]
    requests = asked("loglikelihood", *PAIRS[:2])
    found = []
    for change in (0.0, 0.1):
        model = helpers.build("llama", vocab_size=len(tokenizer))
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] += change
        lm = GriffinLM(pretrained=model, tokenizer=tokenizer, density=1.0)
        found.append(cached(lm, tmp_path / "cache").loglikelihood(requests))
        assert found[-1] == lm.loglikelihood(requests, True)
    assert found[0] != found[1]


def test_what_load_refuses_is_refused(shallow: tuple, tmp_path: Path) -> None:
    helpers.build("llama", vocab_size=len(shallow[1])).base_model.save_pretrained(tmp_path)
    shallow[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights that are in no file \(lm_head.weight\)"):
        GriffinLM(pretrained=str(tmp_path), device="cpu")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        GriffinLM(pretrained=str(tmp_path / "none"))
    with pytest.raises(TypeError, match=r"model is a .*: give the model before its tokenizer"):
        GriffinLM(pretrained=shallow[1])


@pytest.mark.parametrize("inside", [False, True])
def test_a_gguf_file_is_a_model(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = ggufs.write(tmp_path / "birds.gguf", ggufs.tiny("llama"))
    options = {"density": 1.0, "device": "cpu"}
    if inside:
        lm = GriffinLM(pretrained=str(tmp_path), gguf_file="birds.gguf", **options)
    else:
        lm = GriffinLM(pretrained=str(file), **options)
    model, tokenizer = flocking.load(file)
    direct = GriffinLM(pretrained=model, tokenizer=tokenizer, density=1.0)
    request = Instance("loglikelihood", {}, ("birds of a", " feather"), 0, ("t", 0, 1))
    assert lm.loglikelihood([request], True) == direct.loglikelihood([request], True)


def test_is_declared_where_the_harness_will_look() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="lm_eval.models", name="griffin")
    assert found.load() is GriffinLM
