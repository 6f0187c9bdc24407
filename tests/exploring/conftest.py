"""A recording with everything, and a browser where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import helpers
import in_browser
import pytest
import xarray as xr

WORDS = [
    "<b>",
    "</script>",
    "<img src=x onerror=alert(1)>",
    "&amp;",
    " a",
    "\n",
    "\u4e2d",
    "\u2028",
]


@pytest.fixture(scope="session")
def recording() -> xr.Dataset:
    """Three texts in windows of 8, with everything; tokens that HTML would read as its own."""
    ids = helpers.random_ids(41, 49, 45, seed=4)
    made = helpers.record(
        helpers.proved("llama"), ids, window=8, prompt_tokens=33, relative=True
    ).assign_coords(sequence=["a", "b", "<i>"])
    words = made.token_id.astype(object).copy()
    words.values[:] = [
        [WORDS[n % len(WORDS)] if n >= 0 else "" for n in row] for row in words.values
    ]
    return made.assign_coords(
        token_text=words, text=("sequence", ["one", "</title><script>", "three"])
    )


@pytest.fixture(scope="session")
def browser(chromium: None) -> Iterator:
    """Headless Chromium, for several pages one after the other."""
    with in_browser.chromium() as page:
        yield page
