"""Looks at every link of the built site, without a network.

    python docs/check_links.py out/docs

Links within the site must lead to a file, and to an anchor in it. Nothing that a page loads
(styles, scripts, fonts, pictures) may come from elsewhere. Links that a reader may follow to
elsewhere are checked for their form alone.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src")}
LOADING_LINKS = {"stylesheet", "preload", "icon", "shortcut icon", "modulepreload"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one element refers to."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        for name in ("src", "href"):
            if name not in given:
                continue
            loads = (tag, name) in LOADED or given.get("rel", "").lower() in LOADING_LINKS
            (self.loaded if loads else self.links).add(given[name])


def problem_with(link: str, path: Path, loads: bool, pages: dict[Path, Page]) -> str:
    """What is wrong with a link of the page at `path`; empty if nothing is."""
    parts = urlsplit(link)
    if parts.scheme in {"data", "mailto", "javascript"}:
        return ""
    if parts.scheme or parts.netloc:
        if loads:
            return f"loads {link}"
        return "" if parts.scheme == "https" and "." in parts.netloc else f"{link} is no address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return f"{link} is not there"
    known = target not in pages or unquote(parts.fragment) in {"", *pages[target].anchors}
    return "" if known else f"{link} has no such anchor"


def problems_of(site: Path) -> list[str]:
    """What is wrong with the site's links, a line for each."""
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in files}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links | page.loaded):
            if problem := problem_with(link, path, link in page.loaded, pages):
                found.append(f"{path.relative_to(site)}: {problem}")
    for path in sorted(site.rglob("*.css")):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for url in re.findall(r"(?:url\(|@import\s+)['\"]?((?:https?:)?//[^'\")]+)", text):
            found.append(f"{path.relative_to(site)}: loads {url}")
    return found


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    site = Path(sys.argv[1])
    if not (site / "index.html").exists():
        print(f"{site} has no index.html: make docs builds the site.")
        return 2
    found = problems_of(site.resolve())
    for line in found:
        print(line)
    pages = sum("_static" not in path.parts for path in site.rglob("*.html"))
    print(f"{pages} pages, {len(found)} problems with links")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
