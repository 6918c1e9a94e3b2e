"""``--help`` of a command: what it does, the choices of its groups, and its keys with their descriptions.

The configuration files are the one place that describes each key, in a comment behind its value.
"""

import textwrap
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dcdit.settings.plugins import config_folders
from dcdit.settings.published import CONFIG_DIR

_BASES = {"data": ("default",), "trainer": ("default",)}
"""Files of a group that its choices share; they are no choices themselves."""

_INCLUDED = ("sampling", "assume")
"""Groups whose one file is part of a command's keys, not a choice."""

_COMMON = "common"
"""The file of the keys that nearly all commands have."""

_HIDDEN = ("hydra", "paths", "local", *_INCLUDED)

_LISTED = ("sampler", "model", "diffusion", "multi_budget", "optimizer", "init", "alignment", "reader")
"""Groups whose keys the help names, because users look for them; a comment in their files describes each."""

_WIDTH = 120
"""Columns of the help's lists of keys."""


class Key(NamedTuple):
    """A key of a configuration file.

    Attributes:
        line: the line of the file that sets it, without indentation.
        children: the lines of the keys below it, by name.
    """

    line: str
    children: dict[str, str]


def show_help(name: str, documentation: str) -> None:
    """Print the help of a command.

    Args:
        name: of the command, and of its file in ``configs``.
        documentation: what the command does.
    """
    file = Path(CONFIG_DIR, f"{name}.yaml")
    lines = [documentation.strip(), "", "Groups (choose with group=choice):"]
    for group, choice in groups_of(file).items():
        lines.append(f"  {group:14} {' '.join(choices(group))}" + (f"   (now: {choice})" if choice else ""))
        if group in _LISTED:
            keys = ", ".join(f"{group}.{key}" for key in keys_of_choices(group))
            lines += textwrap.wrap(keys, _WIDTH, initial_indent=" " * 20, subsequent_indent=" " * 20)
    lines += ["", "Keys (set with key=value; below a group, with group.key=value):", ""]
    after_section = False
    for key in keys_of(file).values():
        lines += [""] * (after_section or bool(key.children))
        lines += [f"  {key.line}", *(f"    {line}" for line in key.children.values())]
        after_section = bool(key.children)
    lines += [
        "",
        "The files in configs/<group> describe the keys of a group.",
        f"All keys, with values: python -m dcdit.{name} --cfg job --resolve. Hydra's options: --hydra-help",
    ]
    print("\n".join(lines))


def groups_of(file: Path) -> dict[str, str | None]:
    """The groups of a command's file, and what it chooses of each."""
    groups: dict[str, str | None] = {}
    for group, choice in _defaults(file):
        if group == "sampling":
            groups |= groups_of(Path(CONFIG_DIR, group, f"{choice}.yaml"))
        elif group.partition("/")[0] not in _HIDDEN:
            groups[group] = choice
    return groups


def group_names() -> frozenset[str]:
    """The names of the groups of all commands."""
    return frozenset[str]().union(*map(_groups_in, config_folders()))


@cache
def _groups_in(folder: Path) -> frozenset[str]:
    groups = {path.parent.relative_to(folder) for path in folder.rglob("*.yaml")}
    return frozenset(group.as_posix() for group in groups - {Path()})


def choices(group: str) -> dict[str, Path]:
    """The names that a user may choose in a group, sorted, and their files."""
    files = {path.stem: path for folder in config_folders() for path in Path(folder, group).glob("*.yaml")}
    return {name: files[name] for name in sorted(files.keys() - set(_BASES.get(group, ())))}


def keys_of_choices(group: str) -> list[str]:
    """The keys that the choices of a group have, without its name, in the order of their files."""
    return list(dict.fromkeys(key for file in choices(group).values() for key in keys_in(file) if key != "name"))


def keys_in(file: Path) -> list[str]:
    """The keys that a choice of a group gives it, after those of the files that it builds on."""
    values = yaml.safe_load(file.read_text()) or {}
    bases = [entry.split("@")[0] for entry in values.pop("defaults", []) if isinstance(entry, str)]
    own = [file.parent / f"{base}.yaml" for base in bases if not base.startswith(("_self_", "/"))]
    inherited = [key for base in own for key in keys_in(base)]
    return list(dict.fromkeys([*inherited, *values.get(file.parent.name, values)]))


def keys_of(file: Path) -> dict[str, Key]:
    """The keys of a configuration file and of those that it includes, without what is Hydra's."""
    lines = file.read_text().splitlines()
    root = yaml.compose("\n".join(lines))
    assert isinstance(root, yaml.MappingNode)
    keys: dict[str, Key] = {}
    for name, node in root.value:
        if name.value not in ("defaults", "hydra"):
            block = node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []
            children = {child.value: lines[child.start_mark.line].strip() for child, _ in block}
            keys[name.value] = Key(lines[name.start_mark.line], children)
    for group, choice in _defaults(file):
        if group in _INCLUDED:
            included = Path(CONFIG_DIR, group, f"{choice}.yaml")
            keys = _merged(keys, keys_of(included)) if group == "sampling" else {**keys, group: _section(included)}
    if _COMMON in (yaml.safe_load(file.read_text()).get("defaults") or ()):
        keys |= keys_of(Path(CONFIG_DIR, f"{_COMMON}.yaml"))
    return keys


def _section(file: Path) -> Key:
    """A file whose keys stand in a section of its group's name, and whose first line describes them."""
    children = {name: key.line for name, key in keys_of(file).items()}
    return Key(f"{file.parent.name}:  {file.read_text().splitlines()[0]}", children)


def _merged(own: dict[str, Key], included: dict[str, Key]) -> dict[str, Key]:
    """The keys of a file and of one that it includes: the file's own values, and the included one's descriptions."""
    merged = {name: key for name, key in own.items() if name not in included}
    for name, key in included.items():
        mine = own.get(name, key)
        children = {child: _described(line, key.children.get(child, "")) for child, line in mine.children.items()}
        merged[name] = Key(_described(mine.line, key.line), key.children | children)
    return merged


def _described(line: str, other: str) -> str:
    """A line that sets a key, with the comment of another line that sets it if it has none itself."""
    column = other.find("#")
    return line if "#" in line or column < 0 else f"{line:{column - 1}} {other[column:]}"


def _defaults(file: Path) -> list[tuple[str, Any]]:
    """The groups in a file's list of defaults with their choices; one that overrides another choice comes after it."""
    content = yaml.safe_load(file.read_text())
    entries = [item for entry in content.get("defaults", []) if isinstance(entry, dict) for item in entry.items()]
    return [(key.split()[-1].partition("@")[0].lstrip("/"), choice) for key, choice in entries]
