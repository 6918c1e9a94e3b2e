"""The keys that a configuration file sets, with the comment of each, and what the key may be."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import yaml
from kinds import allowed

from dcdit.checks import annotations
from dcdit.cluster.settings import ClusterSettings
from dcdit.data.builtin import SOURCES
from dcdit.data.datamodule import LatentDataModule
from dcdit.diffusion.settings import SAMPLERS, GuidanceSettings
from dcdit.errors import UserError
from dcdit.network import NETWORKS
from dcdit.settings.overrides import classes_of
from dcdit.settings.published import CONFIG_DIR
from dcdit.training.settings import LOGGER_KEYS

_INCLUDED = ("assume", "paths", "sampling")
"""Groups of one file, whose keys are keys of the command."""

_SECTIONS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "model": tuple(NETWORKS.values()),
    "data": (LatentDataModule,),
    "data.source": tuple(SOURCES.values()),
    "cluster": (ClusterSettings,),
    "sampler": tuple(SAMPLERS.values()),
    "guidance": (GuidanceSettings,),
    "callbacks.fid.sampler": tuple(SAMPLERS.values()),
    "callbacks.fid.guidance": (GuidanceSettings,),
}
"""What checks the keys of sections that the class of a configuration leaves open."""


class Key(NamedTuple):
    """A key.

    Attributes:
        name: with dots.
        value: as it stands in the file; None of a section.
        comment: behind it in the file, which describes it.
    """

    name: str
    value: str | None
    comment: str


def keys_of(file: Path, prefix: str = "") -> dict[str, Key]:
    """The keys that a file sets and those of the files that it builds on, by name; later files win.

    A key without a comment has that of the same key in a file below.

    Args:
        file: of the folder of configurations.
        prefix: of names, with its dot, unless the file says that its keys belong to the top.
    """
    if file.read_text().startswith("# @package _global_"):
        prefix = ""
    keys: dict[str, Key] = {}
    for below, package in _built_on(file):
        if package:
            keys[package] = Key(package, None, heading_of(below))
        keys |= keys_of(below, prefix if package is None else f"{package}.")
    for key in _own(file, prefix):
        comment = key.comment or (keys[key.name].comment if key.name in keys else "")
        keys[key.name] = key._replace(comment=comment)
    return keys


def heading_of(file: Path) -> str:
    """The comment at the top of a file, up to its first command: what the file is."""
    found = []
    for line in file.read_text().splitlines():
        words, *command = re.split(r" {3,}", line.removeprefix("#"))
        if not line.startswith("#") or not words:
            break
        if "@package" not in words:
            found.append(words.strip())
        if command:
            break
    return " ".join(found).rstrip(":")


def allowed_values(config: Callable[..., Any], keys: Mapping[str, Key]) -> dict[str, str]:
    """What each key may be, by its name, from the annotations that the command checks it with.

    Args:
        config: class of the command's configuration.
        keys: of a command, or of a choice of a group; what ``_target_`` names has the annotations of its section.
    """
    sections = dict(_SECTIONS)
    for name, key in keys.items():
        section, _, last = name.rpartition(".")
        if last == "_target_" and key.value and key.value.startswith("dcdit."):
            sections[section] = (resolve_name(key.value),)
    return {name: _allowed(config, name, sections) for name in keys}


def _allowed(config: Callable[..., Any], name: str, sections: Mapping[str, tuple[Callable[..., Any], ...]]) -> str:
    hints, path, kinds = [], "", [config]
    for part in name.split("."):
        hints = [annotations(kind)[part] for kind in kinds if part in annotations(kind)]
        path = f"{path}.{part}".lstrip(".")
        kinds = [kind for hint in hints for kind in classes_of(hint)] or list(sections.get(path, ()))
    if not hints and name.startswith("logger."):
        hints = [LOGGER_KEYS[part]] if part in LOGGER_KEYS else []
    texts = dict.fromkeys(filter(None, map(allowed, hints)))
    return "; or ".join(texts)


def _built_on(file: Path) -> Iterator[tuple[Path, str | None]]:
    """The files in a file's list of defaults whose keys are described with its own, each with its package or None."""
    content = yaml.safe_load(file.read_text()) or {}
    for entry in content.get("defaults", []):
        for name, choice in entry.items() if isinstance(entry, dict) else [(entry, None)]:
            path, _, package = name.partition("@")
            group = path.lstrip("/")
            if choice is not None and group in _INCLUDED:
                own = None if group == "sampling" else package or group
                yield Path(CONFIG_DIR, group, f"{choice}.yaml"), own
            elif choice is None and name != "_self_" and isinstance(entry, str):
                yield file.parent / f"{path}.yaml", None


def _own(file: Path, prefix: str) -> Iterator[Key]:
    text = file.read_text()
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file} has no keys")
    hidden = {"defaults"} if prefix else {"defaults", "hydra"}
    yield from _walk([(key, node) for key, node in root.value if key.value not in hidden], prefix, text.splitlines())


def _walk(pairs: Any, prefix: str, lines: list[str]) -> Iterator[Key]:
    for key, node in pairs:
        name = f"{prefix}{key.value}"
        if isinstance(node, yaml.MappingNode) and not node.flow_style:
            comment = lines[key.end_mark.line][key.end_mark.column :]
            yield Key(name, None, comment.partition("#")[2].strip())
            yield from _walk(node.value, f"{name}.", lines)
        else:
            start, end = node.start_mark, node.end_mark
            line = lines[end.line] if end.line < len(lines) else ""
            same = start.line == end.line
            value = line[start.column : end.column] if same else str(node.value)
            yield Key(name, value.strip() or "null", line[end.column :].partition("#")[2].strip() if same else "")
