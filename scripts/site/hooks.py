"""What MkDocs calls: pages that are made, links that hold on the site, and the checks of what was built."""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from checking import faults
from links import ROOT, TOP, place_of, rewritten, source_pages, targets, without_code
from mkdocs.structure.files import File, Files
from notebook_pages import notebook_files
from reference import MODULES, file_of, pages

log = logging.getLogger("mkdocs.hooks.dcdit")

_paths: dict[str, str] = {}
"""Files of the repository that pages show, by the places of the pages."""

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?(.*?)</code>")
_SHOWN_AS_TEXT = re.compile(
    r"\n *(\n {1,3}\S.*)"  # after an empty line, indented by less than 4
    r"|^( {1,3}(?:[-*]|\d+\.) .*)"  # a list in a list, indented by less than 4
    r"|^(?![-*] |\d+\. |[ #|])\S.*\n((?:[-*] |\d+\. |\|).*)",  # a list or table below a line of text
    flags=re.MULTILINE,
)
"""What GitHub takes for a part of a list, or for a list or table, and MkDocs for text."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file in ``docs/`` holds."""
    made: dict[str, str | bytes] = dict(pages())
    _paths.clear()
    _paths.update({place: path for path, place in TOP.items()})
    _paths.update({file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()})
    made |= {place: (ROOT / path).read_text() for path, place in TOP.items()}
    linked = [target for path in _paths.values() for target in targets((ROOT / path).read_text(), path)]
    linked += map(file_of, MODULES)
    for path, text in source_pages(linked).items():
        place = place_of(path)
        _paths[place] = path
        made[place] = f"---\nsearch:\n  exclude: true\n---\n{text}"
    for place, content in (made | notebook_files()).items():
        files.append(File.generated(config, place, content=content))
    config.nav = _expanded(config.nav, list(made))
    return files


def _expanded(nav: Any, places: list[str]) -> Any:
    """A navigation in which ``folder/*`` stands for the pages that were made in a folder."""
    if isinstance(nav, dict):
        return {title: _expanded(entry, places) for title, entry in nav.items()}
    if isinstance(nav, str) and nav.endswith("/*"):
        return [place for place in places if posixpath.dirname(place) == nav[:-2]]
    return [_expanded(entry, places) for entry in nav] if isinstance(nav, list) else nav


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Have the links of a page lead to pages of the site; report what would be shown as bare text."""
    place = page.file.src_uri
    if place not in _paths:
        return markdown
    for fault in _SHOWN_AS_TEXT.finditer(without_code(markdown)):
        line = next(filter(None, fault.groups())).strip()
        log.warning("%s: indent it by 4, or put an empty line before the list or table: %s", place, line)
    return rewritten(markdown, _paths[place], place)


def on_page_content(html: str, **others: Any) -> str:
    """Show the names in docstrings, which :class:`these` marks are around, as code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def on_post_build(config: Any, **others: Any) -> None:
    """Check the built site; with ``--strict`` a fault fails the build."""
    for fault in faults(Path(config.site_dir)):
        log.warning(fault)
