"""The commands of README and documentation are real."""

import re
import shlex
from pathlib import Path

import pytest
from support.configs import compose_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ROOT / "docs" / "extending.md"  # whose commands are of what it adds: tests/test_extending.py
COMMON = [page for page in PAGES if page != OWN]
BLOCKS = [block for page in COMMON for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)]
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if line and not line.startswith("#")]


def test_there_are_commands():
    assert {"make train", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "python -m dcdit." in line])
def test_hydra_commands_compose(line):
    words = shlex.split(line)
    module = words[words.index("-m") + 1]
    overrides = [word for word in words[words.index(module) + 1 :] if "=" in word]
    # a sweep's list of choices: its first one
    overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", word) if "-m" in words[3:] else word for word in overrides]
    assert compose_config(*overrides, name=module.removeprefix("dcdit.")) is not None


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), target
