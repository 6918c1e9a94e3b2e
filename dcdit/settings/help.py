"""``--help`` of a command: what it does, what can be chosen in its groups, and what can be set."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dcdit.settings.published import CONFIG_DIR

_BASES = {"data": ("default",), "trainer": ("default",)}
"""What the choices of a group share, and is none itself."""


def show_help(name: str, documentation: str) -> None:
    """Print the help of a command: its documentation, its groups, and its own file of keys."""
    file = Path(CONFIG_DIR, f"{name}.yaml")
    lines = [documentation.strip(), "", "Groups (choose with group=choice):"]
    for group, choice in groups_of(file).items():
        lines.append(f"  {group:14} {' '.join(choices(group))}" + (f"   (now: {choice})" if choice else ""))
        if group == "sampler":  # few keys, and what one looks for
            keys = list(OmegaConf.load(Path(CONFIG_DIR, group, "auto.yaml")))
            lines.append(f"  {'':17} {', '.join(f'{group}.{key}' for key in keys if key != 'name')}")
    lines += ["", "Keys (set with key=value; below a group, with group.key=value):", ""]
    lines += [f"  {line}" for line in _keys(file)]
    lines += ["", f"All keys with their values: python -m dcdit.{name} --cfg job. Hydra's own options: --hydra-help"]
    print("\n".join(lines))


def groups_of(file: Path) -> dict[str, Any]:
    """The groups that a command's file names in its defaults, and those of the files it includes whole."""
    found: dict[str, Any] = {}
    for entry in OmegaConf.to_container(OmegaConf.load(file)).get("defaults", []):  # type: ignore[union-attr]
        if not isinstance(entry, dict):
            continue
        ((key, choice),) = entry.items()
        words = str(key).split()
        group = words[-1].split("@")[0].lstrip("/")
        if "override" in words or group.startswith("hydra"):
            continue
        if group == "sampling":  # part of the command rather than a choice
            found |= groups_of(Path(CONFIG_DIR, group, f"{choice}.yaml"))
        elif group not in ("paths", "local", "assume"):
            found[group] = choice
    return found


@cache
def group_names() -> frozenset[str]:
    """The names of all groups, of whichever command."""
    folders = {path.parent.relative_to(CONFIG_DIR) for path in Path(CONFIG_DIR).rglob("*.yaml")}
    return frozenset(folder.as_posix() for folder in folders - {Path()})


def choices(group: str) -> list[str]:
    """The choices of a group."""
    found = {path.stem for path in Path(CONFIG_DIR, group).glob("*.yaml")}
    return sorted(found - set(_BASES.get(group, ())))


def _keys(file: Path) -> list[str]:
    """The lines of a configuration file between its defaults and what concerns Hydra."""
    text = re.sub(r"(?m)^defaults:\n(?:[ -].*\n|#.*\n)*", "", file.read_text())
    text = re.sub(r"(?ms)^hydra:.*", "", text)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    included = re.findall(r"^ +- /?(sampling|assume)(?:@assume)?: (\w+)", file.read_text(), flags=re.M)
    for group, choice in included:
        own = Path(CONFIG_DIR, group, f"{choice}.yaml")
        if group == "assume":
            lines += ["", f"assume:  {own.read_text().splitlines()[0]}", *(f"  {line}" for line in _keys(own))]
        else:
            lines = _merged(lines, _keys(own))
    return "\n".join(lines).strip().splitlines()


def _merged(own: Sequence[str], included: Sequence[str]) -> list[str]:
    """Lines of a file and of one that it includes: what both name stands once, where that does, as the first says."""
    said = {path: line for path, line in zip(_paths(own), own, strict=True) if path and line.partition(":")[2].strip()}
    known = _paths(included)
    twice = set(said) & set(known)
    rest = [line for path, line in zip(_paths(own), own, strict=True) if path not in twice]
    # a section of which nothing is left
    rest = [line for line, after in zip(rest, [*rest[1:], ""], strict=True) if not _empty(line, after)]
    return [*rest, "", *(said[path] if path in twice else line for path, line in zip(known, included, strict=True))]


def _empty(line: str, after: str) -> bool:
    """Whether a line begins a section of which nothing follows."""
    return bool(re.fullmatch(r"\w+:\s*", line)) and not after.startswith(" ")


def _paths(lines: Sequence[str]) -> list[str]:
    """For each line the key that it sets, sections included; nothing for one that sets none."""
    found, section = [], ""
    for line in lines:
        key = re.match(r"( *)(\w+):", line)
        if key and not key[1]:
            section = key[2]
        found.append("" if not key else section if not key[1] else f"{section}.{key[2]}")
    return found
