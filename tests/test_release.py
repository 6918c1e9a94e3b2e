"""What a release states, and what it is built of."""

import sys
from pathlib import Path

import pytest

import dcdit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from check_release import fault_of, section, version

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_the_version_has_one_place():
    assert version() == dcdit.__version__
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "Dockerfile"):
        lines = (ROOT / name).read_text().splitlines()
        assert [line for line in lines if line.startswith("version") and dcdit.__version__ in line] == [], name


def test_the_changelog_has_what_comes_next():
    assert section(CHANGELOG, "Unreleased") or section(CHANGELOG, dcdit.__version__)


@pytest.mark.parametrize(
    ("tag", "changelog", "fault"),
    [
        ("v1.2.0", "## 1.2.0, 2027-01-01\n\n- new\n\n## 1.1.0\n\n- old\n", None),
        ("v1.2.0", "## 1.2.0\n\n- new\n", None),
        ("v1.3.0", "## 1.3.0\n\n- new\n", "the tag v1.3.0 is not v1.2.0"),
        ("1.2.0", "## 1.2.0\n\n- new\n", "the tag 1.2.0 is not v1.2.0"),
        ("v1.2.0", "## Unreleased\n\n- new\n", "no section"),
        ("v1.2.0", "## 1.2.0\n\n## 1.1.0\n\n- old\n", "no section"),
        ("v1.2.0", "## 1.2.01\n\n- other\n", "no section"),
    ],
)
def test_what_keeps_a_tag_from_being_a_release(tag, changelog, fault):
    found = fault_of(tag, "1.2.0", changelog)
    assert (found is None) if fault is None else (fault in str(found))
