"""A saved page in a real browser: its numbers are Python's, and it loads nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import xarray as xr

import flocking
from flocking import analysis

_CONTROL = """
const [name, value] = arguments;
const labels = [...document.querySelectorAll("label")];
const label = labels.find((one) => one.textContent.startsWith(name));
const control = label.querySelector("input, select");
if (control.type === "checkbox") control.click();
else {
  control.value = value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
  control.dispatchEvent(new Event("change", { bubbles: true }));
}
return control.value;
"""
_NUMBERS = """
return Object.fromEntries([...document.querySelectorAll("dd")]
  .map((one) => [one.dataset.number, one.dataset.value]));
"""


class Page:
    """A saved page, and what a person does with it."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.browser = browser
        browser.get_log("browser")  # what others left
        browser.get(path.resolve().as_uri())
        self.script = browser.execute_script
        self.wait(0)

    def wait(self, text: int, layer: int | None = None) -> None:
        wanted = f"{text}/" + ("" if layer is None else str(layer))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            found = self.script(
                "return document.querySelector('.flocking-explorer')?.dataset.ready ?? ''"
            )
            if found == wanted or (layer is None and found.startswith(wanted)):
                return
            time.sleep(0.05)
        raise AssertionError(f"waited for {wanted}, and there is {found!r}")

    def set(self, name: str, value: object = None) -> str:
        return self.script(_CONTROL, name, str(value))

    def show(self, text: int, layer: int) -> None:
        self.set("Text", text)
        self.set("Layer", layer)
        self.wait(text, layer)

    def numbers(self) -> dict[str, str]:
        return self.script(_NUMBERS)

    def readout(self) -> dict[str, str]:
        return self.script("return {...document.querySelector('.readout').dataset}")

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.script(
                "document.querySelector('canvas').dispatchEvent("
                "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
                key,
            )


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[[xr.Dataset], Page]]:
    """Opens a recording's page; at the end, the console is empty and nothing was loaded."""
    pages = []

    def opening(recording: xr.Dataset) -> Page:
        pages.append(Page(browser, flocking.explore(recording).save(tmp_path / "page.html")))
        return pages[-1]

    yield opening
    loaded = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert pages
    assert loaded == 0
    assert browser.get_log("browser") == []
    browser.get("about:blank")


def check_numbers(page: Page, recording: xr.Dataset, layer: int, first: int, last: int) -> None:
    """What the page shows of a text and layer is what the public measures give."""
    one = recording.isel(layer=[layer])
    one = one.isel(window=np.flatnonzero(one.tokens.values[0] > 0))
    there = one.sizes["window"]
    prompt = flocking.statistic(one.isel(window=slice(first, last)))
    for density in (0.5, 0.07, 0.29, 1.0):
        page.set("Density", density)
        shown = page.numbers()
        kept = flocking.select(prompt, density)
        assert int(shown["kept"]) == int(kept.sum())
        if last == there:
            assert "captured" not in shown
            assert "No later tokens" in page.text("dl")
            continue
        later = flocking.statistic(one.isel(window=slice(last, None)))
        own = flocking.select(later, density)
        expected = {
            "captured": flocking.captured_energy(kept, later),
            "missed": 1 - flocking.captured_energy(kept, later),
            "best": flocking.captured_energy(own, later),
            "jaccard": analysis.overlap_of(prompt, later, density),
            "chance": flocking.chance_jaccard(density),
            "density": density,
        }
        for name, value in expected.items():
            assert float(shown[name]) == pytest.approx(
                np.asarray(value).item(), rel=1e-9, abs=1e-12
            )
        bars = page.script("return document.querySelector('svg').getAttribute('aria-label')")
        windows = [
            float(
                flocking.captured_energy(kept, flocking.statistic(one.isel(window=[number]))).item()
            )
            for number in range(last, there)
        ]
        told = [float(number) for number in bars.rpartition(": ")[2].split(", ")]
        assert told == pytest.approx(windows, rel=1e-3)


@pytest.mark.parametrize("model", ["llama", "mixtral", "ties", "narrow"])
def test_numbers_are_those_of_the_measures(
    model: str, recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]
) -> None:
    if model == "ties":  # many neurons with the same energy, and many with none
        recording = recording.assign(energy=(recording.energy * 4).round() / 4)
    if model == "narrow":  # where 0.29 * 100 is less than 29 in binary
        energy = recording.energy.copy()
        energy[{"layer": 0, "neuron": slice(100, None)}] = 0
        recording = recording.assign(energy=energy).assign_coords(d_ff=("layer", [100, 160]))
    if model == "mixtral":
        ids = helpers.random_ids(41, 30, seed=4)
        recording = helpers.record(helpers.proved(model), ids, window=8, relative=[1])
    page = opened(recording)
    for text, layer, first, last in ((0, 0, 0, 3), (1, 1, 2, 4), (1, 0, 1, 5), (0, 1, 0, 2)):
        page.show(text, layer)
        page.set("Prompt from", first)
        page.set("Prompt up to", last)
        check_numbers(page, recording.isel(sequence=[text]), layer, first, last)
    page.set("Prompt up to", 1000)
    one = recording.isel(sequence=[0])
    check_numbers(page, one, 1, 0, int((one.tokens.values > 0).sum()))
    page.set("Prompt from", 3)  # beyond the end of the prompt: that moves, too
    page.set("Prompt up to", 2)
    assert page.numbers()["prompt"] == "1 to 8"


def test_each_cell_is_read(recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]) -> None:
    page = opened(recording)
    page.show(1, 1)
    page.set("Density", 0.3)
    page.press("Home", *["ArrowRight"] * 7, *["PageDown"] * 2, "ArrowDown")
    one = recording.isel(sequence=[1], layer=[1])
    statistic = flocking.statistic(one, phase="prompt")  # the default, where there is a generation
    kept = flocking.select(statistic, 0.3)
    relative = recording.relative.isel(sequence=[1], layer=[1], token=21).astype(np.float64)
    shown = page.readout()
    assert (shown["row"], shown["token"], shown["neuron"]) == ("21", "21", "7")
    assert float(shown["relative"]) == float(relative[..., 7].item())
    assert bool(int(shown["kept"])) == bool(kept[..., 7].item())
    assert float(shown["statistic"]) == pytest.approx(statistic[..., 7].item(), rel=1e-12)
    captured = flocking.captured_energy(kept, relative).item()
    assert float(shown["captured"]) == pytest.approx(captured, rel=1e-9)
    here = page.script("return [...document.querySelectorAll('.here')].map((e) => e.dataset.token)")
    assert here == ["21"]
    page.set("Rows", "windows")
    shown = page.readout()
    energy = recording.energy.values[1, 1, 3, 7]  # tokens 17 to 24
    assert (shown["row"], shown["token"]) == ("3", "17")
    assert float(shown["relative"]) == pytest.approx(np.sqrt(energy / 8), rel=1e-6)


def test_columns_are_sorted(recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]) -> None:
    page = opened(recording)
    page.show(0, 1)
    statistic = flocking.statistic(recording.isel(sequence=0, layer=1), phase="prompt").values
    by = {"position": np.arange(160), "energy": np.argsort(-statistic, kind="stable")}
    for name, expected in by.items():
        page.set("Sort neurons by", name)
        page.press("Home")
        assert int(page.readout()["neuron"]) == expected[0]
        page.press("ArrowRight", "ArrowRight", "ArrowRight")
        assert int(page.readout()["neuron"]) == expected[3]
        page.press("End")
        assert int(page.readout()["neuron"]) == expected[-1]
    page.set("Sort neurons by", "specific")
    page.press("Home")
    shares = []
    for _ in range(160):
        shares.append(float(page.text(".readout").partition("specificity ")[2].split(" ")[0]))
        page.press("ArrowRight")
    assert shares == sorted(shares, reverse=True)
    whole = flocking.specificity(recording).isel(sequence=0, layer=1).mean().item()
    assert sum(shares) == pytest.approx(whole, rel=1e-3)


def test_texts_stay_texts(recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]) -> None:
    page = opened(recording)
    page.show(2, 0)
    words = page.script(
        "return [...document.querySelectorAll('.tokens > span')].map((e) => e.textContent)"
    )
    expected = recording.token_text.values[2, :45].tolist()
    marks = {" ": "\u200b\u00b7", "\n": "\u21b5\n"}
    assert words == ["".join(marks.get(one, one) for one in word) for word in expected]
    assert page.script("return document.querySelectorAll('img, i').length") == 0
    options = page.script("return [...document.querySelector('select').options].map((e) => e.text)")
    assert options == ["a: one", "b: </title><script>", "<i>: three"]


def test_all_is_reached_by_keys_and_has_a_name(
    recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]
) -> None:
    from selenium.webdriver.common.keys import Keys

    page = opened(recording)
    reached = []
    for _ in range(14):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.browser.switch_to.active_element)
    names = [element.accessible_name for element in reached]
    for name in ("Text", "Layer", "Prompt from", "Prompt up to", "Density", "Sort neurons by"):
        assert any(found.startswith(name) for found in names), name
    assert any(found.startswith("Picture of relative activations") for found in names)
    slider = next(e for e in reached if e.accessible_name.startswith("Density"))
    before = page.numbers()["kept"]
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert (before, page.numbers()["kept"]) == ("80", "83")
    layer = next(e for e in reached if e.accessible_name.startswith("Layer"))
    layer.send_keys(Keys.END)
    page.wait(0, 1)
    canvas = page.browser.find_element("tag name", "canvas")
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.readout()["neuron"] == "1"
    live = page.script("return document.querySelector('.readout').getAttribute('aria-live')")
    assert live == "polite"


def test_the_picture_shows_the_values_under_the_pointer(
    recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page = opened(recording)
    page.show(1, 0)
    canvas = page.browser.find_element("tag name", "canvas")
    width, height = page.script(
        "const c = document.querySelector('canvas'); return [c.clientWidth, c.clientHeight]"
    )
    x, y = 76 + (width - 76) * 40.5 / 160, 16 + 420 * 30.5 / 49  # neuron 40, token 30
    ActionChains(page.browser).move_to_element_with_offset(
        canvas, round(x - width / 2), round(y - height / 2)
    ).perform()
    shown = page.readout()
    assert (shown["neuron"], shown["token"]) == ("40", "30")
    image = page.script(
        "const c = document.querySelector('canvas'), d = devicePixelRatio;"
        "const [x, y] = arguments;"
        "return [...c.getContext('2d').getImageData(x * d, y * d, 1, 1).data].slice(0, 3)",
        76 + (width - 76) * 100.5 / 160,
        16 + 420 * 11.5 / 49,
    )
    import seaborn as sns

    values = recording.relative.values[1, 0, :49].astype(np.float32)
    shade = min(255, int(256 * values[11, 100] / np.percentile(values, 99)))
    colour = np.round(np.array(sns.color_palette("rocket", as_cmap=True)(shade)[:3]) * 255)
    assert np.abs(np.array(image) - colour).max() <= 2


def test_without_activations_by_token_rows_are_windows(
    recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]
) -> None:
    page = opened(recording.drop_vars("relative").isel(sequence=[0]))
    assert page.text(".status") == "Layer 0 has no rows of tokens: rows are windows."
    assert "keeps" in page.text(".notes")
    assert "needs a recording of two texts or more" in page.text(".notes")
    page.press("ArrowDown", "ArrowDown")
    assert page.text(".readout").startswith("tokens 9 to 16 ")
    check_numbers(page, recording.isel(sequence=[0]), 0, 0, 5)


def test_one_token_has_no_later_ones(opened: Callable[[xr.Dataset], Page]) -> None:
    one = helpers.record(helpers.proved("llama"), [[5]])
    page = opened(one)
    page.set("Prompt up to", 0)
    page.set("Prompt from", 1)
    assert page.numbers()["prompt"] == "0 to 0"
    assert "No later tokens: choose a shorter prompt." in page.text("dl")
    page.press("ArrowDown", "PageUp", "End", "Home")
    assert page.readout()["token"] == "0"


def test_a_text_without_a_token_in_the_windows_says_so(
    opened: Callable[[xr.Dataset], Page],
) -> None:
    recording = helpers.record(helpers.proved("llama"), helpers.random_ids(30, 12), window=8)
    page = opened(recording.isel(window=slice(3, None)))
    before = page.numbers()
    page.set("Text", 1)
    deadline = time.monotonic() + 20
    while "no token" not in page.text("[role=status]") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert page.text("[role=status]") == "This text has no token in the windows of this recording."
    assert page.numbers() == {}
    page.set("Text", 0)
    while page.numbers() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert page.numbers() == before


def test_experts_without_a_token_do_not_overlap(opened: Callable[[xr.Dataset], Page]) -> None:
    """They would keep their first neurons, before and after."""
    recording = helpers.record(helpers.proved("mixtral"), helpers.random_ids(24, seed=4), window=8)
    energy = recording.energy.copy()
    expert = recording.expert.isel(layer=0).values
    energy[{"layer": 0, "neuron": np.flatnonzero(expert == 1)}] = 0
    recording = recording.assign(energy=energy)
    page = opened(recording)
    page.show(0, 0)
    page.set("Prompt from", 0)
    page.set("Prompt up to", 2)
    check_numbers(page, recording, 0, 0, 2)


def test_a_part_is_enlarged_and_follows_the_keys(
    recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]
) -> None:
    page = opened(recording)
    page.show(0, 0)
    page.set("Neurons in view", 64)
    page.set("Rows in view", 24)
    page.press("End", *["PageDown"] * 3)
    first = "return [...document.querySelectorAll('input[type=range]')].at(-1).value"
    assert page.script(first) == "96"
    page.set("First neuron", 10)
    assert page.readout()["neuron"] == "73"  # the last that is in view
    assert page.readout()["row"] == "30"
    page.press(*["ArrowLeft"] * 70)
    assert page.readout()["neuron"] == "3"
    assert int(page.script(first)) <= 3
    page.set("Neurons in view", 0)
    assert page.script(first) == "0"
    page.set("Dim what is not kept")


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_window(
    width: int, recording: xr.Dataset, opened: Callable[[xr.Dataset], Page]
) -> None:
    page = opened(recording)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(0.2)
    wide = page.script("return document.documentElement.scrollWidth")
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width


def test_a_page_that_was_made_smaller_says_so_and_is_right(
    recording: xr.Dataset, opened: Callable[[xr.Dataset], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flocking.exploring.page.MOST", 120_000)
    page = opened(recording)
    notes = page.text(".notes")
    assert "Values of rows are rounded to 255 steps" in notes
    page.show(0, 1)
    tokens = int(notes.partition("root mean square of up to ")[2].split(" ")[0])
    relative = recording.relative.values[0, 1, :41].astype(np.float64)
    step = 0.51 / 255 * np.sqrt(relative.max())
    page.press("Home", *["ArrowRight"] * 9)
    seen = 0
    for _ in range(page.script("return document.querySelectorAll('.tokens > span').length")):
        shown = page.readout()
        here = page.script(
            "return [...document.querySelectorAll('.here')].map((e) => +e.dataset.token)"
        )
        assert len(here) <= tokens
        if int(shown["row"]) == seen:  # (the last row stays)
            values = relative[here, int(shown["neuron"])]
            found = np.sqrt(float(shown["relative"]))
            assert found == pytest.approx(np.sqrt(np.sqrt((values**2).mean())), abs=step)
            seen += 1
        page.press("ArrowDown")
    assert seen >= 41 / tokens
    one = recording.isel(sequence=0, layer=1)
    kept = flocking.select(flocking.statistic(one, phase="prompt"), 0.5)
    captured = flocking.captured_energy(kept, flocking.statistic(one, phase="generation"))
    assert float(page.numbers()["captured"]) == pytest.approx(captured.item(), rel=1e-6)
