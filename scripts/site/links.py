"""Where the links of a page lead on the site.

The pages in ``docs/`` and the README link one another, and files of the code, by paths of the repository, so that they
work where the repository is shown. On the site a link to another page leads to that page; a link to any other file or
folder leads to a page that shows it.
"""

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "SUPPORT.md": "support.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
}
"""Pages of the repository's top folder, and their places on the site."""

_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".json": "json", ".html": "html"}
_SHOWN = {*_LANGUAGES, ".md", ".cff", ".jinja", ""}
"""Endings of the files that the page of a folder lists."""

_LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(#[^()\s]*)?(?=\))")
_NAMED = re.compile(r"\[(?:docs/)?\w+\.md(?=\]\(([^()\s#:]+)(?:#[^()\s]*)?\))")
"""The beginning of a link that is called like its file."""

_FENCE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2 *$)", flags=re.DOTALL | re.MULTILINE)
"""Blocks of code, where nothing is a link."""

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", flags=re.DOTALL)


def place_of(path: str) -> str:
    """The place on the site of a file or folder of the repository, ``path`` from the top with ``/``."""
    if path in TOP:
        return TOP[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/"):
        return path.replace(".ipynb", ".md")
    return f"source/{path}.md"


def without_code(text: str) -> str:
    """Markdown without its blocks of code."""
    return "".join(_FENCE.split(text)[::3])


def targets(text: str, path: str) -> list[str]:
    """The paths, from the top of the repository, that a page at ``path`` links to."""
    found = [link[1] for link in _LINK.finditer(without_code(text))]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for target in found]


def rewritten(text: str, path: str, place: str) -> str:
    """A page's Markdown with links that hold on the site, and are called like the pages that they lead to.

    Args:
        text: of the page.
        path: of its file, from the top of the repository.
        place: of the page on the site.
    """
    parts = _FENCE.split(text)

    def to_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if not (ROOT / target).exists():
            return link[0]  # which MkDocs reports
        return posixpath.relpath(place_of(target), posixpath.dirname(place)) + (link[2] or "")

    def titled(link: re.Match[str]) -> str:
        target = ROOT / posixpath.dirname(path) / link[1]
        title = re.search(r"^# (.+)$", target.read_text(), flags=re.MULTILINE) if target.is_file() else None
        return f"[{title[1]}" if title else link[0]

    parts[::3] = [_LINK.sub(to_site, _NAMED.sub(titled, part)) for part in parts[::3]]
    return "".join(part for number, part in enumerate(parts) if number % 3 != 2)


def source_pages(paths: Iterable[str]) -> dict[str, str]:
    """Pages that show the files and folders that are linked and are no pages themselves, by their paths.

    The files of a folder that is linked have pages too.
    """
    pages: dict[str, str] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        file = ROOT / path
        if path in pages or not place_of(path).startswith("source/") or not file.exists() or path.startswith(".."):
            continue
        if file.is_dir():
            inside = [f"{path}/{entry.name}" for entry in sorted(file.iterdir()) if _is_listed(entry)]
            waiting += inside
            rows = "".join(f"- [`{posixpath.basename(path)}`]({posixpath.basename(path)})\n" for path in inside)
            pages[path] = f"# {path}/\n\n{rows.replace('](', f']({posixpath.basename(path)}/')}"
        elif file.suffix == ".md":
            pages[path] = _FRONT_MATTER.sub("", file.read_text())
            waiting += targets(pages[path], path)
        else:
            language = _LANGUAGES.get(file.suffix, "text")
            pages[path] = f"# {path}\n\n~~~~~~~~ {language}\n{file.read_text().rstrip()}\n~~~~~~~~\n"
    return pages


def _is_listed(file: Path) -> bool:
    return not file.name.startswith((".", "__pycache__")) and file.is_file() and file.suffix in _SHOWN
