"""The site: what is made for it says what the code says, and its links lead somewhere."""

import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from support.configs import compose_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "site"))

from checking import faults
from hooks import _SHOWN_AS_TEXT
from keys import allowed_values, heading_of, keys_of
from kinds import allowed
from links import TOP, place_of, rewritten, source_pages, targets
from notebook_pages import notebook_files
from reference import MODULES, config_of, file_of, pages

from dcdit.__main__ import COMMANDS
from dcdit.checks import Bounds, conform
from dcdit.errors import UserError
from dcdit.settings.help import choices, groups_of
from dcdit.settings.published import CONFIG_DIR

PAGES = [*TOP, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
made_pages = cache(pages)
NAME = re.compile(r'<code id="([^"]+)">')


def leaves(node, path=""):
    """Keys and values as files have them, references unresolved."""
    for key in node:
        name = f"{path}{key}"
        value = OmegaConf.to_container(node, resolve=False)[key]
        if isinstance(node, DictConfig) and OmegaConf.is_dict(node._get_node(key)) and value:
            yield from leaves(node._get_node(key), f"{name}.")
        else:
            yield name, value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_command_is_on_its_page_or_on_those_of_its_groups(command):
    file = Path(CONFIG_DIR, f"{command}.yaml")
    made = made_pages()
    shown = set(NAME.findall(made[f"commands/{command}.md"]))
    for group in groups_of(file):
        shown |= set(NAME.findall(made[f"configuration/{group}.md"]))
    composed = {name for name, _ in leaves(compose_config(name=command))}
    chosen = {name for name in composed if name.endswith((".name", "._target_"))}  # by the choice of a group
    assert composed - chosen - shown == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults_on_a_page_are_those_that_hydra_composes(command):
    composed = dict(leaves(compose_config(name=command)))
    keys = keys_of(Path(CONFIG_DIR, f"{command}.yaml"))
    values = {name: yaml.safe_load(key.value) for name, key in keys.items() if key.value is not None}
    assert len(values) > 1
    assert {name: composed.get(name, "no such key") for name in values} == values


def test_choices_have_the_values_that_hydra_composes():
    for group in ("model", "sampler", "multi_budget", "data", "init"):
        command = "sample" if group == "sampler" else "train"
        for name, file in list(choices(group).items())[:6]:
            composed = dict(leaves(compose_config(f"{group}={name}", name=command)))
            for key, found in keys_of(file, f"{group}.").items():
                if found.value is not None and key.startswith(f"{group}."):
                    assert yaml.safe_load(found.value) == composed[key], (group, name, key)


def test_every_choice_says_what_it_is():
    for command in COMMANDS:
        for group in groups_of(Path(CONFIG_DIR, f"{command}.yaml")):
            for name, file in choices(group).items():
                assert heading_of(file), f"{group}/{name}.yaml has no comment in its first line"
                assert "python -m" not in heading_of(file)


def test_most_keys_say_what_they_may_be():
    for command in ("train", "sample", "extract"):
        keys = keys_of(Path(CONFIG_DIR, f"{command}.yaml"))
        kinds = allowed_values(config_of(command), keys)
        silent = [name for name, key in keys.items() if key.value is not None and not kinds[name]]
        assert set(silent) <= {"plugins", "paths.data", "paths.runs"}


bounds = st.builds(
    lambda low, high, open_low, open_high: Bounds(min(low, high), max(low, high) + 1, open_low, open_high),
    *(st.integers(-50, 50),) * 2,
    *(st.booleans(),) * 2,
)


@given(bounds, st.integers(-60, 60))
def test_a_range_in_words_is_the_range_that_is_checked(limits, value):
    text = allowed(Annotated[int, limits])
    opening, low, high, closing = re.fullmatch(r"a whole number in ([\[(])(-?\d+), (-?\d+)([\])])", text).groups()
    inside = (value > int(low) or (value == int(low) and opening == "[")) and (
        value < int(high) or (value == int(high) and closing == "]")
    )
    try:
        conform("x", value, Annotated[int, limits])
        accepted = True
    except UserError:
        accepted = False
    assert accepted == inside


@pytest.mark.parametrize("path", PAGES)
def test_links_of_a_page_lead_to_pages_of_the_site(path):
    text, place = (ROOT / path).read_text(), place_of(path)
    assert place == (TOP[path] if path in TOP else Path(path).name)  # as the navigation has it
    wanted = targets(text, path)
    shown = {place_of(each) for each in source_pages(wanted)} | {place_of(page) for page in PAGES} | {*notebook_files()}
    for target in wanted:
        assert (ROOT / target).exists(), target
        assert place_of(target) in shown or target.startswith("docs/images/"), target
    assert targets(rewritten(text, path, place), place) == list(map(place_of, wanted))


def test_the_page_of_a_notebook_has_its_pictures():
    files = notebook_files()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = files[f"notebooks/{notebook.stem}.md"]
        pictures = re.findall(r"!\[png\]\((.+?)\)", page)
        assert len(pictures) >= 3
        assert {f"notebooks/{name}" for name in pictures} <= files.keys()
        assert files[f"notebooks/{notebook.name}"] == notebook.read_bytes()


def test_links_in_code_stay_as_they_are():
    text = "[a](README.md)\n\n```python\ncall[a](README.md)\n```\n\n[b](README.md#more)\n"
    made = rewritten(text, "x.md", "deep/x.md")
    assert made == text.replace("[a](README.md)\n\n", "[a](../index.md)\n\n").replace("README.md#", "../index.md#")


def test_what_mkdocs_would_show_as_text_is_found():
    for fault in ("- one\n\n  more\n", "1. one\n\n   | a |\n", "- one\n  - two\n", "text\n- one\n", "text\n| a |\n"):
        assert _SHOWN_AS_TEXT.search(f"\n{fault}"), fault
    for fine in ("- one\n  more\n- two\n", "- one\n\n    more\n", "text\n\n- one\n", "text\n\n| a |\n|---|\n| b |\n"):
        assert not _SHOWN_AS_TEXT.search(f"\n{fine}"), fine


def test_modules_that_the_pages_import_are_in_the_reference():
    text = "".join((ROOT / "docs" / name).read_text() for name in ("python.md", "extending.md"))
    imported = set(re.findall(r"^(?:from|import) (dcdit[\w.]*)", text, flags=re.MULTILINE))
    assert len(imported) > 10
    assert imported - {f"dcdit.{command}" for command in COMMANDS} <= set(MODULES)
    for name in MODULES:
        assert import_module(name).__file__ == str(ROOT / file_of(name))


def test_faults_of_a_built_site_are_found(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="there">x</h1>')
    fine = '<a href="other.html#there">x</a><a href="https://example.org">x</a><img src="data:image/png;base64,AA">'
    (tmp_path / "index.html").write_text(fine)
    assert faults(tmp_path) == []
    for wrong in (
        '<a href="gone.html">x</a>',
        '<a href="other.html#gone">x</a>',
        '<a href="#gone">x</a>',
        '<a href="../outside.html">x</a>',
        '<a href=".">x</a>',
        '<img src="gone.png">',
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="//example.org/x.css">',
    ):
        (tmp_path / "index.html").write_text(fine + wrong)
        assert len(faults(tmp_path)) == 1, wrong
