"""What a twin says of itself."""

from __future__ import annotations

from dataclasses import replace

import helpers
import torch

import flocking


def shown(twin: object) -> list[str]:
    return repr(twin).split("\n")


def test_a_twin_begins_with_what_it_is() -> None:
    model = helpers.build("llama")
    modules = repr(model)
    twin = flocking.griffin(model, density=0.25, refresh=3)
    assert shown(twin)[:4] == [
        "GRIFFIN twin of a LlamaForCausalLM",
        "  selects by: method topk, density 0.25",
        "  selects again: after every 3 new tokens",
        "  keeps just now: nothing: generate will read a prompt and select",
    ]
    assert "\n".join(shown(twin)[4:]).startswith(modules.split("\n")[0])  # and the modules follow
    ids = torch.arange(1, 10)[None]
    twin.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert shown(twin)[3] == (
        "  keeps just now: 40 in each of 2 layers, of 160 neurons, selected from 9 tokens"
    )
    model.name_or_path = "/somewhere/mine"
    twin = flocking.griffin(model, density=[0.25, 0.5], scope="sequence")
    twin.generate(ids.repeat(2, 1), max_new_tokens=2, pad_token_id=0)
    assert shown(twin)[0] == "GRIFFIN twin of mine (LlamaForCausalLM)"
    assert shown(twin)[1:4] == [
        "  selects by: method topk, densities from 0.25 to 0.5",
        "  selects again: never",
        "  keeps just now: 40 to 80 in 2 layers, of 160 neurons, selected from 18 tokens, "
        "of each of 2 texts its own",
    ]


def test_its_html_is_escaped_and_keeps_the_modules() -> None:
    model = helpers.build("llama")
    model.name_or_path = "org/<script>alert(1)"
    text = flocking.griffin(model)._repr_html_()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<summary>modules</summary>" in text
    assert "down_proj" in text


def test_a_report_is_a_table() -> None:
    twin = flocking.griffin(helpers.build("mixtral"), refresh=2)
    twin.generate(torch.arange(1, 4)[None], max_new_tokens=6, pad_token_id=0)
    report = twin.report()
    rows = dict(report.rows())
    assert rows["parameters"] == f"{report.parameters:,}"
    share = report.active_parameters / report.parameters
    assert rows["active parameters"] == f"{report.active_parameters:,} ({share:.1%})"
    assert rows["refreshes"] == str(report.refreshes) != "0"
    assert "drafted tokens accepted" not in rows  # what there was none of is left out
    assert repr(report).startswith("Report of a twin")
    for name, text in rows.items():
        assert f"{name}</th>" in report._repr_html_()
        assert any(line.split() == [*name.split(), *text.split()] for line in shown(report))
    slow = dict(replace(report, selection_seconds=0.0123, copy_seconds=2.021).rows())
    assert slow["selecting neurons"] == "12.3 ms"
    assert slow["copying their weights"] == "2.02 s"


def test_a_report_counts_prompts_and_not_their_beams() -> None:
    model = helpers.build("mixtral")
    ids = torch.arange(1, 4)[None]
    found = set()
    for more in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        twin = flocking.griffin(model, scope="sequence")
        twin.generate(ids, max_new_tokens=2, pad_token_id=0, **more)
        report = twin.report()
        found.add((report.prefilled_tokens, report.unreached_experts))
    assert len(found) == 1


def test_a_selection_says_that_more_than_the_prompt_was_read() -> None:
    twin = flocking.griffin(helpers.build("llama"), refresh=4)
    ids = torch.arange(1, 10)[None]
    twin.generate(ids, max_new_tokens=3, pad_token_id=0)
    assert twin.selection.attrs["made_from"].endswith("the prompt had 9 tokens")
    twin.generate(ids, max_new_tokens=7, min_new_tokens=7, pad_token_id=0)
    told = twin.selection.attrs["made_from"]
    assert told.endswith("made from 13 tokens of the text, read so far")
