"""A page for each committed figure: the picture, its caption, and the code behind it.

``figures/NAME.json`` has the caption, and ``flocking.experiments`` the two functions: the
experiment, which computes the numbers, and the drawing. Pages are written into ``docs/gallery``,
which is not committed; the directive ``{thumbnails}`` makes the overview.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from PIL import Image
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flocking.experiments import EXPERIMENTS
from flocking.experiments.figures import FIGURES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/gallery"
WIDTH = 480  # pixels of a thumbnail, for screens of twice the usual density

PAGE = """# {title}

{question}![{title}](../../figures/{name}.png)

{caption}

Numbers, settings and versions: {{download}}`{name}.json <../../figures/{name}.json>`; the picture
for print: {{download}}`{name}.svg <../../figures/{name}.svg>`.

## Make it

```bash
flocking figures --only {name} --out figures
```

runs the experiment and draws it, or only draws it where its numbers are there and up to date; with
`--model MODEL --texts a.txt --texts b.txt --out mine`, of your model and texts. In Python:

```python
import flocking
from flocking.experiments import EXPERIMENTS
from flocking.experiments.figures import FIGURES

model, tokenizer = flocking.load()
data = EXPERIMENTS["{name}"](model, tokenizer, flocking.passages())  # an xarray.Dataset
figure = FIGURES["{name}"](data)
```

## The code that draws it

`{drawing_file}`:

```python
{drawing}
```

## The code that computes its numbers

`{computing_file}`:

```python
{computing}
```
"""


def first_sentence(function: Callable[..., object]) -> str:
    """The first line of a docstring, without its full stop."""
    return (inspect.getdoc(function) or function.__name__).partition("\n")[0].removesuffix(".")


def source_of(function: Callable[..., object]) -> tuple[str, str]:
    """The file of a function, from the repository's root, and its code."""
    inner = inspect.unwrap(function)
    file = Path(inspect.getsourcefile(inner) or "")
    return file.relative_to(ROOT).as_posix(), inspect.getsource(inner).strip()


def shown() -> list[str]:
    """Figures that are committed with their numbers, in the order of the experiments."""
    return [name for name in EXPERIMENTS if (ROOT / f"figures/{name}.json").exists()]


def write_pages(app: Sphinx) -> None:
    """Write a page and a thumbnail for each figure, where they are not there or have changed."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        if old.stem not in shown():
            old.unlink()
    for name in shown():
        numbers = json.loads((ROOT / f"figures/{name}.json").read_text(encoding="utf-8"))
        title, question = first_sentence(FIGURES[name]), first_sentence(EXPERIMENTS[name])
        drawing_file, drawing = source_of(FIGURES[name])
        computing_file, computing = source_of(EXPERIMENTS[name])
        page = PAGE.format(
            name=name,
            title=title,
            question="" if question == title else f"{question}.\n\n",
            caption=numbers["attrs"]["caption"],
            drawing_file=drawing_file,
            drawing=drawing,
            computing_file=computing_file,
            computing=computing,
        )
        written = FOLDER / f"{name}.md"
        if not written.exists() or written.read_text(encoding="utf-8") != page:
            written.write_text(page, encoding="utf-8")
        with Image.open(ROOT / f"figures/{name}.png") as picture:
            height = round(picture.height * WIDTH / picture.width)
            picture.convert("RGB").resize((WIDTH, height)).save(FOLDER / f"{name}.png")


class Thumbnails(SphinxDirective):
    """All figures, small, each a link to its page."""

    def run(self) -> list[nodes.Node]:
        """One container of containers, which the style sheet lays out side by side."""
        outer = nodes.container(classes=["thumbnails"])
        for name in shown():
            title = first_sentence(FIGURES[name])
            there = f"(gallery/{name}.md)"
            text = f"[![{title}](gallery/{name}.png)]{there}\n\n[{title}]{there}"
            inner = nodes.container(classes=["thumbnail"])
            self.state.nested_parse(StringList(text.splitlines(), "gallery"), 0, inner)
            outer += inner
        return [outer]


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for pages."""
    app.connect("builder-inited", write_pages)
    app.add_directive("thumbnails", Thumbnails)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
