"""The pages of the documentation agree with the code and with each other; nothing is built here.

`make docs` builds them, with every warning an error, and looks at the links of what was built.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
import xarray as xr
import yaml

import flocking
from flocking.recording import MOMENT_DIMS, Moments, Windows

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GALLERY = DOCS / "gallery"  # made by `make docs`
PAGES = sorted(
    path
    for path in [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks/README.md"]
    if not {GALLERY, DOCS / "api"} & {*path.parents}
    and not path.with_suffix(".json").exists()  # a figure's caption
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
named = pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)


def prose(page: Path) -> str:
    """The Markdown of a page or of a notebook, without its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace("[", "(").replace("]", ")"), text)


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower().strip()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


# --------------------------------------------------------------------------------------
# Links


@named
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./~#?=&%+-]*)?", link), link
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_relative_to(ROOT), link
        if GALLERY in target.parents:
            continue
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_references_of_the_other_kind_lead_somewhere(page: Path) -> None:
    """``[text][name]`` needs a line that says where `name` is."""
    text = prose(page)
    used = {name.lower() for name in re.findall(r"\]\[([^\]]+)\]", text)}
    assert used <= {name.lower() for name in re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE)}


@named
def test_rows_of_a_table_have_as_many_cells(page: Path) -> None:
    """A `|` in code ends a cell as well, and what comes after it is lost."""
    cells = 0
    for line in re.sub(r"\\\|", "", prose(page)).splitlines():
        cells = (cells or line.count("|")) if line.startswith("|") else 0
        assert not cells or line.count("|") == cells, line


def test_every_page_is_in_the_contents() -> None:
    listed = {DOCS / "index.md"}
    for page in DOCS.rglob("*.md"):
        for body in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL):
            for line in body.splitlines():
                if line and not line.startswith(":"):
                    name = re.sub(r".*<(.*)>", r"\1", line)
                    listed.add((page.parent / f"{name}.md").resolve())
    assert {page for page in PAGES if DOCS in page.parents} <= listed


def test_nothing_is_loaded_from_a_network() -> None:
    own = [path for path in DOCS.rglob("_*/**/*") if path.suffix in {".js", ".css", ".html"}]
    assert own
    for path in own:
        assert "http:" not in (text := path.read_text()), path
        assert "https:" not in text, path
        assert "//" not in re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE), path


# --------------------------------------------------------------------------------------
# The code that pages speak of


def test_the_reference_has_every_public_name_once() -> None:
    text = (DOCS / "api.md").read_text()
    assert sorted(re.findall(r"^   (\w+)$", text, re.MULTILINE)) == sorted(flocking.__all__)


def test_every_figure_that_is_shown_has_code_and_a_caption() -> None:
    from flocking.experiments import EXPERIMENTS
    from flocking.experiments.figures import FIGURES

    assert {*EXPERIMENTS} == {*FIGURES}
    for name in EXPERIMENTS:
        for suffix in (".png", ".svg"):
            assert (ROOT / f"figures/{name}{suffix}").exists()
        assert json.loads((ROOT / f"figures/{name}.json").read_text())["attrs"]["caption"]


def functions_named(text: str) -> set[str]:
    return set(re.findall(r"(?<![/\w.-])flocking\.(?!ipynb|my_measure)(\w+)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_functions_that_pages_name_are_there(page: Path) -> None:
    rooms = {path.stem for path in (ROOT / "flocking").iterdir()}
    known = {*flocking.__all__, *rooms, "__version__", "__all__", "egg"}
    if page.name != "CHANGELOG.md":  # which names what once was
        assert functions_named(page.read_text(encoding="utf-8")) <= known


def template(node: ast.expr) -> str:
    """The text of a string in the code, with … for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def test_errors_are_said_by_the_code() -> None:
    messages = re.findall(r"^### .*?^```text\n(.*?)\n```", (DOCS / "errors.md").read_text(), 24)
    assert len(messages) > 60
    said = [
        template(node)
        for path in (ROOT / "flocking").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    for message in messages:
        fragments = map(re.escape, filter(None, re.split("…+", message)))
        pattern = re.compile(".*".join(fragments), re.DOTALL)
        assert any(pattern.search(text) for text in said), message


def tiny(embedded: tuple, layers: int) -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase]:
    """In the embedded model's place: its tokenizer, and little else."""
    tokenizer = embedded[1]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    tokens = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = tf.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **tokens)
    tf.set_seed(42)
    model = tf.LlamaForCausalLM(config).eval()
    model.name_or_path = embedded[0].name_or_path
    return model, tokenizer


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("quick-start", 30),
        ("recording", 2),
        ("exploring", 2),
        ("griffin", 2),
        ("decoding", 2),
        ("evaluation", 2),
        ("export", 2),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of compilers about themselves
def test_the_python_of_a_page_runs(
    name: str, layers: int, embedded: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tiny(embedded, layers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr("flocking.pruning.graphs._COMPILER", "eager")
    monkeypatch.setattr(flocking, "load", lambda: subject, raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        if "import xllamacpp" not in block:  # which few have; tests/pruning/test_llama_cpp.py does
            exec(block, names)


# --------------------------------------------------------------------------------------
# The worked example of docs/mathematics.md


def recording_of(r: list[list[float]], window: int, lengths: list[float]) -> xr.Dataset:
    """A recording of one text and layer from relative activations (token, neuron)."""
    z = np.array(r) * np.array(lengths)[:, None]
    tokens, d_ff = z.shape
    numbers = np.concatenate([[0], 1 + np.arange(tokens - 1) // window])
    moments = Moments.zeros(1, numbers[-1] + 1, d_ff)
    norm, l1 = moments.update(
        torch.tensor(z, dtype=torch.float32)[None], Windows.of(torch.tensor(numbers)[None])
    )
    return xr.Dataset(
        {
            "energy": (MOMENT_DIMS, moments.energy[:, None].numpy()),
            "mass": (MOMENT_DIMS, moments.mass[:, None].numpy()),
            "norm": (("sequence", "layer", "token"), norm[:, None].numpy()),
            "l1": (("sequence", "layer", "token"), l1[:, None].numpy()),
            "tokens": (("sequence", "window"), np.bincount(numbers)[None]),
        },
        {
            "window": np.arange(numbers[-1] + 1),
            "phase": ("window", ["first"] + ["prompt"] * int(numbers[-1])),
            "start": ("window", [0, *range(1, tokens, window)]),
            "d_ff": ("layer", [d_ff]),
            "token_window": (("sequence", "token"), numbers[None]),
        },
    )


def table_of(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page."""
    text = (DOCS / "mathematics.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def vector(cell: str) -> list[float]:
    return [float(number) for number in cell.strip("()").split(",")]


def test_the_table_of_the_worked_example_is_its_own_arithmetic() -> None:
    rows = table_of("The example: four neurons, six tokens")
    assert len(rows) == 6
    for _, z, length, r in rows:
        assert math.hypot(*vector(z)) == float(length)
        assert np.abs(np.array(vector(z)) / float(length) - 0).round(3).tolist() == vector(r)


def test_the_worked_example_is_what_flocking_gives() -> None:
    rows = table_of("The example: four neurons, six tokens")
    lengths = [float(row[2]) for row in rows]
    r = [[abs(value) / float(length) for value in vector(z)] for _, z, length, _ in rows]
    whole = recording_of(r, 3, lengths)
    text = whole.isel(window=slice(2), token=slice(4))
    other = [[0, 0, 1, 0], [0, 0, 0.6, 0.8], [0.6, 0, 0.8, 0], [0, 0, 0.8, 0.6]]
    pair = xr.concat([text, recording_of(other, 3, [9, 1, 2, 3])], "sequence", data_vars="all")

    prompt, later = flocking.statistic(whole, stop=4), flocking.statistic(whole, start=4)
    kept = flocking.select(prompt, density=0.5)
    hindsight = flocking.select(later, density=0.5)
    assert np.flatnonzero(kept).tolist() == [0, 1]
    assert np.flatnonzero(hindsight).tolist() == [0, 3]
    given = {
        "consistency": flocking.consistency(text),
        "chance": flocking.chance_consistency(text),
        "flocking score": flocking.flocking_score(text),
        "effective neurons": flocking.effective_neurons(text),
        "between two texts": flocking.between_consistency(pair)[0, 1],
        "specificity": flocking.specificity(pair)[0, 1],
        "statistic of neuron 0": prompt[..., 0],
        "statistic of neuron 3": prompt[..., 3],
        "captured energy": flocking.captured_energy(kept, later),
        "of the oracle's": flocking.captured_energy(kept, later, of="oracle"),
        "overlap": flocking.jaccard(kept, hindsight),
        "chance overlap": flocking.chance_jaccard(0.5),
    }
    written = {row[0]: row[1] for row in table_of("All numbers")}
    assert {name: f"{np.asarray(value).item():.3f}" for name, value in given.items()} == written


def test_the_text_of_the_worked_example_has_the_same_numbers() -> None:
    text = (DOCS / "mathematics.md").read_text(encoding="utf-8").partition("## All numbers")[0]
    for name, number, _ in table_of("All numbers"):
        assert number in text, name
    r = np.array([[0.8, 0.6, 0, 0], [0.6, 0.8, 0, 0], [0.8, 0, 0, 0.6]])
    cosines = [f"{a @ b:.2f}" for a, b in itertools.combinations(r, 2)]
    assert all(f"= {cosine}" in text for cosine in cosines)


# --------------------------------------------------------------------------------------
# What machines read


def test_the_citation_is_valid() -> None:
    """By the format's rules (Citation File Format 1.2.0): what must be there, and what may."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == flocking.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
    assert citation["message"]
    assert citation["title"]
    for author in citation["authors"]:
        assert {*author} <= {"name"} or {*author} <= {"family-names", "given-names"}
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= {*paper}
    assert [author["family-names"] for author in paper["authors"]] == ["Dong", "Chen", "Chi"]


def test_entries_for_bibtex_agree_with_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entries = re.findall(r"```bibtex\n(.*?)```", (DOCS / "citing.md").read_text(), re.DOTALL)
    paper, software = (
        dict(re.findall(r"^  (\w+) = {(.*?)},?$", entry, re.MULTILINE)) for entry in entries
    )
    (reference,) = citation["references"]
    assert paper["title"].translate({ord("{"): None, ord("}"): None}) == reference["title"]
    assert int(paper["year"]) == reference["year"]
    assert paper["url"] == reference["url"]
    names = [f"{a['family-names']}, {a['given-names']}" for a in reference["authors"]]
    assert paper["author"] == " and ".join(names)
    assert software["version"] == citation["version"]
    assert software["title"] == citation["title"]
    for entry in entries:
        assert entry.count("{") == entry.count("}")


def test_packages_of_the_site_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    for requirement in project["optional-dependencies"]["docs"]:
        name, bound = requirement.split(">=")
        pin = next(pinned[n] for n in (name, name.replace("-", "_")) if n in pinned)
        numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (pin, bound)]
        assert numbers[0] >= numbers[1], name
