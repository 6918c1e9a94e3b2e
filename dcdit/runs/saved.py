"""The configuration that a run keeps in its directory, read for ``resume=``. The file may be another person's."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from dcdit.checks import conform, shown, visible
from dcdit.errors import UserError
from dcdit.runtime.files import open_regular
from dcdit.runtime.limits import BudgetError, check_budget
from dcdit.settings.help import group_names
from dcdit.settings.plugins import config_folders

CONFIG_NAME = "config.yaml"
_LARGEST = 1 << 18
"""Bytes of the file: those of dcdit have some thousand."""

_NEVER_SAVED = ("hydra", "defaults", "cluster", "plugins")
"""Sections that dcdit does not write into the file, and that name code to run."""

_WRITTEN = frozenset({"dirpath", "folder", "save_dir", "cache", "default_root_dir"})
"""Keys of folders that training writes to, by their last part."""


def values_to_resume(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The values that take the place of ``configs/train.yaml`` and its groups; None without ``resume=``.

    The folder of the run is the one that is named, wherever it was when it was trained.

    Args:
        arguments: words of a command line.

    Raises:
        UserError: if there is no such run, its file cannot be trusted, or other words contradict ``resume=``.
    """
    words = [word for word in arguments if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    named = [word for word in words if word.lstrip("+").startswith("resume=")]
    if not named:
        return None
    overrides = OverridesParser.create().parse_overrides(words)
    if {"-m", "--multirun"} & set(arguments) or any(override.is_sweep_override() for override in overrides):
        raise UserError(f"{visible(named[0])} goes on with one run: leave -m out, and give each key one value")
    run = next(override.value() for override in overrides if override.key_or_group == "resume")
    if run is None:
        return None
    name = f"resume={run}"
    given = {override.key_or_group for override in overrides}
    for key in sorted(given & group_names() - {"cluster"}):
        raise UserError(
            f"{key}=...: {visible(name)} goes on with the run's own configuration, of which single keys may be changed,"
            f" such as trainer.max_steps=2000 ({key}.<key>=...; logger.csv=null leaves a section out)"
        )
    for key in sorted(given & {"run_dir", "run_name"}):
        raise UserError(f"{key}=...: {visible(name)} says which run goes on, leave {key} out")
    path = Path(str(run), CONFIG_NAME)
    values = _read(path, name)
    _check(values, given, path)
    return {**_with_references(values), "run_dir": str(run), "ckpt_path": "last", "resume": str(run)}


def _read(path: Path, name: str) -> dict[str, Any]:
    """The content of the file; UserError if it is none that dcdit wrote."""
    if not path.is_file():
        raise UserError(
            f"{visible(name)}: there is no {path}; name the directory of a run, or start one with experiment=..."
        )
    try:
        with open_regular(path, _LARGEST) as file:
            values = yaml.load(file.read().decode(), _Loader)  # noqa: S506 - a subclass of the safe loader
        check_budget(values)
        values = conform(CONFIG_NAME, values, dict[str, Any])
        for key in ("run_dir", "run_name"):
            values[key] = conform(key, values.get(key), str)
    except (yaml.YAMLError, BudgetError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is corrupt ({visible(reason[:200])}): restore it, or give the command that started the run, with"
            " ckpt_path=last"
        ) from error
    return values


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Plain values, without references to other parts of the file, which could make it grow without bound."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def _check(values: Mapping[str, Any], given: set[str], path: Path) -> None:
    """Raise :class:`UserError` if the file would run code, or write to a place, that the user has not named.

    Args:
        given: keys on the command line: what they say is the user's.
    """

    def refuse(key: str, value: object, reason: str) -> None:
        if key not in given:
            raise UserError(
                f"{path}: {visible(key)}={shown(value)} {reason}. If that is meant, write this key behind resume=... as"
                " well"
            )

    for key in _NEVER_SAVED:
        if key in values:
            raise UserError(f"{path}: dcdit writes no section {key} there: remove it, and name what it sets yourself")
    inside = str(values["run_dir"])
    for key, value in _walk(values):
        last = key.rpartition(".")[2]
        if not isinstance(value, str | int | float | Mapping | list | None):
            raise UserError(f"{path}: {visible(key)}={shown(value)} is no value of a configuration")
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{path}: {visible(key)}={shown(value)}: dcdit writes values there, no references")
        if last in _WRITTEN and isinstance(value, str) and value != inside and not _is_below(value, inside):
            refuse(key, value, "is a folder outside of the run, which training would write to")
        if key == "data.allow_pipe" and value:
            refuse(key, value, "lets data.directory run a shell command")
        if isinstance(value, Mapping) and "_target_" in value:
            _check_target(key, value, refuse)


def _check_target(key: str, section: Mapping[str, Any], refuse: Any) -> None:
    """Refuse a class that is none of dcdit's own configurations, and arguments of a library's that they do not have."""
    target = section["_target_"]
    known = _own_targets(*config_folders()).get(str(target))
    if known is None:
        refuse(f"{key}._target_", target, "names code to run that no configuration of dcdit names")
        return
    if not str(target).startswith("dcdit."):  # dcdit's constructors know their arguments, a logger's takes any
        for argument, value in section.items():
            if argument not in known:
                refuse(f"{key}.{argument}", value, "is no key of dcdit's configuration of it")
            elif argument == "name" and not target.endswith("WandbLogger") and Path(str(value)).name != value:
                refuse(f"{key}.name", value, "is a folder outside of the run")


@cache
def _own_targets(*folders: Path) -> Mapping[str, frozenset[str]]:
    """The classes that the configuration files of dcdit and of plug-ins name, with the keys that they give them."""
    files = [
        path
        for group in ("callbacks", "logger", "features")
        for folder in folders
        for path in Path(folder, group).glob("*.yaml")
    ]
    sections = [value for path in files for _, value in _walk({"file": yaml.safe_load(path.read_text())})]
    named = [section for section in sections if isinstance(section, Mapping) and "_target_" in section]
    return {section["_target_"]: frozenset(section) for section in named if section["_target_"] != "???"}


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested mappings and lists, and the mappings themselves, by their keys."""
    if path:
        yield path, value
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _walk(child, f"{path}.{key}" if path else str(key))


def _is_below(path: object, folder: str) -> bool:
    """Whether a text of the file is a path below ``folder``."""
    return isinstance(path, str) and path.startswith(f"{folder}/") and ".." not in Path(path).parts


def _with_references(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, in which folders follow those that the user names now: of the run, of the data below them."""
    run_dir, data = values["run_dir"], values.get("data")
    directory = data.get("directory") if isinstance(data, Mapping) else None

    def referring(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: referring(child, f"{key}.{name}") for name, child in value.items()}
        if isinstance(value, list):
            return [referring(child, key) for child in value]
        if not isinstance(value, str):
            return value
        if _is_below(value, run_dir) or (value == run_dir and key.rpartition(".")[2] in _WRITTEN):
            return "${run_dir}" + value.removeprefix(run_dir)
        if key.startswith(".callbacks.") and directory and _is_below(value, str(directory)):
            return "${data.directory}" + value.removeprefix(str(directory))
        return "${run_id}" if key.startswith(".logger.") and value == values.get("run_id") else value

    return {key: referring(value, f".{key}") for key, value in values.items()}
