"""Notebooks as they were committed, but for progress bars, which say nothing once they are full."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx


def without_bars(app: Sphinx, tree: nodes.document) -> None:
    """Remove outputs that only a running notebook server could show."""
    for node in list(tree.findall(nodes.container)):
        if node.get("mime_type") == "application/vnd.jupyter.widget-view+json":
            bundle = node.parent
            bundle.parent.remove(bundle)


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at each page when it has been read."""
    app.connect("doctree-read", without_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
