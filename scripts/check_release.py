"""Check that a tag may become a release: ``python scripts/check_release.py v0.1.0``.

The tag is the version of :mod:`dcdit` with a ``v`` before it, and the changelog has a section of that version with
something in it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version() -> str:
    """The version that the package states, read without importing it."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "dcdit" / "__init__.py").read_text(), flags=re.MULTILINE)
    assert found
    return found[1]


def section(changelog: str, version: str) -> str:
    """What the changelog says of a version; empty if it has no section of it."""
    found = re.search(rf"^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)", changelog, flags=re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def fault_of(tag: str, version: str, changelog: str) -> str | None:
    """What keeps a tag from being a release; None if nothing does."""
    if tag != f"v{version}":
        return f"the tag {tag} is not v{version}, the version in dcdit/__init__.py"
    if not section(changelog, version):
        return f'CHANGELOG.md has no section "## {version}": rename "Unreleased" to it'
    return None


if __name__ == "__main__":
    fault = fault_of(sys.argv[1], version(), (ROOT / "CHANGELOG.md").read_text())
    if fault:
        sys.exit(fault)
    print(f"{sys.argv[1]} is version {version()}, and the changelog has it")
