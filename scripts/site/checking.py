"""Checks of the built site: every link leads somewhere, and no page asks another machine for anything."""

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src"}
_RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}


class Page(HTMLParser):
    """The anchors of an HTML page, what it links to, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and _RELATIONS & set(values.get("rel", "").split()):
            self.loaded.append(values.get("href", ""))
        if tag in _LOADED and values.get(_LOADED[tag]):
            self.loaded.append(values[_LOADED[tag]])


def faults(folder: Path) -> list[str]:
    """What is wrong with the links of a built site, a line for each: empty if nothing is.

    Args:
        folder: with the site; the page for addresses that do not exist is left out, as its links are for a server.
    """
    folder = folder.resolve()
    page = cache(lambda file: Page(file.read_text()))
    found = []
    for file in sorted(folder.rglob("*.html")):
        if file.name == "404.html":
            continue
        name = file.relative_to(folder)
        remote = [target for target in page(file).loaded if urlsplit(target).netloc]
        found += [f"{name} loads {target} from another machine" for target in remote]
        for target in page(file).links + page(file).loaded:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not there.is_file() or not there.is_relative_to(folder):
                found.append(f"{name} links to {target}: there is no such file")
            elif there.suffix == ".html" and unquote(parts.fragment) not in page(there).anchors:
                found.append(f"{name} links to {target}: there is no such anchor")
    return found
