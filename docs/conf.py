"""Settings of the documentation site, which `make docs` builds into out/docs.

The source folder is the repository itself (`sphinx-build -c docs . out/docs`), so that links
between pages, notebooks, figures and code are the same on the site as in the repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no build may reach for the network
os.environ["MPLBACKEND"] = "agg"
HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE.parent),
    str(HERE / "_ext"),
]  # this checkout's package, not an installed one

import flocking  # noqa: E402

project = "flocking"
author = "The flocking developers"
project_copyright = "2026, the flocking developers"
version = release = flocking.__version__

# --------------------------------------------------------------------------------------
# What is read

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "commands",  # docs/_ext: the command line's reference
    "formulas",  # docs/_ext: formulas as MathML
    "gallery",  # docs/_ext: a page for each figure
    "notebooks",  # docs/_ext: notebooks without their progress bars
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "out", "build", "dist", "tests", "flocking", "docs/_*", "**/.*"]
# Captions of figures, which pages about them show.
exclude_patterns += ["figures/*.md"]
exclude_patterns += [
    f"docs/results/*/{name}.md"
    for name in ("loss_by_*", "scores", "sequence_overlap", "token_order")
]
templates_path = [str(HERE / "_templates")]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the committed outputs are shown; tests/test_notebooks.py runs them
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # would be loaded from a network

autosummary_generate = True
autodoc_typehints = "none"  # types are in the docstrings
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
nitpicky = True  # a reference to what is not there is an error

# Pages of names that are no longer there; autosummary makes those of the others.
for page in (HERE / "api").glob("flocking.*.rst"):
    if page.name.split(".")[1] not in flocking.__all__:
        page.unlink()

# --------------------------------------------------------------------------------------
# What is written

html_theme = "pydata_sphinx_theme"
html_title = "flocking"
html_static_path = ["_static"]
html_extra_path = ["_root"]
html_css_files = ["flocking.css"]
html_js_files = ["filter.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # is fetched, which browsers refuse for files on a disk
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 1,
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    # Their tables are as wide as a page can be.
    "secondary_sidebar_items": {
        "**": ["page-toc"],
        "docs/architectures": [],
        **{
            f"docs/{page.relative_to(HERE).with_suffix('').as_posix()}": []
            for page in HERE.glob("results/**/*.md")
        },
    },
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars: dict[str, list[str]] = {"docs/index": [], "docs/quick-start": []}
html_math_renderer = "mathml"
pygments_style = "default"
